//! Mappings other than the built-in one, into a real table.

use login_etl::keyring::Keyring;
use serde_json::{Value, json};

use crate::world::{World, event, failed, invoke, message_id};

/// A column of each type. Two columns have the names of ledger columns.
const MAPPING: &str = r#"
    table = "app.every type"
    [[column]]
    name = "message_id"
    value = "message-id"
    type = "uuid"
    [[column]]
    name = "sent_at"
    value = "sent-time"
    type = "timestamptz"
    [[column]]
    name = "sent day"
    value = "sent-date"
    type = "date"
    [[column]]
    name = "queue"
    value = "queue"
    type = "text"
    [[column]]
    name = "masked"
    from = "who.mail"
    keep = "masked"
    normalize = "lowercase"
    [[column]]
    name = "text"
    from = "text"
    keep = "plain"
    type = "text"
    max_length = 5
    optional = true
    [[column]]
    name = "integer"
    from = "numbers.integer"
    keep = "plain"
    type = "integer"
    [[column]]
    name = "bigint"
    from = "numbers.bigint"
    keep = "plain"
    type = "bigint"
    convert = "from-text"
    [[column]]
    name = "double"
    from = "numbers.double"
    keep = "plain"
    type = "double precision"
    [[column]]
    name = "boolean"
    from = "boolean"
    keep = "plain"
    type = "boolean"
    [[column]]
    name = "date"
    from = "date"
    keep = "plain"
    type = "date"
    [[column]]
    name = "time"
    from = "time"
    keep = "plain"
    type = "timestamptz"
    [[column]]
    name = "epoch"
    from = "epoch"
    keep = "plain"
    type = "timestamptz"
    convert = "epoch-millis"
    [[column]]
    name = "uuid"
    from = "uuid"
    keep = "plain"
    type = "uuid"
    [[column]]
    name = "jsonb"
    from = "numbers"
    keep = "plain"
    type = "jsonb"
"#;

const TABLE: &str = r#"
    create schema app;
    create table app."every type" (
        message_id uuid, sent_at timestamptz, "sent day" date, queue text, masked varchar(256), text varchar(5), integer integer,
        bigint bigint, double double precision, boolean boolean, date date, time timestamptz, epoch timestamptz, uuid uuid, jsonb jsonb
    );
    grant usage on schema app to login_etl;
    grant insert on app."every type" to login_etl"#;

fn body(number: i64, mail: &str) -> Value {
    json!({
        "who": {"mail": mail},
        "text": null,
        "numbers": {"integer": number, "bigint": "9007199254740993", "double": 0.1},
        "boolean": true,
        "date": "1999-12-31",
        "time": "2026-11-28T01:00:00.000001+01:00",
        "epoch": 1,
        "uuid": "6F9619FF-8B86-4011-B42D-00C04FC96401",
        "ignored": [{"deep": null}],
    })
}

#[tokio::test]
async fn a_row_has_every_type_and_is_inserted_once() {
    let mut world = World::new().await;
    world.admin.batch_execute(TABLE).await.unwrap();
    world.use_mapping(MAPPING);
    let handler = world.handler().await;
    let bodies = [body(1, "Ann@Example.com"), body(-2, "ann@example.com"), body(1, "x"), json!({"text": "longer"})];
    let mut bodies = bodies.map(|body| body.to_string());
    // Nested too deeply for PostgreSQL's stack.
    bodies[2] = bodies[2].replace("0.1", &format!("0.1, \"x\": {}{}", "[".repeat(20_000), "]".repeat(20_000)));
    for _ in 0..2 {
        let response = invoke(&handler, &event(7, &bodies)).await.unwrap();
        assert_eq!(failed(&response), [message_id(9), message_id(10)]);
    }
    let rows =
        world.rows(r#"select (to_jsonb(row) - 'masked')::text from app."every type" as row order by message_id"#).await;
    let rows: Vec<Value> = rows.iter().map(|row| serde_json::from_str(row.get(0)).unwrap()).collect();
    let expected = |number: i64, place: u128, milliseconds: &str| {
        json!({
            "message_id": message_id(place), "sent_at": format!("2025-11-22T08:26:40{milliseconds}+00:00"), "sent day": "2025-11-22",
            "queue": "logins", "text": null, "integer": number, "bigint": 9_007_199_254_740_993_i64, "double": 0.1, "boolean": true,
            "date": "1999-12-31", "time": "2026-11-28T00:00:00.000001+00:00", "epoch": "1970-01-01T00:00:00.001+00:00",
            "uuid": "6f9619ff-8b86-4011-b42d-00c04fc96401",
            "jsonb": {"integer": number, "bigint": "9007199254740993", "double": 0.1},
        })
    };
    assert_eq!(rows, [expected(1, 7, ""), expected(-2, 8, ".001")]);
    assert_eq!(world.count(r#"(select distinct masked from app."every type") as masks"#).await, 1);
    assert_eq!(world.count("user_logins").await, 0);
}

#[tokio::test]
async fn a_mapping_that_does_not_fit_the_table_fails_the_batch_and_loses_nothing() {
    let mut world = World::new().await;
    world.use_mapping(&MAPPING.replace("app.every type", "nowhere"));
    let error = invoke(&world.handler().await, &event(1, [body(1, "x").to_string()])).await.unwrap_err();
    assert!(error.to_string().contains("42P01"), "{error}");
    assert_eq!(world.count("etl_ledger").await, 0);
}

const ONE_WAY_BESIDE_RECOVERABLE: &str = r#"
    table = "visits"
    [[column]]
    name = "mail"
    from = "mail"
    keep = "masked"
    [[column]]
    name = "phone"
    from = "phone"
    keep = "one-way"
    normalize = "trim"
"#;

#[tokio::test]
async fn one_way_and_recoverable_columns_work_side_by_side() {
    let mut world = World::new().await;
    world
        .admin
        .batch_execute("create table visits (mail text, phone text); grant insert on visits to login_etl")
        .await
        .unwrap();
    world.use_mapping(ONE_WAY_BESIDE_RECOVERABLE);
    let error = world.try_handler().await.unwrap_err().to_string();
    assert!(error.contains("`etlctl keys activate ID --one-way`"), "{error}");

    let key = "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff";
    let ring = json!({"active": "a", "one_way": "h", "keys": {
        "a": {"cipher": "aes-siv", "key": key},
        "h": {"cipher": "hmac-sha256", "key": key},
    }});
    world.put_secret("masking", &ring.to_string()).await;
    let handler = world.handler().await;
    let bodies = ["1", " 1 ", "2"].map(|phone| json!({"mail": "m", "phone": phone}).to_string());
    assert!(failed(&invoke(&handler, &event(0, &bodies)).await.unwrap()).is_empty());

    let rows = world.rows("select mail, phone, count(*) from visits group by 1, 2 order by 3").await;
    assert_eq!(rows.iter().map(|row| row.get::<_, i64>(2)).collect::<Vec<_>>(), [1, 2]);
    let keyring = Keyring::from_json(&ring.to_string()).unwrap();
    for row in rows {
        assert_eq!(*keyring.recover("mail", row.get(0)).unwrap(), "m");
        let phone: &str = row.get(1);
        assert!(phone.starts_with("h:") && keyring.recover("phone", phone).is_err(), "{phone}");
    }
}
