//! The function's settings, from environment variables, and the AWS SDK's configuration.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use aws_config::{SdkConfig, retry::RetryConfig, timeout::TimeoutConfig};
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode},
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
    /// `OUTAGE_DELAY`: how long a message stays hidden after its first receive in an outage.
    pub outage_delay: Duration,
    /// `MAPPING_FILE`: a mapping to use instead of the one beside the program or the built-in one.
    pub mapping_file: Option<PathBuf>,
    /// `MAINTENANCE_SCHEDULE`: ARN of the schedule whose events start maintenance.
    pub maintenance_schedule: Option<String>,
}

/// Where the database is, and who signs in. A field that is `None` is taken from the database secret.
#[derive(Clone, Debug)]
pub struct DatabaseConfig {
    /// `DATABASE_AUTH`, and what it needs.
    pub sign_in: SignIn,
    /// `DATABASE_HOST`.
    pub host: Option<String>,
    /// `DATABASE_HOSTADDR`: the address to connect to, such as a tunnel's, instead of the host's. The certificate names the host.
    pub hostaddr: Option<IpAddr>,
    /// `DATABASE_PORT`.
    pub port: Option<u16>,
    /// `DATABASE_NAME`.
    pub name: Option<String>,
    /// `DATABASE_TLS` and `DATABASE_CA`.
    pub tls: Tls,
    /// `LEDGER_RETENTION_DAYS`: how long the ledger remembers a message.
    pub ledger_retention: Duration,
    /// `PREPARED_STATEMENTS`: whether a connection keeps statements prepared.
    pub prepared_statements: bool,
    /// `COPY_THRESHOLD`: a batch of at least this many valid messages is written by `COPY`.
    pub copy_threshold: usize,
    /// Longest time to wait for a connection.
    pub connect_timeout: Duration,
}

/// The default of `OUTAGE_DELAY`.
pub const OUTAGE_DELAY: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(86_400);
/// `COPY` is faster for many rows, but needs two more round trips. On one machine it is a tenth slower at 2,000 messages and a
/// fifth faster at 5,000.
const COPY_THRESHOLD: usize = 4_000;

/// How to sign in to the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SignIn {
    /// With a user's password.
    Password {
        /// `DATABASE_SECRET_ID`: name or ARN of the credentials' secret.
        secret_id: String,
    },
    /// With an IAM token, which needs no secret.
    Iam {
        /// `DATABASE_USER`.
        user: String,
    },
}

/// Whether and how the connection to the database is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tls {
    /// Encrypted; the certificate must name the host and chain to a trusted root.
    VerifyFull(Roots),
    /// Not encrypted.
    Disable,
}

/// The trusted roots: `DATABASE_CA`, or `DATABASE_CA_FILE`, its old name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Roots {
    /// The built-in roots of Amazon and RDS for AWS's hosts; the system's roots for others.
    Aws,
    /// The system's roots.
    System,
    /// The roots in a PEM file.
    File(PathBuf),
}

/// A setting is missing or wrong. The operator's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A required variable is unset or empty.
    #[error("set {0}: it is required")]
    Missing(&'static str),
    /// A setting that has moved, and would otherwise be ignored silently.
    #[error("remove {0}, and set {1}")]
    Moved(&'static str, &'static str),
    /// A token would be sent unencrypted.
    #[error("remove DATABASE_TLS=disable: DATABASE_AUTH=iam needs TLS")]
    TokenInClear,
    /// Two settings name different ports.
    #[error("DATABASE_HOST has port {0}, but DATABASE_PORT is {1}: remove one of them")]
    TwoPorts(u16, u16),
    /// A variable has an invalid value.
    #[error("set {name} to {expected}: its value is invalid")]
    Invalid {
        /// The variable.
        name: &'static str,
        /// The valid values.
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
        let roots = match optional("DATABASE_CA").or_else(|| optional("DATABASE_CA_FILE")) {
            None => Roots::Aws,
            Some(roots) if roots == "aws" => Roots::Aws,
            Some(roots) if roots == "system" => Roots::System,
            Some(file) => Roots::File(file.into()),
        };
        let sign_in = match optional("DATABASE_AUTH").as_deref() {
            None | Some("password") => SignIn::Password { secret_id: required("DATABASE_SECRET_ID")? },
            Some("iam") if optional("DATABASE_TLS").as_deref() == Some("disable") => {
                return Err(ConfigError::TokenInClear);
            }
            Some("iam") => {
                required("DATABASE_HOST")?;
                SignIn::Iam { user: required("DATABASE_USER")? }
            }
            Some(_) => return Err(invalid("DATABASE_AUTH", "password or iam")),
        };
        let (host, port_of_host) = match optional("DATABASE_HOST").map(|host| host_and_port(&host)) {
            None => (None, None),
            Some(Some((host, port))) => (Some(host), port),
            Some(None) => return Err(invalid("DATABASE_HOST", "a host name or address, optionally with a port")),
        };
        let port = match optional("DATABASE_PORT").map(|port| port.parse()) {
            None => port_of_host,
            Some(Ok(port)) if port > 0 => Some(port),
            Some(_) => return Err(invalid("DATABASE_PORT", "a port from 1 to 65535")),
        };
        if let (Some(of_host), Some(port)) = (port_of_host, port)
            && of_host != port
        {
            return Err(ConfigError::TwoPorts(of_host, port));
        }
        Ok(Self {
            masking_secret_id: required("MASKING_SECRET_ID")?,
            database: DatabaseConfig {
                sign_in,
                host,
                hostaddr: match optional("DATABASE_HOSTADDR").map(|address| address.parse()) {
                    None => None,
                    Some(Ok(address)) => Some(address),
                    Some(Err(_)) => return Err(invalid("DATABASE_HOSTADDR", "an IP address")),
                },
                port,
                name: optional("DATABASE_NAME"),
                tls: match optional("DATABASE_TLS").as_deref() {
                    None | Some("verify-full") => Tls::VerifyFull(roots),
                    Some("disable") => Tls::Disable,
                    Some(_) => return Err(invalid("DATABASE_TLS", "verify-full or disable")),
                },
                ledger_retention: match optional("LEDGER_RETENTION_DAYS").map(|days| days.parse()) {
                    None => DAY * 35,
                    // A message keeps its id for at most 14 days in the queue and then 14 in the dead-letter queue.
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
                    Some(_) => return Err(invalid("COPY_THRESHOLD", "a number of messages, at least 1")),
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
                // 120 times this, plus jitter, stays below 12 hours, the longest that SQS can hide a message.
                Some(Ok(seconds @ 0..=240)) => Duration::from_secs(seconds),
                Some(_) => return Err(invalid("OUTAGE_DELAY", "a number of seconds from 0 to 240")),
            },
            mapping_file: optional("MAPPING_FILE").map(PathBuf::from),
            maintenance_schedule: optional("MAINTENANCE_SCHEDULE"),
        })
    }
}

/// Splits a text such as `db`, `db:5433`, `10.0.0.1` or `[::1]:5433` into a host and an optional port. `None` for anything else,
/// such as a URL or a list.
pub(crate) fn host_and_port(text: &str) -> Option<(String, Option<u16>)> {
    let text = text.trim();
    if text.parse::<IpAddr>().is_ok() {
        return Some((text.to_owned(), None));
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Some((address.ip().to_string(), Some(address.port())));
    }
    let (host, port) = match text.split_once(':') {
        None => (text, None),
        Some((host, port)) => (host, Some(port.parse().ok().filter(|port| *port > 0)?)),
    };
    let is_name = |host: &str| {
        host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
            && !host.trim_matches('.').is_empty()
    };
    is_name(host).then(|| (host.to_owned(), port))
}

const SDK_TIMEOUT: Duration = Duration::from_secs(7);

/// The AWS SDK's configuration: region, credentials and endpoint from the standard sources, and these trusted roots.
pub async fn sdk_config(trust: TrustStore) -> SdkConfig {
    let http_client = Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring));
    let http_client = match TlsContext::builder().with_trust_store(trust).build() {
        Ok(context) => http_client.tls_context(context).build_https(),
        // Not expected: the roots are not checked here. An unusable root fails on first use.
        Err(_) => http_client.build_https(),
    };
    // Lambda limits initialisation to 10 s. Within that, the SDK retries and then reports what is wrong.
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
        assert_eq!(config.database.tls, Tls::VerifyFull(Roots::Aws));
    }

    #[test]
    fn roots_are_from_aws_the_system_or_a_file() {
        let file = |name: &str| Tls::VerifyFull(Roots::File(name.into()));
        for (settings, tls) in [
            (&[("DATABASE_CA", "aws")][..], Tls::VerifyFull(Roots::Aws)),
            (&[("DATABASE_CA", "system")], Tls::VerifyFull(Roots::System)),
            (&[("DATABASE_CA", "/opt/roots.pem")], file("/opt/roots.pem")),
            (&[("DATABASE_CA_FILE", "/opt/before.pem")], file("/opt/before.pem")),
            (&[("DATABASE_CA_FILE", "/opt/before.pem"), ("DATABASE_CA", "/opt/now.pem")], file("/opt/now.pem")),
        ] {
            assert_eq!(read(settings).unwrap().database.tls, tls);
        }
    }

    #[test]
    fn an_invalid_setting_is_named_with_its_valid_values() {
        for (name, value, message) in [
            ("MASKING_SECRET_ID", "", "set MASKING_SECRET_ID: it is required"),
            ("DATABASE_SECRET_ID", "", "set DATABASE_SECRET_ID: it is required"),
            ("DATABASE_AUTH", "token", "set DATABASE_AUTH to password or iam: its value is invalid"),
            ("DATABASE_AUTH", "iam", "set DATABASE_HOST: it is required"),
            ("DATABASE_PORT", "0", "set DATABASE_PORT to a port from 1 to 65535: its value is invalid"),
            (
                "DATABASE_HOST",
                "postgres://db",
                "set DATABASE_HOST to a host name or address, optionally with a port: its value is invalid",
            ),
            ("DATABASE_HOSTADDR", "db", "set DATABASE_HOSTADDR to an IP address: its value is invalid"),
            ("DATABASE_TLS", "prefer", "set DATABASE_TLS to verify-full or disable: its value is invalid"),
            ("SECRETS_TTL", "1h", "set SECRETS_TTL to a number of seconds: its value is invalid"),
            ("PREPARED_STATEMENTS", "on", "set PREPARED_STATEMENTS to true or false: its value is invalid"),
            ("COPY_THRESHOLD", "0", "set COPY_THRESHOLD to a number of messages, at least 1: its value is invalid"),
            ("OUTAGE_DELAY", "241", "set OUTAGE_DELAY to a number of seconds from 0 to 240: its value is invalid"),
            (
                "LEDGER_RETENTION_DAYS",
                "27",
                "set LEDGER_RETENTION_DAYS to a number of days from 28 to 36500: its value is invalid",
            ),
            (
                "APP_VERSION_ENCODING",
                "ordered",
                "remove APP_VERSION_ENCODING, and set convert = \"version-ordered\" in mapping.toml",
            ),
        ] {
            assert_eq!(read(&[(name, value)]).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn a_host_may_include_a_port() {
        for (text, host, port) in [
            ("db", "db", None),
            (" db.example.com.\n", "db.example.com.", None),
            ("db_1:5433", "db_1", Some(5433)),
            ("10.0.0.1", "10.0.0.1", None),
            ("10.0.0.1:5433", "10.0.0.1", Some(5433)),
            ("fd00::1", "fd00::1", None),
            ("[fd00::1]:5433", "fd00::1", Some(5433)),
        ] {
            let database = read(&[("DATABASE_HOST", text)]).unwrap().database;
            assert_eq!((database.host.as_deref(), database.port), (Some(host), port), "{text:?}");
        }
        for text in [
            " ",
            ".",
            "postgres://db",
            "db:",
            "db:x",
            "db:0",
            "db:70000",
            "db:5432:5433",
            "a b",
            "a,b",
            "user@db",
            "db/logins",
        ] {
            assert!(read(&[("DATABASE_HOST", text)]).is_err(), "{text:?}");
        }
        let both = |port| read(&[("DATABASE_HOST", "db:5433"), ("DATABASE_PORT", port)]);
        assert_eq!(both("5433").unwrap().database.port, Some(5433));
        assert_eq!(
            both("5432").unwrap_err().to_string(),
            "DATABASE_HOST has port 5433, but DATABASE_PORT is 5432: remove one of them"
        );
    }

    #[test]
    fn tokens_need_a_user_a_host_and_tls_and_no_secret() {
        let iam = [("DATABASE_AUTH", "iam"), ("DATABASE_SECRET_ID", ""), ("DATABASE_HOST", "db")];
        assert_eq!(read(&iam).unwrap_err(), ConfigError::Missing("DATABASE_USER"));
        let with = |more| [&iam[..], &[("DATABASE_USER", "login_etl")], more].concat();
        assert_eq!(read(&with(&[])).unwrap().database.sign_in, SignIn::Iam { user: "login_etl".to_owned() });
        assert_eq!(read(&with(&[("DATABASE_TLS", "disable")])).unwrap_err(), ConfigError::TokenInClear);
    }
}
