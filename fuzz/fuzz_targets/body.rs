//! Any body: refused, or masked; its content never shows; and the same comes of it however it stands in the event.
#![no_main]

use std::{sync::LazyLock, time::SystemTime};

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;

use self::{
    login::{AppVersionEncoding, Day, Login, Row},
    mask::Keyring,
};

#[allow(dead_code, reason = "used by the product")]
#[path = "../../src/login.rs"]
mod login;
#[allow(dead_code, reason = "used by the product")]
#[path = "../../src/mask.rs"]
mod mask;
#[allow(dead_code, reason = "used by the product")]
#[path = "../../src/scan.rs"]
mod scan;

static KEYRINGS: LazyLock<[Keyring; 2]> = LazyLock::new(|| {
    [
        r#"{"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"}"#,
        r#"{"active": "k", "keys": {"k": {"cipher": "aes-siv",
            "key": "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"}}}"#,
    ]
    .map(|text| Keyring::from_json(text).expect("a keyring"))
});

fuzz_target!(|text: &str| {
    // As a body, and as what stands between the quotes of one.
    for json in [serde_json::to_string(text).expect("a string"), format!("\"{text}\"")] {
        let Ok(body) = serde_json::from_str::<String>(&json) else { continue };
        for encoding in [AppVersionEncoding::Digits, AppVersionEncoding::Ordered] {
            for keyring in &*KEYRINGS {
                check(&body, &json, encoding, keyring);
            }
        }
    }
});

fn check(body: &str, json: &str, encoding: AppVersionEncoding, keyring: &Keyring) {
    let (today, mut buffer) = (Day::of(SystemTime::UNIX_EPOCH), BytesMut::new());
    let content = |row: Row| {
        let mut content = BytesMut::new();
        row.copy(&mut content);
        content
    };
    let login = Login::parse(body, encoding).and_then(|login| {
        assert_eq!(format!("{login:?}"), "Login { .. }");
        login.mask(keyring, today, &mut buffer)
    });
    assert_eq!(Row::of(json, encoding, keyring, today, &mut buffer).map(content), login.map(content));
}
