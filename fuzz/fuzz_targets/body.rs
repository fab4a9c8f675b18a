//! Any body: refused, or masked; and its content never shows.
#![no_main]

use std::{sync::LazyLock, time::SystemTime};

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;

use self::{
    login::{AppVersionEncoding, Day, Login},
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

fuzz_target!(|body: &str| {
    for encoding in [AppVersionEncoding::Digits, AppVersionEncoding::Ordered] {
        for keyring in &*KEYRINGS {
            if let Ok(login) = Login::parse(body, encoding) {
                let shown = format!("{login:?}");
                assert_eq!(shown, "Login { .. }");
                let _ = login.mask(keyring, Day::of(SystemTime::now()), &mut BytesMut::new());
            }
        }
    }
});
