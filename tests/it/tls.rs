//! The connection to the database is private, and to nobody else.

use crate::world::{World, bodies, event, invoke};

#[tokio::test]
async fn the_connection_is_encrypted_by_default() {
    let world = World::new().await;
    let handler = world.handler().await;
    invoke(&handler, &event(0, bodies(0..1))).await.unwrap();
    let query = "select ssl, version from pg_stat_ssl join pg_stat_activity using (pid) \
                 where datname = current_database() and application_name = 'login-etl'";
    let sessions = world.rows(query).await;
    assert_eq!(sessions.len(), 1);
    assert!(sessions[0].get::<_, bool>("ssl"));
    assert!(["TLSv1.2", "TLSv1.3"].contains(&sessions[0].get("version")));
}

#[tokio::test]
async fn a_certificate_for_another_host_name_is_refused() {
    let mut world = World::new().await;
    world.settings.insert("DATABASE_HOST", "127.0.0.1".to_owned());
    let error = invoke(&world.handler().await, &event(0, bodies(0..1))).await.unwrap_err();
    assert_eq!(error.error_type(), "DatabaseTls");
    assert!(error.to_string().contains("mismatch"), "{error}");
    assert_eq!(world.count("user_logins").await, 0);
}

#[tokio::test]
async fn a_certificate_of_an_unknown_authority_is_refused() {
    let mut world = World::new().await;
    world.settings.remove("DATABASE_CA_FILE");
    let error = invoke(&world.handler().await, &event(0, bodies(0..1))).await.unwrap_err();
    assert_eq!(error.error_type(), "DatabaseTls");
    assert!(error.to_string().contains("certificate verify failed"), "{error}");
}

#[tokio::test]
async fn tls_can_be_disabled() {
    let mut world = World::new().await;
    world.settings.insert("DATABASE_TLS", "disable".to_owned());
    invoke(&world.handler().await, &event(0, bodies(0..1))).await.unwrap();
    assert_eq!(world.count("user_logins").await, 1);
}

#[tokio::test]
async fn a_file_without_certificates_keeps_the_environment_from_starting() {
    let mut world = World::new().await;
    for path in ["/nowhere.pem", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")] {
        world.settings.insert("DATABASE_CA_FILE", path.to_owned());
        let error = world.try_handler().await.unwrap_err();
        assert_eq!(error.error_type(), "Configuration");
        assert!(error.to_string().contains(path), "{error}");
    }
}
