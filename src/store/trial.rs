//! Tries what the function would write, and rolls it back.

use tokio_postgres::Client;

use super::{Connection, DatabaseError, Entry, LedgerKey, Sql, batch::Batch, database_error::Remedy};
use crate::mapping::{Mapping, Row};

/// Tries rows by the function's own statement, in a transaction that is rolled back. Connects as the function's database user.
#[derive(Debug)]
pub struct Trial {
    connection: Connection,
    sql: Sql,
}

impl Trial {
    /// Begins the transaction.
    ///
    /// # Errors
    /// [`DatabaseError`], if the server does not answer.
    pub async fn begin(connection: Connection, mapping: &Mapping) -> Result<Self, DatabaseError> {
        // Deferred constraints are checked at the commit, which never comes.
        let begin = "begin; set constraints all immediate";
        connection.client.batch_execute(begin).await.map_err(|error| DatabaseError::new(&error))?;
        Ok(Self { connection, sql: Sql::new(mapping) })
    }

    /// Why PostgreSQL refuses each row; `None` if it does not. A row whose message is in the ledger is not tried.
    ///
    /// # Errors
    /// [`DatabaseError`], if no row is at fault.
    pub async fn refusals(&self, rows: Vec<(LedgerKey, Row)>) -> Result<Vec<Option<DatabaseError>>, DatabaseError> {
        let entries: Vec<_> = rows.into_iter().map(|(key, row)| Entry { key, group: None, row }).collect();
        // Usually all rows are accepted, so they are tried together first.
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
            Err(error) if error.remedy() == Remedy::Isolate && !error.is_table_fault() => Ok(Some(error)),
            Err(error) => Err(error),
        }
    }
}
