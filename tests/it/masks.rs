//! Compares masks with those of other tools, among them the original script's.

use std::process::Command;

use login_etl::keyring::Keyring;
use serde_json::json;

use crate::world::variable;

/// NIST SP 800-38A's AES-256 key; its first 32 and 48 digits serve as AES-128 and AES-192 keys.
const KEY: &str = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4";
const IV: &str = "000102030405060708090a0b0c0d0e0f";
/// RFC 5297's key of appendix A.1.
const SIV_KEY: &str = "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff";

fn mask(secret: &serde_json::Value, field: &str, value: &str) -> String {
    Keyring::from_json(&secret.to_string()).unwrap().mask(field, value).unwrap().as_str().to_owned()
}

fn siv(key: &str) -> serde_json::Value {
    json!({"active": "siv", "keys": {"siv": {"cipher": "aes-siv", "key": key}}})
}

/// Recorded from pycryptodome 3.23.
#[test]
fn masks_are_those_of_the_original_script() {
    let given = |digits| json!({"key": KEY[..digits], "iv": IV});
    let derived = |digits| json!({"key": KEY[..digits]});
    for (secret, value, masked) in [
        (given(32), "199.172.111.135", "0O9KyHGalcGZ/SO4SJOPLg=="),
        (given(32), "593-47-5928", "xnKBH53Sps61AZ54Mm/8gQ=="),
        (given(48), "199.172.111.135", "vb8Iu29ISTcxt/2b/L1r6g=="),
        (given(64), "199.172.111.135", "FGV999l/wJpqUDVxPK7Ouw=="),
        (given(64), "0123456789abcdef", "r3mC9nj0mL4FPw7Aa8VHyvgdq5Ai8QCZkc31oCqGSl0="),
        (given(64), "é", "/8NTVYdjGI1qQkt5klA2GQ=="),
        // Without an IV: AES of the block "login-etl/cbc-iv", here f54467a433cd0ee07b236395661c874d for 64 digits.
        (derived(32), "199.172.111.135", "PDN6Dhr2BXSj3GOyNOoeyg=="),
        (derived(48), "199.172.111.135", "mjinhB0wg9SBP460rB2kBA=="),
        (derived(64), "199.172.111.135", "VsnKWfChdfOL5rAf0MZF5g=="),
    ] {
        assert_eq!(mask(&secret, "ip", value), masked, "{secret} {value}");
    }
}

/// Recorded from pycryptodome 3.23.
#[test]
fn siv_masks_follow_rfc_5297_with_the_field_as_associated_data() {
    let long = format!("{SIV_KEY}{}", SIV_KEY.chars().rev().collect::<String>());
    for (key, field, masked) in [
        (SIV_KEY, "ip", "siv:TII6A2Gv6TswCF3MZA0ngt2QYayuT20qjkH0J/36cA=="),
        (SIV_KEY, "device_id", "siv:8VxLX9ZL6aJgYNHWTrbpnIuRh0RrlfwzMTsWBJ+qew=="),
    ] {
        assert_eq!(mask(&siv(key), field, "199.172.111.135"), masked);
    }
    let masked = mask(&siv(&long), "ip", "199.172.111.135");
    let keyring = Keyring::from_json(&siv(&long).to_string()).unwrap();
    assert_eq!(*keyring.recover("ip", &masked).unwrap(), "199.172.111.135");
}

/// Python's `hmac` makes the same masks, and the keyring cannot recover them.
#[test]
fn one_way_masks_are_the_mac_of_field_zero_byte_and_value() {
    const HMAC: &str = "
import sys, hmac; from base64 import b64encode
print('one-way:' + b64encode(hmac.digest(bytes.fromhex(sys.argv[1]), sys.argv[2].encode() + b'\\0' + sys.stdin.buffer.read(), 'sha256')).decode())";
    for key in [KEY.to_owned(), format!("{KEY}{KEY}")] {
        let secret = json!({"active": "one-way", "keys": {"one-way": {"cipher": "hmac-sha256", "key": key}}});
        for value in VALUES {
            let masked = mask(&secret, "ip", value);
            let mut command = Command::new(variable("PYTHON"));
            command.args(["-c", HMAC, &key, "ip"]);
            assert_eq!(masked, output(command, value));
            let keyring = Keyring::from_json(&secret.to_string()).unwrap();
            assert!(keyring.recover("ip", &masked).is_err() && keyring.is_one_way("one-way"));
        }
    }
}

/// Values that all tools mask: short, one block, longer, not ASCII.
const VALUES: [&str; 5] = ["199.172.111.135", "2001:db8::1", "593-47-5928", "0123456789abcdef", "é\"'$"];

#[test]
fn openssl_makes_the_same_masks() {
    for digits in [32, 48, 64] {
        for value in VALUES {
            let cipher = format!("-aes-{}-cbc", digits * 4);
            let mut command = Command::new("openssl");
            command.args(["enc", &cipher, "-K", &KEY[..digits], "-iv", IV, "-base64", "-A"]);
            let masked = output(command, value);
            assert_eq!(mask(&json!({"key": KEY[..digits], "iv": IV}), "ip", value), masked, "{digits} {value}");
        }
    }
}

#[test]
fn pycryptodome_makes_the_same_masks() {
    const CBC: &str = "
import sys; from base64 import b64encode; from Crypto.Cipher import AES; from Crypto.Util.Padding import pad
key, iv = map(bytes.fromhex, sys.argv[1:])
print(b64encode(AES.new(key, AES.MODE_CBC, iv).encrypt(pad(sys.stdin.buffer.read(), 16))).decode())";
    const SIV: &str = "
import sys; from base64 import b64encode; from Crypto.Cipher import AES
cipher = AES.new(bytes.fromhex(sys.argv[1]), AES.MODE_SIV); cipher.update(sys.argv[2].encode())
text, tag = cipher.encrypt_and_digest(sys.stdin.buffer.read())
print('siv:' + b64encode(tag + text).decode())";

    let python = variable("PYTHON");
    for value in VALUES {
        let mut command = Command::new(&python);
        command.args(["-c", CBC, KEY, IV]);
        assert_eq!(mask(&json!({"key": KEY, "iv": IV}), "ip", value), output(command, value), "{value}");
        let long = format!("{SIV_KEY}{KEY}");
        for key in [SIV_KEY, &long] {
            let mut command = Command::new(&python);
            command.args(["-c", SIV, key, "device_id"]);
            assert_eq!(mask(&siv(key), "device_id", value), output(command, value), "{value}");
        }
    }
}

/// Runs a tool on `input`, and returns its output.
pub fn output(mut command: Command, input: &str) -> String {
    use std::{io::Write, process::Stdio};
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the tool is on PATH");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{command:?} failed");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
