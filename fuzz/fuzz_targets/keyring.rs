//! Any secret and any masked value: refused, or a keyring that recovers what it masks.
#![no_main]

use libfuzzer_sys::fuzz_target;
use login_etl::keyring::Keyring;

fuzz_target!(|input: (&str, &str)| {
    let (text, value) = input;
    if let Ok(keyring) = Keyring::from_json(text) {
        let _ = keyring.recover("ip", value);
        if let Ok(masked) = keyring.mask("ip", value) {
            assert!(masked.as_str().len() <= 256);
            let recovered = keyring.recover("ip", masked.as_str()).expect("its own mask");
            assert_eq!(recovered.as_str(), value);
        }
    }
});
