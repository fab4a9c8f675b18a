//! Writes rows and their messages' ledger keys in one transaction.

use std::{error::Error as StdError, fmt, pin::pin, time::SystemTime};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::SinkExt;
use tokio_postgres::{
    Client, CopyInSink, Error, Statement,
    types::{IsNull, ToSql, Type, to_sql_checked},
};
use uuid::Uuid;

use super::{Entry, LedgerKey, sql::Sql};
use crate::mapping::Row;

/// Header and trailer of the binary format: <https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.55.9.4>.
const COPY_HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
const COPY_TRAILER: i16 = -1;
/// Bytes sent at a time.
const COPY_CHUNK: usize = 64 * 1024;

/// The statements that a connection keeps prepared, so that the server does not plan them again and again.
pub(super) struct Statements {
    insert: Statement,
    copy_ledger: Statement,
    copy_rows: Statement,
}

impl Statements {
    /// One round trip.
    pub(super) async fn prepare(client: &Client, sql: &Sql) -> Result<Self, Error> {
        let (insert, copy_ledger, copy_rows) =
            tokio::join!(client.prepare(&sql.insert), client.prepare(sql.copy_ledger), client.prepare(&sql.copy_rows));
        Ok(Self { insert: insert?, copy_ledger: copy_ledger?, copy_rows: copy_rows? })
    }
}

pub(super) struct Batch<'a> {
    keys: Vec<LedgerKey>,
    rows: Vec<&'a Row>,
}

impl<'a> Batch<'a> {
    pub(super) fn new(mut entries: Vec<&'a Entry<'_>>) -> Self {
        // Sessions with the same keys lock them in the same order, so they cannot deadlock.
        entries.sort_by_key(|entry| entry.key);
        Self {
            keys: entries.iter().map(|entry| entry.key).collect(),
            rows: entries.iter().map(|entry| &entry.row).collect(),
        }
    }

    /// Writes the batch in one round trip, or fails with a unique violation if the ledger has one of the messages. Returns the
    /// number of rows.
    pub(super) async fn insert(&self, client: &Client, sql: &Sql, kept: Option<&Statements>) -> Result<u64, Error> {
        let Some(Statements { insert, .. }) = kept else { return self.execute(client, &sql.insert, sql).await };
        let arrays = Arrays::of(self, sql);
        let parameters: Vec<_> = arrays.parameters().map(|(array, _)| array).collect();
        client.execute(insert, &parameters).await
    }

    /// Writes the messages that the ledger does not have. Returns the number of rows written.
    pub(super) async fn insert_unknown(&self, client: &Client, sql: &Sql) -> Result<u64, Error> {
        self.execute(client, &sql.insert_unknown, sql).await
    }

    async fn execute(&self, client: &Client, statement: &str, sql: &Sql) -> Result<u64, Error> {
        let arrays = Arrays::of(self, sql);
        let parameters: Vec<_> = arrays.parameters().collect();
        client.execute_typed(statement, &parameters).await
    }

    /// Like [`insert`](Self::insert), but by `COPY`. Takes three round trips, or four without kept statements.
    ///
    /// Do not use a connection again on which it failed: if the server refuses a `COPY` at its start, the driver confuses one
    /// answer with another (<https://github.com/sfackler/rust-postgres/issues/789>).
    pub(super) async fn copy(&self, client: &Client, sql: &Sql, kept: Option<&Statements>) -> Result<u64, Error> {
        // Requests are pipelined to save round trips.
        let begin = client.batch_execute("begin");
        // Biased, as `begin` must go first: rows copied before it would be committed, whatever happens next.
        let (copying, copy_ledger) = match kept {
            Some(kept) => {
                let (begun, copying) = tokio::join!(biased; begin, client.copy_in(&kept.copy_rows));
                begun?;
                (copying?, kept.copy_ledger.clone())
            }
            None => {
                let (begun, copy_rows, copy_ledger) =
                    tokio::join!(biased; begin, client.prepare(&sql.copy_rows), client.prepare(sql.copy_ledger));
                begun?;
                (client.copy_in(&copy_rows?).await?, copy_ledger?)
            }
        };
        // The rows go first, as they take longer. If the ledger has one of the keys, they were written in vain.
        let (copied, entering) = tokio::join!(self.copy_rows(copying, sql.arrays.len()), client.copy_in(&copy_ledger));
        let copied = copied?;
        let entering = entering?;
        // Closes a statement that is not kept within its transaction: a pooler may run the next one on another connection.
        drop(copy_ledger);
        let (entered, committed) = tokio::join!(self.copy_keys(entering), client.batch_execute("commit"));
        entered?;
        committed?;
        Ok(copied)
    }

    async fn copy_rows(&self, sink: CopyInSink<Bytes>, columns: usize) -> Result<u64, Error> {
        let mut sink = pin!(sink);
        let mut data = BytesMut::with_capacity(2 * COPY_CHUNK);
        data.extend_from_slice(COPY_HEADER);
        for row in &self.rows {
            data.put_i16(columns as i16);
            data.extend_from_slice(row.as_bytes());
            if data.len() >= COPY_CHUNK {
                sink.feed(data.split().freeze()).await?;
            }
        }
        data.put_i16(COPY_TRAILER);
        sink.feed(data.freeze()).await?;
        sink.finish().await
    }

    async fn copy_keys(&self, sink: CopyInSink<Bytes>) -> Result<u64, Error> {
        let mut sink = pin!(sink);
        let mut data = BytesMut::from(COPY_HEADER);
        for key in &self.keys {
            key.copy(&mut data);
        }
        data.put_i16(COPY_TRAILER);
        sink.feed(data.freeze()).await?;
        sink.finish().await
    }
}

/// A batch as parameters of a statement: one array a column.
struct Arrays<'a> {
    sent_at: Vec<SystemTime>,
    message_id: Vec<Uuid>,
    columns: Vec<Vec<Cell<'a>>>,
    types: &'a [Type],
}

impl<'a> Arrays<'a> {
    fn of(batch: &Batch<'a>, sql: &'a Sql) -> Self {
        let mut columns: Vec<_> = sql.arrays.iter().map(|_| Vec::with_capacity(batch.rows.len())).collect();
        for row in &batch.rows {
            for (column, cell) in columns.iter_mut().zip(row.cells()) {
                column.push(Cell(cell));
            }
        }
        Self {
            sent_at: batch.keys.iter().map(|key| key.sent_at).collect(),
            message_id: batch.keys.iter().map(|key| key.message_id).collect(),
            columns,
            types: &sql.arrays,
        }
    }

    fn parameters(&self) -> impl Iterator<Item = (&(dyn ToSql + Sync), Type)> {
        let ledger: [(&(dyn ToSql + Sync), Type); 2] =
            [(&self.sent_at, Type::TIMESTAMPTZ_ARRAY), (&self.message_id, Type::UUID_ARRAY)];
        let columns = self.columns.iter().map(|column| column as &(dyn ToSql + Sync)).zip(self.types.iter().cloned());
        ledger.into_iter().chain(columns)
    }
}

/// A cell in PostgreSQL's binary format.
struct Cell<'a>(Option<&'a [u8]>);

impl fmt::Debug for Cell<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cell").finish_non_exhaustive()
    }
}

impl ToSql for Cell<'_> {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        let Some(cell) = self.0 else { return Ok(IsNull::Yes) };
        out.extend_from_slice(cell);
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}
