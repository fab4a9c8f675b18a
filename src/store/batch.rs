//! Some rows and their messages' keys, and the ways to write both in one transaction.

use std::{pin::pin, time::SystemTime};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::SinkExt;
use tokio::task::yield_now;
use tokio_postgres::{
    Client, CopyInSink, Error, Statement,
    types::{ToSql, Type},
};
use uuid::Uuid;

use super::{Entries, Entry, LedgerKey};
use crate::login::{Columns, Row};

const INSERT: &str = include_str!("insert.sql");
const INSERT_UNKNOWN: &str = include_str!("insert_unknown.sql");
const COPY_LEDGER: &str = include_str!("copy_ledger.sql");
const COPY_ROWS: &str = include_str!("copy_rows.sql");

/// What begins and ends the binary format: <https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.55.9.4>.
const COPY_HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
const COPY_TRAILER: i16 = -1;
/// Rows that are made, and then sent, before the next are.
const ROWS_TOGETHER: usize = 256;

/// The statements that a connection keeps prepared, which spares the server to plan them again and again.
pub(super) struct Statements {
    insert: Statement,
    copy_ledger: Statement,
    copy_rows: Statement,
}

impl Statements {
    /// One round trip.
    pub(super) async fn prepare(client: &Client) -> Result<Self, Error> {
        let (insert, copy_ledger, copy_rows) =
            tokio::join!(client.prepare(INSERT), client.prepare(COPY_LEDGER), client.prepare(COPY_ROWS));
        Ok(Self { insert: insert?, copy_ledger: copy_ledger?, copy_rows: copy_rows? })
    }
}

pub(super) struct Batch<'a> {
    keys: Vec<LedgerKey>,
    rows: Vec<&'a Row>,
}

impl<'a> Batch<'a> {
    pub(super) fn new(mut entries: Vec<&'a Entry<'_>>) -> Self {
        // Two sessions that hold the same keys then lock them in the same order, and cannot deadlock.
        entries.sort_by_key(|entry| entry.key);
        Self {
            keys: entries.iter().map(|entry| entry.key).collect(),
            rows: entries.iter().map(|entry| &entry.row).collect(),
        }
    }

    /// Writes all of it in one round trip, or fails with a unique violation if the ledger has one of the messages. Returns the
    /// number of rows.
    pub(super) async fn insert(&self, client: &Client, kept: Option<&Statements>) -> Result<u64, Error> {
        match kept {
            Some(Statements { insert, .. }) => {
                let arrays = Arrays::of(self);
                let parameters: Vec<_> = arrays.parameters().map(|(array, _)| array).collect();
                client.execute(insert, &parameters).await
            }
            None => self.execute(client, INSERT).await,
        }
    }

    /// Writes what the ledger does not have yet. Returns the number of rows written.
    pub(super) async fn insert_unknown(&self, client: &Client) -> Result<u64, Error> {
        self.execute(client, INSERT_UNKNOWN).await
    }

    async fn execute(&self, client: &Client, statement: &str) -> Result<u64, Error> {
        let arrays = Arrays::of(self);
        let parameters: Vec<_> = arrays.parameters().collect();
        client.execute_typed(statement, &parameters).await
    }
}

/// Writes all entries as [`Batch::insert`] does, in three round trips, or four where no statements are kept. They are taken
/// while the server works on those before.
///
/// A connection on which it failed is not to be used again: after a `COPY` that the server refuses at its start the driver
/// takes one answer for another (<https://github.com/sfackler/rust-postgres/issues/789>).
pub(super) async fn copy(client: &Client, kept: Option<&Statements>, entries: &mut Entries<'_>) -> Result<u64, Error> {
    // What goes ahead of an answer spares a round trip.
    let begin = client.batch_execute("begin");
    // Biased, as `begin` has to go first: what is copied before it would stay, whatever comes after.
    let (copying, copy_ledger) = match kept {
        Some(kept) => {
            let (begun, copying) = tokio::join!(biased; begin, client.copy_in(&kept.copy_rows));
            begun?;
            (copying?, kept.copy_ledger.clone())
        }
        None => {
            let (begun, copy_rows, copy_ledger) =
                tokio::join!(biased; begin, client.prepare(COPY_ROWS), client.prepare(COPY_LEDGER));
            begun?;
            (client.copy_in(&copy_rows?).await?, copy_ledger?)
        }
    };
    // The rows come first, as the keys are only known with them. Where the ledger has one of the keys they are written in vain.
    let (copied, entering) = tokio::join!(copy_rows(copying, entries), client.copy_in(&copy_ledger));
    let copied = copied?;
    let entering = entering?;
    // One that is not kept is closed within its transaction, as a pooler may give the next to another connection.
    drop(copy_ledger);
    let (entered, committed) = tokio::join!(copy_keys(entering, entries.all()), client.batch_execute("commit"));
    entered?;
    committed?;
    Ok(copied)
}

async fn copy_rows(sink: CopyInSink<Bytes>, entries: &mut Entries<'_>) -> Result<u64, Error> {
    let mut sink = pin!(sink);
    let mut data = BytesMut::from(COPY_HEADER);
    let mut sent = 0;
    loop {
        let rows = entries.next(sent, ROWS_TOGETHER);
        for entry in rows {
            entry.row.copy(&mut data);
        }
        sent += rows.len();
        if rows.is_empty() {
            data.put_i16(COPY_TRAILER);
            sink.feed(data.freeze()).await?;
            return sink.finish().await;
        }
        sink.feed(data.split().freeze()).await?;
        // The connection's task gets to send them.
        yield_now().await;
    }
}

async fn copy_keys(sink: CopyInSink<Bytes>, entries: &[Entry<'_>]) -> Result<u64, Error> {
    let mut sink = pin!(sink);
    let mut keys: Vec<_> = entries.iter().map(|entry| entry.key).collect();
    // In the order in which a batch has them, for the same reason.
    keys.sort();
    let mut data = BytesMut::from(COPY_HEADER);
    for key in &keys {
        key.copy(&mut data);
    }
    data.put_i16(COPY_TRAILER);
    sink.feed(data.freeze()).await?;
    sink.finish().await
}

/// A batch as a statement's parameters.
struct Arrays<'a> {
    sent_at: Vec<SystemTime>,
    message_id: Vec<Uuid>,
    columns: Columns<'a>,
}

impl<'a> Arrays<'a> {
    fn of(batch: &Batch<'a>) -> Self {
        Self {
            sent_at: batch.keys.iter().map(|key| key.sent_at).collect(),
            message_id: batch.keys.iter().map(|key| key.message_id).collect(),
            columns: batch.rows.iter().copied().collect(),
        }
    }

    fn parameters(&self) -> impl Iterator<Item = (&(dyn ToSql + Sync), Type)> {
        let ledger: [(&(dyn ToSql + Sync), Type); 2] =
            [(&self.sent_at, Type::TIMESTAMPTZ_ARRAY), (&self.message_id, Type::UUID_ARRAY)];
        ledger.into_iter().chain(self.columns.parameters())
    }
}
