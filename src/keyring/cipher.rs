//! The ciphers.

use std::fmt;

use aes::cipher::{
    BlockCipherDecrypt, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt, BlockSizeUser, InnerIvInit, KeyInit,
    array::{Array, typenum::U16},
    block_padding::Pkcs7,
};
use aes_siv::siv::{Aes128Siv, Aes256Siv};
use hmac::{Hmac, Mac};
use sha2::Sha256;
use zeroize::Zeroizing;

use super::{KeyringError, MASKED_MAX};

/// Bytes of an `aes-siv` mask's tag, which precedes the ciphertext.
const TAG_LEN: usize = 16;
/// Most bytes of a ciphertext: a value of [`MASKED_MAX`] bytes, and a block of padding or a tag.
pub(super) const CIPHERTEXT_MAX: usize = MASKED_MAX + 16;
/// An `aes-cbc` key without an IV uses this block, encrypted under the key, as its IV.
const IV_LABEL: [u8; 16] = *b"login-etl/cbc-iv";

/// A key with its cipher. `Debug` shows only the cipher's name.
pub(super) struct Key(pub(super) Box<dyn Cipher + Send + Sync>);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name())
    }
}

pub(super) trait Cipher {
    fn name(&self) -> &'static str;
    /// Masks at most [`MASKED_MAX`] bytes into the buffer, without allocating.
    fn encrypt<'a>(&self, field: &str, plain: &[u8], buffer: &'a mut [u8; CIPHERTEXT_MAX]) -> &'a [u8];
    fn decrypt(&self, field: &str, ciphertext: &[u8]) -> Option<Vec<u8>>;
}

pub(super) type Iv = Array<u8, U16>;

/// AES-CBC with PKCS#7 padding and one IV for all values. Holds the key schedule, which the `aes` crate zeroizes on drop.
pub(super) struct Cbc<C> {
    aes: C,
    iv: Iv,
}

impl<C: BlockCipherEncrypt + BlockSizeUser<BlockSize = U16> + KeyInit> Cbc<C> {
    pub(super) fn new(key: &[u8], iv: Option<Iv>) -> Result<Self, KeyringError> {
        let aes = C::new_from_slice(key).map_err(|_| KeyringError::CbcKey)?;
        let iv = iv.unwrap_or_else(|| {
            let mut block = Array(IV_LABEL);
            aes.encrypt_block(&mut block);
            block
        });
        Ok(Self { aes, iv })
    }
}

impl<C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16>> Cipher for Cbc<C> {
    fn name(&self) -> &'static str {
        "aes-cbc"
    }

    #[expect(clippy::expect_used, reason = "the buffer has room for the padding of the longest value")]
    fn encrypt<'a>(&self, _field: &str, plain: &[u8], buffer: &'a mut [u8; CIPHERTEXT_MAX]) -> &'a [u8] {
        cbc::Encryptor::inner_iv_init(&self.aes, &self.iv).encrypt_padded_b2b::<Pkcs7>(plain, buffer).expect("room")
    }

    fn decrypt(&self, _field: &str, ciphertext: &[u8]) -> Option<Vec<u8>> {
        cbc::Decryptor::inner_iv_init(&self.aes, &self.iv).decrypt_padded_vec::<Pkcs7>(ciphertext).ok()
    }
}

/// AES-SIV under a key of 32 bytes (AES-128) or 64 (AES-256), with the field's name as its only header.
pub(super) struct Siv(pub(super) Zeroizing<Vec<u8>>);

impl Cipher for Siv {
    fn name(&self) -> &'static str {
        "aes-siv"
    }

    #[expect(clippy::expect_used, reason = "it fails on more than 126 headers only, and on no other key length")]
    fn encrypt<'a>(&self, field: &str, plain: &[u8], buffer: &'a mut [u8; CIPHERTEXT_MAX]) -> &'a [u8] {
        let ciphertext = &mut buffer[..TAG_LEN + plain.len()];
        let (tag, text) = ciphertext.split_at_mut(TAG_LEN);
        text.copy_from_slice(plain);
        let made = match Aes256Siv::new_from_slice(&self.0) {
            Ok(mut siv) => siv.encrypt_inout_detached([field], text.into()),
            Err(_) => {
                Aes128Siv::new_from_slice(&self.0).expect("32 bytes").encrypt_inout_detached([field], text.into())
            }
        };
        tag.copy_from_slice(&made.expect("one header"));
        ciphertext
    }

    fn decrypt(&self, field: &str, ciphertext: &[u8]) -> Option<Vec<u8>> {
        match Aes256Siv::new_from_slice(&self.0) {
            Ok(mut siv) => siv.decrypt([field], ciphertext).ok(),
            Err(_) => Aes128Siv::new_from_slice(&self.0).ok()?.decrypt([field], ciphertext).ok(),
        }
    }
}

pub(super) const HMAC: &str = "hmac-sha256";
/// A key shorter than the output weakens HMAC, and a key longer than a SHA-256 block is hashed first (RFC 2104).
pub(super) const HMAC_KEY_MIN: usize = 32;
pub(super) const HMAC_KEY_MAX: usize = 64;

/// HMAC-SHA-256 of the field's name, a zero byte and the value. Holds the keyed hash state, which is zeroized on drop.
pub(super) struct OneWay(Hmac<Sha256>);

impl OneWay {
    pub(super) fn new(key: &[u8]) -> Result<Self, KeyringError> {
        Hmac::new_from_slice(key).map(Self).map_err(|_| KeyringError::HmacKey)
    }
}

impl Cipher for OneWay {
    fn name(&self) -> &'static str {
        HMAC
    }

    fn encrypt<'a>(&self, field: &str, plain: &[u8], buffer: &'a mut [u8; CIPHERTEXT_MAX]) -> &'a [u8] {
        let mac = self.0.clone().chain_update(field).chain_update([0]).chain_update(plain).finalize().into_bytes();
        let masked = &mut buffer[..mac.len()];
        masked.copy_from_slice(&mac);
        masked
    }

    fn decrypt(&self, _field: &str, _ciphertext: &[u8]) -> Option<Vec<u8>> {
        None
    }
}
