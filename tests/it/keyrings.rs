//! Running environments use a rotated keyring.

use login_etl::keyring::Keyring;

use crate::world::{World, body, event, invoke};

const RING: &str = r#"{"active": "new", "keys": {"new": {"cipher": "aes-siv",
    "key": "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"}}}"#;

async fn masked_under_the_new_key(world: &World) -> i64 {
    world.count("user_logins where masked_ip like 'new:%' and masked_device_id like 'new:%'").await
}

#[tokio::test]
async fn a_rotated_keyring_is_used_once_the_ttl_has_passed() {
    let mut world = World::new().await;
    let patient = world.handler().await;
    world.settings.insert("SECRETS_TTL", "0".to_owned());
    let eager = world.handler().await;
    world.put_secret("masking", RING).await;
    invoke(&patient, &event(0, [body(0)])).await.unwrap();
    assert_eq!(masked_under_the_new_key(&world).await, 0);
    invoke(&eager, &event(1, [body(1)])).await.unwrap();
    assert_eq!(masked_under_the_new_key(&world).await, 1);

    // An aes-siv mask can only be recovered for its own field.
    let rows = world.rows("select masked_ip, masked_device_id from user_logins where user_id = 'user-1'").await;
    let ring = Keyring::from_json(RING).unwrap();
    assert_eq!(*ring.recover("ip", rows[0].get("masked_ip")).unwrap(), "10.0.0.1");
    assert_eq!(*ring.recover("device_id", rows[0].get("masked_device_id")).unwrap(), "device-1");
}

#[tokio::test]
async fn a_keyring_stays_in_use_if_it_cannot_be_read_again() {
    let mut world = World::new().await;
    world.settings.insert("SECRETS_TTL", "0".to_owned());
    let handler = world.handler().await;
    world.put_secret("masking", "no keyring").await;
    invoke(&handler, &event(0, [body(0)])).await.unwrap();
    assert_eq!(world.count("user_logins").await, 1);
}
