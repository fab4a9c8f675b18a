//! Edits the keyring's secret: reads it, changes it, and replaces only the version that was read.

use std::{collections::BTreeMap, mem, time::Duration};

use aws_sdk_secretsmanager::{Client, error::ProvideErrorMetadata};
use jiff::Timestamp;
use login_etl::keyring::Keyring;
use serde::{Deserialize, Deserializer, Serialize};
use zeroize::Zeroizing;

use crate::{
    output::{Failure, aws, failed},
    settings::Settings,
};

/// The secret's content, in the form for several keys. It is never shown. [`Keyring`] validates it.
#[derive(Deserialize, Serialize)]
pub struct Ring {
    /// The id of the key that new values are masked under.
    pub active: String,
    /// The id of the key that new one-way values are masked under.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub one_way: Option<String>,
    /// The keys by id.
    pub keys: BTreeMap<String, Key>,
}

#[derive(Deserialize, Serialize)]
pub struct Key {
    #[serde(skip_serializing_if = "Option::is_none")]
    cipher: Option<String>,
    key: Zeroizing<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    iv: Option<Zeroizing<String>>,
    /// The time when it was made.
    #[serde(default, deserialize_with = "time", skip_serializing_if = "Option::is_none")]
    pub created: Option<Timestamp>,
    /// The time when another key became active in its place.
    #[serde(default, deserialize_with = "time", skip_serializing_if = "Option::is_none")]
    pub replaced: Option<Timestamp>,
}

/// Prefix of the version labels that this tool sets.
const LABEL: &str = "ETLCTL-";

/// Label, without its prefix, of the version that still has a retired key.
pub fn retired(id: &str) -> String {
    format!("RETIRED-{}", if id.is_empty() { "unnamed" } else { id })
}

/// The secret, as its current version was read.
pub struct RingSecret {
    client: Client,
    id: String,
    version: String,
    /// The time when this version was written.
    pub written: Timestamp,
    /// The content, with any edits.
    pub ring: Ring,
}

impl RingSecret {
    /// Reads the current version.
    pub async fn read(settings: &Settings) -> Result<Self, Failure> {
        let id = settings.require("MASKING_SECRET_ID")?;
        // Validates it, with a clear error.
        settings.secrets().keyring(&id, &[]).await?;
        let client = Client::new(&settings.aws);
        let secret = client.get_secret_value().secret_id(&id).send().await.map_err(aws("read the keyring"))?;
        let text = Zeroizing::new(secret.secret_string.unwrap_or_default());
        let version = secret.version_id.ok_or_else(|| failed("the keyring's secret has no version"))?;
        let written =
            secret.created_date.and_then(|at| Timestamp::from_second(at.secs()).ok()).unwrap_or_else(Timestamp::now);
        // The form for several keys, or for one.
        let ring = serde_json::from_str::<Ring>(&text)
            .or_else(|_| {
                let key = serde_json::from_str::<Key>(&text)?;
                let key = Key { created: Some(written), ..key };
                Ok(Ring { active: String::new(), one_way: None, keys: BTreeMap::from([(String::new(), key)]) })
            })
            // The error itself may quote a key.
            .map_err(|_: serde_json::Error| failed("the keyring's secret has a form that this etlctl does not know"))?;
        Ok(Self { client, id, version, written, ring })
    }

    /// Labels the version that was read, so that Secrets Manager keeps it when it is neither current nor previous. Returns the
    /// label.
    pub async fn keep_as(&self, label: &str) -> Result<String, Failure> {
        let label = format!("{LABEL}{label}");
        let keep = self.client.update_secret_version_stage().secret_id(&self.id).version_stage(&label);
        let kept = keep.move_to_version_id(&self.version).send().await;
        kept.map(|_| label).map_err(aws("keep the current version of the keyring"))
    }

    /// Whether a label shows that a key with this id was retired.
    pub async fn was_retired(&self, id: &str) -> Result<bool, Failure> {
        let label = format!("{LABEL}{}", retired(id));
        let mut pages = self.client.list_secret_version_ids().secret_id(&self.id).into_paginator().send();
        while let Some(page) = pages.next().await {
            let page = page.map_err(aws("look for retired keys"))?;
            if page.versions().iter().any(|version| version.version_stages().contains(&label)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn current_version(&self) -> Option<String> {
        self.client.get_secret_value().secret_id(&self.id).send().await.ok()?.version_id
    }

    /// Makes the edited ring the current version. Fails if the version that was read is no longer the current one.
    pub async fn write(&self) -> Result<(), Failure> {
        let text = serde_json::to_string(&self.ring)
            .map(Zeroizing::new)
            .map_err(|_| failed("the keyring cannot be written"))?;
        Keyring::from_json(&text).map_err(|error| failed(format!("with this change, the keyring {error}")))?;
        // A label keeps the version until it is the current one. It is unique, so that no other writer moves it away.
        let version = hex::encode(random::<16>()?.as_ref());
        let pending = format!("{LABEL}{version}");
        let put = self.client.put_secret_value().secret_id(&self.id).client_request_token(&version);
        match put.secret_string(text.as_str()).version_stages(&pending).send().await {
            // The SDK retried after a lost answer, and the version exists already.
            Err(error) if error.code() == Some("ResourceExistsException") => {}
            put => drop(put.map_err(aws("write the keyring"))?),
        }
        let promote = self.client.update_secret_version_stage().secret_id(&self.id).version_stage("AWSCURRENT");
        let promoted = promote.move_to_version_id(&version).remove_from_version_id(&self.version).send().await;
        // After a success, this only tidies up; after a failure, it lets Secrets Manager delete the rejected version.
        let tidy = self.client.update_secret_version_stage().secret_id(&self.id).version_stage(&pending);
        drop(tidy.remove_from_version_id(&version).send().await);
        let Err(error) = promoted else { return Ok(()) };
        // The first try may have succeeded although its retry failed.
        if self.current_version().await.as_deref() == Some(version.as_str()) {
            return Ok(());
        }
        Err(match error.code() {
            Some("InvalidParameterException" | "InvalidRequestException") => {
                failed("the keyring was changed by somebody else just now: see `etlctl keys list`, and try again")
            }
            _ => aws("make the new keyring the current one")(error),
        })
    }
}

impl Ring {
    /// Adds a new random key.
    pub fn add(&mut self, id: &str, cipher: &str) -> Result<(), Failure> {
        if self.keys.contains_key(id) {
            return Err(Failure::Usage(format!("there is a key {id:?} already: give the new one another id")));
        }
        // 32 bytes are AES-256 for CBC, and two AES-128 keys for SIV, whose security is 128 bits with any key.
        let key = Zeroizing::new(hex::encode(random::<32>()?.as_ref()));
        let cipher = Some(cipher.to_owned());
        self.keys.insert(id.to_owned(), Key { cipher, key, iv: None, created: Some(now()), replaced: None });
        Ok(())
    }

    /// Makes a key the active one, or with `one_way`, the active one for one-way masks. Returns the id of the key that it
    /// replaces.
    pub fn activate(&mut self, id: &str, one_way: bool) -> Result<Option<String>, Failure> {
        self.key(id)?;
        let before = match one_way {
            true => self.one_way.replace(id.to_owned()),
            false => Some(mem::replace(&mut self.active, id.to_owned())),
        };
        if let Some(key) = before.as_ref().filter(|before| !self.is_used(before)).and_then(|id| self.keys.get_mut(id)) {
            key.replaced = Some(now());
        }
        if let Some(key) = self.keys.get_mut(id) {
            key.replaced = None;
        }
        Ok(before)
    }

    /// Whether new masks are made under this key.
    pub fn is_used(&self, id: &str) -> bool {
        self.active == id || self.one_way.as_deref() == Some(id)
    }

    /// The key with this id, or an error.
    pub fn key(&self, id: &str) -> Result<&Key, Failure> {
        let known = || self.keys.keys().map(|id| format!("{id:?}")).collect::<Vec<_>>().join(", ");
        self.keys
            .get(id)
            .ok_or_else(|| Failure::Usage(format!("there is no key {id:?} in the keyring; it has {}", known())))
    }
}

fn random<const LENGTH: usize>() -> Result<Zeroizing<[u8; LENGTH]>, Failure> {
    let mut bytes = Zeroizing::new([0; LENGTH]);
    getrandom::fill(bytes.as_mut()).map_err(|error| failed(format!("no random numbers: {error}")))?;
    Ok(bytes)
}

/// Reads a time that people may have written by hand. An invalid one counts as absent.
fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(value.as_str().and_then(|text| text.parse().ok()))
}

fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

/// The time since `at`; zero if it is in the future, by a clock that is ahead.
pub fn age(at: Timestamp) -> Duration {
    Duration::try_from(Timestamp::now().duration_since(at)).unwrap_or_default()
}
