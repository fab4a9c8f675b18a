//! Secrets Manager: the keyring and the database's credentials.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use aws_config::SdkConfig;
use aws_sdk_secretsmanager::{Client, error::ProvideErrorMetadata};
use serde::{Deserialize, Deserializer, de::Error as _};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout_at},
};
use zeroize::Zeroizing;

use crate::keyring::{Keyring, KeyringError, Mask};

/// Reads secrets, with the SDK's own retries.
#[derive(Clone, Debug)]
pub struct Secrets {
    client: Client,
}

/// Why a secret cannot be used. The operator's fault, or Secrets Manager's. No variant holds any part of the secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// Secrets Manager did not return it.
    #[error("cannot read the secret {id:?} ({code}){}", hint(.code))]
    Read {
        /// The name or ARN that was asked for.
        id: String,
        /// The service's error code, or the kind of failure if the service did not answer.
        code: String,
    },
    /// It holds bytes where text is expected.
    #[error("the secret {id:?} is binary: store it as text")]
    Binary {
        /// The name or ARN.
        id: String,
    },
    /// It is not a keyring.
    #[error("the secret {id:?} {error}")]
    Keyring {
        /// The name or ARN.
        id: String,
        /// What is wrong with it.
        error: KeyringError,
    },
    /// It holds no valid credentials.
    #[error(
        "the secret {id:?} is not a JSON object with \"username\" and \"password\", or its \"host\", \"port\" or \"dbname\" is invalid"
    )]
    Credentials {
        /// The name or ARN.
        id: String,
    },
}

fn hint(code: &str) -> &'static str {
    match code {
        "AccessDeniedException" => {
            ": allow the function's role secretsmanager:GetSecretValue on it, and kms:Decrypt if it has its own KMS key"
        }
        "ResourceNotFoundException" => ": no secret of that name in this account and region, or it has no value yet",
        "DecryptionFailure" => ": allow the function's role kms:Decrypt on the secret's key",
        "TimeoutError" | "DispatchFailure" => {
            ": Secrets Manager is unreachable, or its certificate is not trusted; a function in a VPC needs a NAT gateway or \
             a VPC endpoint for it"
        }
        _ => "",
    }
}

/// The database's credentials, and its address if the secret has it. `Debug` shows none of them.
#[derive(Clone, Deserialize)]
pub struct Credentials {
    pub(crate) username: String,
    pub(crate) password: Zeroizing<String>,
    pub(crate) host: Option<String>,
    #[serde(default, deserialize_with = "port")]
    pub(crate) port: Option<u16>,
    #[serde(alias = "database", alias = "db")]
    pub(crate) dbname: Option<String>,
    /// Whether the password is an IAM token.
    #[serde(skip)]
    pub(crate) is_token: bool,
}

/// Rotation templates write the port as a number, people also as a string.
fn port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Port {
        Number(u16),
        Text(String),
    }
    match Option::deserialize(deserializer)? {
        None => Ok(None),
        Some(Port::Number(port)) => Ok(Some(port)),
        Some(Port::Text(text)) if text.is_empty() => Ok(None),
        Some(Port::Text(text)) => text.parse().map(Some).map_err(|_| D::Error::custom("not a port")),
    }
}

impl Credentials {
    /// A user's name and password, without the database's address.
    pub fn new(username: String, password: String) -> Self {
        Self { username, password: Zeroizing::new(password), host: None, port: None, dbname: None, is_token: false }
    }

    /// A user's name and an IAM token.
    pub(crate) fn of_token(username: String, token: Zeroizing<String>) -> Self {
        Self { password: token, is_token: true, ..Self::new(username, String::new()) }
    }

    /// The same user, with the database's address from `other`.
    pub fn at(self, other: &Self) -> Self {
        Self { host: other.host.clone(), port: other.port, dbname: other.dbname.clone(), ..self }
    }

    /// The user's name.
    pub fn username(&self) -> &str {
        &self.username
    }

    /// Whether the password is an IAM token.
    pub fn is_token(&self) -> bool {
        self.is_token
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

impl Secrets {
    /// A client with this configuration.
    pub fn new(sdk_config: &SdkConfig) -> Self {
        Self { client: Client::new(sdk_config) }
    }

    /// Reads the keyring, which must have the keys that these masks need.
    ///
    /// # Errors
    /// [`SecretError`], when the secret cannot be read, is not a keyring, or lacks a key.
    pub async fn keyring(&self, id: &str, masks: &[Mask]) -> Result<Keyring, SecretError> {
        let text = self.text(id).await?;
        let keyring = Keyring::from_json(&text).and_then(|keyring| keyring.for_masks(masks.iter().copied()));
        keyring.map_err(|error| SecretError::Keyring { id: id.to_owned(), error })
    }

    /// Reads the database's credentials.
    ///
    /// # Errors
    /// [`SecretError`], when the secret cannot be read or holds no credentials.
    pub async fn credentials(&self, id: &str) -> Result<Credentials, SecretError> {
        let text = self.text(id).await?;
        serde_json::from_str(&text).map_err(|_| SecretError::Credentials { id: id.to_owned() })
    }

    async fn text(&self, id: &str) -> Result<Zeroizing<String>, SecretError> {
        let secret = self.client.get_secret_value().secret_id(id).send().await.map_err(|error| {
            let code = error.code().unwrap_or(match error {
                aws_sdk_secretsmanager::error::SdkError::TimeoutError(_) => "TimeoutError",
                aws_sdk_secretsmanager::error::SdkError::DispatchFailure(_) => "DispatchFailure",
                _ => "unexpected answer",
            });
            SecretError::Read { id: id.to_owned(), code: code.to_owned() }
        })?;
        secret.secret_string.map(Zeroizing::new).ok_or_else(|| SecretError::Binary { id: id.to_owned() })
    }
}

/// Longest wait for a new keyring; the current one can still be used.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(2);
/// Wait before a failed refresh is retried.
const REFRESH_PAUSE: Duration = Duration::from_secs(60);

/// The keyring, read again when it is older than its time to live.
#[derive(Debug)]
pub struct FreshKeyring {
    secrets: Secrets,
    id: String,
    ttl: Duration,
    /// The masks for which it must have keys.
    masks: Vec<Mask>,
    current: Mutex<(Arc<Keyring>, SystemTime)>,
    failures: AtomicU64,
}

impl FreshKeyring {
    /// Reads the keyring for the first time.
    ///
    /// # Errors
    /// [`SecretError`], when the secret cannot be read, is not a keyring, or lacks a key.
    pub async fn read(
        secrets: Secrets,
        id: String,
        ttl: Duration,
        masks: impl Iterator<Item = Mask>,
    ) -> Result<Self, SecretError> {
        let masks: Vec<_> = masks.collect();
        let keyring = secrets.keyring(&id, &masks).await?;
        let expires = SystemTime::now() + ttl;
        let current = Mutex::new((Arc::new(keyring), expires));
        Ok(Self { secrets, id, ttl, masks, current, failures: AtomicU64::new(0) })
    }

    /// The keyring to mask with now. If a refresh fails, the current one is kept, with a warning: its masks stay recoverable.
    pub async fn current(&self, deadline: Instant) -> Arc<Keyring> {
        let mut current = self.current.lock().await;
        let now = SystemTime::now();
        if now >= current.1 {
            let reading = self.secrets.keyring(&self.id, &self.masks);
            let read = match timeout_at(deadline.min(Instant::now() + REFRESH_TIMEOUT), reading).await {
                Ok(read) => read.map_err(|error| error.to_string()),
                Err(_) => Err("no answer in time".to_owned()),
            };
            match read {
                Ok(keyring) => *current = (Arc::new(keyring), now + self.ttl),
                Err(error) => {
                    tracing::warn!(error, "keyring refresh failed; keeping the current one");
                    self.failures.fetch_add(1, Ordering::Relaxed);
                    current.1 = now + self.ttl.min(REFRESH_PAUSE);
                }
            }
        }
        Arc::clone(&current.0)
    }

    /// How often a refresh failed since the last call.
    pub fn take_failures(&self) -> u64 {
        self.failures.swap(0, Ordering::Relaxed)
    }
}
