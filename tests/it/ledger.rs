//! Which ledger keys expire, and which never do.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::world::{World, bodies, body, event, failed, invoke, maintain};

const DAY: u64 = 86_400;

/// The event with all messages sent `days` ago.
fn sent_days_ago(days: u64, event: &str) -> String {
    let sent_at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap() - Duration::from_secs(days * DAY);
    let mut event: Value = serde_json::from_str(event).unwrap();
    for message in event["Records"].as_array_mut().unwrap() {
        message["attributes"]["SentTimestamp"] = json!(sent_at.as_millis().to_string());
    }
    event.to_string()
}

async fn remember_expired(world: &World, count: u32) {
    let keys = format!(
        "insert into etl_ledger
         select now() - interval '36 days' - number * interval '1 second', md5(number::text)::uuid
         from generate_series(1, {count}) as number"
    );
    world.admin.batch_execute(&keys).await.unwrap();
}

#[tokio::test]
async fn expired_keys_are_pruned_and_the_others_stay() {
    let world = World::new().await;
    remember_expired(&world, 1000).await;
    let handler = world.handler().await;
    let young = sent_days_ago(34, &event(0, bodies(0..10)));
    invoke(&handler, &young).await.unwrap();
    assert_eq!(world.count("etl_ledger").await, 10);
    invoke(&handler, &young).await.unwrap();
    assert_eq!(world.count("user_logins").await, 10);
}

#[tokio::test]
async fn a_ledger_that_has_grown_shrinks_by_more_than_what_is_inserted() {
    let world = World::new().await;
    remember_expired(&world, 60_000).await;
    let handler = world.handler().await;
    for batch in 0..3 {
        invoke(&handler, &sent_days_ago(1, &event(batch * 10_000, bodies(0..10_000)))).await.unwrap();
    }
    // The first batch prunes 20,000 keys; later prunes delete twice as many keys as rows were inserted since.
    assert_eq!(world.count("etl_ledger where sent_at < now() - interval '35 days'").await, 0);
    assert_eq!(world.count("user_logins").await, 30_000);
}

#[tokio::test]
async fn retention_is_a_setting() {
    let mut world = World::new().await;
    world.settings.insert("LEDGER_RETENTION_DAYS", "40".to_owned());
    remember_expired(&world, 10).await;
    invoke(&world.handler().await, &sent_days_ago(1, &event(0, bodies(0..1)))).await.unwrap();
    assert_eq!(world.count("etl_ledger").await, 11);
}

#[tokio::test]
async fn a_message_older_than_the_retention_is_still_inserted_once() {
    let world = World::new().await;
    for _ in 0..2 {
        // New environments, each of which prunes.
        let old = sent_days_ago(400, &event(0, [body(1)]));
        assert!(failed(&invoke(&world.handler().await, &old).await.unwrap()).is_empty());
    }
    assert_eq!(world.count("user_logins").await, 1);
    assert_eq!(world.count("etl_ledger where sent_at = 'epoch'").await, 1);
}

#[tokio::test]
async fn a_ledger_that_cannot_be_pruned_stops_nothing() {
    let world = World::new().await;
    world.admin.batch_execute("revoke delete on etl_ledger from login_etl").await.unwrap();
    let handler = world.handler().await;
    for batch in 0..2 {
        assert!(failed(&invoke(&handler, &event(batch, [body(1)])).await.unwrap()).is_empty());
    }
    assert_eq!(world.count("user_logins").await, 2);
}

#[tokio::test]
async fn the_schedule_prunes_the_ledger_and_batches_leave_that_to_it() {
    let world = World::new().await;
    let expired = "etl_ledger where sent_at < now() - interval '35 days'";
    remember_expired(&world, 25_000).await;
    maintain(&world.handler().await).await;
    assert_eq!(world.count(expired).await, 0);

    remember_expired(&world, 10).await;
    let handler = world.handler().await;
    for batch in 0..2 {
        invoke(&handler, &sent_days_ago(1, &event(batch * 10_000, bodies(0..10_000)))).await.unwrap();
    }
    assert_eq!(world.count(expired).await, 10);

    world.admin.batch_execute("update etl_maintenance set done_at = now() - interval '25 hours'").await.unwrap();
    for batch in 0..10 {
        // Each environment prunes after its first batch, for a second at most, which is too short on a busy machine.
        invoke(&world.handler().await, &sent_days_ago(1, &event(30_000 + batch, bodies(0..1)))).await.unwrap();
        if world.count(expired).await == 0 {
            return;
        }
    }
    panic!("batches do not prune the ledger");
}

#[tokio::test]
async fn a_failed_maintenance_run_is_not_recorded() {
    let world = World::new().await;
    remember_expired(&world, 10).await;
    world.admin.batch_execute("revoke delete on etl_ledger from login_etl").await.unwrap();
    maintain(&world.handler().await).await;
    assert_eq!(world.count("etl_maintenance").await, 0);
}

#[tokio::test]
async fn a_database_without_the_schedule_s_record_is_pruned_by_batches() {
    let world = World::new().await;
    world.admin.batch_execute("drop table etl_maintenance").await.unwrap();
    remember_expired(&world, 10).await;
    invoke(&world.handler().await, &sent_days_ago(1, &event(0, bodies(0..1)))).await.unwrap();
    assert_eq!(world.count("etl_ledger").await, 1);
}
