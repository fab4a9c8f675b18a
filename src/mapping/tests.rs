use std::time::{Duration, SystemTime};

use bytes::BytesMut;

use super::*;

const KEYRING: &str = r#"{"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"}"#;
const GOOD: &str = r#"{"user_id":"u","app_version":"2.3.0","device_type":"ios","ip":"199.172.111.135","locale":null,"device_id":"593-47-5928"}"#;
const MESSAGE_ID: &str = "059f36b4-87a3-44ab-83d2-661975830a7d";

fn envelope() -> Envelope<'static> {
    Envelope {
        message_id: MESSAGE_ID,
        sent: Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1_545_082_649_183)),
        queue: Some("logins"),
        now: SystemTime::UNIX_EPOCH + Duration::from_secs(1_763_800_000),
    }
}

fn row_of(mapping: &Mapping, body: &str) -> Result<Vec<Option<Vec<u8>>>, String> {
    let keyring = Keyring::from_json(KEYRING).unwrap();
    let row = mapping.row(body, &envelope(), &keyring, &mut BytesMut::new());
    // The scanner must give the same row.
    let json = serde_json::to_string(body).unwrap();
    assert_eq!(mapping.row_of_json_string(&json, &envelope(), &keyring, &mut BytesMut::new()), row, "{body}");
    let row = row.map_err(|invalid| invalid.to_string())?;
    Ok(row.cells().map(|cell| cell.map(<[u8]>::to_vec)).collect())
}

fn rejected(body: &str) -> Option<String> {
    row_of(&Mapping::built_in().unwrap(), body).err()
}

/// The good body with one field's value replaced by `value` (JSON text), or without the field.
fn with(field: &str, value: Option<&str>) -> String {
    let mut body: serde_json::Map<String, serde_json::Value> = serde_json::from_str(GOOD).unwrap();
    body.remove(field);
    let rest = serde_json::to_string(&body).unwrap();
    match value {
        Some(value) => rest.replacen('{', &format!(r#"{{"{field}":{value},"#), 1),
        None => rest,
    }
}

/// The cell, or the refusal, of a field `f` whose column is declared by `keys`.
fn cell(keys: &str, value: &str) -> Result<Option<Vec<u8>>, String> {
    let mapping = format!("table = \"t\"\n[[column]]\nname = \"c\"\nfrom = \"f\"\n{keys}");
    let mapping = Mapping::from_toml(&mapping, "m").unwrap();
    row_of(&mapping, &format!(r#"{{"f": {value}}}"#)).map(|mut row| row.remove(0))
}

#[test]
fn debug_shows_no_value() {
    let keyring = Keyring::from_json(KEYRING).unwrap();
    let row = Mapping::built_in().unwrap().row(GOOD, &envelope(), &keyring, &mut BytesMut::new()).unwrap();
    assert_eq!(format!("{row:?}"), "Row { .. }");
}

#[test]
fn each_broken_rule_has_its_own_reason() {
    assert_eq!(rejected(GOOD), None);
    for (body, reason) in [
        ("", "body is not JSON"),
        ("not json", "body is not JSON"),
        ("{", "body is not JSON"),
        (r#"{"user_id":"\ud800"}"#, "body is not JSON"),
        ("null", "body is not a JSON object"),
        ("\"text\"", "body is not a JSON object"),
        ("12", "body is not a JSON object"),
        (r#"{"foo": "oops_wrong_msg_type", "bar": "123"}"#, "user_id is missing"),
    ] {
        assert_eq!(rejected(body).as_deref(), Some(reason), "{body}");
    }
    let long = |count: usize| format!("\"{}\"", "é".repeat(count));
    for (field, value, reason) in [
        ("user_id", None, "is missing"),
        ("user_id", Some("null"), "is missing"),
        ("user_id", Some("\"\""), "is empty"),
        ("user_id", Some(r#""a\u0000b""#), "contains a NUL character"),
        ("user_id", Some(long(129).as_str()), "is too long"),
        ("app_version", None, "is missing"),
        ("app_version", Some("230"), "is not a string"),
        ("app_version", Some("\"\""), "is empty"),
        ("app_version", Some("\"2.3-beta\""), "is not digits and dots"),
        ("app_version", Some("\"2..3\""), "is not digits and dots"),
        ("app_version", Some("\".\""), "is not digits and dots"),
        ("app_version", Some("\"٢.٣\""), "is not digits and dots"),
        ("app_version", Some("\"+2\""), "is not digits and dots"),
        ("app_version", Some("\"2147483648\""), "does not fit an integer"),
        ("device_type", None, "is missing"),
        ("device_type", Some("[\"ios\"]"), "is not a string"),
        ("device_type", Some("\"\""), "is empty"),
        ("device_type", Some(long(33).as_str()), "is too long"),
        ("ip", None, "is missing"),
        ("ip", Some("{\"v4\":1}"), "is not a string"),
        ("ip", Some("\"\""), "is empty"),
        ("ip", Some(r#""\u0000""#), "contains a NUL character"),
        ("locale", Some("false"), "is not a string"),
        ("locale", Some("-1e4"), "is not a string"),
        ("locale", Some(long(33).as_str()), "is too long"),
        ("locale", Some(r#""\u0000""#), "contains a NUL character"),
        ("device_id", None, "is missing"),
        ("device_id", Some("1.5"), "is not a string"),
        ("device_id", Some("\"\""), "is empty"),
        ("device_id", Some(long(200).as_str()), "is too long"),
    ] {
        assert_eq!(rejected(&with(field, value)), Some(format!("{field} {reason}")), "{field}: {value:?}");
    }
    let twice = GOOD.replacen('{', r#"{"ip":"8.8.8.8","#, 1);
    assert_eq!(rejected(&twice).as_deref(), Some("ip is given twice"));
}

#[test]
fn the_longest_and_the_odd_but_valid_values_pass() {
    let widest = |count: usize| format!("\"{}\"", "é".repeat(count));
    for (field, value) in [
        ("user_id", Some(widest(128).as_str())),
        ("device_type", Some(widest(32).as_str())),
        ("locale", Some(widest(32).as_str())),
        ("locale", Some("\"\"")),
        ("locale", None),
        ("app_version", Some("\"2147483647\"")),
        ("app_version", Some("\"0.26\"")),
        ("ip", Some("\"0.0.0.0\"")),
        ("ip", Some("\"not an address\"")),
        ("extra", Some("{\"deep\":[[[1]]]}")),
    ] {
        assert_eq!(rejected(&with(field, value)), None, "{field}: {value:?}");
    }
}

#[test]
fn the_reason_names_a_recognised_shape() {
    for (body, reason) in [
        (r#"{"Type":"Notification","MessageId":"m","TopicArn":"arn:aws:sns:eu-west-1:1:t","Message":"{}"}"#, "SNS"),
        (r#"{"version":"0","detail-type":"Login","source":"app","detail":{"user_id":"u"}}"#, "EventBridge"),
        (
            r#"["software.amazon.payloadoffloading.PayloadS3Pointer",{"s3BucketName":"b","s3Key":"k"}]"#,
            "extended client",
        ),
        (&serde_json::to_string(GOOD).unwrap(), "encoded twice"),
        (&format!("\u{feff}{GOOD}"), "byte order mark"),
        ("eyJ1c2VyX2lkIjoidSJ9eyJ1", "Base64"),
        ("H4sIAAAAAAAAA6tWKi1OLYrPTFGyUipVqgUA0P5nVxIAAAA=", "gzip"),
        (&format!("[{GOOD}]"), "list"),
    ] {
        let said = rejected(body).unwrap();
        assert!(said.contains(reason), "{body}: {said}");
    }
}

#[test]
fn versions_become_integers_both_ways() {
    for (version, digits, ordered) in [
        ("2.3.0", Some(230), Some(2_003_000)),
        ("0.26", Some(26), Some(26_000)),
        ("2.6", Some(26), Some(2_006_000)),
        ("6.02", Some(602), Some(6_002_000)),
        ("7", Some(7), Some(7_000_000)),
        ("2147483647", Some(i32::MAX), None),
        ("2147.483.648", None, None),
        ("2147.483.647", Some(i32::MAX), Some(i32::MAX)),
        ("1.1000.0", Some(110_000), None),
        ("1.2.3.4", Some(1234), None),
        ("1.", None, None),
    ] {
        assert_eq!(convert::version(version, false).ok(), digits, "{version}");
        assert_eq!(convert::version(version, true).ok(), ordered, "{version}");
    }
}

#[test]
fn an_address_has_one_spelling() {
    for (text, canonical) in [
        ("199.172.111.135", "199.172.111.135"),
        (" 199.172.111.135\t", "199.172.111.135"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
        ("::ffff:198.51.100.7", "198.51.100.7"),
        ("::ffff:c633:6407", "198.51.100.7"),
        ("fe80::1%eth0", "fe80::1"),
        (" FE80:0::1%25 ", "fe80::1"),
        // Not addresses.
        ("010.1.1.1", "010.1.1.1"),
        ("10.0.0.1%eth0", "10.0.0.1%eth0"),
        ("fe80::1% <x>", "fe80::1% <x>"),
        (" unknown ", " unknown "),
    ] {
        assert_eq!(convert::normalized(text.into(), &[Normalize::Ip], false).unwrap(), canonical, "{text:?}");
    }
    assert_eq!(convert::normalized("unknown".into(), &[Normalize::Ip], true), Err(Fault::NotAnAddress));
    let steps = [Normalize::Trim, Normalize::Lowercase];
    assert_eq!(convert::normalized(" Ä@Example.COM ".into(), &steps, false).unwrap(), "ä@example.com");
    assert_eq!(convert::normalized("ǅ".into(), &steps, false).unwrap(), "ǆ");
}

#[test]
fn each_type_takes_its_values_and_no_others() {
    let bytes = |bytes: &[u8]| Ok(Some(bytes.to_vec()));
    let refused = |fault: &str| Err(format!("f {fault}"));
    let plain = |column_type: &str| format!("keep = \"plain\"\ntype = \"{column_type}\"\n");
    let converted = |column_type: &str, convert: &str| plain(column_type) + &format!("convert = \"{convert}\"\n");

    let deep = format!("{}{}", "[".repeat(20_000), "]".repeat(20_000));
    for (keys, value, expected) in [
        (plain("text"), "\"a\\u00e9\"", bytes("aé".as_bytes())),
        (plain("text"), "7", refused("is not a string")),
        (converted("text", "from-number"), "1.50", bytes(b"1.50")),
        (converted("text", "from-number"), "\"1\"", refused("is not a number")),
        (plain("integer"), "-2147483648", bytes(&i32::MIN.to_be_bytes())),
        (plain("integer"), "2147483648", refused("does not fit an integer")),
        (plain("integer"), "1.0", refused("is not an integer")),
        (plain("integer"), "1e3", refused("is not an integer")),
        (plain("integer"), "\"1\"", refused("is not a number")),
        (converted("integer", "from-text"), "\"42\"", bytes(&42_i32.to_be_bytes())),
        (converted("integer", "from-text"), "\"+42\"", refused("is not a number")),
        (converted("integer", "from-text"), "42", refused("is not a string")),
        (plain("bigint"), "9223372036854775807", bytes(&i64::MAX.to_be_bytes())),
        (plain("bigint"), "9223372036854775808", refused("does not fit a bigint")),
        (plain("double precision"), "0.1", bytes(&0.1_f64.to_be_bytes())),
        (plain("double precision"), "1e999", refused("does not fit a double precision")),
        (plain("double precision"), "true", refused("is not a number")),
        (plain("boolean"), "true", bytes(&[1])),
        (plain("boolean"), "false", bytes(&[0])),
        (plain("boolean"), "1", refused("is not true or false")),
        (plain("date"), "\"2000-02-29\"", bytes(&59_i32.to_be_bytes())),
        (plain("date"), "\"1999-12-31\"", bytes(&(-1_i32).to_be_bytes())),
        (plain("date"), "\"2001-02-29\"", refused("is not a date (YYYY-MM-DD)")),
        (plain("date"), "\"2001-2-9\"", refused("is not a date (YYYY-MM-DD)")),
        (plain("timestamptz"), "\"2000-01-01T01:00:00.5+01:00\"", bytes(&500_000_i64.to_be_bytes())),
        (plain("timestamptz"), "\"2000-01-01 00:00\"", refused("is not a time (RFC 3339)")),
        (plain("timestamptz"), "\"2000-01-01x00:00:00Z\"", refused("is not a time (RFC 3339)")),
        (plain("timestamptz"), "\"9999-12-31T23:59:59-01:00\"", refused("does not fit a timestamptz")),
        (converted("timestamptz", "epoch-seconds"), "946684801", bytes(&1_000_000_i64.to_be_bytes())),
        (converted("timestamptz", "epoch-millis"), "946684800001", bytes(&1_000_i64.to_be_bytes())),
        (converted("timestamptz", "epoch-seconds"), "946684800001000", refused("does not fit a timestamptz")),
        (converted("timestamptz", "epoch-seconds"), "1.5", refused("is not an integer")),
        (plain("uuid"), "\"00000000-0000-0000-0000-0000000000ff\"", bytes(&u128::to_be_bytes(255))),
        (plain("uuid"), "\"ff\"", refused("is not a UUID")),
        (plain("jsonb"), "{\"a\": [1, \"\\\\u0000\"]}", bytes(b"\x01{\"a\": [1, \"\\\\u0000\"]}")),
        (plain("jsonb"), "\"\\u0000\"", refused("contains a NUL character")),
        (plain("jsonb"), "null", refused("is missing")),
        (plain("jsonb"), "\"\\ud800\"", refused("has a number, character or nesting that jsonb cannot store")),
        (plain("jsonb"), "1e999999", refused("has a number, character or nesting that jsonb cannot store")),
        (plain("jsonb"), &*deep, refused("has a number, character or nesting that jsonb cannot store")),
        (
            converted("integer", "version-ordered"),
            "\"1.2.3.4\"",
            refused("is not major.minor.patch, with minor and patch up to 999"),
        ),
        (plain("jsonb") + "optional = true", "null", Ok(None)),
    ] {
        assert_eq!(cell(&keys, value), expected, "{keys}{value}");
    }
}

#[test]
fn nested_fields_and_attributes_are_found() {
    let mapping = Mapping::from_toml(
        r#"
        table = "app.orders"
        [[column]]
        name = "masked_mail"
        from = "customer.mail"
        keep = "masked"
        [[column]]
        name = "city"
        from = "customer.address.city"
        keep = "plain"
        type = "text"
        optional = true
        [[column]]
        name = "address"
        from = "customer.address"
        keep = "plain"
        type = "jsonb"
        optional = true
        [[column]]
        name = "sent"
        value = "sent-time"
        type = "timestamptz"
        [[column]]
        name = "id"
        value = "message-id"
        type = "uuid"
        [[column]]
        name = "queue"
        value = "queue"
        type = "text"
        "#,
        "m",
    )
    .unwrap();
    let row = row_of(&mapping, r#"{"customer": {"address": {"city": "Bern", "zip": 1}, "mail": "a@b.c"}}"#).unwrap();
    assert_eq!(row[1].as_deref(), Some("Bern".as_bytes()));
    assert_eq!(row[2].as_deref(), Some(b"\x01{\"city\": \"Bern\", \"zip\": 1}".as_slice()));
    assert_eq!(row[3].as_deref(), Some(598_397_849_183_000_i64.to_be_bytes().as_slice()));
    assert_eq!(row[4].as_deref(), Some(0x059f_36b4_87a3_44ab_83d2_6619_7583_0a7d_u128.to_be_bytes().as_slice()));
    assert_eq!(row[5].as_deref(), Some("logins".as_bytes()));
    let keyring = Keyring::from_json(KEYRING).unwrap();
    let masked = String::from_utf8(row[0].clone().unwrap()).unwrap();
    assert_eq!(*keyring.recover("customer.mail", &masked).unwrap(), "a@b.c");

    for (body, reason) in [
        (r#"{"customer": {"mail": "\ud800"}}"#, "body is not JSON"),
        (r#"{"customer": null}"#, "customer.mail is missing"),
        (r#"{"customer": "me"}"#, "customer.mail is not inside an object"),
        (r#"{"customer": {"mail": "a@b.c", "address": 1}}"#, "customer.address.city is not inside an object"),
        (r#"{"customer": {"mail": "a@b.c"}, "customer": {}}"#, "customer.mail is given twice"),
        (r#"{"customer": {}, "customer": {"mail": "a@b.c"}}"#, "customer.mail is given twice"),
        (
            r#"{"customer": {"mail": "a@b.c", "address": {}, "address": {"city": "x"}}}"#,
            "customer.address.city is given twice",
        ),
    ] {
        assert_eq!(row_of(&mapping, body).unwrap_err(), reason, "{body}");
    }
    let row = row_of(&mapping, r#"{"customer": {"mail": "a@b.c", "address": null}}"#).unwrap();
    assert_eq!((row[1].clone(), row[2].clone()), (None, None));
}

#[test]
fn an_sns_notification_is_unwrapped_if_declared() {
    let mapping = format!("unwrap = \"sns\"\n{BUILT_IN}");
    let mapping = Mapping::from_toml(&mapping, "m").unwrap();
    let wrapped = serde_json::json!({"Type": "Notification", "TopicArn": "arn:aws:sns:eu-west-1:1:t", "Message": GOOD});
    assert_eq!(row_of(&mapping, &wrapped.to_string()), row_of(&Mapping::built_in().unwrap(), GOOD));
    let bare = row_of(&mapping, GOOD).unwrap_err();
    assert_eq!(bare, "body is not an SNS notification, which `unwrap = \"sns\"` expects");
}

#[test]
fn a_mapping_that_breaks_a_rule_is_refused_with_its_place() {
    let plain = |more: &str| {
        format!("table = \"t\"\n[[column]]\nname = \"c\"\nfrom = \"f\"\nkeep = \"plain\"\ntype = \"text\"\n{more}")
    };
    let masked =
        |more: &str| format!("table = \"t\"\n[[column]]\nname = \"c\"\nfrom = \"f\"\nkeep = \"masked\"\n{more}");
    for (text, position, message) in [
        ("table = 1".to_owned(), (1, 9), "invalid type"),
        ("table = \"t\"".to_owned(), (1, 9), "there is no [[column]]"),
        (plain("").replace("[[column]]", "[column]"), (2, 1), "in double brackets"),
        (plain("unwrap = \"sns\""), (7, 1), "before the first [[column]]"),
        (plain("").replace("\"t\"", "\"etl_ledger\""), (1, 9), "login-etl's own tables"),
        (plain("").replace("\n[[", "\nretention_days = 0\n[["), (2, 18), "from 1 to 36500"),
        (plain("").replace("\n[[", "\nretention_days = 30\n[["), (2, 18), "no column of type \"date\""),
        ("table = \"a.b.c\"\n[[column]]\nname = \"c\"".to_owned(), (1, 9), "must be \"name\" or \"schema.name\""),
        (plain("oops = 1"), (7, 1), "unknown field `oops`"),
        (plain("").replace("keep = \"plain\"\n", ""), (3, 8), "has no `keep`"),
        (plain("").replace("type = \"text\"\n", ""), (3, 8), "has no `type`"),
        (plain("").replace("from = \"f\"\n", ""), (3, 8), "has no source"),
        (plain("value = \"queue\""), (7, 9), "both `from` and `value`"),
        (plain("").replace("\"f\"", "\"f..g\""), (4, 8), "single dots"),
        (plain("").replace("\"text\"", "\"varchar\""), (6, 8), "unknown variant `varchar`"),
        (plain("convert = \"epoch-millis\""), (7, 11), "this conversion does not produce text"),
        (plain("max_length = 0"), (7, 14), "from 1 to 10485760"),
        (plain("").replace("\"c\"", "\"ctid\""), (3, 8), "reserves this name"),
        (plain("").replace("\"f\"", "\"f[0]\""), (4, 8), "elements of an array"),
        (
            masked("") + "[[column]]\nname = \"d\"\nfrom = \"f\"\nkeep = \"masked\"\nnormalize = \"trim\"",
            (7, 8),
            "masks the field \"f\" differently",
        ),
        (plain("strict = true"), (7, 10), "needs `normalize"),
        (plain("also_plain = true"), (7, 14), "no other column masks"),
        (plain("normalize = \"upper\""), (7, 13), "a list of them"),
        (masked("type = \"integer\""), (6, 8), "a masked column must be \"text\""),
        (masked("max_length = 9"), (6, 14), "remove `max_length`"),
        (masked("") + "[[column]]\nname = \"c\"\nvalue = \"queue\"\ntype = \"text\"", (7, 8), "is declared twice"),
        (
            masked("") + "[[column]]\nname = \"d\"\nfrom = \"f\"\nkeep = \"plain\"\ntype = \"text\"",
            (7, 8),
            "shows the field \"f\"",
        ),
        (
            masked("").replace("\"f\"", "\"f.g\"")
                + "[[column]]\nname = \"d\"\nfrom = \"f\"\nkeep = \"plain\"\ntype = \"jsonb\"",
            (7, 8),
            "shows the field \"f.g\"",
        ),
        (
            "table = \"t\"\n[[column]]\nname = \"c\"\nvalue = \"sent-date\"\ntype = \"text\"".to_owned(),
            (5, 8),
            "the type of sent-date must be \"date\"",
        ),
    ] {
        let error = Mapping::from_toml(&text, "m").unwrap_err();
        assert!(error.message.contains(message), "{text}\n{error}");
        assert_eq!(error.position, Some(position), "{text}\n{error}");
    }
    let allowed =
        masked("") + "[[column]]\nname = \"d\"\nfrom = \"f\"\nkeep = \"plain\"\ntype = \"text\"\nalso_plain = true";
    assert!(Mapping::from_toml(&allowed, "m").is_ok());
}

#[test]
fn common_bodies_are_scanned() {
    let mapping = Mapping::built_in().unwrap();
    let texts = [1, 15, 16, 17, 33].map(|len| format!("\"{}\"", "x".repeat(len)));
    let texts = texts.iter().map(String::as_str).chain(["null", "\"é🦀\"", "\"\""]);
    for text in texts.chain(["7", "{\"a\": [true, \"b\"]}"]) {
        for body in [with("device_id", Some(text)), with("another", Some(text))] {
            for body in [body.clone(), body.replace(':', ": ").replace(',', " , ")] {
                let scanned = mapping.fields.scanned(&serde_json::to_string(&body).unwrap()).is_some();
                let is_text = text == "null" || text.starts_with('"');
                assert_eq!(scanned, is_text || body.contains("another"), "{body}");
            }
        }
    }
}

#[test]
fn scanner_and_parser_agree() {
    let mapping = r#"
        table = "t"
        [[column]]
        name = "a"
        from = "a"
        keep = "plain"
        type = "text"
        optional = true
        [[column]]
        name = "b"
        from = "b.c"
        keep = "plain"
        type = "integer"
        optional = true
        [[column]]
        name = "d"
        from = "b.d"
        keep = "plain"
        type = "boolean"
        optional = true"#;
    let mapping = Mapping::from_toml(mapping, "m").unwrap();
    let body = r#"{"a": "é", "b": {"c": -12, "x": [1, {}], "d": true}, "y": null}"#;
    assert!(mapping.fields.scanned(&serde_json::to_string(body).unwrap()).is_some());
    // Each character removed or replaced; `row_of` compares scanner and parser.
    for (position, character) in body.char_indices() {
        for put in ["", "\"", "\\", "{", "}", "[", "]", ",", ":", " ", "\n", "\0", "n", "0", "-", ".", "é"] {
            let body = format!("{}{put}{}", &body[..position], &body[position + character.len_utf8()..]);
            drop(row_of(&mapping, &body));
        }
    }
}
