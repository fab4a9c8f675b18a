//! What the schedule has done: expired ledger keys and rows deleted, off the path of the batches.
//!
//! It goes in slices. Each is a statement of its own that deletes a few thousand rows and holds its locks for milliseconds, and
//! leaves the connection to a batch that waits.

use std::time::SystemTime;

use tokio::{
    sync::MutexGuard,
    time::{Duration, Instant, timeout_at},
};
use tokio_postgres::{
    Row,
    types::{ToSql, Type},
};

use super::{DatabaseError, PRUNE, Session, Store, StoreError};

/// Keys or rows that one statement deletes, at most.
const SLICE: i64 = 10_000;
/// For so long after the schedule's last run, batches leave pruning to it.
const TRUSTED: Duration = Duration::from_secs(86_400);

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

impl Store {
    /// Deletes what has expired, and tends partitions, until `deadline`.
    ///
    /// # Errors
    /// [`StoreError`], for the first step that failed; the steps after it were tried all the same.
    pub async fn maintain(&self, deadline: Instant) -> Result<Maintained, StoreError> {
        let mut done = Maintained::default();
        let keys = self.prune_all(&mut done, deadline).await;
        let rows = self.expire_all(&mut done, deadline).await;
        let partitions = self.tend_partitions(&mut done, deadline).await;
        keys.and(rows).and(partitions)?;
        self.session(deadline).await?.execute(RECORD, &[], deadline).await?;
        Ok(done)
    }

    async fn prune_all(&self, done: &mut Maintained, deadline: Instant) -> Result<(), StoreError> {
        let horizon = self.horizon();
        let parameters: [(&(dyn ToSql + Sync), Type); 2] = [(&horizon, Type::TIMESTAMPTZ), (&SLICE, Type::INT8)];
        while Instant::now() < deadline {
            let deleted = self.session(deadline).await?.execute(PRUNE, &parameters, deadline).await?;
            done.keys += deleted;
            if deleted < SLICE.unsigned_abs() {
                return Ok(());
            }
        }
        done.more = true;
        Ok(())
    }

    async fn expire_all(&self, done: &mut Maintained, deadline: Instant) -> Result<(), StoreError> {
        while Instant::now() < deadline {
            let mut session = self.session(deadline).await?;
            let Some(expire) = session.sql.expire.clone() else { return Ok(()) };
            let expired = session.query(&expire, &[(&SLICE, Type::INT8)], deadline).await?;
            let number = |column| expired.first().map_or(0, |row| row.get::<_, i64>(column).unsigned_abs());
            let deleted = number(0);
            done.rows += deleted;
            done.partitions += number(1);
            if deleted < SLICE.unsigned_abs() {
                return Ok(());
            }
        }
        done.more = true;
        Ok(())
    }

    /// Makes the partitions that will be needed, where tables are partitioned as docs/partition-the-tables.md says.
    async fn tend_partitions(&self, done: &mut Maintained, deadline: Instant) -> Result<(), StoreError> {
        let mut session = self.session(deadline).await?;
        let has_partitions = session.query(HAS_PARTITIONS, &[], deadline).await?;
        if has_partitions.first().is_some_and(|row| row.get(0)) {
            done.partitions += session.query(TEND_PARTITIONS, &[], deadline).await?.len() as u64;
        }
        Ok(())
    }

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

    /// Runs a statement, and returns how many rows it deleted or wrote.
    async fn execute(
        &mut self,
        statement: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
        deadline: Instant,
    ) -> Result<u64, StoreError> {
        let connection = self.take_connected().await?;
        let executed = timeout_at(deadline, connection.client.execute_typed(statement, parameters)).await;
        let executed = executed.map_err(|_| StoreError::Deadline)?;
        self.connection = Some(connection);
        executed.map_err(|error| StoreError::Maintenance(DatabaseError::new(&error)))
    }

    /// Runs a statement, and returns its rows.
    async fn query(
        &mut self,
        statement: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
        deadline: Instant,
    ) -> Result<Vec<Row>, StoreError> {
        let connection = self.take_connected().await?;
        let asked = timeout_at(deadline, connection.client.query_typed(statement, parameters)).await;
        let asked = asked.map_err(|_| StoreError::Deadline)?;
        self.connection = Some(connection);
        asked.map_err(|error| StoreError::Maintenance(DatabaseError::new(&error)))
    }
}
