//! The JSON text of a keyring, in either form.

use std::{collections::BTreeMap, fmt};

use aes::{Aes128, Aes192, Aes256};
use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, Visitor},
};
use zeroize::Zeroizing;

use super::{
    KeyringError,
    cipher::{Cbc, HMAC_KEY_MAX, HMAC_KEY_MIN, Iv, Key, OneWay, Siv},
};

/// What the text says: which key is active, which is for one-way masks, and the keys by id.
pub(super) struct KeyringText {
    pub(super) active: String,
    pub(super) one_way: Option<String>,
    pub(super) keys: BTreeMap<String, KeyText>,
}

impl KeyringText {
    pub(super) fn from_json(text: &str) -> Result<Self, KeyringError> {
        let text: EitherForm = serde_json::from_str(text)
            // The error itself may quote a key, so only its place is kept.
            .map_err(|error| KeyringError::Shape { line: error.line(), column: error.column() })?;
        match text {
            EitherForm { key: key @ Some(_), iv, active: None, one_way: None, keys: None } => {
                let key = KeyText { key, iv, ..KeyText::default() };
                Ok(Self { active: String::new(), one_way: None, keys: BTreeMap::from([(String::new(), key)]) })
            }
            EitherForm { key: None, iv: None, active: Some(active), one_way, keys: Some(keys) } => {
                Ok(Self { active, one_way, keys })
            }
            _ => Err(KeyringError::Shape { line: 1, column: 1 }),
        }
    }
}

/// Both forms at once, told apart by the fields that are set. A misspelt field is refused: an IV that is not read would silently
/// change every mask.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EitherForm {
    active: Option<String>,
    one_way: Option<String>,
    #[serde(default, deserialize_with = "keys_once")]
    keys: Option<BTreeMap<String, KeyText>>,
    #[serde(default, deserialize_with = "given")]
    key: Option<Zeroizing<String>>,
    #[serde(default, deserialize_with = "given")]
    iv: Option<Zeroizing<String>>,
}

/// Refuses `null`: an IV that is read as absent would change every mask.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Zeroizing<String>>, D::Error> {
    Zeroizing::deserialize(deserializer).map(Some)
}

/// Refuses a repeated id: one of the two keys would be lost silently.
fn keys_once<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<BTreeMap<String, KeyText>>, D::Error> {
    struct Keys;
    impl<'de> Visitor<'de> for Keys {
        type Value = BTreeMap<String, KeyText>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("keys by their ids")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut keys = BTreeMap::new();
            while let Some((id, key)) = map.next_entry()? {
                if keys.insert(id, key).is_some() {
                    return Err(A::Error::custom("an id twice"));
                }
            }
            Ok(keys)
        }
    }
    deserializer.deserialize_map(Keys).map(Some)
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct KeyText {
    #[serde(default)]
    cipher: CipherName,
    #[serde(default, deserialize_with = "given")]
    key: Option<Zeroizing<String>>,
    #[serde(default, deserialize_with = "given")]
    iv: Option<Zeroizing<String>>,
    /// When the key was made and replaced: for `etlctl` and people, not for the function.
    #[serde(rename = "created")]
    _created: Option<IgnoredAny>,
    #[serde(rename = "replaced")]
    _replaced: Option<IgnoredAny>,
}

#[derive(Default, Deserialize)]
enum CipherName {
    #[default]
    #[serde(rename = "aes-cbc")]
    Cbc,
    #[serde(rename = "aes-siv")]
    Siv,
    #[serde(rename = "hmac-sha256")]
    Hmac,
}

impl KeyText {
    pub(super) fn parse(&self) -> Result<Key, KeyringError> {
        let bytes = |text: &Zeroizing<String>| hex::decode(text.as_bytes()).map(Zeroizing::new).ok();
        let key = self.key.as_ref().and_then(bytes).unwrap_or_default();
        let iv = match &self.iv {
            None => None,
            Some(text) => {
                let iv = bytes(text).and_then(|iv| Iv::try_from(iv.as_slice()).ok());
                Some(iv.ok_or(KeyringError::Iv)?)
            }
        };
        Ok(Key(match (&self.cipher, key.len()) {
            (CipherName::Siv | CipherName::Hmac, _) if iv.is_some() => return Err(KeyringError::NoIv),
            (CipherName::Hmac, HMAC_KEY_MIN..=HMAC_KEY_MAX) => Box::new(OneWay::new(&key)?),
            (CipherName::Hmac, _) => return Err(KeyringError::HmacKey),
            (CipherName::Siv, 32 | 64) => Box::new(Siv(key)),
            (CipherName::Siv, _) => return Err(KeyringError::SivKey),
            (CipherName::Cbc, 16) => Box::new(Cbc::<Aes128>::new(&key, iv)?),
            (CipherName::Cbc, 24) => Box::new(Cbc::<Aes192>::new(&key, iv)?),
            (CipherName::Cbc, 32) => Box::new(Cbc::<Aes256>::new(&key, iv)?),
            (CipherName::Cbc, _) => return Err(KeyringError::CbcKey),
        }))
    }
}
