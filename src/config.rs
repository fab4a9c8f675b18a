//! The settings: environment variables, read once, and the AWS SDK's.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use aws_config::{SdkConfig, retry::RetryConfig, timeout::TimeoutConfig};
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, rustls_provider::CryptoMode},
};

/// All settings of the function.
#[derive(Clone, Debug)]
pub struct Config {
    /// `MASKING_SECRET_ID`: name or ARN of the keyring's secret.
    pub masking_secret_id: String,
    /// The `DATABASE_*` settings.
    pub database: DatabaseConfig,
    /// `SECRETS_TTL`: the age at which the keyring is read again.
    pub secrets_ttl: Duration,
    /// `OUTAGE_DELAY`: how long a message is hidden after its first receive, when the database is out.
    pub outage_delay: Duration,
    /// `MAPPING_FILE`: the mapping to use in place of the one beside the program, or built in.
    pub mapping_file: Option<PathBuf>,
}

/// Where the database is; what is `None` here comes from the credentials' secret.
#[derive(Clone, Debug)]
pub struct DatabaseConfig {
    /// `DATABASE_SECRET_ID`: name or ARN of the credentials' secret.
    pub secret_id: String,
    /// `DATABASE_HOST`.
    pub host: Option<String>,
    /// `DATABASE_HOSTADDR`: the address to connect to instead of the host's, as of a tunnel. The certificate names the host.
    pub hostaddr: Option<IpAddr>,
    /// `DATABASE_PORT`.
    pub port: Option<u16>,
    /// `DATABASE_NAME`.
    pub name: Option<String>,
    /// `DATABASE_TLS` and `DATABASE_CA_FILE`.
    pub tls: Tls,
    /// `LEDGER_RETENTION_DAYS`: how long the ledger remembers a message.
    pub ledger_retention: Duration,
    /// `PREPARED_STATEMENTS`: whether a connection keeps statements prepared.
    pub prepared_statements: bool,
    /// `COPY_THRESHOLD`: the number of messages from which on a batch is written by `COPY`.
    pub copy_threshold: usize,
    /// Longest time to wait for a connection.
    pub connect_timeout: Duration,
}

/// The default of `OUTAGE_DELAY`.
pub const OUTAGE_DELAY: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(86_400);
/// `COPY` is faster for many rows, but waits for two more answers. On one machine it loses a tenth at 2,000 messages and gains a
/// fifth at 5,000.
const COPY_THRESHOLD: usize = 4_000;

/// Whether and how the connection to the database is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tls {
    /// Encrypted; the certificate must name the host and lead to a root in `ca_file`, or to one of the system's.
    VerifyFull {
        /// PEM file of the roots to trust, instead of the system's.
        ca_file: Option<PathBuf>,
    },
    /// Not encrypted.
    Disable,
}

/// A setting is missing or wrong. The operator's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A required variable is unset or empty.
    #[error("set {0}: it is required")]
    Missing(&'static str),
    /// A setting that is made elsewhere now, and would be lost in silence.
    #[error("remove {0}, and say {1}")]
    Moved(&'static str, &'static str),
    /// A variable's value is none of those it can have.
    #[error("set {name} to {expected}: its value is not one of these")]
    Invalid {
        /// The variable.
        name: &'static str,
        /// What it can be.
        expected: &'static str,
    },
}

impl Config {
    /// Reads the settings through `variable`, which is `std::env::var` outside tests. An empty variable counts as unset.
    ///
    /// # Errors
    /// [`ConfigError`], for the first setting that is missing or wrong.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let optional = |name| variable(name).filter(|value| !value.is_empty());
        let required = |name| optional(name).ok_or(ConfigError::Missing(name));

        if optional("APP_VERSION_ENCODING").is_some_and(|encoding| encoding != "digits") {
            return Err(ConfigError::Moved("APP_VERSION_ENCODING", "convert = \"version-ordered\" in mapping.toml"));
        }
        let ca_file = optional("DATABASE_CA_FILE").map(PathBuf::from);
        Ok(Self {
            masking_secret_id: required("MASKING_SECRET_ID")?,
            database: DatabaseConfig {
                secret_id: required("DATABASE_SECRET_ID")?,
                host: optional("DATABASE_HOST"),
                hostaddr: match optional("DATABASE_HOSTADDR").map(|address| address.parse()) {
                    None => None,
                    Some(Ok(address)) => Some(address),
                    Some(Err(_)) => return Err(invalid("DATABASE_HOSTADDR", "an IP address")),
                },
                port: match optional("DATABASE_PORT").map(|port| port.parse()) {
                    None => None,
                    Some(Ok(port)) if port > 0 => Some(port),
                    Some(_) => return Err(invalid("DATABASE_PORT", "a port from 1 to 65535")),
                },
                name: optional("DATABASE_NAME"),
                tls: match optional("DATABASE_TLS").as_deref() {
                    None | Some("verify-full") => Tls::VerifyFull { ca_file },
                    Some("disable") => Tls::Disable,
                    Some(_) => return Err(invalid("DATABASE_TLS", "verify-full or disable")),
                },
                ledger_retention: match optional("LEDGER_RETENTION_DAYS").map(|days| days.parse()) {
                    None => DAY * 35,
                    // A message keeps its id for 14 days in the queue at most, and then 14 in the dead-letter queue.
                    Some(Ok(days @ 28..=36_500)) => DAY * days,
                    Some(_) => return Err(invalid("LEDGER_RETENTION_DAYS", "a number of days from 28 to 36500")),
                },
                prepared_statements: match optional("PREPARED_STATEMENTS").as_deref() {
                    None | Some("true") => true,
                    Some("false") => false,
                    Some(_) => return Err(invalid("PREPARED_STATEMENTS", "true or false")),
                },
                copy_threshold: match optional("COPY_THRESHOLD").map(|messages| messages.parse()) {
                    None => COPY_THRESHOLD,
                    Some(Ok(messages @ 1..)) => messages,
                    Some(_) => return Err(invalid("COPY_THRESHOLD", "a number of messages from 1 up")),
                },
                connect_timeout: Duration::from_secs(5),
            },
            secrets_ttl: match optional("SECRETS_TTL").map(|seconds| seconds.parse()) {
                None => Duration::from_secs(3600),
                Some(Ok(seconds)) => Duration::from_secs(seconds),
                Some(Err(_)) => return Err(invalid("SECRETS_TTL", "a number of seconds")),
            },
            outage_delay: match optional("OUTAGE_DELAY").map(|seconds| seconds.parse()) {
                None => OUTAGE_DELAY,
                // 120 times that, and the jitter, stay below the 12 hours that SQS can hide a message.
                Some(Ok(seconds @ 0..=240)) => Duration::from_secs(seconds),
                Some(_) => return Err(invalid("OUTAGE_DELAY", "a number of seconds from 0 to 240")),
            },
            mapping_file: optional("MAPPING_FILE").map(PathBuf::from),
        })
    }
}

const SDK_TIMEOUT: Duration = Duration::from_secs(7);

/// The AWS SDK's settings: region, credentials and endpoint of the environment, as every SDK reads them.
pub async fn sdk_config() -> SdkConfig {
    let http_client = Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https();
    // Lambda gives initialisation 10 s; within them the SDK tries again and again, and then says what is wrong.
    let timeouts = TimeoutConfig::builder().connect_timeout(Duration::from_secs(2)).operation_timeout(SDK_TIMEOUT);
    let config = aws_config::defaults(aws_config::BehaviorVersion::latest()).http_client(http_client);
    let retries = RetryConfig::standard()
        .with_max_attempts(10)
        .with_initial_backoff(Duration::from_millis(200))
        .with_max_backoff(Duration::from_secs(2));
    config.timeout_config(timeouts.build()).retry_config(retries).load().await
}

fn invalid(name: &'static str, expected: &'static str) -> ConfigError {
    ConfigError::Invalid { name, expected }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(changes: &[(&str, &str)]) -> Result<Config, ConfigError> {
        Config::from_variables(|name| {
            let required = [("MASKING_SECRET_ID", "keyring"), ("DATABASE_SECRET_ID", "database")];
            let found = changes.iter().chain(&required).find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_two_secrets_suffice() {
        let config = read(&[("DATABASE_HOST", "")]).unwrap();
        assert_eq!(config.database.host, None);
        assert_eq!(config.database.tls, Tls::VerifyFull { ca_file: None });
    }

    #[test]
    fn a_wrong_setting_is_named_with_what_it_can_be() {
        for (name, value, message) in [
            ("MASKING_SECRET_ID", "", "set MASKING_SECRET_ID: it is required"),
            ("DATABASE_SECRET_ID", "", "set DATABASE_SECRET_ID: it is required"),
            ("DATABASE_PORT", "0", "set DATABASE_PORT to a port from 1 to 65535: its value is not one of these"),
            ("DATABASE_HOSTADDR", "db", "set DATABASE_HOSTADDR to an IP address: its value is not one of these"),
            ("DATABASE_TLS", "prefer", "set DATABASE_TLS to verify-full or disable: its value is not one of these"),
            ("SECRETS_TTL", "1h", "set SECRETS_TTL to a number of seconds: its value is not one of these"),
            ("PREPARED_STATEMENTS", "on", "set PREPARED_STATEMENTS to true or false: its value is not one of these"),
            (
                "COPY_THRESHOLD",
                "0",
                "set COPY_THRESHOLD to a number of messages from 1 up: its value is not one of these",
            ),
            (
                "OUTAGE_DELAY",
                "241",
                "set OUTAGE_DELAY to a number of seconds from 0 to 240: its value is not one of these",
            ),
            (
                "LEDGER_RETENTION_DAYS",
                "27",
                "set LEDGER_RETENTION_DAYS to a number of days from 28 to 36500: its value is not one of these",
            ),
            (
                "APP_VERSION_ENCODING",
                "ordered",
                "remove APP_VERSION_ENCODING, and say convert = \"version-ordered\" in mapping.toml",
            ),
        ] {
            assert_eq!(read(&[(name, value)]).unwrap_err().to_string(), message);
        }
    }
}
