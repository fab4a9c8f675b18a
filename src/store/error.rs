//! What the database can answer, and what to do about it.

use std::{error::Error as _, fmt, io, iter, path::PathBuf};

use crate::{
    secrets::{Credentials, SecretError},
    sign_in::TokenError,
};

/// Why rows were not inserted. The batch's fault, but for what [`Store::new`](super::Store::new) returns: the operator's.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The credentials could not be read.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// No token could be signed.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// Nobody says where the database is.
    #[error("no database host: set DATABASE_HOST, or put \"host\" into the database secret")]
    NoHost,
    /// The secret's host cannot be one.
    #[error(
        "the \"host\" of the database secret is no host: a name or an address, with nothing but a port behind it, and not another than \"port\" is"
    )]
    SecretHost,
    /// The file of trusted roots cannot be used.
    #[error("cannot use DATABASE_CA {path:?}: {reason}")]
    CaFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// TLS cannot be set up at all.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
    /// The server did not take the connection in time.
    #[error("no connection to the database in time: check DATABASE_HOST, security groups and the database's load")]
    ConnectTimeout,
    /// The server's certificate is of an authority that is not trusted.
    #[error(
        "no TLS: the database's certificate leads to none of the roots that are trusted, which are {roots}: set DATABASE_CA to a PEM \
         file with its root, or to aws or system"
    )]
    Untrusted {
        /// Whose they are.
        roots: String,
    },
    /// The server's certificate names other hosts.
    #[error("no TLS: the database's certificate is not for {host:?}{}: connect by a name that it has", listed(.names))]
    OtherName {
        /// The host that was asked for.
        host: String,
        /// Those that it names, as far as they could be read.
        names: Vec<String>,
    },
    /// The invocation ran out of time.
    #[error("the invocation's deadline came first")]
    Deadline,
    /// The database did not let us in.
    #[error("cannot connect to the database: {0}")]
    Connect(DatabaseError),
    /// The database does not take the credentials.
    #[error("cannot connect to the database: {error}: {advice}")]
    Refused {
        /// Its answer.
        error: DatabaseError,
        /// What to do about it.
        advice: String,
    },
    /// The database refused the statement, or stopped answering.
    #[error("cannot insert: {0}")]
    Insert(DatabaseError),
    /// What the schedule asks for failed.
    #[error("cannot delete what has expired: {0}")]
    Maintenance(DatabaseError),
    /// The table takes no row.
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
                "does the server demand TLS? Remove DATABASE_TLS=disable; or check the user in the database secret"
                    .to_owned()
            }
            (false, "28000") => {
                "check username and password in the database secret; of a user who is of rds_iam, it takes tokens alone (DATABASE_AUTH=iam)".to_owned()
            }
            (false, _) => "check username and password in the database secret".to_owned(),
            // A user who is not of rds_iam is asked for a password: https://docs.aws.amazon.com/AmazonRDS/latest/UserGuide/UsingWithRDS.IAMDBAuth.DBAccounts.html
            (true, "28P01") => {
                format!("it takes the token for a password: grant rds_iam to {user:?}, or have the proxy ask for tokens (IAMAuth=REQUIRED)")
            }
            (true, _) => format!(
                "it refuses the token: allow the AWS identity rds-db:connect as {user:?} on this database, name the database \
                 by its own endpoint and port, and see that this machine's clock is right"
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

/// What helps against an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remedy {
    /// Perhaps a row's fault: find out which rows are refused.
    Isolate,
    /// A conflict with another session: the same again.
    Repeat,
    /// The connection's fault, or the server's for a while: a new connection.
    Reconnect,
    /// Nothing this invocation can do.
    GiveUp,
}

/// An error of the database or of the way to it. Keeps SQLSTATE and names of the schema, but never the server's message
/// or details, which quote values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseError(Box<Cause>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Cause {
    /// The server's answer: its code, and what of the schema it names.
    Sqlstate {
        code: String,
        constraint: Option<String>,
        column: Option<String>,
        table: Option<String>,
        denied: Denied,
        /// Where a table was looked for in vain.
        place: Option<String>,
    },
    /// The connection broke or was not made.
    Lost(String),
    /// The server's certificate was refused, or TLS failed.
    Tls(String),
    /// A failure of the driver's.
    Driver(String),
}

const UNKNOWN_HOST: &str = "its host's name is not known: check DATABASE_HOST, or \"host\" in the database secret";

/// What denies something that is refused with insufficient_privilege: the server's text says it in the server's language, the name
/// of its routine does not change. And with protocol_violation, a pooler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Denied {
    /// A right is missing.
    Right,
    /// A policy of row security.
    Policy,
    /// A pooler that did not let us in, which has no code of its own for that: PgBouncer up to 1.18 at least.
    SignIn,
    /// Something else, as a trigger.
    Otherwise,
}

impl DatabaseError {
    pub(super) fn new(error: &tokio_postgres::Error) -> Self {
        if let Some(answer) = error.as_db_error() {
            let table = answer.schema().zip(answer.table()).map(|(schema, table)| format!("{schema}.{table}"));
            return Self::of(Cause::Sqlstate {
                code: answer.code().code().to_owned(),
                constraint: answer.constraint().map(ToOwned::to_owned),
                column: answer.column().map(ToOwned::to_owned),
                table,
                denied: match (answer.code().code(), answer.routine()) {
                    (_, Some("aclcheck_error")) => Denied::Right,
                    (_, Some("ExecWithCheckOptions")) => Denied::Policy,
                    ("08P01", _) if is_about_credentials(answer.message()) => Denied::SignIn,
                    _ => Denied::Otherwise,
                },
                place: None,
            });
        }
        let sources = || iter::successors(error.source(), |&error| error.source());
        let io = sources().find_map(|source| source.downcast_ref::<io::Error>());
        let tls = sources().find_map(|source| source.downcast_ref::<native_tls::Error>());
        match (io, tls) {
            (Some(io), _) => Self::of_io(io),
            (None, Some(tls)) => Self::of_tls(tls),
            (None, None) if error.is_closed() => Self::of(Cause::Lost("connection closed".to_owned())),
            // Without its source it names the kind of failure alone. The driver does not tell a server without TLS apart
            // in any other way.
            (None, None) => match error.to_string() {
                kind if kind == "error performing TLS handshake" => Self::without_tls(),
                kind => Self::of(Cause::Driver(kind)),
            },
        }
    }

    pub(super) fn of_io(error: &io::Error) -> Self {
        // The standard library has no kind for it.
        let text = error.to_string();
        let unknown = ["Name or service not known", "No address associated", "nodename nor servname"];
        let kind = match text.starts_with("failed to lookup address") {
            true if unknown.iter().any(|words| text.contains(words)) => UNKNOWN_HOST.to_owned(),
            true => "its host's name cannot be looked up at the moment".to_owned(),
            false => error.kind().to_string(),
        };
        Self::of(Cause::Lost(kind))
    }

    pub(super) fn of_tls(error: &dyn fmt::Display) -> Self {
        let reason = error.to_string();
        // How OpenSSL tells that the connection ended in the handshake.
        Self::of(if reason.contains("EOF") { Cause::Lost(reason) } else { Cause::Tls(reason) })
    }

    pub(super) fn without_tls() -> Self {
        Self::of(Cause::Tls("the server does not offer it; DATABASE_TLS=disable is for local runs".to_owned()))
    }

    /// Whether the certificate's authority is not trusted. The words are OpenSSL's: `X509_verify_cert_error_string`.
    pub(super) fn is_about_the_root(&self) -> bool {
        let words =
            ["unable to get local issuer certificate", "self-signed certificate", "unable to get issuer certificate"];
        matches!(&*self.0, Cause::Tls(reason) if words.iter().any(|words| reason.contains(words)))
    }

    /// Whether the certificate is for other hosts.
    pub(super) fn is_about_the_name(&self) -> bool {
        matches!(&*self.0, Cause::Tls(reason) if reason.contains("hostname mismatch") || reason.contains("IP address mismatch"))
    }

    fn of(cause: Cause) -> Self {
        Self(Box::new(cause))
    }

    fn is_about_tls(&self) -> bool {
        matches!(*self.0, Cause::Tls(_))
    }

    fn code(&self) -> &str {
        match &*self.0 {
            Cause::Sqlstate { code, .. } => code,
            _ => "",
        }
    }

    /// Class 28: the credentials are wrong, perhaps because they were rotated.
    pub(super) fn refuses_credentials(&self) -> bool {
        self.code().starts_with("28") || matches!(*self.0, Cause::Sqlstate { denied: Denied::SignIn, .. })
    }

    /// The ledger has one of the keys, or an index that is not ours one of the rows.
    pub(super) fn is_unique_violation(&self) -> bool {
        self.code() == "23505"
    }

    /// The server answered, with its last word on the connection perhaps: the transaction has failed.
    pub(super) fn is_answer(&self) -> bool {
        matches!(*self.0, Cause::Sqlstate { .. })
    }

    /// invalid_sql_statement_name, duplicate_prepared_statement: the server's session is not the one that the connection
    /// had before, as behind a pooler in transaction mode.
    pub(super) fn is_prepared_statement_conflict(&self) -> bool {
        matches!(self.code(), "26000" | "42P05")
    }

    /// Rather the table's fault than a row's, however few rows say so: a right is missing, or a table or column.
    pub(super) fn is_the_table_s(&self) -> bool {
        matches!(*self.0, Cause::Sqlstate { denied: Denied::Right, .. }) || matches!(self.code(), "42P01" | "42703")
    }

    /// undefined_table
    pub(super) fn is_missing_table(&self) -> bool {
        self.code() == "42P01"
    }

    /// Says where the table was looked for.
    pub(super) fn set_place(&mut self, looked_for: String) {
        if let Cause::Sqlstate { place, .. } = &mut *self.0 {
            *place = Some(looked_for);
        }
    }

    /// Whether the same row will be refused again, whatever else is written meanwhile: for a value, or by a constraint other than a
    /// foreign key, whose row may yet come.
    pub fn is_for_good(&self) -> bool {
        match &*self.0 {
            Cause::Sqlstate { code, constraint, .. } => {
                code.starts_with("22") || (code.starts_with("23") && code != "23503" && constraint.is_some())
            }
            _ => false,
        }
    }

    /// Whether a row is refused rather for its own sake than for the table's, as far as the code says: by a constraint, or for
    /// a value. A row that finds no partition names neither; a column that is not written, `written` being those that are, is
    /// the table's matter.
    pub fn is_likely_the_row_s(&self, written: &[String]) -> bool {
        match &*self.0 {
            Cause::Sqlstate { code, constraint, column, .. } => {
                let is_ours = column.as_ref().is_some_and(|column| written.contains(column));
                code.starts_with("22") || (code.starts_with("23") && (constraint.is_some() || is_ours))
            }
            _ => false,
        }
    }

    /// Classes and codes: <https://www.postgresql.org/docs/current/errcodes-appendix.html>.
    pub(super) fn remedy(&self) -> Remedy {
        let code = match &*self.0 {
            Cause::Sqlstate { code, .. } => code,
            Cause::Lost(_) => return Remedy::Reconnect,
            Cause::Tls(_) | Cause::Driver(_) => return Remedy::GiveUp,
        };
        match code.as_str() {
            // serialization_failure, deadlock_detected
            "40001" | "40P01" => Remedy::Repeat,
            // admin_shutdown, crash_shutdown, cannot_connect_now, idle_session_timeout; too_many_connections;
            // read_only_sql_transaction: a failover left us on the standby
            "57P01" | "57P02" | "57P03" | "57P05" | "53300" | "25006" => Remedy::Reconnect,
            // invalid_sql_statement_name
            "26000" => Remedy::GiveUp,
            // connection_exception
            code if code.starts_with("08") => Remedy::Reconnect,
            // Not this statement's matter, but the server's or the connection's: invalid_transaction_state,
            // invalid_authorization_specification, invalid_catalog_name, invalid_schema_name, insufficient_resources,
            // object_not_in_prerequisite_state (lock_timeout), operator_intervention (statement_timeout), system_error, config_file_error,
            // internal_error
            code if ["25", "28", "3D", "3F", "53", "55", "57", "58", "F0", "XX"]
                .contains(&&code[..2.min(code.len())]) =>
            {
                Remedy::GiveUp
            }
            _ => Remedy::Isolate,
        }
    }
}

/// Whether a pooler's words for a protocol_violation are about them.
fn is_about_credentials(message: &str) -> bool {
    ["authentication failed", "no such user"].iter().any(|words| message.contains(words))
}

impl fmt::Display for DatabaseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0 {
            Cause::Sqlstate { code, constraint, column, table, denied, place } => {
                write!(f, "SQLSTATE {code}")?;
                if let Some(constraint) = constraint {
                    write!(f, ", constraint {constraint:?}")?;
                }
                if let Some(column) = column {
                    write!(f, ", column {column:?}")?;
                }
                if let Some(table) = table {
                    write!(f, ", table {table}")?;
                }
                if let Some(place) = place {
                    write!(f, ", {place}")?;
                }
                f.write_str(match code.as_str() {
                    "42501" if *denied == Denied::Policy => ": a policy of row security forbids it",
                    "42804" => ": the types of the table's columns are not the mapping's; `etlctl doctor` names them",
                    "23502" => ": the column takes no null; give it a default, or have the mapping fill it",
                    "23514" if constraint.is_none() && table.is_some() => ": no partition takes the row; make one",
                    "3D000" => ": no such database; set DATABASE_NAME, or \"dbname\" in the database secret",
                    "42P01" | "42703" => ": a table or column is missing; run `etlctl migrate`, or make the mapping's table (`etlctl mapping ddl`)",
                    "42501" if *denied == Denied::Right => ": the user may not write to the tables; grant it INSERT, and SELECT on the ledger",
                    "53300" => ": too many connections; lower the mapping's MaximumConcurrency or use a pooler",
                    _ => "",
                })
            }
            Cause::Lost(kind) if kind == UNKNOWN_HOST => f.write_str(kind),
            Cause::Lost(kind) => write!(f, "the connection is lost: {kind}"),
            Cause::Tls(reason) => write!(f, "no TLS: {reason}"),
            Cause::Driver(reason) => f.write_str(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sqlstate_has_its_remedy() {
        for (codes, remedy) in [
            ("22001 22003 22021 22P02 23502 23505 23514 54001 P0001 42501 44000 42804 42P01 42703", Remedy::Isolate),
            ("40001 40P01", Remedy::Repeat),
            ("08000 08006 57P01 57P02 57P03 57P05 53300 25006", Remedy::Reconnect),
            ("28P01 28000 3D000 3F000 53100 55P03 57014 58030 XX000", Remedy::GiveUp),
        ] {
            for code in codes.split(' ') {
                let error = DatabaseError::of(Cause::Sqlstate {
                    code: code.to_owned(),
                    constraint: None,
                    column: None,
                    table: None,
                    denied: Denied::Otherwise,
                    place: None,
                });
                assert_eq!(error.remedy(), remedy, "{code}");
                let at_the_door = if remedy == Remedy::Reconnect { remedy } else { Remedy::GiveUp };
                assert_eq!(StoreError::Connect(error).remedy(), at_the_door, "{code}");
            }
        }
    }
}
