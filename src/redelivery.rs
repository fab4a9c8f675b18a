//! When failed messages are redelivered: in an outage with exponential backoff, so that good messages outlive it; at once if they
//! can never succeed, so that they soon reach the dead-letter queue.
//!
//! By default, a message returns after the queue's visibility timeout. A batch that fails because of the database is not its
//! messages' fault, but SQS counts their receives all the same. So each message is hidden for a time that doubles with its
//! receives. A message that fails through its own fault only costs time until its last receive, and holds up its group.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use aws_config::SdkConfig;
use aws_sdk_sqs::{
    Client,
    error::{ProvideErrorMetadata, SdkError},
    types::ChangeMessageVisibilityBatchRequestEntry,
};
use futures_util::{StreamExt, stream};
use tokio::{
    sync::{Mutex, OnceCell},
    time::{Instant, timeout_at},
};

use crate::event::Message;

/// The longest delay is this many times the first.
const LONGEST: u32 = 120;
/// Up to one part in this many of the delay is added at random, so that messages that failed together do not return together.
const JITTER: u32 = 4;
/// After this many receives, messages that can never succeed are no longer hurried: their queue allows very many receives.
const HURRIED_RECEIVES: u64 = 20;
/// SQS's limit on the entries of a request.
const ENTRIES: usize = 10;
/// Requests in flight at once; a full batch of 10,000 messages needs a thousand.
const REQUESTS: usize = 32;

/// Delays redeliveries, or hurries them.
#[derive(Debug)]
pub struct Redelivery {
    sdk_config: SdkConfig,
    first_delay: Duration,
    client: OnceCell<Client>,
    /// By ARN.
    queue_urls: Mutex<HashMap<String, String>>,
    denied: AtomicBool,
}

impl Redelivery {
    /// `first_delay` is how long a message is hidden after its first receive. Zero turns delaying and hurrying off. The SQS
    /// client is built when it is first needed.
    pub fn new(sdk_config: SdkConfig, first_delay: Duration) -> Self {
        Self {
            sdk_config,
            first_delay,
            client: OnceCell::new(),
            queue_urls: Mutex::default(),
            denied: AtomicBool::new(false),
        }
    }

    /// Delays messages that failed because of the database, as many as possible until `deadline`.
    pub async fn delay<'a>(&self, messages: impl Iterator<Item = &'a Message<'a>>, deadline: Instant) {
        let after =
            |message: &Message<'_>| delay(self.first_delay, message.receive_count().unwrap_or(1), fastrand::f32());
        self.show(messages.map(|message| (message, after(message))).collect(), deadline).await;
    }

    /// Immediately redelivers messages that can never succeed, as many as possible until `deadline`.
    pub async fn hurry<'a>(&self, messages: impl Iterator<Item = &'a Message<'a>>, deadline: Instant) {
        let messages = messages.filter(|message| message.receive_count().unwrap_or(1) < HURRIED_RECEIVES);
        self.show(messages.map(|message| (message, Duration::ZERO)).collect(), deadline).await;
    }

    /// Makes each message visible after its time, unless delays are turned off.
    ///
    /// A failure is only logged: the messages then return after the queue's visibility timeout. If the function's role lacks
    /// the permission, there are no further attempts.
    async fn show(&self, messages: Vec<(&Message<'_>, Duration)>, deadline: Instant) {
        if messages.is_empty() || self.first_delay.is_zero() || self.denied.load(Ordering::Relaxed) {
            return;
        }
        let error = match timeout_at(deadline, self.show_all(messages)).await {
            Ok(Ok(())) => return,
            Ok(Err(code)) => code,
            Err(_) => "no time left".to_owned(),
        };
        let mut hint = "";
        if error.contains("AccessDenied") {
            self.denied.store(true, Ordering::Relaxed);
            hint = "the role needs sqs:GetQueueUrl and sqs:ChangeMessageVisibility on the queue; not tried again";
        }
        tracing::warn!(error, hint, "cannot delay the redelivery of some messages");
    }

    async fn show_all(&self, messages: Vec<(&Message<'_>, Duration)>) -> Result<(), String> {
        let client = self.client.get_or_init(|| async { Client::new(&self.sdk_config) }).await;
        let mut queues: HashMap<&str, Vec<ChangeMessageVisibilityBatchRequestEntry>> = HashMap::new();
        for (message, after) in messages {
            let (Some(arn), Some(receipt_handle)) = (message.queue_arn(), message.receipt_handle()) else {
                continue;
            };
            let entries = queues.entry(arn).or_default();
            let entry = ChangeMessageVisibilityBatchRequestEntry::builder()
                .id((entries.len() % ENTRIES).to_string())
                .receipt_handle(receipt_handle)
                .visibility_timeout(after.as_secs().try_into().unwrap_or(i32::MAX))
                .build();
            entries.push(entry.map_err(|error| error.to_string())?);
        }
        let mut result = Ok(());
        for (arn, entries) in queues {
            let url = self.queue_url(client, arn).await?;
            let requests: Vec<_> = entries
                .chunks(ENTRIES)
                .map(|entries| {
                    client.change_message_visibility_batch().queue_url(&url).set_entries(Some(entries.to_vec())).send()
                })
                .collect();
            let mut answers = stream::iter(requests).buffer_unordered(REQUESTS);
            while let Some(answer) = answers.next().await {
                // One failed message, such as one that another delivery has finished, does not stop the others.
                let failed = answer.map(|answer| answer.failed().first().map(|failed| failed.code().to_owned()));
                result = result.and(failed.map_err(code).and_then(|failed| failed.map_or(Ok(()), Err)));
            }
        }
        result
    }

    async fn queue_url(&self, client: &Client, arn: &str) -> Result<String, String> {
        let mut urls = self.queue_urls.lock().await;
        if let Some(url) = urls.get(arn) {
            return Ok(url.clone());
        }
        // arn:aws:sqs:region:account:name
        let mut parts = arn.rsplit(':');
        let (name, account) = (parts.next(), parts.next());
        let queue = client.get_queue_url().set_queue_name(name.map(Into::into));
        let queue = queue.set_queue_owner_aws_account_id(account.map(Into::into)).send().await.map_err(code)?;
        let url = queue.queue_url.unwrap_or_default();
        urls.insert(arn.to_owned(), url.clone());
        Ok(url)
    }
}

/// How long to hide a message after this many receives; `chance`, from 0 to 1, is the part of the jitter that is added.
fn delay(first: Duration, receives: u64, chance: f32) -> Duration {
    let doublings = receives.saturating_sub(1).try_into().unwrap_or(u32::MAX);
    let times = 2_u32.saturating_pow(doublings).min(LONGEST);
    let delay = first.saturating_mul(times);
    delay + (delay / JITTER).mul_f32(chance)
}

fn code<E: ProvideErrorMetadata>(error: SdkError<E>) -> String {
    let kind = match error {
        SdkError::TimeoutError(_) => "TimeoutError",
        SdkError::DispatchFailure(_) => "DispatchFailure",
        _ => "unexpected answer",
    };
    error.code().unwrap_or(kind).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_covers_six_hours_of_outage() {
        let template = include_str!("../template.yaml");
        let (_, parameter) = template.split_once("  MaxReceiveCount:\n").unwrap();
        let (_, default) = parameter.split_once("Default: ").unwrap();
        let receives: u64 = default.lines().next().unwrap().parse().unwrap();
        let covered: Duration = (1..receives).map(|receive| delay(Duration::from_secs(60), receive, 0.0)).sum();
        assert!(covered >= Duration::from_secs(6 * 3600), "{covered:?}");
    }

    #[test]
    fn the_delay_doubles_with_each_receive_up_to_its_longest() {
        let minute = Duration::from_secs(60);
        assert_eq!(delay(minute, 0, 0.0), minute);
        assert_eq!(delay(minute, 1, 0.0), minute);
        assert_eq!(delay(minute, 1, 1.0), minute * 5 / 4);
        assert_eq!(delay(minute, 4, 0.0), 8 * minute);
        assert_eq!(delay(minute, u64::MAX, 0.0), 120 * minute);
        // SQS's limit is 12 hours from the receive.
        assert!(delay(minute, u64::MAX, 1.0) < Duration::from_secs(12 * 3600 - 900));
    }
}
