//! What the function would write, tried and taken back.

use tokio_postgres::Client;

use super::{Connection, DatabaseError, Entry, LedgerKey, Sql, batch::Batch, error::Remedy};
use crate::mapping::{Mapping, Row};

/// Tries rows by the function's own statement, in a transaction that is rolled back. Its connection is the function's user's.
#[derive(Debug)]
pub struct Trial {
    connection: Connection,
    sql: Sql,
}

impl Trial {
    /// Begins.
    ///
    /// # Errors
    /// [`DatabaseError`], when the server does not answer.
    pub async fn begin(connection: Connection, mapping: &Mapping) -> Result<Self, DatabaseError> {
        // What is checked at the end of a transaction would never be.
        let begin = "begin; set constraints all immediate";
        connection.client.batch_execute(begin).await.map_err(|error| DatabaseError::new(&error))?;
        Ok(Self { connection, sql: Sql::new(mapping) })
    }

    /// Why PostgreSQL refuses each of these rows, if it does. One whose message is in the ledger is not written, and not refused.
    ///
    /// # Errors
    /// [`DatabaseError`], when it refuses them for no row's sake.
    pub async fn refusals(&self, rows: Vec<(LedgerKey, Row)>) -> Result<Vec<Option<DatabaseError>>, DatabaseError> {
        let entries: Vec<_> = rows.into_iter().map(|(key, row)| Entry { key, group: None, row }).collect();
        // Most are all right.
        if self.refusal(entries.iter().collect()).await?.is_none() {
            return Ok(vec![None; entries.len()]);
        }
        let mut refusals = Vec::with_capacity(entries.len());
        for entry in &entries {
            refusals.push(self.refusal(vec![entry]).await?);
        }
        Ok(refusals)
    }

    async fn refusal(&self, entries: Vec<&Entry<'_>>) -> Result<Option<DatabaseError>, DatabaseError> {
        let client: &Client = &self.connection.client;
        let database_error = |error: tokio_postgres::Error| DatabaseError::new(&error);
        client.batch_execute("savepoint trial").await.map_err(database_error)?;
        let written = Batch::new(entries).insert_unknown(client, &self.sql).await.map_err(database_error);
        client.batch_execute("rollback to savepoint trial").await.map_err(database_error)?;
        match written {
            Ok(_) => Ok(None),
            Err(error) if error.remedy() == Remedy::Isolate && !error.is_the_table_s() => Ok(Some(error)),
            Err(error) => Err(error),
        }
    }
}
