//! Malicious and malformed messages: none is lost, affects others, or is written wrongly.

use std::time::SystemTime;

use bytes::BytesMut;
use login_etl::{
    keyring::Keyring,
    mapping::{Envelope, Mapping},
};
use proptest::{collection::vec, prelude::*};
use serde_json::{Value, json};

use crate::world::{KEYRING, World, body, event, failed, invoke, message_id};

/// A valid body with one field's value replaced.
fn with(field: &str, value: &str) -> String {
    let mut body: Value = serde_json::from_str(&body(1)).unwrap();
    body[field] = json!(value);
    body.to_string()
}

fn nested(depth: usize) -> String {
    format!("{}{}", "[".repeat(depth), "]".repeat(depth))
}

#[tokio::test]
async fn hostile_bodies_are_each_accounted_for() {
    let world = World::new().await;
    let good = body(1);
    let sql = "x'); drop table user_logins; --";
    let accepted = [
        good.replacen('{', &format!(r#"{{"extra": {},"#, nested(500_000)), 1),
        good.replacen('{', r#"{"extra": 1, "extra": 2,"#, 1),
        good.replacen('{', r#"{"extra": 1e999999,"#, 1),
        good.replacen('{', &format!(r#"{{"extra": "{}","#, "x".repeat(1_000_000)), 1),
        good.replace("ip", r"\u0069p"),
        with("user_id", sql),
        with("ip", sql),
        with("device_id", "$1 {} %s \\ \" ' ` \u{7f} \u{1b}[31m"),
        with("locale", "\u{202e}\u{200b}\u{feff}"),
        with("device_type", "🦀"),
        format!("\n\t {good} \r\n"),
    ];
    let refused = [
        good.replacen('{', r#"{"ip": "1.1.1.1","#, 1),
        good.replacen('{', r#"{"user_id": {"$ne": null},"#, 1),
        nested(500_000),
        "{\"user_id\":".repeat(100_000),
        "9".repeat(1_000_000),
        "\u{feff}{}".to_owned(),
        good.replace("user-1", r"\ud800"),
        good.replace("user-1", r"\u0000"),
        good.replace("user-1", &"u".repeat(1_000_000)),
        with("ip", &"1".repeat(1_000_000)),
        with("app_version", "1e5"),
        with("app_version", &"1".repeat(1_000_000)),
        with("app_version", &".".repeat(1_000_000)),
        good.replace("\"2.3.0\"", "230"),
        format!("{good}{good}"),
        String::new(),
    ];
    let bodies = accepted.iter().chain(&refused);
    let response = invoke(&world.handler().await, &event(0, bodies)).await.unwrap();
    let expected: Vec<_> = (accepted.len()..accepted.len() + refused.len()).map(|n| message_id(n as u128)).collect();
    assert_eq!(failed(&response), expected);
    assert_eq!(world.count("user_logins").await, accepted.len() as i64);
    assert_eq!(world.count(&format!("user_logins where user_id = $${sql}$$")).await, 1);
}

#[tokio::test]
async fn hostile_metadata_affects_only_its_own_message() {
    let world = World::new().await;
    let message = |id: &str, attributes: Value| json!({"messageId": id, "body": body(1), "attributes": attributes});
    let event = json!({"Records": [
        message("'; drop table user_logins; --", json!({"SentTimestamp": "-9223372036854775808"})),
        message("\u{202e}", json!({"SentTimestamp": "9999999999999999999999"})),
        message(&"i".repeat(100_000), json!({"SentTimestamp": "253402300799999"})),
        message(" ", json!(null)),
        message("{00000000-0000-0000-0000-000000000001}", json!({})),
        // A second copy: the same id in another spelling.
        message("urn:uuid:00000000-0000-0000-0000-000000000001", json!({"Unknown": "attribute"})),
    ], "version": "9.9", "unknown": [1]});
    for _ in 0..2 {
        let response = invoke(&world.handler().await, &event.to_string()).await.unwrap();
        assert!(failed(&response).is_empty());
    }
    assert_eq!(world.count("user_logins").await, 5);
}

/// JSON values of any kind, some of them named like a login's fields.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        "[0-9.]{0,14}".prop_map(Value::from),
    ];
    let name = prop_oneof![
        Just("user_id".to_owned()),
        Just("app_version".to_owned()),
        Just("device_type".to_owned()),
        Just("ip".to_owned()),
        Just("locale".to_owned()),
        Just("device_id".to_owned()),
        any::<String>(),
    ];
    leaf.prop_recursive(3, 24, 8, move |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec((name.clone(), inner), 0..8).prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// A second implementation of the built-in mapping's rules.
fn is_login(body: &Value) -> bool {
    let text = |field: &str, max: usize| {
        body[field].as_str().is_some_and(|text| (1..=max).contains(&text.chars().count()) && !text.contains('\0'))
    };
    let locale = body["locale"].is_null() || body["locale"] == "" || text("locale", 32);
    let version = text("app_version", usize::MAX)
        && body["app_version"].as_str().is_some_and(|version| {
            let digits = version.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
            digits && version.replace('.', "").parse::<i32>().is_ok()
        });
    // 191 bytes with their padding are twelve blocks, or 256 characters of Base64.
    let short = |field: &str| body[field].as_str().is_some_and(|text| text.len() <= 191);
    let masked = ["ip", "device_id"].into_iter().all(|field| text(field, usize::MAX) && short(field));
    body.is_object() && text("user_id", 128) && text("device_type", 32) && masked && locale && version
}

/// Whether a body is accepted. Also checks that its JSON escapes in the event make no difference.
fn accepts(body: &str) -> bool {
    let (mapping, keyring) = (Mapping::built_in().unwrap(), Keyring::from_json(KEYRING).unwrap());
    let envelope = Envelope { message_id: "m", sent: None, queue: None, now: SystemTime::now() };
    let mut buffer = BytesMut::new();
    let row = mapping.row(body, &envelope, &keyring, &mut buffer);
    for json in spellings(body) {
        assert_eq!(mapping.row_of_json_string(&json, &envelope, &keyring, &mut buffer), row, "{json}");
    }
    row.is_ok()
}

/// A text as three JSON strings: with the fewest escapes, with other escapes for quotes, and with every character escaped.
fn spellings(text: &str) -> [String; 3] {
    let spelling = |escaped: fn(char) -> bool| {
        let characters = text.chars().map(|character| {
            let units: String =
                character.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect();
            let json = serde_json::to_string(&character).unwrap();
            if escaped(character) { units } else { json[1..json.len() - 1].to_owned() }
        });
        format!("\"{}\"", characters.collect::<String>())
    };
    [spelling(|_| false), spelling(|character| character == '"'), spelling(|_| true)]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn no_text_makes_the_parser_panic(body in any::<String>()) {
        accepts(&body);
    }

    #[test]
    fn exactly_the_logins_among_all_json_are_accepted(body in any_json()) {
        prop_assert_eq!(accepts(&body.to_string()), is_login(&body));
    }

    #[test]
    fn exactly_the_valid_variations_of_a_login_are_accepted(
        field in prop_oneof![Just("user_id"), Just("app_version"), Just("device_type"), Just("ip"), Just("locale"), Just("device_id")],
        value in any_json(),
    ) {
        let mut body: Value = serde_json::from_str(&body(1)).unwrap();
        body[field] = value;
        prop_assert_eq!(accepts(&body.to_string()), is_login(&body));
    }

    #[test]
    fn only_masked_values_are_recovered(value in any::<String>(), other in any::<String>()) {
        let siv = r#"{"active": "k", "keys": {"k": {"cipher": "aes-siv",
            "key": "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"}}}"#;
        for text in [KEYRING, siv] {
            let keyring = Keyring::from_json(text).unwrap();
            if let Ok(masked) = keyring.mask("ip", &value) {
                prop_assert!(masked.as_str().len() <= 256);
                let recovered = keyring.recover("ip", masked.as_str()).unwrap();
                prop_assert_eq!(recovered.as_str(), value.as_str());
                prop_assert_eq!(keyring.mask("ip", &other).is_ok_and(|mask| mask == masked), value == other);
            }
        }
        prop_assert!(Keyring::from_json(siv).unwrap().recover("ip", &other).is_err());
    }

    #[test]
    fn no_text_of_a_secret_makes_the_keyring_panic(text in any::<String>(), value in any_json()) {
        prop_assert!(Keyring::from_json(&text).is_err());
        prop_assert!(Keyring::from_json(&value.to_string()).is_err());
    }
}
