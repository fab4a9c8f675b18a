//! Any body, under the mapping that ships and under one of all types, is refused or becomes a row of all columns. The result does
//! not depend on how the event escapes the body.
#![no_main]

use std::{sync::LazyLock, time::SystemTime};

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use login_etl::{
    keyring::Keyring,
    mapping::{Envelope, Mapping},
};

static KEYRINGS: LazyLock<[Keyring; 2]> = LazyLock::new(|| {
    [
        r#"{"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"}"#,
        r#"{"active": "k", "keys": {"k": {"cipher": "aes-siv",
            "key": "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"}}}"#,
    ]
    .map(|text| Keyring::from_json(text).expect("a keyring"))
});

static MAPPINGS: LazyLock<[Mapping; 2]> = LazyLock::new(|| {
    let all = Mapping::from_toml(include_str!("../all_types.toml"), "all_types.toml").expect("a mapping");
    [Mapping::built_in().expect("a mapping"), all]
});

fuzz_target!(|text: &str| {
    // As a body, and as the raw text between a body's quotes.
    for json in [serde_json::to_string(text).expect("a string"), format!("\"{text}\"")] {
        let Ok(body) = serde_json::from_str::<String>(&json) else { continue };
        check(&body, &json);
    }
});

fn check(body: &str, json: &str) {
    let now = SystemTime::UNIX_EPOCH;
    let envelope = Envelope { message_id: "059f36b4-87a3-44ab-83d2-661975830a7d", sent: None, queue: None, now };
    let mut buffer = BytesMut::new();
    for mapping in &*MAPPINGS {
        for keyring in &*KEYRINGS {
            let row = mapping.row(body, &envelope, keyring, &mut buffer);
            assert_eq!(mapping.row_of_json_string(json, &envelope, keyring, &mut buffer), row);
            if let Ok(row) = row {
                assert_eq!(row.cells().count(), mapping.columns().len());
            }
        }
    }
}
