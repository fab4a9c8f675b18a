//! Deletes expired ledger keys and rows when the schedule asks for it, off the path of the batches.
//!
//! It works in slices. A slice is one statement that deletes a few thousand rows and holds its locks for milliseconds. A batch that
//! waits for the connection comes after it.

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

/// Keys or rows that one statement deletes, at most.
const SLICE: i64 = 10_000;
/// For so long after the schedule's last run, batches leave pruning to it.
const TRUSTED: Duration = Duration::from_secs(86_400);

/// Deletes up to $2 of the keys that were sent before $1, the oldest first. Keys under the epoch stay. The times are given twice
/// because the partitions of a ledger share their ctids. Batches use `prune.sql`, which locks the keys first, so that two batches do
/// not wait for each other. That costs as much again, and there is only one schedule.
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

/// What a run of the schedule did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Maintained {
    /// Ledger keys deleted.
    pub keys: u64,
    /// Rows deleted one by one.
    pub rows: u64,
    /// Partitions made or dropped.
    pub partitions: u64,
    /// Whether something was left when the time was up; the next run goes on.
    pub more: bool,
}

/// Whether there was time for all of a step.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Done,
    TimeIsUp,
}

/// A step that the deadline ended has done some of its work, and is no failure.
fn within_time(step: Result<Step, StoreError>) -> Result<Step, StoreError> {
    match step {
        Err(StoreError::Deadline) => Ok(Step::TimeIsUp),
        step => step,
    }
}

impl Store {
    /// Tends partitions and deletes what has expired, until `deadline`. What is left, the next run does.
    ///
    /// # Errors
    /// [`StoreError`], for the first step that failed; the steps after it were tried all the same.
    pub async fn maintain(&self, deadline: Instant) -> Result<Maintained, StoreError> {
        let mut done = Maintained::default();
        // A backlog of keys leaves time for rows, and both leave some to record it.
        let last = deadline - (deadline - Instant::now()) / 10;
        let half = last - (last - Instant::now()) / 2;
        let partitions = self.tend_partitions(&mut done, half).await;
        let keys = within_time(self.prune_all(&mut done, half).await);
        // It is what batches ask for.
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

    /// Makes the partitions that will be needed, where tables are partitioned as docs/partition-the-tables.md says.
    async fn tend_partitions(&self, done: &mut Maintained, deadline: Instant) -> Result<(), StoreError> {
        let has_partitions = self.query(HAS_PARTITIONS, &[], deadline).await?;
        if has_partitions.first().is_some_and(|row| row.get(0)) {
            done.partitions += self.query(TEND_PARTITIONS, &[], deadline).await?.len() as u64;
        }
        Ok(())
    }

    /// Runs a statement, and returns how many rows it deleted or wrote.
    async fn execute(
        &self,
        statement: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
        deadline: Instant,
    ) -> Result<u64, StoreError> {
        let running = async |client: &Client| client.execute_typed(statement, parameters).await;
        self.session(deadline).await?.run(running, deadline).await
    }

    /// Runs a statement, and returns its rows.
    async fn query(
        &self,
        statement: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
        deadline: Instant,
    ) -> Result<Vec<Row>, StoreError> {
        let running = async |client: &Client| client.query_typed(statement, parameters).await;
        self.session(deadline).await?.run(running, deadline).await
    }

    /// The connection, for one statement: a batch that waits for it comes next.
    async fn session(&self, deadline: Instant) -> Result<MutexGuard<'_, Session>, StoreError> {
        timeout_at(deadline, self.session.lock()).await.map_err(|_| StoreError::Deadline)
    }
}

impl Session {
    /// Whether the schedule has been at work within a day. Asked once, and again when that day is over.
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
        // A statement that is given up may still be under way on its connection, which is not kept.
        timeout_at(deadline, running).await.map_err(|_| StoreError::Deadline)?
    }
}
