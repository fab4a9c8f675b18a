//! Inserts rows into PostgreSQL, exactly once.
//!
//! One transaction writes a batch's rows and enters their messages in the ledger. So a redelivered batch inserts nothing twice,
//! and every retry here is safe, even if the outcome of a statement is unknown.
//!
//! - [`Store::insert`] takes the connection, within the deadline.
//! - `Session::insert` writes all entries together. If PostgreSQL refuses them, `isolation` finds out which rows it refuses, and
//!   whether the row or the table is at fault.
//! - `Session::write` runs one transaction, and retries it if that can help.
//! - `Batch` writes it. The fast way, `COPY` or `INSERT`, assumes that no message is in the ledger. If the ledger refuses that,
//!   an `INSERT` writes only the messages that it does not have.

mod batch;
mod certificate;
mod connection;
mod database_error;
mod early;
mod error;
mod isolation;
mod ledger;
mod maintenance;
mod sql;
mod trial;
mod trust;

use std::{
    collections::HashSet,
    fmt,
    panic::resume_unwind,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use aws_config::SdkConfig;
use tokio::{
    sync::{Mutex, oneshot},
    task::spawn_blocking,
    time::{Instant, sleep, timeout_at},
};
use tokio_postgres::types::{ToSql, Type};

use self::{batch::Batch, database_error::Remedy, early::Early};
pub use self::{
    connection::{Connection, Connector},
    database_error::DatabaseError,
    error::StoreError,
    ledger::LedgerKey,
    maintenance::Maintained,
    sql::Sql,
    trial::Trial,
};
use crate::{
    config::DatabaseConfig,
    mapping::{Mapping, Row},
    secrets::Secrets,
    sign_in::Signer,
};

const PRUNE: &str = include_str!("prune.sql");

/// Expired keys are deleted after this many inserted rows. Up to twice as many keys go, so that a ledger that has grown shrinks.
const PRUNE_EVERY: u64 = 10_000;
/// Maximum delay of a batch by pruning.
const PRUNE_TIMEOUT: Duration = Duration::from_secs(1);

/// Maximum tries of a statement that lost its connection, or a conflict with another session.
const TRIES: u32 = 4;
/// Wait before the second try; it doubles with each further try.
const FIRST_WAIT: Duration = Duration::from_millis(50);

/// How long after an insert the table is assumed to be in order.
const RECENT: Duration = Duration::from_secs(300);

/// A row to insert, and its message. `Debug` shows only the key, as groups are often named after users.
pub struct Entry<'a> {
    /// The message's key in the ledger, unique within a batch.
    pub key: LedgerKey,
    /// The message group of a FIFO queue: after a refused row, the rest of its group waits.
    pub group: Option<&'a str>,
    /// The row.
    pub row: Row,
}

impl fmt::Debug for Entry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("key", &self.key).finish_non_exhaustive()
    }
}

/// The outcome of an entry.
#[derive(Clone, Debug)]
pub enum Fate {
    /// It is in the database, by this call or an earlier one.
    Stored,
    /// PostgreSQL refused it, and the row is at fault.
    Refused(DatabaseError),
    /// PostgreSQL refused it, and either the row or the table may be at fault.
    Doubtful(DatabaseError),
    /// It waits for an earlier entry of its group.
    HeldBack,
    /// There was no time left to try it.
    Untried,
}

/// The outcome of a batch.
#[derive(Debug)]
pub struct Stored {
    /// How many rows this call inserted. Other stored rows were inserted before.
    pub inserted: u64,
    /// The fate of each entry, in the order of the entries.
    pub fates: Vec<Fate>,
}

/// The database: one connection, made when needed and kept.
#[derive(Debug)]
pub struct Store {
    session: Mutex<Session>,
    retention: Duration,
    counts: Arc<Counts>,
}

/// Counts for metrics.
#[derive(Debug, Default)]
struct Counts {
    credential_refreshes: AtomicU64,
    prune_failures: AtomicU64,
}

impl Store {
    /// Reads the credentials and the trusted roots; connects on first use.
    ///
    /// # Errors
    /// [`StoreError`], if either cannot be used. The operator's fault.
    pub async fn new(
        config: DatabaseConfig,
        secrets: Secrets,
        sdk_config: SdkConfig,
        mapping: &Mapping,
    ) -> Result<Self, StoreError> {
        let signer = Signer::new(config.sign_in.clone(), secrets, sdk_config);
        // The server's new process, OpenSSL with the trusted roots, and the TLS handshake take milliseconds each. All of it
        // runs while the secret is fetched.
        let (send_tls, tls) = oneshot::channel();
        let early = connection::begin(&config, tls);
        let making = spawn_blocking(|| Connector::new(config, env!("CARGO_PKG_NAME")));
        let connector = async {
            let connector = making.await.unwrap_or_else(|panic| resume_unwind(panic.into_panic()))?;
            if let Some(tls) = connector.configured_tls() {
                _ = send_tls.send(tls);
            }
            Ok::<_, StoreError>(connector)
        };
        let (connector, signer) = tokio::join!(connector, signer);
        let (connector, signer) = (connector?, signer?);
        connector.host(signer.known())?;
        let retention = connector.ledger_retention();
        // Prune after the first batch, as an environment may insert few rows in its life.
        let unpruned = PRUNE_EVERY;
        let counts = Arc::<Counts>::default();
        let session = Session {
            keeps_statements: connector.prepared_statements(),
            connector,
            sql: Arc::new(Sql::new(mapping)),
            signer,
            early,
            connection: None,
            unpruned,
            maintained_until: None,
            wrote_at: None,
            refused: HashSet::new(),
            counts: Arc::clone(&counts),
        };
        Ok(Self { session: Mutex::new(session), retention, counts })
    }

    /// Connects before the first batch, which would connect otherwise.
    ///
    /// # Errors
    /// [`StoreError`], if connecting fails.
    pub async fn connect(&self) -> Result<(), StoreError> {
        self.session.lock().await.connect_ahead().await
    }

    /// How often refused credentials were read again since the last call.
    pub fn take_credential_refreshes(&self) -> u64 {
        self.counts.credential_refreshes.swap(0, Ordering::Relaxed)
    }

    /// How often the ledger could not be pruned since the last call.
    pub fn take_prune_failures(&self) -> u64 {
        self.counts.prune_failures.swap(0, Ordering::Relaxed)
    }

    /// Messages sent before this time are older than the ledger's retention.
    pub fn horizon(&self) -> SystemTime {
        SystemTime::now() - self.retention
    }

    /// Inserts the rows of the messages that the ledger does not have.
    ///
    /// # Errors
    /// [`StoreError`], if the database cannot be reached or used by `deadline`. The batch's fault: some of it may be written,
    /// and all of it may be tried again.
    pub async fn insert(&self, entries: &[Entry<'_>], deadline: Instant) -> Result<Stored, StoreError> {
        let mut session = timeout_at(deadline, self.session.lock()).await.map_err(|_| StoreError::Deadline)?;
        let mut result = session.insert(entries, deadline).await;
        match &mut result {
            Ok(stored) => session.prune(stored.inserted, self.horizon(), deadline).await,
            Err(error) => {
                session.add_place(error, deadline).await;
                // A statement may still be running on it.
                session.connection = None;
            }
        }
        result
    }
}

/// How a batch is written, fastest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// `COPY`, which fails if the ledger has one of the messages.
    Copy,
    /// `INSERT`, which fails if the ledger has one of the messages.
    Insert,
    /// `INSERT` of the messages that the ledger does not have.
    InsertUnknown,
}

struct Session {
    connector: Connector,
    sql: Arc<Sql>,
    signer: Signer,
    /// Opened at the start, for the first connection.
    early: Option<Early>,
    connection: Option<Connection>,
    /// Cleared once a pooler in transaction mode is detected.
    keeps_statements: bool,
    /// Rows inserted since the ledger was last pruned.
    unpruned: u64,
    /// Until then, the schedule is trusted to prune the ledger.
    maintained_until: Option<SystemTime>,
    /// When rows were last inserted.
    wrote_at: Option<SystemTime>,
    /// Messages whose rows were refused while others were inserted.
    refused: HashSet<LedgerKey>,
    counts: Arc<Counts>,
}

impl Session {
    /// Writes the entries together. If PostgreSQL refuses some, writes the others.
    async fn insert(&mut self, entries: &[Entry<'_>], deadline: Instant) -> Result<Stored, StoreError> {
        // A batch without a valid message needs no connection.
        if entries.is_empty() {
            return Ok(Stored { inserted: 0, fates: Vec::new() });
        }
        let way = if entries.len() < self.connector.copy_threshold() { Way::Insert } else { Way::Copy };
        let writing = timeout_at(deadline, self.write(entries.iter().collect(), way));
        let stored = match writing.await {
            Ok((_, Ok(inserted))) => Stored { inserted, fates: vec![Fate::Stored; entries.len()] },
            Ok((way, Err(StoreError::Insert(error)))) if error.remedy() == Remedy::Isolate => {
                self.isolate(entries, way, deadline).await?
            }
            Ok((_, Err(error))) => return Err(error),
            Err(_) => return Err(StoreError::Deadline),
        };
        if stored.inserted > 0 {
            self.wrote_at = Some(SystemTime::now());
        }
        Ok(stored)
    }

    /// Writes entries in one transaction. Retries if that can help, and falls back to a slower way if a faster way fails.
    /// Returns the way to use for the rest of this batch, and how many rows were inserted.
    async fn write(&mut self, entries: Vec<&Entry<'_>>, mut way: Way) -> (Way, Result<u64, StoreError>) {
        let batch = Batch::new(entries);
        let mut wait = FIRST_WAIT;
        let mut tries = 1;
        loop {
            let error = match self.try_to_write(&batch, &mut way).await {
                Err(StoreError::Insert(error)) if error.is_prepared_statement_conflict() && self.keeps_statements => {
                    tracing::warn!(%error, "pooler detected; prepared statements disabled");
                    self.keeps_statements = false;
                    self.connection = None;
                    continue;
                }
                // The ledger has some of the messages, or a row is refused, or `COPY` cannot write this table but `INSERT` may. `INSERT`
                // fails in its own way if the server is at fault. After a failed `COPY` the ledger most likely has some of the messages.
                Err(StoreError::Insert(error)) if error.is_answer() && way == Way::Copy => {
                    if !error.is_unique_violation() {
                        tracing::warn!(%error, "COPY failed; falling back to INSERT");
                    }
                    way = Way::InsertUnknown;
                    continue;
                }
                // The ledger has some of the messages.
                Err(StoreError::Insert(error)) if error.is_unique_violation() && way == Way::Insert => {
                    way = Way::InsertUnknown;
                    continue;
                }
                Err(error) => error,
                inserted => return (way, inserted),
            };
            match error.remedy() {
                Remedy::Reconnect => self.connection = None,
                Remedy::Repeat => {}
                Remedy::Isolate | Remedy::GiveUp => return (way, Err(error)),
            }
            if tries == TRIES {
                return (way, Err(error));
            }
            tracing::warn!(%error, "insert failed; retrying");
            sleep(wait).await;
            tries += 1;
            wait *= 2;
        }
    }

    /// Writes a batch once. Replaces [`Way::Copy`] if `COPY` would not write what `INSERT` writes.
    async fn try_to_write(&mut self, batch: &Batch<'_>, way: &mut Way) -> Result<u64, StoreError> {
        let mut connection = self.take_connected().await?;
        let keeps_statements = self.keeps_statements;
        let sql = Arc::clone(&self.sql);
        let writing = async {
            if *way == Way::Copy && !connection.copy_fits(&sql).await? {
                *way = Way::InsertUnknown;
            }
            let (client, kept) = connection.prepared(&sql, keeps_statements).await?;
            match *way {
                Way::Copy => batch.copy(client, &sql, kept).await,
                Way::Insert => batch.insert(client, &sql, kept).await,
                Way::InsertUnknown => batch.insert_unknown(client, &sql).await,
            }
        };
        let written = writing.await.map_err(|error| StoreError::Insert(DatabaseError::new(&error)));
        // After a failed `COPY` the driver may confuse one answer with another (rust-postgres, issue 789).
        if *way != Way::Copy || written.is_ok() {
            self.connection = Some(connection);
        }
        written
    }

    /// Deletes expired keys now and then, if the schedule does not. A failure never fails the batch: it is logged, and pruning is
    /// tried again later.
    async fn prune(&mut self, inserted: u64, horizon: SystemTime, deadline: Instant) {
        self.unpruned += inserted;
        if self.unpruned < PRUNE_EVERY {
            return;
        }
        let deadline = deadline.min(Instant::now() + PRUNE_TIMEOUT);
        if self.is_maintained(deadline).await {
            self.unpruned = 0;
            return;
        }
        let Some(connection) = &self.connection else { return };
        let limit = (2 * self.unpruned) as i64;
        let parameters: [(&(dyn ToSql + Sync), Type); 2] = [(&horizon, Type::TIMESTAMPTZ), (&limit, Type::INT8)];
        let pruning = connection.client.execute_typed(PRUNE, &parameters);
        let error = match timeout_at(deadline, pruning).await {
            Ok(result) => result.err().map(|error| DatabaseError::new(&error).to_string()),
            Err(_) => {
                self.connection = None;
                Some("no time left".to_owned())
            }
        };
        if let Some(error) = error {
            tracing::warn!(error, "ledger prune failed");
            self.counts.prune_failures.fetch_add(1, Ordering::Relaxed);
        }
        self.unpruned = 0;
    }

    async fn connect_ahead(&mut self) -> Result<(), StoreError> {
        self.connection = Some(self.take_connected().await?);
        Ok(())
    }

    async fn take_connected(&mut self) -> Result<Connection, StoreError> {
        if let Some(mut connection) = self.connection.take()
            && connection.is_alive().await
        {
            return Ok(connection);
        }
        self.connect().await
    }

    /// Connects. Renews refused credentials: reads the secret again, as it may have been rotated, or signs a new token.
    async fn connect(&mut self) -> Result<Connection, StoreError> {
        for wait in self.signer.waits() {
            match self.connect_once().await {
                Err(StoreError::Refused { .. }) => sleep(*wait).await,
                result => return result,
            }
            self.counts.credential_refreshes.fetch_add(1, Ordering::Relaxed);
            self.signer.renew().await?;
        }
        self.connect_once().await
    }

    /// Adds to the error of a missing table where the server looked for it.
    async fn add_place(&self, error: &mut StoreError, deadline: Instant) {
        if let StoreError::Table(error) | StoreError::Insert(error) | StoreError::Maintenance(error) = error
            && error.is_missing_table()
            && let Ok(Some(place)) = timeout_at(deadline, self.place()).await
        {
            error.set_place(place);
        }
    }

    async fn place(&self) -> Option<String> {
        let client = &self.connection.as_ref()?.client;
        let place = "select pg_catalog.format('database %I, user %I, schema %s, search path %s', current_database(), current_user, \
                     coalesce(pg_catalog.quote_ident(current_schema()), 'none'), pg_catalog.current_setting('search_path'))";
        client.query_typed(place, &[]).await.ok()?.first()?.try_get(0).ok()
    }

    async fn connect_once(&mut self) -> Result<Connection, StoreError> {
        let known = self.signer.known();
        let (host, port) = (self.connector.host(known)?, self.connector.port(known));
        let credentials = self.signer.credentials(&host, port).await?;
        match self.early.take() {
            Some(early) => self.connector.sign_in(early, &credentials).await,
            None => self.connector.connect(&credentials).await,
        }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("connected", &self.connection.is_some()).finish_non_exhaustive()
    }
}
