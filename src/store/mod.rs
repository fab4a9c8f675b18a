//! Rows into PostgreSQL, exactly once.
//!
//! One statement writes a batch's rows and enters their messages in the ledger, so a batch that comes back, for whatever
//! reason, inserts nothing twice; that is what makes every retry here safe, even when the fate of a statement is unknown.

mod connection;
mod error;
mod ledger;

use std::{
    collections::HashSet,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::{
    sync::Mutex,
    time::{Instant, sleep, timeout_at},
};
use tokio_postgres::types::{ToSql, Type};

use self::error::Remedy;
pub use self::{
    connection::{Connection, Connector},
    error::{DatabaseError, StoreError},
    ledger::LedgerKey,
};
use crate::{
    config::DatabaseConfig,
    login::{Columns, Row},
    secrets::{Credentials, Secrets},
};

const INSERT: &str = include_str!("insert.sql");
const PRUNE: &str = include_str!("prune.sql");

/// Waits before refused credentials are read again.
const ROTATION_WAITS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(500), Duration::from_secs(1)];

/// Inserted rows after which expired keys are deleted: up to twice as many, so that a ledger that has grown shrinks.
const PRUNE_EVERY: u64 = 10_000;
/// Longest that a batch may wait for that.
const PRUNE_TIMEOUT: Duration = Duration::from_secs(1);

/// Tries of a statement that lost its connection or a conflict with another session.
const TRIES: u32 = 4;
/// Wait before the second try; it doubles with each further one.
const FIRST_WAIT: Duration = Duration::from_millis(50);

/// A row to insert, and the message it came from. `Debug` shows the key alone, as groups are often named after users.
pub struct Entry {
    /// The message's key in the ledger, unique within a batch.
    pub key: LedgerKey,
    /// The message group, where the queue keeps an order: once a row is refused, the rest of its group waits.
    pub group: Option<String>,
    /// The row.
    pub row: Row,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("key", &self.key).finish_non_exhaustive()
    }
}

/// What became of a batch's entries, by their index. Those in neither list are in the database.
#[derive(Debug, Default)]
pub struct Outcome {
    /// How many rows this call inserted; the others had been inserted before.
    pub inserted: u64,
    /// Entries that PostgreSQL refuses, each with its error.
    pub refused: Vec<(usize, DatabaseError)>,
    /// Entries that wait for an earlier one of their group.
    pub held_back: Vec<usize>,
}

/// The database: one connection, made when needed and kept.
#[derive(Debug)]
pub struct Store {
    session: Mutex<Session>,
    retention: Duration,
    counts: Arc<Counts>,
}

/// What happens beside the inserting of rows and is worth a metric.
#[derive(Debug, Default)]
struct Counts {
    credential_refreshes: AtomicU64,
    prune_failures: AtomicU64,
}

impl Store {
    /// Reads the credentials and the trusted roots; connects on first use.
    ///
    /// # Errors
    /// [`StoreError`], when either cannot be used. The operator's fault.
    pub async fn new(config: DatabaseConfig, secrets: Secrets) -> Result<Self, StoreError> {
        let connector = Connector::new(config, env!("CARGO_PKG_NAME"))?;
        let credentials = secrets.credentials(connector.secret_id()).await?;
        connector.host(&credentials)?;
        let retention = connector.ledger_retention();
        // An environment that lives for few rows prunes, too.
        let unpruned = PRUNE_EVERY;
        let counts = Arc::<Counts>::default();
        let session =
            Session { connector, secrets, credentials, connection: None, unpruned, counts: Arc::clone(&counts) };
        Ok(Self { session: Mutex::new(session), retention, counts })
    }

    /// Connects ahead of the first batch, which would do so itself.
    ///
    /// # Errors
    /// [`StoreError`], when the database is not to be reached now.
    pub async fn connect(&self) -> Result<(), StoreError> {
        self.session.lock().await.connected().await.map(drop)
    }

    /// How often refused credentials were read again, since this was last asked.
    pub fn take_credential_refreshes(&self) -> u64 {
        self.counts.credential_refreshes.swap(0, Ordering::Relaxed)
    }

    /// How often the ledger could not be pruned, since this was last asked.
    pub fn take_prune_failures(&self) -> u64 {
        self.counts.prune_failures.swap(0, Ordering::Relaxed)
    }

    /// Messages sent before this are beyond the ledger's memory.
    pub fn horizon(&self) -> SystemTime {
        SystemTime::now() - self.retention
    }

    /// Inserts the rows of the messages that were not inserted before.
    ///
    /// # Errors
    /// [`StoreError`], when the database cannot be reached or used by `deadline`. The batch's fault: all of it may be
    /// tried again, though some of it may be written already.
    pub async fn insert(&self, entries: &[Entry], deadline: Instant) -> Result<Outcome, StoreError> {
        let mut session = timeout_at(deadline, self.session.lock()).await.map_err(|_| StoreError::Deadline)?;
        let result = timeout_at(deadline, session.insert(entries)).await.unwrap_or(Err(StoreError::Deadline));
        if result.is_err() {
            // A statement may still be under way on it.
            session.connection = None;
        }
        if let Ok(outcome) = &result {
            session.prune(outcome.inserted, self.horizon(), deadline).await;
        }
        result
    }
}

struct Session {
    connector: Connector,
    secrets: Secrets,
    credentials: Credentials,
    connection: Option<Connection>,
    /// Rows inserted since the ledger was pruned.
    unpruned: u64,
    counts: Arc<Counts>,
}

impl Session {
    /// Inserts the entries together; where PostgreSQL refuses that for a row's sake, by halves, until that row is alone.
    /// Earlier entries go first, so that a refused row holds back the rest of its group and nothing else.
    async fn insert(&mut self, entries: &[Entry]) -> Result<Outcome, StoreError> {
        let mut outcome = Outcome::default();
        let mut stopped = HashSet::new();
        let mut pending = vec![(0..entries.len()).collect::<Vec<_>>()];
        while let Some(mut part) = pending.pop() {
            part.retain(|&index| {
                let held_back = entries[index].group.as_ref().is_some_and(|group| stopped.contains(group));
                if held_back {
                    outcome.held_back.push(index);
                }
                !held_back
            });
            if part.is_empty() {
                continue;
            }
            match self.insert_together(part.iter().map(|&index| &entries[index]).collect()).await {
                Ok(inserted) => outcome.inserted += inserted,
                Err(StoreError::Insert(error)) if error.remedy() == Remedy::Split => {
                    if let [index] = part[..] {
                        outcome.refused.push((index, error));
                        stopped.extend(entries[index].group.as_ref());
                    } else {
                        let later = part.split_off(part.len() / 2);
                        pending.extend([later, part]);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(outcome)
    }

    /// One statement, tried again where that can help. Returns how many rows it inserted.
    async fn insert_together(&mut self, mut entries: Vec<&Entry>) -> Result<u64, StoreError> {
        // Two sessions that hold the same keys then lock them in the same order, and cannot deadlock.
        entries.sort_unstable_by_key(|entry| entry.key);
        let (sent_at, message_id): (Vec<_>, Vec<_>) =
            entries.iter().map(|entry| (entry.key.sent_at, entry.key.message_id)).unzip();
        let columns: Columns<'_> = entries.iter().map(|entry| &entry.row).collect();
        let ledger: [(&(dyn ToSql + Sync), Type); 2] =
            [(&sent_at, Type::TIMESTAMPTZ_ARRAY), (&message_id, Type::UUID_ARRAY)];
        let parameters: Vec<_> = ledger.into_iter().chain(columns.parameters()).collect();

        let mut wait = FIRST_WAIT;
        let mut tries = 1;
        loop {
            let error = match self.connected().await {
                // Unnamed, so that a pooler in transaction mode can share the connection.
                Ok(connection) => match connection.client.execute_typed(INSERT, &parameters).await {
                    Ok(inserted) => return Ok(inserted),
                    Err(error) => StoreError::Insert(DatabaseError::new(&error)),
                },
                Err(error) => error,
            };
            match error.remedy() {
                Remedy::Reconnect => self.connection = None,
                Remedy::Repeat => {}
                Remedy::Split | Remedy::GiveUp => return Err(error),
            }
            if tries == TRIES {
                return Err(error);
            }
            tracing::warn!(%error, "trying the insert again");
            sleep(wait).await;
            tries += 1;
            wait *= 2;
        }
    }

    /// Now and then deletes expired keys. A failure is no batch's matter: it is logged, and tried again in time.
    async fn prune(&mut self, inserted: u64, horizon: SystemTime, deadline: Instant) {
        self.unpruned += inserted;
        let Some(connection) = self.connection.as_ref().filter(|_| self.unpruned >= PRUNE_EVERY) else { return };
        let limit = (2 * self.unpruned) as i64;
        let parameters: [(&(dyn ToSql + Sync), Type); 2] = [(&horizon, Type::TIMESTAMPTZ), (&limit, Type::INT8)];
        let pruning = connection.client.execute_typed(PRUNE, &parameters);
        let error = match timeout_at(deadline.min(Instant::now() + PRUNE_TIMEOUT), pruning).await {
            Ok(result) => result.err().map(|error| DatabaseError::new(&error).to_string()),
            Err(_) => {
                self.connection = None;
                Some("no time left".to_owned())
            }
        };
        if let Some(error) = error {
            tracing::warn!(error, "ledger not pruned");
            self.counts.prune_failures.fetch_add(1, Ordering::Relaxed);
        }
        self.unpruned = 0;
    }

    async fn connected(&mut self) -> Result<&Connection, StoreError> {
        let kept = match self.connection.take() {
            Some(mut connection) => connection.is_alive().await.then_some(connection),
            None => None,
        };
        let connection = match kept {
            Some(connection) => connection,
            None => self.connect().await?,
        };
        Ok(self.connection.insert(connection))
    }

    /// Connects. Refused credentials are read again, because they may have been rotated; and again a little later, because
    /// a rotation changes the database first and the secret after it.
    async fn connect(&mut self) -> Result<Connection, StoreError> {
        for wait in ROTATION_WAITS {
            match self.connector.connect(&self.credentials).await {
                Err(StoreError::Connect(error)) if error.refuses_credentials() => sleep(wait).await,
                result => return result,
            }
            self.counts.credential_refreshes.fetch_add(1, Ordering::Relaxed);
            self.credentials = self.secrets.credentials(self.connector.secret_id()).await?;
        }
        self.connector.connect(&self.credentials).await
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("connected", &self.connection.is_some()).finish_non_exhaustive()
    }
}
