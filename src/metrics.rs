//! One wide event a batch, and one a maintenance run, in CloudWatch's embedded metric format: a line of JSON on standard output,
//! from which CloudWatch extracts the metrics.

use std::{
    sync::Mutex,
    time::{Duration, SystemTime},
};

use metrique::{
    CloseValue, RootEntry,
    emf::Emf,
    unit::{Count, Millisecond, Second},
    unit_of_work::metrics,
    writer::{Entry, format::Format},
};

/// The namespace of the metrics.
const NAMESPACE: &str = "login-etl";

/// A batch's metrics, in namespace `login-etl`, by function name.
#[metrics(rename_all = "PascalCase", emf::dimension_sets = [["FunctionName"]])]
#[derive(Debug)]
pub struct Metrics {
    /// When the batch arrived.
    #[metrics(timestamp)]
    pub timestamp: SystemTime,
    /// Dimension.
    pub function_name: String,
    /// Property: Lambda's id of the invocation.
    pub request_id: String,
    /// Property: `Ok`, or the `errorType` of a failed batch.
    pub outcome: &'static str,
    /// Messages in the batch.
    #[metrics(unit = Count)]
    pub messages: u64,
    /// Rows inserted.
    #[metrics(unit = Count)]
    pub inserted: u64,
    /// Messages whose rows had been inserted before.
    #[metrics(unit = Count)]
    pub deduplicated: u64,
    /// Batch item failures.
    #[metrics(unit = Count)]
    pub failed: u64,
    /// 1 if the whole batch failed and returns to the queue, else 0.
    #[metrics(unit = Count)]
    pub batches_failed: u64,
    /// From the event's arrival to the response.
    #[metrics(unit = Millisecond)]
    pub duration: Duration,
    /// From sending to the end of the batch, of the oldest message that succeeded; if the whole batch failed, of the oldest.
    #[metrics(unit = Second)]
    pub age_of_oldest_message: Option<Duration>,
    /// The highest receive count of the batch's messages.
    #[metrics(unit = Count)]
    pub highest_receive_count: Option<u64>,
    /// How often refused credentials were read again, since the last batch.
    #[metrics(unit = Count)]
    pub credential_refreshes: u64,
    /// How often the keyring could not be read again, since the last batch.
    #[metrics(unit = Count)]
    pub keyring_failures: u64,
    /// How often the ledger could not be pruned, since the last batch.
    #[metrics(unit = Count)]
    pub prune_failures: u64,
}

/// A maintenance run's metrics, in the same namespace.
#[metrics(rename_all = "PascalCase", emf::dimension_sets = [["FunctionName"]])]
#[derive(Debug)]
pub struct Maintenance {
    /// When the schedule's event arrived.
    #[metrics(timestamp)]
    pub timestamp: SystemTime,
    /// Dimension.
    pub function_name: String,
    /// Property: Lambda's id of the invocation.
    pub request_id: String,
    /// Property: `Ok`, or the error's type.
    pub outcome: &'static str,
    /// 1 if everything expired was deleted, or as much as there was time for; 0 if something failed.
    #[metrics(unit = Count)]
    pub maintained: u64,
}

impl Metrics {
    /// Writes the event to standard output.
    pub fn emit(self) {
        emit(&RootEntry::new(self.close()));
    }
}

impl Maintenance {
    /// Writes the event to standard output.
    pub fn emit(self) {
        emit(&RootEntry::new(self.close()));
    }
}

/// Writes an event at once: Lambda may freeze the environment with a buffered event in it.
#[expect(clippy::print_stdout, reason = "Lambda reads metrics from standard output; tests can capture `print!`")]
fn emit(entry: &impl Entry) {
    static EMF: Mutex<Option<Emf>> = Mutex::new(None);

    let mut line = Vec::new();
    let mut emf = EMF.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let emf = emf.get_or_insert_with(|| Emf::builder(NAMESPACE.to_owned(), vec![vec![]]).build());
    match emf.format(entry, &mut line) {
        Ok(()) => print!("{}", String::from_utf8_lossy(&line)),
        Err(error) => tracing::warn!(%error, "metrics not written"),
    }
}
