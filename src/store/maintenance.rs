//! Deletes expired ledger keys and rows when the schedule invokes the function, outside the batches.
//!
//! Each statement deletes a slice of up to ten thousand rows and holds its locks for milliseconds. A batch that waits for the
//! connection runs between two slices.

use std::time::SystemTime;

use tokio::{
    sync::MutexGuard,
    time::{Duration, Instant, timeout_at},
};
use tokio_postgres::{
    Client, Error, Row,
    types::{ToSql, Type},
};

use super::{DatabaseError, Session, Store, StoreError};

/// Maximum keys or rows that one statement deletes.
const SLICE: i64 = 10_000;
/// How long after the schedule's last run batches leave pruning to it.
const TRUSTED: Duration = Duration::from_secs(86_400);

/// Deletes up to $2 keys sent before $1, oldest first. Keys under the epoch stay. The times appear twice because partitions of
/// the ledger can have equal ctids. Batches use `prune.sql` instead, which locks the keys first so that two batches do not wait
/// for each other. Locking doubles the cost, and there is only one schedule.
const DELETE_KEYS: &str = "
    delete from etl_ledger
    where sent_at > 'epoch' and sent_at < $1 and ctid = any (array(
        select ctid from etl_ledger where sent_at > 'epoch' and sent_at < $1 order by sent_at, message_id limit $2
    ))";
const RECORD: &str = "
    insert into etl_maintenance (done_at) values (pg_catalog.now())
    on conflict (only_row) do update set done_at = excluded.done_at";
const HAS_PARTITIONS: &str = "select pg_catalog.to_regprocedure('login_etl_tend_partitions(interval)') is not null";
const TEND_PARTITIONS: &str = "select login_etl_tend_partitions()";

/// The result of a scheduled run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Maintained {
    /// Ledger keys deleted.
    pub keys: u64,
    /// Rows deleted one by one.
    pub rows: u64,
    /// Partitions created or dropped.
    pub partitions: u64,
    /// Whether work was left when the time was up. The next run continues.
    pub more: bool,
}

/// Whether a step was completed in time.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Done,
    TimeIsUp,
}

/// Maps a deadline to [`Step::TimeIsUp`]: a step that ran out of time has done part of its work, and did not fail.
fn within_time(step: Result<Step, StoreError>) -> Result<Step, StoreError> {
    match step {
        Err(StoreError::Deadline) => Ok(Step::TimeIsUp),
        step => step,
    }
}

impl Store {
    /// Creates partitions and deletes expired data, until `deadline`. The next run does the rest.
    ///
    /// # Errors
    /// [`StoreError`], for the first step that failed. The steps after it are still tried.
    pub async fn maintain(&self, deadline: Instant) -> Result<Maintained, StoreError> {
        let mut done = Maintained::default();
        // A backlog of keys must leave time for rows, and both must leave time to record the run.
        let last = deadline - (deadline - Instant::now()) / 10;
        let half = last - (last - Instant::now()) / 2;
        let partitions = self.tend_partitions(&mut done, half).await;
        let keys = within_time(self.prune_all(&mut done, half).await);
        // Batches leave pruning to the schedule only if its run is recorded.
        let recorded = match &keys {
            Ok(_) => self.execute(RECORD, &[], deadline).await,
            Err(_) => Ok(0),
        };
        let rows = within_time(self.expire_all(&mut done, last).await);
        partitions?;
        done.more = keys? == Step::TimeIsUp;
        recorded?;
        done.more |= rows? == Step::TimeIsUp;
        Ok(done)
    }

    async fn prune_all(&self, done: &mut Maintained, deadline: Instant) -> Result<Step, StoreError> {
        let horizon = self.horizon();
        let parameters: [(&(dyn ToSql + Sync), Type); 2] = [(&horizon, Type::TIMESTAMPTZ), (&SLICE, Type::INT8)];
        loop {
            let deleted = self.execute(DELETE_KEYS, &parameters, deadline).await?;
            done.keys += deleted;
            if deleted < SLICE.unsigned_abs() {
                return Ok(Step::Done);
            }
        }
    }

    async fn expire_all(&self, done: &mut Maintained, deadline: Instant) -> Result<Step, StoreError> {
        let Some(expire) = self.session(deadline).await?.sql.expire.clone() else { return Ok(Step::Done) };
        loop {
            let expired = self.query(&expire, &[(&SLICE, Type::INT8)], deadline).await?;
            let number = |column| expired.first().map_or(0, |row| row.get::<_, i64>(column).unsigned_abs());
            done.rows += number(0);
            done.partitions += number(1);
            if number(0) < SLICE.unsigned_abs() {
                return Ok(Step::Done);
            }
        }
    }

    /// Creates the partitions needed next, if the tables are partitioned as in docs/partition-the-tables.md.
    async fn tend_partitions(&self, done: &mut Maintained, deadline: Instant) -> Result<(), StoreError> {
        let has_partitions = self.query(HAS_PARTITIONS, &[], deadline).await?;
        if has_partitions.first().is_some_and(|row| row.get(0)) {
            done.partitions += self.query(TEND_PARTITIONS, &[], deadline).await?.len() as u64;
        }
        Ok(())
    }

    /// Runs a statement. Returns how many rows it deleted or wrote.
    async fn execute(
        &self,
        statement: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
        deadline: Instant,
    ) -> Result<u64, StoreError> {
        let running = async |client: &Client| client.execute_typed(statement, parameters).await;
        self.session(deadline).await?.run(running, deadline).await
    }

    /// Runs a statement. Returns its rows.
    async fn query(
        &self,
        statement: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
        deadline: Instant,
    ) -> Result<Vec<Row>, StoreError> {
        let running = async |client: &Client| client.query_typed(statement, parameters).await;
        self.session(deadline).await?.run(running, deadline).await
    }

    /// Locks the session for one statement, so that a waiting batch comes next.
    async fn session(&self, deadline: Instant) -> Result<MutexGuard<'_, Session>, StoreError> {
        timeout_at(deadline, self.session.lock()).await.map_err(|_| StoreError::Deadline)
    }
}

impl Session {
    /// Whether the schedule ran within the last day. Asks the server again only after that day.
    pub(super) async fn is_maintained(&mut self, deadline: Instant) -> bool {
        let now = SystemTime::now();
        if self.maintained_until.is_some_and(|until| now < until) {
            return true;
        }
        let Some(connection) = &self.connection else { return false };
        let asking = connection.client.query_typed("select done_at from etl_maintenance", &[]);
        let Ok(Ok(rows)) = timeout_at(deadline, asking).await else { return false };
        let done_at: Option<SystemTime> = rows.first().and_then(|row| row.try_get(0).ok());
        self.maintained_until = done_at.map(|at| at + TRUSTED);
        self.maintained_until.is_some_and(|until| now < until)
    }

    async fn run<T>(
        &mut self,
        statement: impl AsyncFnOnce(&Client) -> Result<T, Error>,
        deadline: Instant,
    ) -> Result<T, StoreError> {
        let running = async {
            let connection = self.take_connected().await?;
            let result = statement(&connection.client).await;
            self.connection = Some(connection);
            result.map_err(|error| StoreError::Maintenance(DatabaseError::new(&error)))
        };
        // On a timeout the connection is dropped, as the statement may still be running on it.
        let mut result = timeout_at(deadline, running).await.map_err(|_| StoreError::Deadline)?;
        if let Err(error) = &mut result {
            self.add_place(error, deadline).await;
        }
        result
    }
}
