//! The keyring masks personal values, and recovers them.
//!
//! Masking is deterministic, so equal values have equal masks. The ciphers:
//! - AES-CBC with a fixed IV writes the same bytes as the original script;
//! - AES-SIV (RFC 5297) also authenticates, and gives a value different masks in different columns;
//! - HMAC-SHA-256 cannot be reversed.

mod cipher;
mod text;

use std::{collections::BTreeMap, fmt, sync::Arc};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use bytes::{BufMut, BytesMut};
use zeroize::Zeroizing;

use self::{
    cipher::{CIPHERTEXT_MAX, HMAC, Key},
    text::KeyringText,
};

/// Most characters of a masked value: the width of its column.
pub const MASKED_MAX: usize = 256;
/// Most characters of a key id.
pub const KEY_ID_MAX: usize = 32;

/// Which of the ring's two keys in use masks a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// The active key. Its masks are recoverable, unless it is a one-way key itself.
    Recoverable,
    /// The key for one-way masks.
    OneWay,
}

/// A masked value, at most 256 ASCII characters. Only a [`Keyring`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Masked(String);

impl Masked {
    /// The value as the column holds it: `<base64>`, or `<key id>:<base64>` under a named key.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The masked value would not fit its column. The message's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too long to be masked into {MASKED_MAX} characters")]
pub struct TooLong;

/// The value cannot be recovered: it is not a mask, made under a key that is not in the ring, or damaged.
/// There is one error for all cases, so that it tells nothing about the plain value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this value cannot be recovered with this keyring")]
pub struct Unrecoverable;

/// Why the text of a secret is not a keyring. The operator's fault. No variant holds any part of a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyringError {
    /// Not JSON, or neither of the two documented forms.
    #[error(
        "is not a keyring (line {line}, column {column}): expected \
         {{\"key\": \"<hex>\", \"iv\": \"<hex>\"}} or {{\"active\": \"<id>\", \"keys\": {{\"<id>\": {{…}}}}}}"
    )]
    Shape {
        /// Line of the error in the text, from 1.
        line: usize,
        /// Column in that line, from 1.
        column: usize,
    },
    /// "active" names no key.
    #[error("has no key with the id that \"active\" names")]
    NoActiveKey,
    /// "one_way" names no key, or a key of another cipher.
    #[error("has no hmac-sha256 key with the id that \"one_way\" names")]
    NoHmacKey,
    /// The mapping has one-way masks, but the ring has no key for them.
    #[error(
        "has no \"one_way\" key, which the mapping needs: run `etlctl keys add ID --cipher hmac-sha256`, then \
         `etlctl keys activate ID --one-way`"
    )]
    NoOneWayKey,
    /// A key id breaks the rule for ids.
    #[error("has a key id that is not 1 to {KEY_ID_MAX} characters of a-z 0-9 . _ -")]
    KeyId,
    /// An `aes-cbc` key of a wrong length, or not hex.
    #[error("has an aes-cbc key that is not 32, 48 or 64 hex digits (AES-128, -192, -256)")]
    CbcKey,
    /// An IV of a wrong length, or not hex.
    #[error("has an iv that is not 32 hex digits")]
    Iv,
    /// An `aes-siv` key of a wrong length, or not hex.
    #[error("has an aes-siv key that is not 64 or 128 hex digits")]
    SivKey,
    /// An `hmac-sha256` key of a wrong length, or not hex.
    #[error("has an hmac-sha256 key that is not 64 to 128 hex digits")]
    HmacKey,
    /// An IV for a key of a cipher that has none.
    #[error("has an iv for an aes-siv or hmac-sha256 key, which takes none")]
    NoIv,
}

/// The keys by id: one is active, and one may be for one-way masks. The unnamed key has the empty id. `Debug` shows only ids and
/// ciphers.
pub struct Keyring {
    active: String,
    active_key: Arc<Key>,
    one_way: Option<(String, Arc<Key>)>,
    keys: BTreeMap<String, Arc<Key>>,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyring").field("active", &self.active).field("keys", &self.keys).finish_non_exhaustive()
    }
}

impl Keyring {
    /// Reads a keyring from the text of its secret, in either form.
    ///
    /// # Errors
    /// [`KeyringError`], the operator's fault.
    pub fn from_json(text: &str) -> Result<Self, KeyringError> {
        let KeyringText { active, one_way, keys } = KeyringText::from_json(text)?;
        let keys = keys
            .into_iter()
            .map(|(id, key)| if is_key_id(&id) { Ok((id, Arc::new(key.parse()?))) } else { Err(KeyringError::KeyId) })
            .collect::<Result<BTreeMap<_, _>, _>>()?;
        let active_key = Arc::clone(keys.get(&active).ok_or(KeyringError::NoActiveKey)?);
        let one_way = match one_way {
            None => None,
            Some(id) => {
                let key = keys.get(&id).filter(|key| key.0.name() == HMAC).map(Arc::clone);
                Some((id, key.ok_or(KeyringError::NoHmacKey)?))
            }
        };
        Ok(Self { active, active_key, one_way, keys })
    }

    /// The ring itself, if it has the keys that these masks need.
    ///
    /// # Errors
    /// [`KeyringError::NoOneWayKey`], the operator's fault.
    pub fn for_masks(self, mut masks: impl Iterator<Item = Mask>) -> Result<Self, KeyringError> {
        if self.one_way.is_none() && masks.any(|mask| mask == Mask::OneWay) {
            return Err(KeyringError::NoOneWayKey);
        }
        Ok(self)
    }

    /// The id of the key that new one-way masks are made under.
    pub fn one_way(&self) -> Option<&str> {
        self.one_way.as_ref().map(|(id, _)| id.as_str())
    }

    /// The id of the key that new values are masked under.
    pub fn active(&self) -> &str {
        &self.active
    }

    /// Every key's id and the name of its cipher.
    pub fn keys(&self) -> impl Iterator<Item = (&str, &'static str)> {
        self.keys.iter().map(|(id, key)| (id.as_str(), key.0.name()))
    }

    /// Whether masks made under the key with this id can never be recovered.
    pub fn is_one_way(&self, id: &str) -> bool {
        self.keys.get(id).is_some_and(|key| key.0.name() == HMAC)
    }

    /// Most bytes of a value whose mask under the active key fits its column. The mask includes the key id.
    pub fn longest(&self) -> usize {
        (0..=MASKED_MAX).rev().find(|&bytes| self.mask("", &"x".repeat(bytes)).is_ok()).unwrap_or_default()
    }

    /// Masks `value` under the active key. `field` is the field's name, on which all masks but `aes-cbc` depend.
    ///
    /// # Errors
    /// [`TooLong`], the message's fault.
    pub fn mask(&self, field: &str, value: &str) -> Result<Masked, TooLong> {
        mask(&self.active, &self.active_key, field, value)
    }

    /// Masks `value` in this way, and appends it to `text`. The ring must have passed [`for_masks`](Self::for_masks).
    ///
    /// # Errors
    /// [`TooLong`], the message's fault. The end of `text` is then not a valid mask.
    pub fn mask_onto(&self, text: &mut BytesMut, way: Mask, field: &str, value: &str) -> Result<(), TooLong> {
        match (way, &self.one_way) {
            (Mask::Recoverable, _) => append(text, &self.active, &self.active_key, field, value),
            (Mask::OneWay, Some((id, key))) => append(text, id, key, field, value),
            (Mask::OneWay, None) => Err(TooLong),
        }
    }

    /// Masks `value` under every key that may have masked it in this way, since rows are of different ages. Leaves out a key
    /// under which the mask is too long.
    pub fn mask_under_all(&self, way: Mask, field: &str, value: &str) -> Vec<(&str, Masked)> {
        let keys = self.keys.iter().filter(|(_, key)| way == Mask::Recoverable || key.0.name() == HMAC);
        let masks = keys.map(|(id, key)| (id.as_str(), mask(id, key, field, value)));
        masks.filter_map(|(id, masked)| Some((id, masked.ok()?))).collect()
    }

    /// The plain value of `masked`, made under any key of the ring.
    ///
    /// # Errors
    /// [`Unrecoverable`], for whatever reason.
    pub fn recover(&self, field: &str, masked: &str) -> Result<Zeroizing<String>, Unrecoverable> {
        let (id, encoded) = split(masked);
        let ciphertext = BASE64.decode(encoded).map_err(|_| Unrecoverable)?;
        let key = self.keys.get(id).ok_or(Unrecoverable)?;
        let plain = key.0.decrypt(field, &ciphertext).ok_or(Unrecoverable)?;
        String::from_utf8(plain).map(Zeroizing::new).map_err(|_| Unrecoverable)
    }
}

/// The key id in a mask; empty for the unnamed key.
pub fn key_id(masked: &str) -> &str {
    split(masked).0
}

fn split(masked: &str) -> (&str, &str) {
    masked.split_once(':').unwrap_or(("", masked))
}

fn mask(id: &str, key: &Key, field: &str, value: &str) -> Result<Masked, TooLong> {
    let mut text = BytesMut::with_capacity(MASKED_MAX);
    append(&mut text, id, key, field, value)?;
    String::from_utf8(text.into()).map(Masked).map_err(|_| TooLong)
}

fn append(text: &mut BytesMut, id: &str, key: &Key, field: &str, value: &str) -> Result<(), TooLong> {
    // hmac-sha256 could take longer values. The limit bounds the work that a hostile value can cause.
    if value.len() > MASKED_MAX {
        return Err(TooLong);
    }
    let start = text.len();
    if !id.is_empty() {
        text.extend_from_slice(id.as_bytes());
        text.put_u8(b':');
    }
    let mut buffer = [0; CIPHERTEXT_MAX];
    let ciphertext = key.0.encrypt(field, value.as_bytes(), &mut buffer);
    let (encoded, end) = (text.len(), text.len() + ciphertext.len().div_ceil(3) * 4);
    text.resize(end, 0);
    BASE64.encode_slice(ciphertext, &mut text[encoded..]).map_err(|_| TooLong)?;
    if end - start > MASKED_MAX { Err(TooLong) } else { Ok(()) }
}

/// Whether this is a valid key id. The empty id, of the unnamed key, is valid.
pub fn is_key_id(id: &str) -> bool {
    id.len() <= KEY_ID_MAX && id.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NIST SP 800-38A's AES-256 key and counter block, here as key and IV.
    const ONE_KEY: &str = r#"{"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
                              "iv": "000102030405060708090a0b0c0d0e0f"}"#;
    const RING: &str = r#"{"active": "siv", "keys": {
        "": {"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
             "iv": "000102030405060708090a0b0c0d0e0f"},
        "2026-11": {"cipher": "aes-cbc", "key": "2b7e151628aed2a6abf7158809cf4f3c"},
        "siv": {"cipher": "aes-siv", "key": "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"}}}"#;

    fn ring(active: &str) -> Keyring {
        Keyring::from_json(&RING.replace(r#""active": "siv""#, &format!(r#""active": "{active}""#))).unwrap()
    }

    #[test]
    fn every_key_of_the_ring_recovers_what_it_masked() {
        let masks = ["", "2026-11", "siv"].map(|id| ring(id).mask("ip", "199.172.111.135").unwrap());
        assert!(!masks[0].as_str().contains(':'), "an unnamed key's masks are bare");
        assert!(masks[1].as_str().starts_with("2026-11:"));
        assert!(masks[2].as_str().starts_with("siv:"));
        for masked in &masks {
            assert_eq!(*ring("siv").recover("ip", masked.as_str()).unwrap(), "199.172.111.135");
        }
        assert_eq!(masks[0], Keyring::from_json(ONE_KEY).unwrap().mask("ip", "199.172.111.135").unwrap());
    }

    #[test]
    fn equal_values_have_equal_masks_and_siv_keeps_the_columns_apart() {
        let siv = ring("siv");
        assert_eq!(siv.mask("ip", "x"), siv.mask("ip", "x"));
        assert_ne!(siv.mask("ip", "x"), siv.mask("device_id", "x"));
        assert_ne!(siv.mask("ip", "x"), siv.mask("ip", "y"));
    }

    #[test]
    fn all_that_is_unrecoverable_reads_alike() {
        let ring = ring("siv");
        let siv = ring.mask("ip", "199.172.111.135").unwrap();
        let moved = ring.recover("device_id", siv.as_str());
        let damaged = ring.recover("ip", &siv.as_str().replace("siv:", "siv:AAAA"));
        for result in [
            moved,
            damaged,
            ring.recover("ip", "gone:AAAA"),
            ring.recover("ip", "AAAA"),
            ring.recover("ip", ""),
            ring.recover("ip", "not base64!"),
            ring.recover("ip", "AAAAAAAAAAAAAAAAAAAAAA=="),
        ] {
            assert_eq!(result, Err(Unrecoverable));
        }
    }

    #[test]
    fn the_longest_value_that_fits_its_column_is_masked() {
        for (active, longest) in [("", 191), ("2026-11", 175), ("siv", 173)] {
            let ring = ring(active);
            assert!(ring.mask("ip", &"x".repeat(longest)).unwrap().as_str().len() <= 256, "{active}");
            assert_eq!(ring.mask("ip", &"x".repeat(longest + 1)), Err(TooLong), "{active}");
        }
    }

    #[test]
    fn a_secret_that_is_no_keyring_says_what_is_wrong() {
        use KeyringError::{CbcKey, HmacKey, Iv, KeyId, NoActiveKey, NoHmacKey, NoIv, Shape, SivKey};
        let start = Shape { line: 1, column: 1 };
        for (text, error) in [
            ("hunter2", start.clone()),
            ("{}", start.clone()),
            (r#"{"iv": "000102030405060708090a0b0c0d0e0f"}"#, start.clone()),
            (r#"{"key": "00", "active": "a", "keys": {}}"#, start),
            (r#"{"key": "00", "vi": "00"}"#, Shape { line: 1, column: 18 }),
            (r#"{"key": "2b7e151628aed2a6abf7158809cf4f3c", "iv": null}"#, Shape { line: 1, column: 54 }),
            (r#"{"active": "a", "keys": {"a": {"key": "00"}, "a": {"key": "00"}}}"#, Shape { line: 1, column: 64 }),
            (r#"{"key": "00"}"#, CbcKey),
            (r#"{"key": "zz7e151628aed2a6abf7158809cf4f3c"}"#, CbcKey),
            (r#"{"key": "2b7e151628aed2a6abf7158809cf4f3c", "iv": "00"}"#, Iv),
            (r#"{"active": "b", "keys": {"a": {"key": "2b7e151628aed2a6abf7158809cf4f3c"}}}"#, NoActiveKey),
            (
                r#"{"active": "a", "one_way": "a", "keys": {"a": {"key": "2b7e151628aed2a6abf7158809cf4f3c"}}}"#,
                NoHmacKey,
            ),
            (r#"{"active": "A", "keys": {"A": {"key": "2b7e151628aed2a6abf7158809cf4f3c"}}}"#, KeyId),
            (
                r#"{"active": "a", "keys": {"a": {"cipher": "aes-siv", "key": "2b7e151628aed2a6abf7158809cf4f3c"}}}"#,
                SivKey,
            ),
            (
                r#"{"active": "a", "keys": {"a": {"cipher": "aes-siv", "key": "00", "iv": "000102030405060708090a0b0c0d0e0f"}}}"#,
                NoIv,
            ),
            (r#"{"active": "a", "keys": {"a": {"cipher": "hmac-sha256", "key": "00"}}}"#, HmacKey),
        ] {
            assert_eq!(Keyring::from_json(text).unwrap_err(), error, "{text}");
        }
    }

    #[test]
    fn debug_shows_no_key() {
        assert_eq!(
            format!("{:?}", ring("siv")),
            r#"Keyring { active: "siv", keys: {"": aes-cbc, "2026-11": aes-cbc, "siv": aes-siv}, .. }"#
        );
    }
}
