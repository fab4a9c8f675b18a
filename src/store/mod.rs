//! Rows into PostgreSQL, exactly once.
//!
//! One transaction writes a batch's rows and enters their messages in the ledger, so a batch that comes back, for whatever
//! reason, inserts nothing twice; that is what makes every retry here safe, even when the fate of a statement is unknown.
//!
//! Hardly any message comes twice, so a batch is first written as if none did, which is faster; where the ledger refuses
//! that, once more with an eye on what it has.

mod batch;
mod connection;
mod error;
mod ledger;

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

use tokio::{
    sync::Mutex,
    task::spawn_blocking,
    time::{Instant, sleep, timeout_at},
};
use tokio_postgres::types::{ToSql, Type};

use self::{batch::Batch, error::Remedy};
pub use self::{
    connection::{Connection, Connector},
    error::{DatabaseError, StoreError},
    ledger::LedgerKey,
};
use crate::{
    config::DatabaseConfig,
    login::Row,
    secrets::{Credentials, Secrets},
};

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
pub struct Entry<'a> {
    /// The message's key in the ledger, unique within a batch.
    pub key: LedgerKey,
    /// The message group, where the queue keeps an order: once a row is refused, the rest of its group waits.
    pub group: Option<&'a str>,
    /// The row.
    pub row: Row,
}

impl fmt::Debug for Entry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("key", &self.key).finish_non_exhaustive()
    }
}

/// A batch's entries, made as they are taken: while PostgreSQL works on the first, the next are made. Those taken are kept, for
/// when all have to be written anew.
pub struct Entries<'a> {
    taken: Vec<Entry<'a>>,
    others: Box<dyn Iterator<Item = Entry<'a>> + Send + 'a>,
    most: usize,
}

impl<'a> Entries<'a> {
    /// The entries of a batch of so many messages.
    pub fn new(messages: usize, entries: impl Iterator<Item = Entry<'a>> + Send + 'a) -> Self {
        Self { taken: Vec::with_capacity(messages), others: Box::new(entries.fuse()), most: messages }
    }

    /// The next of them from `index` on, up to `count`.
    fn next(&mut self, index: usize, count: usize) -> &[Entry<'a>] {
        let missing = (index + count).saturating_sub(self.taken.len());
        self.taken.extend(self.others.by_ref().take(missing));
        &self.taken[index..self.taken.len().min(index + count)]
    }

    fn all(&mut self) -> &[Entry<'a>] {
        self.taken.extend(self.others.by_ref());
        &self.taken
    }
}

impl fmt::Debug for Entries<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entries").field("most", &self.most).finish_non_exhaustive()
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
    copy_threshold: usize,
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
        let secret_id = config.secret_id.clone();
        // Reading the trusted roots takes milliseconds, which another core can spend while the secret is on its way.
        let connector = spawn_blocking(|| Connector::new(config, env!("CARGO_PKG_NAME")));
        let (connector, credentials) = tokio::join!(connector, secrets.credentials(&secret_id));
        let connector = connector.unwrap_or_else(|panic| resume_unwind(panic.into_panic()))?;
        let credentials = credentials?;
        connector.host(&credentials)?;
        let retention = connector.ledger_retention();
        let copy_threshold = connector.copy_threshold();
        // An environment that lives for few rows prunes, too.
        let unpruned = PRUNE_EVERY;
        let counts = Arc::<Counts>::default();
        let session = Session {
            keeps_statements: connector.prepared_statements(),
            connector,
            secrets,
            credentials,
            connection: None,
            unpruned,
            counts: Arc::clone(&counts),
        };
        Ok(Self { session: Mutex::new(session), retention, copy_threshold, counts })
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

    /// Inserts the rows of the messages that were not inserted before. Where it succeeds it has taken all entries.
    ///
    /// # Errors
    /// [`StoreError`], when the database cannot be reached or used by `deadline`. The batch's fault: all of it may be
    /// tried again, though some of it may be written already.
    pub async fn insert(&self, mut entries: Entries<'_>, deadline: Instant) -> Result<Outcome, StoreError> {
        // Where no message is valid, nothing is asked of the database.
        let by_copy = entries.most >= self.copy_threshold && !entries.next(0, 1).is_empty();
        if !by_copy {
            // They go all at once, so the connection is free for others until they are there.
            entries.all();
        }
        let mut session = timeout_at(deadline, self.session.lock()).await.map_err(|_| StoreError::Deadline)?;
        let result =
            timeout_at(deadline, session.insert(&mut entries, by_copy)).await.unwrap_or(Err(StoreError::Deadline));
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

/// What one transaction writes.
enum Work<'a, 'b> {
    /// All of a batch, by `COPY`, while it is made.
    Stream(&'a mut Entries<'b>),
    /// All or a part of one that is made.
    Batch(Batch<'a>),
}

struct Session {
    connector: Connector,
    secrets: Secrets,
    credentials: Credentials,
    connection: Option<Connection>,
    /// Until it shows that the server's sessions are not ours alone.
    keeps_statements: bool,
    /// Rows inserted since the ledger was pruned.
    unpruned: u64,
    counts: Arc<Counts>,
}

impl Session {
    /// Inserts the entries together; where PostgreSQL refuses that for a row's sake, by halves, until that row is alone.
    /// Earlier entries go first, so that a refused row holds back the rest of its group and nothing else.
    async fn insert(&mut self, entries: &mut Entries<'_>, by_copy: bool) -> Result<Outcome, StoreError> {
        let mut by_insert_unknown = false;
        if by_copy {
            match self.write(&mut Work::Stream(entries), &mut by_insert_unknown).await {
                Ok(inserted) => return Ok(Outcome { inserted, ..Outcome::default() }),
                // Some of the messages came before, or a row is refused, or the table is one that `COPY` cannot write and
                // `INSERT` may.
                Err(StoreError::Insert(error)) if error.is_answer() => {
                    if !error.is_unique_violation() {
                        tracing::warn!(%error, "COPY failed: going on with INSERT");
                    }
                    by_insert_unknown = true;
                }
                Err(error) => return Err(error),
            }
        }
        let entries = entries.all();
        let mut outcome = Outcome::default();
        let mut stopped = HashSet::new();
        let mut pending = vec![(0..entries.len()).collect::<Vec<_>>()];
        while let Some(mut part) = pending.pop() {
            part.retain(|&index| {
                let held_back = entries[index].group.is_some_and(|group| stopped.contains(group));
                if held_back {
                    outcome.held_back.push(index);
                }
                !held_back
            });
            if part.is_empty() {
                continue;
            }
            let batch = Batch::new(part.iter().map(|&index| &entries[index]).collect());
            match self.write(&mut Work::Batch(batch), &mut by_insert_unknown).await {
                Ok(inserted) => outcome.inserted += inserted,
                Err(StoreError::Insert(error)) if error.remedy() == Remedy::Split => {
                    if let [index] = part[..] {
                        outcome.refused.push((index, error));
                        stopped.extend(entries[index].group);
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

    /// One transaction, tried again where that can help. Returns how many rows it inserted.
    ///
    /// `by_insert_unknown` says that the faster ways are not for this batch, and is set once that shows.
    async fn write(&mut self, work: &mut Work<'_, '_>, by_insert_unknown: &mut bool) -> Result<u64, StoreError> {
        let mut wait = FIRST_WAIT;
        let mut tries = 1;
        loop {
            let result = match work {
                Work::Stream(entries) => self.copy(entries).await,
                Work::Batch(batch) if *by_insert_unknown => self.insert_unknown(batch).await,
                Work::Batch(batch) => self.insert_all(batch).await,
            };
            let error = match result {
                Err(StoreError::Insert(error)) if error.is_of_a_statement_s_name() && self.keeps_statements => {
                    tracing::warn!(%error, "a pooler is in between: going on without prepared statements");
                    self.keeps_statements = false;
                    self.connection = None;
                    continue;
                }
                // `INSERT` is for that.
                Err(StoreError::Insert(error)) if error.is_answer() && matches!(work, Work::Stream(_)) => {
                    return Err(StoreError::Insert(error));
                }
                // Some of the messages came before.
                Err(StoreError::Insert(error)) if error.is_unique_violation() && !*by_insert_unknown => {
                    *by_insert_unknown = true;
                    continue;
                }
                Err(error) => error,
                inserted => return inserted,
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

    async fn insert_all(&mut self, batch: &Batch<'_>) -> Result<u64, StoreError> {
        let keeps_statements = self.keeps_statements;
        let connection = self.connected().await?;
        let inserting = async {
            let (client, kept) = connection.prepared(keeps_statements).await?;
            batch.insert(client, kept).await
        };
        inserting.await.map_err(|error| StoreError::Insert(DatabaseError::new(&error)))
    }

    async fn insert_unknown(&mut self, batch: &Batch<'_>) -> Result<u64, StoreError> {
        let connection = self.connected().await?;
        let inserted = batch.insert_unknown(&connection.client).await;
        inserted.map_err(|error| StoreError::Insert(DatabaseError::new(&error)))
    }

    async fn copy(&mut self, entries: &mut Entries<'_>) -> Result<u64, StoreError> {
        // It goes back only after a transaction that has ended well.
        let mut connection = self.take_connected().await?;
        let keeps_statements = self.keeps_statements;
        let copying = async {
            let (client, kept) = connection.prepared(keeps_statements).await?;
            batch::copy(client, kept, entries).await
        };
        let copied = copying.await.map_err(|error| StoreError::Insert(DatabaseError::new(&error)))?;
        self.connection = Some(connection);
        Ok(copied)
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

    async fn connected(&mut self) -> Result<&mut Connection, StoreError> {
        let connection = self.take_connected().await?;
        Ok(self.connection.insert(connection))
    }

    async fn take_connected(&mut self) -> Result<Connection, StoreError> {
        if let Some(mut connection) = self.connection.take()
            && connection.is_alive().await
        {
            return Ok(connection);
        }
        self.connect().await
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
