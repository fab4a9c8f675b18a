//! One batch: an SQS event in, the batch item failures out.

use std::{
    collections::{HashMap, HashSet, hash_map},
    fmt,
    ops::RangeInclusive,
    panic::AssertUnwindSafe,
    time::{Duration, SystemTime},
};

use aws_lambda_events::sqs::SqsBatchResponse;
use bytes::BytesMut;
use futures_util::FutureExt;
use lambda_runtime::{Diagnostic, LambdaEvent};
use tokio::time::Instant;

use crate::{
    event::{self, Message, NotAnSqsEvent},
    login::{AppVersionEncoding, Day, Invalid, ROWS_CAPACITY, Row},
    metrics,
    redelivery::Redelivery,
    runtime::Event,
    secrets::FreshKeyring,
    store::{DatabaseError, Entries, Entry, LedgerKey, Store, StoreError},
};

/// What is kept of the invocation's time for the answer, and for what a failed batch needs before it: a tenth, within
/// these.
const ANSWER_TIME: RangeInclusive<Duration> = Duration::from_millis(200)..=Duration::from_secs(3);
/// The time an invocation gets where the caller's deadline is past already, as it is under `cargo lambda watch`.
const NO_DEADLINE: Duration = Duration::from_secs(30);

/// Handles batches; one for the life of an execution environment.
#[derive(Debug)]
pub struct Handler {
    keyring: FreshKeyring,
    store: Store,
    redelivery: Redelivery,
    app_version_encoding: AppVersionEncoding,
}

/// Why a whole batch comes back. None of its messages is reported as handled.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// The event is not one from SQS.
    #[error(transparent)]
    NotAnSqsEvent(#[from] NotAnSqsEvent),
    /// A message has no id, so its failure could not be reported.
    #[error("a message of the event has no messageId")]
    NoMessageId,
    /// The rows were not inserted.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A bug in this program. The log has its place.
    #[error("panicked: see the log for the place in the code")]
    Panic,
}

impl BatchError {
    /// A stable name, for alarms and for Lambda's `errorType`.
    pub fn error_type(&self) -> &'static str {
        match self {
            Self::NotAnSqsEvent(_) => "InvalidEvent",
            Self::NoMessageId => "NoMessageId",
            Self::Store(error) => error.error_type(),
            Self::Panic => "Panic",
        }
    }
}

impl From<BatchError> for Diagnostic {
    fn from(error: BatchError) -> Self {
        Self { error_type: error.error_type().to_owned(), error_message: error.to_string() }
    }
}

/// Why a message is reported as a batch item failure.
#[derive(Clone, Debug)]
enum Failure {
    Invalid(Invalid),
    Refused(DatabaseError),
    HeldBack,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(reason) => reason.fmt(f),
            Self::Refused(error) => write!(f, "refused by the database: {error}"),
            Self::HeldBack => f.write_str("an earlier message of its group failed"),
        }
    }
}

/// What a batch came to.
#[derive(Default)]
struct Report {
    messages: usize,
    inserted: u64,
    /// When the oldest message was sent, of those that are no batch item failures.
    oldest: Option<SystemTime>,
    highest_receive_count: Option<u64>,
    /// Message id and reason, in the batch's order.
    failures: Vec<(String, Failure)>,
}

impl Handler {
    /// A handler with its keyring, its database and what delays redeliveries.
    pub fn new(
        keyring: FreshKeyring,
        store: Store,
        redelivery: Redelivery,
        app_version_encoding: AppVersionEncoding,
    ) -> Self {
        Self { keyring, store, redelivery, app_version_encoding }
    }

    /// Handles an invocation: loads the batch, logs each failed message and one line of counts, emits the metrics.
    ///
    /// # Errors
    /// [`BatchError`]: all of the batch comes back.
    pub async fn invoke(&self, event: LambdaEvent<Event>) -> Result<SqsBatchResponse, BatchError> {
        let (started, timestamp) = (Instant::now(), SystemTime::now());
        let time = event.context.deadline().duration_since(timestamp).unwrap_or(NO_DEADLINE);
        let answer_time = (time / 10).clamp(*ANSWER_TIME.start(), *ANSWER_TIME.end());
        let deadline = started + time.saturating_sub(answer_time);

        let mut report = Report::default();
        let loading = async {
            let messages = event::messages(&event.payload.0)?;
            let result = self.load(&messages, deadline, &mut report).await;
            if let Err(BatchError::Store(_)) = result {
                self.redelivery.delay(&messages, deadline + answer_time / 2).await;
            }
            result
        };
        // The runtime would put a panic's message into its answer, and a message can quote data.
        let result = AssertUnwindSafe(loading).catch_unwind().await.unwrap_or(Err(BatchError::Panic));

        let Report { messages, inserted, oldest, highest_receive_count, failures } = report;
        let failed = failures.len();
        let deduplicated = if result.is_ok() { messages as u64 - failed as u64 - inserted } else { 0 };
        metrics::Batch {
            timestamp,
            function_name: event.context.env_config.function_name.clone(),
            request_id: event.context.request_id.clone(),
            outcome: result.as_ref().err().map_or("Ok", BatchError::error_type),
            messages: messages as u64,
            inserted,
            deduplicated,
            failed: failed as u64,
            batches_failed: result.is_err().into(),
            duration: started.elapsed(),
            age_of_oldest_message: oldest.and_then(|sent| SystemTime::now().duration_since(sent).ok()),
            highest_receive_count,
            credential_refreshes: self.store.take_credential_refreshes(),
            keyring_failures: self.keyring.take_failures(),
            prune_failures: self.store.take_prune_failures(),
        }
        .emit();
        result.inspect_err(|error| {
            tracing::error!(error_type = error.error_type(), %error, messages, "batch failed: all of it comes back");
        })?;
        for (message_id, reason) in &failures {
            tracing::warn!(message_id, %reason, "message failed");
        }
        let duration_ms = started.elapsed().as_millis() as u64;
        tracing::info!(messages, inserted, deduplicated, failed, duration_ms, "batch loaded");

        let mut response = SqsBatchResponse::default();
        let mut reported = HashSet::new();
        response.set_failures(failures.iter().map(|(id, _)| id).filter(|id| reported.insert(*id)));
        Ok(response)
    }

    async fn load(&self, messages: &[Message<'_>], deadline: Instant, report: &mut Report) -> Result<(), BatchError> {
        report.messages = messages.len();
        report.oldest = messages.iter().filter_map(Message::sent).min();
        report.highest_receive_count = messages.iter().filter_map(Message::receive_count).max();
        if messages.iter().any(|message| message.id().is_none_or(str::is_empty)) {
            return Err(BatchError::NoMessageId);
        }

        let keyring = self.keyring.current(deadline).await;
        let horizon = self.store.horizon();
        let today = Day::of(SystemTime::now());
        // By the message's place in the batch: of those that are in an entry, and of those that failed.
        let mut places = Vec::with_capacity(messages.len());
        let mut failures = HashMap::new();
        // A second copy of a message in the batch shares the first one's fate.
        let mut first_copies = Vec::with_capacity(messages.len());
        let mut known = HashMap::with_capacity(messages.len());
        let mut stopped_groups = HashSet::new();
        let mut buffer = BytesMut::with_capacity(ROWS_CAPACITY);
        // Made as the store takes them, all of them where it succeeds: what they leave here is complete only then.
        let entries = messages.iter().enumerate().filter_map(|(place, message)| {
            let key = LedgerKey::new(message.id().unwrap_or_default(), message.sent_timestamp(), horizon);
            let first = match known.entry(key.message_id) {
                hash_map::Entry::Occupied(first) => *first.get(),
                hash_map::Entry::Vacant(unknown) => *unknown.insert(place),
            };
            first_copies.push(first);
            if first != place {
                return None;
            }
            let group = message.fifo_group();
            let row = if group.is_some_and(|group| stopped_groups.contains(group)) {
                Err(Failure::HeldBack)
            } else {
                let body = message.body();
                body.and_then(|body| Row::of(body, self.app_version_encoding, &keyring, today, &mut buffer))
                    .map_err(Failure::Invalid)
            };
            match row {
                Ok(row) => {
                    places.push(place);
                    Some(Entry { key, group, row })
                }
                Err(failure) => {
                    stopped_groups.extend(group);
                    failures.insert(place, failure);
                    None
                }
            }
        });

        let outcome = self.store.insert(Entries::new(messages.len(), entries), deadline).await?;
        report.inserted = outcome.inserted;
        let refused = outcome.refused.into_iter().map(|(index, error)| (index, Failure::Refused(error)));
        let held_back = outcome.held_back.into_iter().map(|index| (index, Failure::HeldBack));
        failures.extend(refused.chain(held_back).map(|(index, failure)| (places[index], failure)));
        if failures.is_empty() {
            return Ok(());
        }
        report.oldest = None;
        for (message, first) in messages.iter().zip(first_copies) {
            if let Some(failure) = failures.get(&first) {
                report.failures.push((message.id().unwrap_or_default().to_owned(), failure.clone()));
            } else {
                report.oldest = report.oldest.into_iter().chain(message.sent()).min();
            }
        }
        Ok(())
    }
}
