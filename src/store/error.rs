//! Why rows were not inserted.

use std::path::PathBuf;

use super::{DatabaseError, database_error::Remedy};
use crate::{
    secrets::{Credentials, SecretError},
    sign_in::TokenError,
};

/// Why rows were not inserted. From [`Store::new`](super::Store::new), the operator's fault; else the batch's.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The credentials could not be read.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// No token could be signed.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// Neither the settings nor the secret name the database's host.
    #[error("no database host: set DATABASE_HOST, or put \"host\" into the database secret")]
    NoHost,
    /// The secret's host is invalid.
    #[error(
        "the \"host\" of the database secret is not valid: use a name or an address; a port after it must equal \"port\""
    )]
    SecretHost,
    /// The file of trusted roots cannot be used.
    #[error("cannot use DATABASE_CA {path:?}: {reason}")]
    CaFile {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// TLS cannot be set up at all.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
    /// Connecting took too long.
    #[error("timed out connecting to the database: check DATABASE_HOST, security groups and the database's load")]
    ConnectTimeout,
    /// No trusted root signed the server's certificate.
    #[error(
        "TLS failed: no trusted root signed the database's certificate; trusted are {roots}: set DATABASE_CA to a PEM file with \
         its root, or to aws or system"
    )]
    Untrusted {
        /// Which roots are trusted.
        roots: String,
    },
    /// The server's certificate names other hosts.
    #[error("TLS failed: the database's certificate is not for {host:?}{}: connect by a name in the certificate", listed(.names))]
    OtherName {
        /// The requested host.
        host: String,
        /// The names in the certificate, if they could be read.
        names: Vec<String>,
    },
    /// The invocation ran out of time.
    #[error("the invocation's deadline passed")]
    Deadline,
    /// Connecting failed.
    #[error("cannot connect to the database: {0}")]
    Connect(DatabaseError),
    /// The database refused the credentials.
    #[error("cannot connect to the database: {error}: {advice}")]
    Refused {
        /// The server's answer.
        error: DatabaseError,
        /// What to do about it.
        advice: String,
    },
    /// The database refused the statement, or stopped answering.
    #[error("cannot insert: {0}")]
    Insert(DatabaseError),
    /// Scheduled maintenance failed.
    #[error("cannot delete expired data: {0}")]
    Maintenance(DatabaseError),
    /// The table refuses every row.
    #[error("the table refuses every row: {0}")]
    Table(DatabaseError),
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!(", but for {}", names.join(", ")) }
}

impl StoreError {
    /// A stable name for alarms and for Lambda's `errorType`.
    pub fn error_type(&self) -> &'static str {
        match self {
            Self::Secret(_) => "Secret",
            Self::NoHost | Self::SecretHost | Self::CaFile { .. } | Self::Tls(_) => "Configuration",
            Self::ConnectTimeout => "DatabaseUnavailable",
            Self::Deadline => "Deadline",
            Self::Refused { .. } | Self::Token(_) => "DatabaseCredentials",
            Self::Connect(error) if error.is_about_tls() => "DatabaseTls",
            Self::Untrusted { .. } | Self::OtherName { .. } => "DatabaseTls",
            Self::Connect(_) | Self::Insert(_) if self.remedy() == Remedy::Reconnect => "DatabaseUnavailable",
            Self::Connect(_) | Self::Insert(_) | Self::Maintenance(_) => "Database",
            Self::Table(_) => "Table",
        }
    }

    pub(super) fn refused(error: DatabaseError, credentials: &Credentials, without_tls: bool) -> Self {
        let user = credentials.username();
        let advice = match (credentials.is_token, error.code()) {
            // "no pg_hba.conf entry for … no encryption"
            (false, "28000") if without_tls => {
                "if the server requires TLS, remove DATABASE_TLS=disable; else check the user in the database secret"
                    .to_owned()
            }
            (false, "28000") => {
                "check username and password in the database secret; a user with rds_iam needs DATABASE_AUTH=iam"
                    .to_owned()
            }
            (false, _) => "check username and password in the database secret".to_owned(),
            // The server asks a user without the role rds_iam for a password: https://docs.aws.amazon.com/AmazonRDS/latest/UserGuide/UsingWithRDS.IAMDBAuth.DBAccounts.html
            (true, "28P01") => {
                format!(
                    "the server treated the token as a password: grant rds_iam to {user:?}, or set the proxy's IAMAuth to REQUIRED"
                )
            }
            (true, _) => format!(
                "the server refused the token: allow the AWS identity rds-db:connect as {user:?} on this database, \
                 connect to the database's own endpoint and port, and check this machine's clock"
            ),
        };
        Self::Refused { error, advice }
    }

    pub(super) fn remedy(&self) -> Remedy {
        match self {
            Self::Insert(error) => error.remedy(),
            // A connect error is never one row's fault.
            Self::Connect(error) if error.remedy() == Remedy::Reconnect => Remedy::Reconnect,
            _ => Remedy::GiveUp,
        }
    }
}
