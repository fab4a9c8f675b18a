//! Any text as a mapping is refused with a place in it, or is a mapping whose rows have all of its columns.
#![no_main]

use std::{sync::LazyLock, time::SystemTime};

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use login_etl::{
    keyring::Keyring,
    mapping::{Envelope, Mapping},
};

static KEYRING: LazyLock<Keyring> = LazyLock::new(|| {
    let text = r#"{"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"}"#;
    Keyring::from_json(text).expect("a keyring")
});

fuzz_target!(|input: (&str, &str)| {
    let (text, body) = input;
    match Mapping::from_toml(text, "fuzz.toml") {
        Ok(mapping) => {
            assert!(!mapping.columns().is_empty());
            let envelope = Envelope {
                message_id: "059f36b4-87a3-44ab-83d2-661975830a7d",
                sent: None,
                queue: None,
                now: SystemTime::UNIX_EPOCH,
            };
            if let Ok(row) = mapping.row(body, &envelope, &KEYRING, &mut BytesMut::new()) {
                assert_eq!(row.cells().count(), mapping.columns().len());
            }
        }
        Err(error) => {
            let (line, column) = error.position.expect("a place");
            let line = text.split('\n').nth(line - 1).expect("a line of the text");
            assert!(column <= line.chars().count() + 1);
        }
    }
});
