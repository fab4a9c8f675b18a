//! What successful batches leave in the tables.

use crate::world::{World, bodies, body, event, failed, invoke, recover, sample};

#[tokio::test]
async fn a_batch_becomes_masked_rows() {
    let world = World::new().await;
    let response = invoke(&world.handler().await, &sample("valid")).await.unwrap();
    assert!(failed(&response).is_empty());

    let rows = world
        .rows(
            "select user_id, device_type, masked_ip, masked_device_id, locale, app_version,
                    create_date = (now() at time zone 'UTC')::date as today
             from user_logins order by app_version",
        )
        .await;
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            let ip = recover("ip", row.get("masked_ip"));
            let device_id = recover("device_id", row.get("masked_device_id"));
            let locale: Option<String> = row.get("locale");
            let app_version: i32 = row.get("app_version");
            assert!(row.get::<_, bool>("today"));
            (row.get::<_, String>("device_type"), ip, device_id, locale, app_version)
        })
        .collect();
    let expected = [
        ("ios", "203.0.113.23", "544-63-2144", None, 26),
        ("android", "203.0.113.167", "149-19-9779", Some("RU"), 230),
        ("android", "2001:db8::1", "328-90-2013", Some("RU"), 602),
    ]
    .map(|(kind, ip, device, locale, version)| {
        (kind.to_owned(), ip.to_owned(), device.to_owned(), locale.map(ToOwned::to_owned), version)
    });
    assert_eq!(rows, expected);
    assert_eq!(world.count("etl_ledger").await, 3);
}

#[tokio::test]
async fn a_redelivered_batch_inserts_nothing() {
    let world = World::new().await;
    let event = event(0, bodies(0..100));
    for handler in [&world.handler().await, &world.handler().await] {
        for _ in 0..2 {
            assert!(failed(&invoke(handler, &event).await.unwrap()).is_empty());
        }
    }
    assert_eq!(world.count("user_logins").await, 100);
    assert_eq!(world.count("etl_ledger").await, 100);
}

#[tokio::test]
async fn a_partly_redelivered_batch_inserts_only_the_new_messages() {
    let world = World::new().await;
    let handler = world.handler().await;
    invoke(&handler, &event(20, bodies(0..30))).await.unwrap();
    assert!(failed(&invoke(&handler, &event(0, bodies(0..100))).await.unwrap()).is_empty());
    assert_eq!(world.count("user_logins").await, 100);
}

#[tokio::test]
async fn a_batch_has_the_same_rows_however_it_is_written() {
    let mut world = World::new().await;
    let mut bodies = bodies(0..50);
    bodies.push(body(50).replace(r#""RU""#, "null"));
    // By INSERT, then by COPY.
    for (first, threshold) in [(0, "52"), (1000, "51")] {
        world.settings.insert("COPY_THRESHOLD", threshold.to_owned());
        assert!(failed(&invoke(&world.handler().await, &event(first, &bodies)).await.unwrap()).is_empty());
    }
    assert_eq!(world.count("(select distinct * from user_logins) as rows").await, 51);
    assert_eq!(world.count("user_logins").await, 102);
    assert_eq!(world.count("etl_ledger").await, 102);
}

/// After a failed `COPY` the driver confuses answers, so the connection must be replaced.
#[tokio::test]
async fn a_redelivered_batch_that_is_written_by_copy_gets_a_new_connection() {
    let mut world = World::new().await;
    world.settings.insert("COPY_THRESHOLD", "1".to_owned());
    let handler = world.handler().await;
    invoke(&handler, &event(0, bodies(0..10))).await.unwrap();
    for (first, rows) in [(5, 15), (5, 15)] {
        let before = world.session().await;
        assert!(failed(&invoke(&handler, &event(first, bodies(0..10))).await.unwrap()).is_empty());
        world.until(&format!("not exists (select from pg_stat_activity where pid = {before})")).await;
        assert_eq!(world.count("user_logins").await, rows);
        assert_eq!(world.count("etl_ledger").await, rows);
    }
}

#[tokio::test]
async fn a_table_that_copy_cannot_write_is_written_by_insert() {
    let mut world = World::new().await;
    world.settings.insert("COPY_THRESHOLD", "1".to_owned());
    for change in [
        "alter table user_logins alter app_version type bigint",
        "alter table user_logins enable row level security; create policy all_rows on user_logins for insert with check (true)",
    ] {
        world.admin.batch_execute(change).await.unwrap();
        let before = world.count("user_logins").await;
        let first = before as u128;
        let response = invoke(&world.handler().await, &event(first, bodies(0..10))).await.unwrap();
        assert!(failed(&response).is_empty(), "{change}");
        assert_eq!(world.count("user_logins").await, before + 10, "{change}");
    }
}

#[tokio::test]
async fn a_message_that_is_twice_in_a_batch_is_inserted_once() {
    let world = World::new().await;
    assert!(failed(&invoke(&world.handler().await, &sample("duplicates")).await.unwrap()).is_empty());
    assert_eq!(world.count("user_logins").await, 3);
    let shared =
        world.rows("select row_count, subject_count, first_day = last_day from user_logins_masked_ip_duplicates").await;
    assert_eq!(shared.len(), 1);
    assert_eq!((shared[0].get::<_, i64>(0), shared[0].get::<_, i64>(1), shared[0].get::<_, bool>(2)), (2, 2, true));
    assert_eq!(world.count("user_logins_masked_device_id_duplicates").await, 1);
}

#[tokio::test]
async fn equal_values_of_different_messages_are_both_inserted() {
    let world = World::new().await;
    invoke(&world.handler().await, &event(0, [body(1), body(1)])).await.unwrap();
    assert_eq!(world.count("user_logins").await, 2);
}

#[tokio::test]
async fn ten_thousand_messages_are_one_batch() {
    let world = World::new().await;
    let event = event(0, bodies(0..10_000));
    assert!(failed(&invoke(&world.handler().await, &event).await.unwrap()).is_empty());
    assert_eq!(world.count("user_logins").await, 10_000);
    assert_eq!(world.count("(select distinct masked_ip, masked_device_id from user_logins) as rows").await, 10_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn environments_that_share_messages_insert_each_once() {
    let world = World::new().await;
    let handlers = [world.handler().await, world.handler().await, world.handler().await, world.handler().await];
    for round in 0..5 {
        let event = event(round * 1000, bodies(0..500));
        let events = [&event, &reversed(&event), &event, &reversed(&event)];
        let calls = handlers.iter().zip(events).map(|(handler, event)| invoke(handler, event));
        for response in futures_util::future::join_all(calls).await {
            assert!(failed(&response.unwrap()).is_empty());
        }
    }
    assert_eq!(world.count("user_logins").await, 2500);
}

/// Sessions that insert the same keys in opposite order would deadlock.
#[tokio::test]
async fn ledger_keys_are_written_in_sorted_order() {
    let world = World::new().await;
    invoke(&world.handler().await, &reversed(&event(0, bodies(0..100)))).await.unwrap();
    let unordered = "(select message_id, lag(message_id) over (order by ctid) as before from etl_ledger) as keys \
                     where message_id < before";
    assert_eq!(world.count(unordered).await, 0);
}

fn reversed(event: &str) -> String {
    let mut event: serde_json::Value = serde_json::from_str(event).unwrap();
    event["Records"].as_array_mut().unwrap().reverse();
    event.to_string()
}

#[tokio::test]
async fn the_ordered_encoding_keeps_versions_apart() {
    let mut world = World::new().await;
    world.use_mapping(&include_str!("../../mapping.toml").replace("version-digits", "version-ordered"));
    let versions = ["0.2.6", "0.26", "2.6", "10.0"];
    let bodies = versions.map(|version| body(1).replace("2.3.0", version));
    invoke(&world.handler().await, &event(0, bodies)).await.unwrap();
    let rows = world.rows("select app_version from user_logins order by app_version").await;
    let stored: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(stored, [2_006, 26_000, 2_006_000, 10_000_000]);
}

#[tokio::test]
async fn the_function_s_user_can_insert_and_nothing_else() {
    let world = World::new().await;
    invoke(&world.handler().await, &sample("valid")).await.unwrap();
    for statement in [
        "select from user_logins",
        "update user_logins set locale = null",
        "delete from user_logins",
        "truncate etl_ledger",
        "select from user_logins_masked_ip_duplicates",
        "select from pg_authid",
    ] {
        let refused = world.admin.batch_execute(&format!("set role login_etl; {statement}")).await.unwrap_err();
        assert_eq!(refused.code().map(|code| code.code()), Some("42501"), "{statement}");
        world.admin.batch_execute("reset role").await.unwrap();
    }
}

#[tokio::test]
async fn the_schema_takes_an_existing_table_as_it_is_and_can_be_applied_again() {
    let world = World::new().await;
    let exercise = "
        drop table user_logins, etl_ledger cascade;
        create table user_logins (
            user_id varchar(128), device_type varchar(32), masked_ip varchar(256), masked_device_id varchar(256),
            locale varchar(32), app_version integer, create_date date
        );
        insert into user_logins values ('old', 'ios', 'mask', 'mask', null, 230, '2020-01-01');
        insert into user_logins values (null), (null)";
    world.admin.batch_execute(exercise).await.unwrap();
    for _ in 0..2 {
        world.apply_schema().await;
    }
    invoke(&world.handler().await, &sample("valid")).await.unwrap();
    assert_eq!(world.count("user_logins").await, 6);
    assert_eq!(world.count("user_logins_masked_ip_duplicates").await, 0, "NULLs are not duplicates");
}

#[tokio::test]
async fn a_table_of_other_types_is_written_the_same_at_every_batch_size() {
    let world = World::new().await;
    let change = "alter table user_logins alter app_version type real, alter locale type char(4)";
    world.admin.batch_execute(change).await.unwrap();
    assert!(failed(&invoke(&world.handler().await, &event(0, bodies(0..10))).await.unwrap()).is_empty());
    assert_eq!(world.count("user_logins where app_version = 230 and locale = 'RU'").await, 10);
}

#[tokio::test]
async fn a_message_id_in_upper_case_is_the_same_and_is_reported_unchanged() {
    let world = World::new().await;
    let handler = world.handler().await;
    let id = "d25e75b7-9d01-4b4c-8f83-6b2b8f1e7f0a";
    let upper = |event: String| event.replace(id, &id.to_uppercase());
    let number = uuid::Uuid::parse_str(id).unwrap().as_u128();
    invoke(&handler, &event(number, [body(0)])).await.unwrap();
    assert!(failed(&invoke(&handler, &upper(event(number, [body(0)]))).await.unwrap()).is_empty());
    assert_eq!(world.count("user_logins").await, 1);
    let response = invoke(&handler, &upper(event(number, ["{}"]))).await.unwrap();
    assert_eq!(failed(&response), [id.to_uppercase()]);
}
