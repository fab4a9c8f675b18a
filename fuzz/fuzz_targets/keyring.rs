//! Any secret is refused, or is a keyring that recovers what it masks, unless its active key is one-way. No masked value makes it panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use login_etl::keyring::Keyring;

fuzz_target!(|input: (&str, &str)| {
    let (text, value) = input;
    if let Ok(keyring) = Keyring::from_json(text) {
        let _ = keyring.recover("ip", value);
        if let Ok(masked) = keyring.mask("ip", value) {
            assert!(masked.as_str().len() <= 256);
            match keyring.recover("ip", masked.as_str()) {
                Ok(recovered) => assert_eq!(recovered.as_str(), value),
                Err(_) => assert!(keyring.is_one_way(keyring.active())),
            }
        }
    }
});
