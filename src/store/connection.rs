//! Connects to PostgreSQL, and holds the one connection that an execution environment keeps.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use native_tls::TlsConnector;
use postgres_native_tls::MakeTlsConnector;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};
use tokio_postgres::{
    Client, Config, NoTls, Socket,
    config::{SslMode, SslNegotiation},
    tls::MakeTlsConnect,
    types::{ToSql, Type},
};
use x509_cert::Certificate;

use super::{
    DatabaseError, StoreError,
    batch::Statements,
    certificate,
    early::{Early, Encrypted, Limits},
    sql::Sql,
    trust::Trusted,
};
use crate::{
    config::{DatabaseConfig, Roots, Tls, host_and_port},
    secrets::Credentials,
    sign_in::TokenError,
};

/// A connection unused for this long is checked first: the environment may have been frozen, and the connection lost silently.
/// By the wall clock, as the monotonic clock stops while frozen.
const CHECK_AFTER: Duration = Duration::from_secs(5);
/// Maximum wait for the answer to that check.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);
/// PostgreSQL's default port.
const DEFAULT_PORT: u16 = 5432;
/// Maximum time that sent bytes may go unacknowledged.
const UNACKNOWLEDGED: Duration = Duration::from_secs(15);

/// The settings for connecting, and the trusted roots, which are read once for a host.
pub struct Connector {
    config: DatabaseConfig,
    application_name: &'static str,
    tls: Mutex<Option<(Trusted, TlsConnector)>>,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("config", &self.config).finish_non_exhaustive()
    }
}

/// A connection and its driver task. Dropping it ends the task.
pub struct Connection {
    /// The client that sends statements.
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
        // Otherwise the task would go on waiting for the answer to an abandoned statement.
        self.driver.abort();
    }
}

impl Connection {
    fn over<S, T>((client, connection): (Client, tokio_postgres::Connection<S, T>)) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        // The error is dropped here, as the next statement fails with it.
        let driver = tokio::spawn(async { drop(connection.await) });
        Self { client, driver, used: SystemTime::now(), statements: None, copy_fits: None }
    }

    /// Whether the server still answers. Asks the server only after a pause of [`CHECK_AFTER`].
    pub(super) async fn is_alive(&mut self) -> bool {
        // Treat a clock that was set back as a pause.
        let paused = self.used.elapsed().map_or(true, |pause| pause >= CHECK_AFTER);
        self.used = SystemTime::now();
        if self.client.is_closed() {
            return false;
        }
        !paused || matches!(timeout(CHECK_TIMEOUT, self.client.check_connection()).await, Ok(Ok(())))
    }
}

impl Connection {
    /// The client, and the prepared statements if `keeps_statements`. The first call prepares them.
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
    /// Whether `COPY` would write the same to the table as `INSERT`. Asks the server once.
    pub(super) async fn copy_fits(&mut self, sql: &Sql) -> Result<bool, tokio_postgres::Error> {
        if let Some(fits) = self.copy_fits {
            return Ok(fits);
        }
        let parameters: [(&(dyn ToSql + Sync), Type); 3] =
            [(&sql.table, Type::TEXT), (&sql.names, Type::TEXT_ARRAY), (&sql.types, Type::OID_ARRAY)];
        let rows = self.client.query_typed(sql.copy_fits, &parameters).await?;
        let fits = rows.first().is_some_and(|row| row.get(0));
        if !fits {
            tracing::warn!(table = sql.table, "table differs from the mapping or has a rule; COPY disabled");
        }
        self.copy_fits = Some(fits);
        Ok(fits)
    }
}

impl Connector {
    /// Reads the trusted roots, if they follow from the settings alone. Sessions on the server have this `application_name`.
    ///
    /// # Errors
    /// [`StoreError`], if the roots cannot be used. The operator's fault.
    pub fn new(config: DatabaseConfig, application_name: &'static str) -> Result<Self, StoreError> {
        let connector = Self { config, application_name, tls: Mutex::default() };
        match (&connector.config.host, &connector.config.tls) {
            (Some(host), _) => _ = connector.tls(host)?,
            // These roots are the same for every host.
            (None, Tls::VerifyFull(Roots::System | Roots::File(_))) => _ = connector.tls("")?,
            _ => {}
        }
        Ok(connector)
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

    /// The TLS connector that verifies a host's certificate; `None` if `DATABASE_TLS` is `disable`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn tls(&self, host: &str) -> Result<Option<TlsConnector>, StoreError> {
        let Some(trusted) = self.trusted(host) else { return Ok(None) };
        let mut known = self.tls.lock().unwrap_or_else(PoisonError::into_inner);
        match &*known {
            Some((of, tls)) if *of == trusted => Ok(Some(tls.clone())),
            _ => {
                let tls = trusted.connector()?;
                *known = Some((trusted, tls.clone()));
                Ok(Some(tls))
            }
        }
    }

    fn trusted(&self, host: &str) -> Option<Trusted> {
        match &self.config.tls {
            Tls::Disable => None,
            Tls::VerifyFull(roots) => Some(Trusted::of(roots, host)),
        }
    }

    /// The host to connect to: from the settings, else from the secret.
    ///
    /// # Errors
    /// [`StoreError::NoHost`] and [`StoreError::SecretHost`]. The operator's fault.
    pub fn host(&self, credentials: &Credentials) -> Result<String, StoreError> {
        let of_secret = self.of_secret(credentials)?.map(|(host, _)| host);
        self.config.host.clone().or(of_secret).ok_or(StoreError::NoHost)
    }

    /// Host and port of the secret's host; `None` if the settings have a host, or the secret has none.
    fn of_secret(&self, credentials: &Credentials) -> Result<Option<(String, Option<u16>)>, StoreError> {
        let text = credentials.host.as_deref().filter(|host| self.config.host.is_none() && !host.trim().is_empty());
        let Some(text) = text else { return Ok(None) };
        match host_and_port(text) {
            Some((_, Some(port))) if credentials.port.is_some_and(|other| other != port) => Err(StoreError::SecretHost),
            Some(place) => Ok(Some(place)),
            None => Err(StoreError::SecretHost),
        }
    }

    /// The port to connect to: from the settings, else from the secret, else PostgreSQL's default.
    pub fn port(&self, credentials: &Credentials) -> u16 {
        let of_host = || self.of_secret(credentials).ok().flatten().and_then(|(_, port)| port);
        self.config.port.or(credentials.port).or_else(of_host).unwrap_or(DEFAULT_PORT)
    }

    /// The database to connect to: from the settings, else from the secret, else `postgres`.
    pub fn name<'a>(&'a self, credentials: &'a Credentials) -> &'a str {
        let of_secret = credentials.dbname.as_deref().filter(|name| !name.is_empty());
        self.config.name.as_deref().or(of_secret).unwrap_or("postgres")
    }

    /// The TLS connector of the settings' host.
    pub(super) fn configured_tls(&self) -> Option<TlsConnector> {
        self.tls(self.config.host.as_deref()?).ok().flatten()
    }

    /// Signs in over an early connection. Opens a new connection if the early one leads elsewhere or has failed.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub(super) async fn sign_in(&self, early: Early, credentials: &Credentials) -> Result<Connection, StoreError> {
        let (host, port) = (self.host(credentials)?, self.port(credentials));
        let mut config = self.driver_config(&host, credentials);
        config.ssl_mode(SslMode::Require).ssl_negotiation(SslNegotiation::Direct);
        let signing_in = async {
            let stream = early.stream(&host, port).await?;
            Some(config.connect_raw(tokio::io::empty(), Encrypted(stream)).await.map(Connection::over))
        };
        let until = Instant::now() + self.config.connect_timeout;
        match timeout_at(until, signing_in).await {
            Ok(Some(Ok(connection))) => Ok(connection),
            // The server answered, so connecting again would fail the same way.
            Ok(Some(Err(error))) if error.as_db_error().is_some() => {
                Err(self.explain(DatabaseError::new(&error), credentials).await)
            }
            Ok(_) => self.connect_until(credentials, until).await,
            Err(_) => Err(StoreError::ConnectTimeout),
        }
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// [`StoreError`], if the server cannot be reached, or refuses the connection.
    pub async fn connect(&self, credentials: &Credentials) -> Result<Connection, StoreError> {
        self.connect_until(credentials, Instant::now() + self.config.connect_timeout).await
    }

    async fn connect_until(&self, credentials: &Credentials, until: Instant) -> Result<Connection, StoreError> {
        if credentials.is_token() && self.config.tls == Tls::Disable {
            return Err(TokenError::InClear.into());
        }
        let host = self.host(credentials)?;
        let mut config = self.driver_config(&host, credentials);
        let tls = self.tls(&host)?;
        let opening = async {
            match tls {
                Some(tls) => open(config.ssl_mode(SslMode::Require), MakeTlsConnector::new(tls)).await,
                None => open(config.ssl_mode(SslMode::Disable), NoTls).await,
            }
        };
        // The driver's own timeout covers only the TCP handshake.
        match timeout_at(until, opening).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(self.explain(DatabaseError::new(&error), credentials).await),
            Err(_) => Err(StoreError::ConnectTimeout),
        }
    }

    fn driver_config(&self, host: &str, credentials: &Credentials) -> Config {
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
        config
    }

    /// The server's certificate, verified as for a connection; `None` if `DATABASE_TLS` is `disable`.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn certificate(&self, credentials: &Credentials) -> Result<Option<Certificate>, StoreError> {
        let host = self.host(credentials)?;
        let Some(tls) = self.tls(&host)? else { return Ok(None) };
        let asking = certificate::shown(tls, &host, self.config.hostaddr, self.port(credentials));
        match timeout(self.config.connect_timeout, asking).await {
            Ok(Ok(certificate)) => Ok(Some(certificate)),
            Ok(Err(error)) => Err(self.explain(error, credentials).await),
            Err(_) => Err(StoreError::ConnectTimeout),
        }
    }

    /// Turns a connect error into one with advice.
    async fn explain(&self, error: DatabaseError, credentials: &Credentials) -> StoreError {
        let host = self.host(credentials).unwrap_or_default();
        if error.refuses_credentials() {
            return StoreError::refused(error, credentials, self.config.tls == Tls::Disable);
        }
        match self.trusted(&host) {
            Some(trusted) if error.is_about_the_root() => StoreError::Untrusted { roots: trusted.to_string() },
            Some(_) if error.is_about_the_name() => {
                let asking = certificate::names(&host, self.config.hostaddr, self.port(credentials));
                let names = timeout(self.config.connect_timeout, asking).await.unwrap_or_default();
                StoreError::OtherName { host: host.clone(), names }
            }
            _ => StoreError::Connect(error),
        }
    }
}

/// Starts connecting while roots and credentials are read, if the settings have the host and TLS is on.
pub(super) fn begin(config: &DatabaseConfig, tls: oneshot::Receiver<TlsConnector>) -> Option<Early> {
    let host = config.host.clone().filter(|_| config.tls != Tls::Disable)?;
    // If the secret has another port, this connection is not used.
    let port = config.port.unwrap_or(DEFAULT_PORT);
    let limits = Limits { connecting: config.connect_timeout, unacknowledged: UNACKNOWLEDGED };
    Some(Early::begin(host, config.hostaddr, port, limits, tls))
}

async fn open<T>(config: &Config, tls: T) -> Result<Connection, tokio_postgres::Error>
where
    T: MakeTlsConnect<Socket>,
    T::Stream: Send + 'static,
{
    config.connect(tls).await.map(Connection::over)
}
