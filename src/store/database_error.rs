//! Errors of the database and the connection to it, and the remedy for each.

use std::{error::Error as _, fmt, io, iter};

/// What to do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remedy {
    /// Find out which rows are refused: perhaps a row's fault.
    Isolate,
    /// Retry on the same connection: a conflict with another session.
    Repeat,
    /// Retry on a new connection: the connection's fault, or a passing fault of the server.
    Reconnect,
    /// Fail: nothing this invocation can do helps.
    GiveUp,
}

/// An error of the database or the connection to it. Keeps the SQLSTATE and names of schema objects, but never the server's
/// message or details, which quote values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseError(Box<Cause>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Cause {
    /// The server's error answer: its code, and the schema objects that it names.
    Sqlstate {
        code: String,
        constraint: Option<String>,
        column: Option<String>,
        table: Option<String>,
        denied: Denied,
        /// Where the server looked for a missing table.
        place: Option<String>,
    },
    /// The connection broke or was not made.
    Lost(String),
    /// The server's certificate was refused, or TLS failed.
    Tls(String),
    /// A failure of the driver.
    Driver(String),
}

const NO_DATABASE: &str = ": no such database; set DATABASE_NAME, or \"dbname\" in the database secret";
const UNKNOWN_HOST: &str = "the host name is unknown: check DATABASE_HOST, or \"host\" in the database secret";

/// What caused an insufficient_privilege or protocol_violation. The server's is recognised by the name of its routine, as its message
/// depends on its language; a pooler's by its message. PgBouncer up to 1.18, at least, has no other code for what it refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Denied {
    /// A missing privilege.
    Right,
    /// A row security policy.
    Policy,
    /// A pooler's refusal of the credentials.
    SignIn,
    /// A pooler's, of the database.
    Database,
    /// A pooler's, of a connection without TLS.
    WithoutTls,
    /// Something else, such as a trigger.
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
                    ("08P01", None) => Denied::by_pooler(answer.message()),
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
            // Without a source, the text names only the kind of failure. Nothing else in the driver's error identifies a server
            // without TLS.
            (None, None) => match error.to_string() {
                kind if kind == "error performing TLS handshake" => Self::without_tls(),
                kind => Self::of(Cause::Driver(kind)),
            },
        }
    }

    pub(super) fn of_io(error: &io::Error) -> Self {
        // The standard library has no error kind for a failed lookup.
        let text = error.to_string();
        let unknown = ["Name or service not known", "No address associated", "nodename nor servname"];
        let kind = match text.starts_with("failed to lookup address") {
            true if unknown.iter().any(|words| text.contains(words)) => UNKNOWN_HOST.to_owned(),
            true => "the host name cannot be looked up at the moment".to_owned(),
            false => error.kind().to_string(),
        };
        Self::of(Cause::Lost(kind))
    }

    pub(super) fn of_tls(error: &dyn fmt::Display) -> Self {
        let reason = error.to_string();
        // OpenSSL reports EOF if the connection ended in the handshake.
        Self::of(if reason.contains("EOF") { Cause::Lost(reason) } else { Cause::Tls(reason) })
    }

    pub(super) fn without_tls() -> Self {
        Self::of(Cause::Tls(
            "the server does not offer TLS: turn it on there (ssl = on); DATABASE_TLS=disable is for local runs: it sends everything unencrypted"
                .to_owned(),
        ))
    }

    /// Whether no trusted root signed the certificate. The texts are from OpenSSL's `X509_verify_cert_error_string`.
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

    pub(super) fn is_about_tls(&self) -> bool {
        matches!(*self.0, Cause::Tls(_))
    }

    pub(super) fn code(&self) -> &str {
        match &*self.0 {
            Cause::Sqlstate { code, .. } => code,
            _ => "",
        }
    }

    /// Whether the credentials are wrong, perhaps because they were rotated: class 28, or a pooler's refusal.
    pub(super) fn refuses_credentials(&self) -> bool {
        self.code().starts_with("28") || matches!(*self.0, Cause::Sqlstate { denied: Denied::SignIn, .. })
    }

    /// Whether the ledger already has one of the keys, or a unique index of the operator's has one of the rows.
    pub(super) fn is_unique_violation(&self) -> bool {
        self.code() == "23505"
    }

    /// Whether the server answered, so the transaction has certainly failed. The connection may be closed.
    pub(super) fn is_answer(&self) -> bool {
        matches!(*self.0, Cause::Sqlstate { .. })
    }

    /// invalid_sql_statement_name, duplicate_prepared_statement: the connection now has another server session, as behind a
    /// pooler in transaction mode.
    pub(super) fn is_prepared_statement_conflict(&self) -> bool {
        matches!(self.code(), "26000" | "42P05")
    }

    /// Whether even one such refusal is the table's fault: a privilege, table or column is missing.
    pub(super) fn is_table_fault(&self) -> bool {
        matches!(*self.0, Cause::Sqlstate { denied: Denied::Right, .. }) || matches!(self.code(), "42P01" | "42703")
    }

    /// undefined_table
    pub(super) fn is_missing_table(&self) -> bool {
        self.code() == "42P01"
    }

    /// Adds where the server looked for the table.
    pub(super) fn set_place(&mut self, looked_for: String) {
        if let Cause::Sqlstate { place, .. } = &mut *self.0 {
            *place = Some(looked_for);
        }
    }

    /// Whether the same row will always be refused: for a value, or by a constraint. A foreign key does not count, as the row
    /// that it refers to may be inserted later.
    pub fn is_permanent(&self) -> bool {
        match &*self.0 {
            Cause::Sqlstate { code, constraint, .. } => {
                code.starts_with("22") || (code.starts_with("23") && code != "23503" && constraint.is_some())
            }
            _ => false,
        }
    }

    /// Whether the code suggests that the row is at fault and not the table: a value, a constraint, or a column in `written`. A
    /// column that the function does not write is the table's fault, and so is a missing partition, which names neither.
    pub fn is_likely_row_fault(&self, written: &[String]) -> bool {
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
            Cause::Sqlstate { denied: Denied::Database | Denied::WithoutTls, .. } => return Remedy::GiveUp,
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
            // The server's or the connection's fault, not this statement's: invalid_transaction_state,
            // invalid_authorization_specification, invalid_catalog_name, invalid_schema_name, insufficient_resources,
            // object_not_in_prerequisite_state (lock_timeout), operator_intervention (statement_timeout), system_error,
            // config_file_error, internal_error
            code if ["25", "28", "3D", "3F", "53", "55", "57", "58", "F0", "XX"]
                .contains(&&code[..2.min(code.len())]) =>
            {
                Remedy::GiveUp
            }
            _ => Remedy::Isolate,
        }
    }
}

impl Denied {
    /// By a pooler's message for a protocol_violation.
    fn by_pooler(message: &str) -> Self {
        let says = |words: &[&str]| words.iter().any(|words| message.contains(words));
        match () {
            () if says(&["authentication failed", "no such user"]) => Self::SignIn,
            () if says(&["no such database"]) => Self::Database,
            () if says(&["SSL required", "TLS required"]) => Self::WithoutTls,
            () => Self::Otherwise,
        }
    }
}

/// What to do about a certificate that is refused for its dates, and about an old version of TLS. The texts are from OpenSSL.
fn advice_on_tls(reason: &str) -> &'static str {
    let says = |words: &[&str]| words.iter().any(|words| reason.contains(words));
    match () {
        () if says(&["certificate has expired"]) => ": renew the server's certificate, or check this machine's clock",
        () if says(&["not yet valid"]) => ": check this machine's clock, and the server's certificate",
        () if says(&["protocol version", "unsupported protocol"]) => ": the server must offer TLS 1.2 or later",
        () => "",
    }
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
                    "08P01" if *denied == Denied::Database => NO_DATABASE,
                    "08P01" if *denied == Denied::WithoutTls => ": the pooler requires TLS; remove DATABASE_TLS=disable",
                    "42501" if *denied == Denied::Policy => ": a row security policy forbids it",
                    "42804" => ": column types differ from the mapping; `etlctl doctor` names them",
                    "23502" => ": the column is NOT NULL; give it a default, or fill it in the mapping",
                    "23514" if constraint.is_none() && table.is_some() => ": no partition takes the row; create one",
                    "3D000" => NO_DATABASE,
                    "42P01" | "42703" => ": a table or column is missing; run `etlctl migrate`, or create the mapping's table (`etlctl mapping ddl`)",
                    "42501" if *denied == Denied::Right => ": the user may not write to the tables; grant it INSERT, and SELECT on the ledger",
                    "53300" => ": too many connections; lower the stack's MaximumConcurrency or use a pooler",
                    _ => "",
                })
            }
            Cause::Lost(kind) if kind == UNKNOWN_HOST => f.write_str(kind),
            Cause::Lost(kind) => write!(f, "the connection is lost: {kind}"),
            Cause::Tls(reason) => write!(f, "TLS failed: {reason}{}", advice_on_tls(reason)),
            Cause::Driver(reason) => f.write_str(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreError;

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
                let on_connect = if remedy == Remedy::Reconnect { remedy } else { Remedy::GiveUp };
                assert_eq!(StoreError::Connect(error).remedy(), on_connect, "{code}");
            }
        }
    }
}
