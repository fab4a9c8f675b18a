//! Connecting to PostgreSQL, and the one connection that an execution environment keeps.

use std::{
    fmt,
    net::IpAddr,
    time::{Duration, SystemTime},
};

use native_tls::{Certificate, Protocol, TlsConnector};
use postgres_native_tls::MakeTlsConnector;
use tokio::{task::JoinHandle, time::timeout};
use tokio_postgres::{
    Client, Config, NoTls, Socket,
    config::SslMode,
    tls::MakeTlsConnect,
    types::{ToSql, Type},
};

use super::{DatabaseError, StoreError, batch::Statements, sql::Sql};
use crate::{
    config::{DatabaseConfig, Tls},
    secrets::Credentials,
};

/// After a pause this long, the environment may have been frozen and the connection be gone without a word.
/// By the wall clock: the monotonic one stands still in a freeze.
const CHECK_AFTER: Duration = Duration::from_secs(5);
/// Longest wait for a live server's answer to that check.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest time that sent bytes may go unacknowledged.
const UNACKNOWLEDGED: Duration = Duration::from_secs(15);

/// How to connect: the settings, and the roots that are trusted, read once.
#[derive(Clone)]
pub struct Connector {
    config: DatabaseConfig,
    application_name: &'static str,
    tls: Option<TlsConnector>,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("config", &self.config).finish_non_exhaustive()
    }
}

/// A connection and the task that drives it, which ends with it.
pub struct Connection {
    /// To send statements with.
    pub client: Client,
    driver: JoinHandle<()>,
    used: SystemTime,
    statements: Option<Statements>,
    copy_fits: Option<bool>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Without this the task would wait for the answer to a statement that nobody waits for any more.
        self.driver.abort();
    }
}

impl Connection {
    /// Whether the server still answers; asked only after a pause.
    pub(super) async fn is_alive(&mut self) -> bool {
        // A clock that was set back says nothing.
        let paused = self.used.elapsed().map_or(true, |pause| pause >= CHECK_AFTER);
        self.used = SystemTime::now();
        if self.client.is_closed() {
            return false;
        }
        !paused || matches!(timeout(CHECK_TIMEOUT, self.client.check_connection()).await, Ok(Ok(())))
    }
}

impl Connection {
    /// The client, and the statements that it keeps prepared from the first time on, if it is to keep any.
    pub(super) async fn prepared(
        &mut self,
        sql: &Sql,
        keeps_statements: bool,
    ) -> Result<(&Client, Option<&Statements>), tokio_postgres::Error> {
        if keeps_statements && self.statements.is_none() {
            self.statements = Some(Statements::prepare(&self.client, sql).await?);
        }
        Ok((&self.client, self.statements.as_ref()))
    }
}

impl Connection {
    /// Whether `COPY` would write the table as `INSERT` does, which is asked once.
    pub(super) async fn copy_fits(&mut self, sql: &Sql) -> Result<bool, tokio_postgres::Error> {
        if let Some(fits) = self.copy_fits {
            return Ok(fits);
        }
        let parameters: [(&(dyn ToSql + Sync), Type); 3] =
            [(&sql.table, Type::TEXT), (&sql.names, Type::TEXT_ARRAY), (&sql.types, Type::OID_ARRAY)];
        let rows = self.client.query_typed(sql.copy_fits, &parameters).await?;
        let fits = rows.first().is_some_and(|row| row.get(0));
        if !fits {
            tracing::warn!(
                table = sql.table,
                "the table's types are not the mapping's, or it has a rule: writing without COPY"
            );
        }
        self.copy_fits = Some(fits);
        Ok(fits)
    }
}

impl Connector {
    /// Reads the trusted roots. The server shows the sessions under `application_name`.
    ///
    /// # Errors
    /// [`StoreError`], when they cannot be used. The operator's fault.
    pub fn new(config: DatabaseConfig, application_name: &'static str) -> Result<Self, StoreError> {
        let tls = match &config.tls {
            Tls::Disable => None,
            Tls::VerifyFull { ca_file } => {
                let mut builder = TlsConnector::builder();
                builder.min_protocol_version(Some(Protocol::Tlsv12));
                if let Some(path) = ca_file {
                    let roots = std::fs::read(path)
                        .map_err(|error| error.kind().to_string())
                        .and_then(|pem| Certificate::stack_from_pem(&pem).map_err(|error| error.to_string()))
                        .and_then(
                            |roots| if roots.is_empty() { Err("no certificate in it".to_owned()) } else { Ok(roots) },
                        )
                        .map_err(|reason| StoreError::CaFile { path: path.clone(), reason })?;
                    builder.disable_built_in_roots(true);
                    for root in roots {
                        builder.add_root_certificate(root);
                    }
                }
                Some(builder.build().map_err(|error| StoreError::Tls(error.to_string()))?)
            }
        };
        Ok(Self { config, application_name, tls })
    }

    pub(super) fn secret_id(&self) -> &str {
        &self.config.secret_id
    }

    pub(super) fn ledger_retention(&self) -> Duration {
        self.config.ledger_retention
    }

    pub(super) fn copy_threshold(&self) -> usize {
        self.config.copy_threshold
    }

    pub(super) fn prepared_statements(&self) -> bool {
        self.config.prepared_statements
    }

    /// How a server's certificate is verified; `None` where `DATABASE_TLS` is `disable`.
    pub fn tls(&self) -> Option<&TlsConnector> {
        self.tls.as_ref()
    }

    /// The host to connect to, of the settings or else of the secret.
    ///
    /// # Errors
    /// [`StoreError::NoHost`]. The operator's fault.
    pub fn host<'a>(&'a self, credentials: &'a Credentials) -> Result<&'a str, StoreError> {
        self.config.host.as_deref().or(credentials.host.as_deref()).ok_or(StoreError::NoHost)
    }

    /// The address to connect to in the host's place, if there is one.
    pub fn hostaddr(&self) -> Option<IpAddr> {
        self.config.hostaddr
    }

    /// The port to connect to, of the settings, or of the secret, or PostgreSQL's own.
    pub fn port(&self, credentials: &Credentials) -> u16 {
        self.config.port.or(credentials.port).unwrap_or(5432)
    }

    /// The database to connect to, of the settings, or of the secret, or `postgres`.
    pub fn name<'a>(&'a self, credentials: &'a Credentials) -> &'a str {
        self.config.name.as_deref().or(credentials.dbname.as_deref()).unwrap_or("postgres")
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// [`StoreError`], when the server is not reached, or lets nobody in.
    pub async fn connect(&self, credentials: &Credentials) -> Result<Connection, StoreError> {
        let host = self.host(credentials)?;
        let mut config = Config::new();
        config
            .host(host)
            .port(self.port(credentials))
            .dbname(self.name(credentials))
            .user(&credentials.username)
            .password(credentials.password.as_bytes())
            .application_name(self.application_name)
            .tcp_user_timeout(UNACKNOWLEDGED);
        if let Some(address) = self.config.hostaddr {
            config.hostaddr(address);
        }
        let opening = async {
            match &self.tls {
                Some(tls) => open(config.ssl_mode(SslMode::Require), MakeTlsConnector::new(tls.clone())).await,
                None => open(config.ssl_mode(SslMode::Disable), NoTls).await,
            }
        };
        // The driver's own limit covers the TCP handshake only.
        match timeout(self.config.connect_timeout, opening).await {
            Ok(opened) => opened.map_err(|error| StoreError::Connect(DatabaseError::new(&error))),
            Err(_) => Err(StoreError::ConnectTimeout),
        }
    }
}

async fn open<T>(config: &Config, tls: T) -> Result<Connection, tokio_postgres::Error>
where
    T: MakeTlsConnect<Socket>,
    T::Stream: Send + 'static,
{
    let (client, connection) = config.connect(tls).await?;
    // What ends the connection shows in the statement that it fails.
    let driver = tokio::spawn(async { drop(connection.await) });
    Ok(Connection { client, driver, used: SystemTime::now(), statements: None, copy_fits: None })
}
