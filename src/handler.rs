//! One batch: an SQS event in, the batch item failures out. `prepare → store → settle`, and every message has one fate.

use std::{
    collections::{HashMap, HashSet, hash_map},
    fmt,
    ops::RangeInclusive,
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, SystemTime},
};

use aws_lambda_events::sqs::SqsBatchResponse;
use bytes::BytesMut;
use futures_util::FutureExt;
use lambda_runtime::{Context, Diagnostic, LambdaEvent};
use tokio::{sync::Mutex, time::Instant};

use crate::{
    event::{self, Message, NotAnSqsEvent},
    keyring::Keyring,
    mapping::{Envelope, Invalid, Mapping, ROWS_CAPACITY},
    metrics,
    redelivery::Redelivery,
    runtime::Event,
    secrets::FreshKeyring,
    store::{self, DatabaseError, Entry, LedgerKey, Maintained, Store, StoreError},
};

/// The part of an invocation's time that is reserved for the response, and for delaying redeliveries before it: a tenth, within
/// these bounds.
const ANSWER_TIME: RangeInclusive<Duration> = Duration::from_millis(200)..=Duration::from_secs(3);
/// Longest time to schedule the redelivery of a batch's failed messages: the others wait for the response.
const REDELIVERY_TIME: Duration = Duration::from_secs(2);
/// The time for an invocation whose deadline has passed already, as under `cargo lambda watch`.
const NO_DEADLINE: Duration = Duration::from_secs(30);

/// An invocation's times.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// When it began, by the monotonic clock.
    pub started: Instant,
    /// When it began, by the wall clock.
    pub timestamp: SystemTime,
    /// When its work must be done.
    pub deadline: Instant,
    /// The time left after the deadline.
    answer_time: Duration,
}

impl Times {
    /// The times of an invocation that begins now.
    pub fn of(context: &Context) -> Self {
        let (started, timestamp) = (Instant::now(), SystemTime::now());
        let time = context.deadline().duration_since(timestamp).unwrap_or(NO_DEADLINE);
        let answer_time = (time / 10).clamp(*ANSWER_TIME.start(), *ANSWER_TIME.end());
        Self { started, timestamp, deadline: started + time.saturating_sub(answer_time), answer_time }
    }

    /// When the redelivery of failed messages must be scheduled.
    pub fn last(&self) -> Instant {
        self.deadline + self.answer_time / 2
    }
}

/// Handles batches; lives as long as its execution environment.
#[derive(Debug)]
pub struct Handler {
    mapping: Mapping,
    keyring: FreshKeyring,
    store: Store,
    redelivery: Redelivery,
    health: Mutex<Health>,
}

/// How many of the latest messages were bad: invalid or refused. Each batch counts half as much as the next one.
#[derive(Debug, Default)]
struct Health {
    messages: f64,
    bad: f64,
}

impl Health {
    /// Adds a batch's new messages. Returns whether less than half were bad. Otherwise the mapping or the table is likelier to be
    /// wrong than the messages.
    fn add(&mut self, messages: usize, bad: usize) -> bool {
        if messages > 0 {
            self.messages = self.messages / 2.0 + messages as f64;
            self.bad = self.bad / 2.0 + bad as f64;
        }
        self.bad < self.messages / 2.0
    }
}

/// Why a whole batch returns to the queue. None of its messages is reported as handled.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// A setting, a secret or the mapping cannot be used. The text says what to do.
    #[error("not started: {0}")]
    Init(String),
    /// The event is not from SQS.
    #[error(transparent)]
    NotAnSqsEvent(#[from] NotAnSqsEvent),
    /// A maintenance event of a schedule that is not the function's.
    #[error("the maintenance event is not from the schedule in MAINTENANCE_SCHEDULE: nothing was done")]
    NotTheSchedule,
    /// The runtime gave one invocation the event of another.
    #[error("the runtime mixed up two invocations")]
    MixedUp,
    /// A message has no id, so its failure could not be reported.
    #[error("a message of the event has no messageId")]
    NoMessageId,
    /// The rows were not inserted.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A bug in this program. The log has its place in the code.
    #[error("panicked: see the log for the place in the code")]
    Panic,
}

impl BatchError {
    /// A stable name, for alarms and for Lambda's `errorType`.
    pub fn error_type(&self) -> &'static str {
        match self {
            Self::Init(_) => "Init",
            Self::NotAnSqsEvent(_) | Self::NotTheSchedule => "InvalidEvent",
            Self::MixedUp => "MixedUp",
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
    Doubtful(DatabaseError),
    HeldBack,
    Untried,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(reason) => reason.fmt(f),
            Self::Refused(error) | Self::Doubtful(error) => write!(f, "refused by the database: {error}"),
            Self::Untried => f.write_str("no time was left to try it; it returns to the queue"),
            Self::HeldBack => f.write_str("an earlier message of its group failed"),
        }
    }
}

/// A message's state before the database sees it.
enum Prepared {
    /// It is the entry at this index.
    Entry(usize),
    /// It is a copy of the message at this index in the batch, and shares its fate.
    CopyOf(usize),
    /// It will not be written.
    Failed(Failure),
}

/// The result of a batch.
struct Loaded {
    inserted: u64,
    /// Why each message of the batch failed, if it did.
    failures: Vec<Option<Failure>>,
}

impl Handler {
    /// Makes a handler of its parts.
    pub fn new(mapping: Mapping, keyring: FreshKeyring, store: Store, redelivery: Redelivery) -> Self {
        Self { mapping, keyring, store, redelivery, health: Mutex::default() }
    }

    /// Deletes expired ledger keys and rows, emits a metric, and logs one line. A failure does not fail the invocation: the
    /// schedule retries.
    pub async fn maintain(&self, times: &Times, context: &Context) {
        let maintained = self.store.maintain(times.deadline).await;
        let done = metrics::Maintenance {
            timestamp: times.timestamp,
            function_name: context.env_config.function_name.clone(),
            request_id: context.request_id.clone(),
            outcome: maintained.as_ref().err().map_or("Ok", StoreError::error_type),
            maintained: maintained.is_ok().into(),
        };
        done.emit();
        let duration_ms = times.started.elapsed().as_millis() as u64;
        match maintained {
            Ok(Maintained { keys, rows, partitions, more }) => {
                tracing::info!(keys, rows, partitions, more, duration_ms, "maintenance done");
            }
            Err(error) => {
                tracing::warn!(error_type = error.error_type(), %error, "maintenance failed; the schedule retries");
            }
        }
    }

    /// Handles an invocation: loads the batch, logs each failed message and one line of counts, emits the metrics.
    ///
    /// # Errors
    /// [`BatchError`]: the whole batch returns to the queue.
    pub async fn invoke(&self, event: LambdaEvent<Event>) -> Result<SqsBatchResponse, BatchError> {
        let LambdaEvent { payload, context, .. } = event;
        let times = Times::of(&context);
        let Times { started, timestamp, deadline, .. } = times;

        let read = || match payload.of(&context.request_id) {
            Some(event) => event::messages(event).map_err(BatchError::from),
            None => Err(BatchError::MixedUp),
        };
        // The runtime would put a panic's message into its response, and such a message can quote data.
        let read = catch_unwind(AssertUnwindSafe(read)).unwrap_or(Err(BatchError::Panic));
        let (messages, unreadable) = match read {
            Ok(messages) => (messages, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        let messages = &messages[..];
        let loading = async {
            let result = self.load(messages, deadline).await;
            let until = times.last();
            match &result {
                Ok(loaded) => self.redeliver(messages, loaded, until.min(Instant::now() + REDELIVERY_TIME)).await,
                Err(BatchError::Store(_)) => self.redelivery.delay(messages.iter(), until).await,
                Err(_) => {}
            }
            result
        };
        let result = match unreadable {
            Some(error) => Err(error),
            None => AssertUnwindSafe(loading).catch_unwind().await.unwrap_or(Err(BatchError::Panic)),
        };

        let (inserted, failed) = match &result {
            Ok(loaded) => (loaded.inserted, loaded.failures.iter().flatten().count() as u64),
            Err(_) => (0, 0),
        };
        let count = messages.len() as u64;
        let deduplicated = if result.is_ok() { count - failed - inserted } else { 0 };
        metrics::Metrics {
            timestamp,
            function_name: context.env_config.function_name.clone(),
            request_id: context.request_id.clone(),
            outcome: result.as_ref().err().map_or("Ok", BatchError::error_type),
            messages: count,
            inserted,
            deduplicated,
            failed,
            batches_failed: result.is_err().into(),
            duration: started.elapsed(),
            age_of_oldest_message: oldest(messages, result.as_ref().ok())
                .and_then(|sent| SystemTime::now().duration_since(sent).ok()),
            highest_receive_count: messages.iter().filter_map(Message::receive_count).max(),
            credential_refreshes: self.store.take_credential_refreshes(),
            keyring_failures: self.keyring.take_failures(),
            prune_failures: self.store.take_prune_failures(),
        }
        .emit();
        let loaded = result.inspect_err(|error| {
            tracing::error!(error_type = error.error_type(), %error, messages = count, "batch failed; all its messages return to the queue");
        })?;
        let mut response = SqsBatchResponse::default();
        let mut reported = HashSet::new();
        for (message, failure) in pairs(messages, &loaded.failures) {
            let (Some(message_id), Some(reason)) = (message.id(), failure) else { continue };
            tracing::warn!(message_id, %reason, "message failed");
            if reported.insert(message_id) {
                response.add_failure(message_id);
            }
        }
        let duration_ms = started.elapsed().as_millis() as u64;
        tracing::info!(messages = count, inserted, deduplicated, failed, duration_ms, "batch loaded");
        Ok(response)
    }

    async fn load(&self, messages: &[Message<'_>], deadline: Instant) -> Result<Loaded, BatchError> {
        if messages.iter().any(|message| message.id().is_none_or(str::is_empty)) {
            return Err(BatchError::NoMessageId);
        }
        let keyring = self.keyring.current(deadline).await;
        let (prepared, entries) = self.prepare(messages, &keyring);
        let stored = self.store.insert(&entries, deadline).await?;
        Ok(Loaded { inserted: stored.inserted, failures: settle(prepared, &stored.fates) })
    }

    /// Immediately redelivers messages that can never succeed, so they soon reach the dead-letter queue and hold up no group.
    /// Delays the redelivery of messages that may succeed later.
    async fn redeliver(&self, messages: &[Message<'_>], loaded: &Loaded, until: Instant) {
        let is_bad = |failure: &Failure| matches!(failure, Failure::Invalid(_) | Failure::Refused(_));
        // A message counts once, however often it is redelivered.
        let first_receives =
            || pairs(messages, &loaded.failures).filter(|(message, _)| message.receive_count().unwrap_or(1) <= 1);
        let bad = first_receives().filter(|(_, failure)| failure.is_some_and(is_bad)).count();
        let most_are_good = self.health.lock().await.add(first_receives().count(), bad);
        if loaded.failures.iter().all(Option::is_none) {
            return;
        }
        let hopeless = |failure: &Failure| match failure {
            Failure::Invalid(_) => most_are_good,
            Failure::Refused(error) => most_are_good && loaded.inserted > 0 && error.is_permanent(),
            Failure::Doubtful(_) | Failure::HeldBack | Failure::Untried => false,
        };
        let failed = || pairs(messages, &loaded.failures).filter_map(|(message, failure)| Some((message, failure?)));
        let groups: HashSet<&str> =
            failed().filter(|(_, failure)| hopeless(failure)).filter_map(|(message, _)| message.fifo_group()).collect();
        let hurried = failed().filter(|(message, failure)| {
            // The messages held back behind it would still hold up their group.
            let waits = matches!(failure, Failure::HeldBack)
                && message.fifo_group().is_some_and(|group| groups.contains(group));
            hopeless(failure) || waits
        });
        self.redelivery.hurry(hurried.map(|(message, _)| message), until).await;
        let later = failed().filter(|(_, failure)| matches!(failure, Failure::Doubtful(_) | Failure::Untried));
        self.redelivery.delay(later.map(|(message, _)| message), until).await;
    }

    /// Makes an entry of each message to be written, in the batch's order.
    fn prepare<'a>(&self, messages: &'a [Message<'_>], keyring: &Keyring) -> (Vec<Prepared>, Vec<Entry<'a>>) {
        let (now, horizon) = (SystemTime::now(), self.store.horizon());
        let mut prepared = Vec::with_capacity(messages.len());
        let mut entries = Vec::with_capacity(messages.len());
        let mut firsts = HashMap::with_capacity(messages.len());
        let mut stopped_groups = HashSet::new();
        let mut buffer = BytesMut::with_capacity(ROWS_CAPACITY);
        for (index, message) in messages.iter().enumerate() {
            let id = message.id().unwrap_or_default();
            let key = LedgerKey::new(id, message.sent_timestamp(), horizon);
            match firsts.entry(key.message_id) {
                hash_map::Entry::Occupied(first) => {
                    prepared.push(Prepared::CopyOf(*first.get()));
                    continue;
                }
                hash_map::Entry::Vacant(unknown) => unknown.insert(index),
            };
            let group = message.fifo_group();
            let row = if group.is_some_and(|group| stopped_groups.contains(group)) {
                Err(Failure::HeldBack)
            } else {
                let envelope = Envelope { message_id: id, sent: message.sent(), queue: message.queue_name(), now };
                let row = message.body().ok_or(Invalid::NoBody);
                row.and_then(|body| self.mapping.row_of_json_string(body, &envelope, keyring, &mut buffer))
                    .map_err(Failure::Invalid)
            };
            prepared.push(match row {
                Ok(row) => {
                    entries.push(Entry { key, group, row });
                    Prepared::Entry(entries.len() - 1)
                }
                Err(failure) => {
                    stopped_groups.extend(group);
                    Prepared::Failed(failure)
                }
            });
        }
        (prepared, entries)
    }
}

/// Why each message of the batch failed, if it did. `fates` are those of the entries.
fn settle(prepared: Vec<Prepared>, fates: &[store::Fate]) -> Vec<Option<Failure>> {
    let mut failures: Vec<Option<Failure>> = Vec::with_capacity(prepared.len());
    for message in prepared {
        failures.push(match message {
            Prepared::Failed(failure) => Some(failure),
            Prepared::CopyOf(first) => failures[first].clone(),
            Prepared::Entry(index) => match &fates[index] {
                store::Fate::Stored => None,
                store::Fate::Refused(error) => Some(Failure::Refused(error.clone())),
                store::Fate::Doubtful(error) => Some(Failure::Doubtful(error.clone())),
                store::Fate::HeldBack => Some(Failure::HeldBack),
                store::Fate::Untried => Some(Failure::Untried),
            },
        });
    }
    failures
}

/// When the oldest message was sent; in a loaded batch, the oldest message that succeeded.
fn oldest(messages: &[Message<'_>], loaded: Option<&Loaded>) -> Option<SystemTime> {
    match loaded {
        None => messages.iter().filter_map(Message::sent).min(),
        Some(loaded) => pairs(messages, &loaded.failures)
            .filter(|(_, failure)| failure.is_none())
            .filter_map(|(message, _)| message.sent())
            .min(),
    }
}

/// Each message with its failure, if it failed.
fn pairs<'a, 'b>(
    messages: &'b [Message<'a>],
    failures: &'b [Option<Failure>],
) -> impl Iterator<Item = (&'b Message<'a>, Option<&'b Failure>)> {
    assert_eq!(messages.len(), failures.len(), "every message has one fate");
    messages.iter().zip(failures.iter().map(Option::as_ref))
}
