//! Redrives dead messages: all of them with an SQS move task, or only the valid ones by invoking the function.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use aws_sdk_lambda::{
    config::{retry::RetryConfig, timeout::TimeoutConfig},
    primitives::Blob,
};
use aws_sdk_sqs::types::{DeleteMessageBatchRequestEntry, ListMessageMoveTasksResultEntry};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{Dead, ENTRIES, Queue, ROUND, Validation, visibility};
use crate::output::{BAD, FAINT, Failure, GOOD, Reply, aws, confirm, count, failed, progress, spinner};

/// Seconds that a message is hidden for its redrive.
const REDRIVE: i32 = 900;
/// Most messages of one invocation.
const BATCH: usize = 500;
/// Most bytes of one invocation's bodies, well below Lambda's limit of 6 MB.
const BATCH_BYTES: usize = 2_000_000;

/// The messages that a redrive has hidden, and the ids of the loaded messages.
#[derive(Default)]
struct Taken {
    dead: Vec<Dead>,
    loaded: HashSet<String>,
}

impl Dead {
    /// The SQS event record that Lambda would send, without the receipt handle: during an outage, the function must not delay
    /// messages of the dead-letter queue.
    fn record(&self, queue_arn: &str) -> Value {
        let attributes: BTreeMap<_, _> =
            self.message.attributes().into_iter().flatten().map(|(name, value)| (name.as_str(), value)).collect();
        json!({
            "messageId": self.id(), "body": self.message.body(),
            "attributes": attributes, "messageAttributes": {}, "md5OfBody": self.message.md5_of_body(),
            "eventSource": "aws:sqs", "eventSourceARN": queue_arn, "awsRegion": queue_arn.split(':').nth(3),
        })
    }
}

impl Queue<'_> {
    pub(super) async fn move_all(&self, rate: Option<i32>, yes: bool) -> Result<Reply, Failure> {
        if self.depth == 0 {
            return Ok(Reply::new(self.with_total(0, String::new()), json!({"moved": 0})));
        }
        let about = count(self.depth, "dead message");
        confirm(&format!("Send about {about} back to the queue, each under a new id?"), yes)?;
        let task =
            self.client.start_message_move_task().source_arn(&self.arn).set_max_number_of_messages_per_second(rate);
        let earlier = self.last_move().await?.map(|task| task.started_timestamp());
        task.send().await.map_err(aws("start the redrive"))?;
        let bar = progress(self.depth, "Redriving {bar:30} {pos} of about {len}  {eta} to go; it goes on without you");
        loop {
            // SQS may list an earlier task until ours appears.
            let ours = self.last_move().await?.filter(|task| Some(task.started_timestamp()) != earlier);
            let Some(task) = ours else {
                sleep(Duration::from_millis(500)).await;
                continue;
            };
            let moved = task.approximate_number_of_messages_moved();
            bar.set_position(moved.unsigned_abs());
            match task.status() {
                Some("RUNNING" | "CANCELLING") | None => sleep(Duration::from_millis(500)).await,
                Some("COMPLETED") => {
                    bar.finish_and_clear();
                    let text = format!("{GOOD}{} back in the queue.{GOOD:#}\n", count(moved, "message"));
                    return Ok(Reply::new(text, json!({"moved": moved})));
                }
                Some(status) => {
                    let reason = task.failure_reason().unwrap_or("no reason given");
                    return Err(failed(format!("the redrive ended as {status} after {moved} messages: {reason}")));
                }
            }
        }
    }

    /// The move task that was started last for this queue.
    async fn last_move(&self) -> Result<Option<ListMessageMoveTasksResultEntry>, Failure> {
        let tasks = self.client.list_message_move_tasks().source_arn(&self.arn).max_results(1).send().await;
        let tasks = tasks.map_err(aws("read the redrive's progress; a redrive that has started continues"))?;
        Ok(tasks.results.unwrap_or_default().into_iter().next())
    }

    pub(super) async fn redrive_fixed(&self, rate: Option<i32>, yes: bool) -> Result<Reply, Failure> {
        if !yes {
            let (dead, _) = self.look(ROUND).await?;
            let valid = dead.iter().filter(|dead| dead.reason.is_none()).count();
            confirm(&format!("Load {} (valid now)?", count(valid as i128, "dead message")), yes)?;
        }
        // Raced against Ctrl-C, so that an interrupted redrive still makes the remaining messages visible again.
        let mut taken = Taken::default();
        let result = tokio::select! {
            result = self.load_all(&mut taken, rate) => result,
            _ = tokio::signal::ctrl_c() => Err(failed("interrupted: messages not loaded are still in the dead-letter queue")),
        };
        let spinner = spinner("Making the remaining messages visible again");
        self.release(taken.dead.iter().filter(|dead| !taken.loaded.contains(dead.id()))).await;
        drop(spinner);
        result?;

        // Refused by the function, or by the database in the trial.
        let left = |refused: bool| {
            let is_refused = |dead: &&Dead| (dead.refused || dead.reason.is_none()) == refused;
            taken.dead.iter().filter(|dead| !taken.loaded.contains(dead.id())).filter(is_refused).count() as i128
        };
        let (loaded, refused, invalid) = (taken.loaded.len() as i128, left(true), left(false));
        let mut text =
            format!("{GOOD}{} loaded{GOOD:#} and deleted from the dead-letter queue\n", count(loaded, "message"));
        if refused > 0 {
            let refused = count(refused, "valid message");
            text += &format!("{BAD}{refused} refused again: `etlctl dlq explain` says why{BAD:#}\n");
        }
        if invalid > 0 {
            text += &format!("{FAINT}{} left in it{FAINT:#}\n", count(invalid, "invalid message"));
        }
        let json = json!({"loaded": loaded, "refused": refused, "invalid": invalid});
        Ok(Reply { no: refused > 0, ..Reply::new(text, json) })
    }

    /// Reads and loads in rounds, until a round reads nothing new. A FIFO queue needs several: SQS shows ten messages of a
    /// group, and the next ten once those are deleted.
    async fn load_all(&self, taken: &mut Taken, rate: Option<i32>) -> Result<(), Failure> {
        let function = self.settings.require("FUNCTION_NAME")?;
        // No read timeout and no retries: an invocation may take 15 minutes, and continues after its caller gives up.
        let config = aws_sdk_lambda::config::Builder::from(&self.settings.aws)
            .timeout_config(TimeoutConfig::builder().connect_timeout(Duration::from_secs(5)).build())
            .retry_config(RetryConfig::disabled());
        let client = aws_sdk_lambda::Client::from_conf(config.build());
        let validation = Validation::new(self.settings).await?;
        loop {
            let first = taken.dead.len();
            self.read(&mut taken.dead, ROUND, REDRIVE, Some(&validation)).await?;
            // If the database cannot be asked, the function finds out.
            drop(self.try_all(&mut taken.dead[first..]).await);
            let fixed: Vec<_> = taken.dead[first..].iter().filter(|dead| dead.reason.is_none()).cloned().collect();
            if taken.dead.len() == first {
                return Ok(());
            }
            let bar = progress(fixed.len() as u64, "Loading {bar:30} {pos} of {len}  {eta} to go");
            let mut due = Instant::now();
            for batch in batches(&fixed, rate) {
                sleep(due.saturating_duration_since(Instant::now())).await;
                let batch = self.hold(batch).await?;
                if let Some(rate) = rate {
                    due = Instant::now() + Duration::from_secs_f64(batch.len() as f64 / f64::from(rate));
                }
                taken.loaded.extend(self.load_batch(&client, &function, &batch).await?);
                bar.inc(batch.len() as u64);
            }
            bar.finish_and_clear();
        }
    }

    /// Extends the time that messages are hidden. Returns those that were still hidden: the others may have been redriven by
    /// somebody else, under another id.
    async fn hold<'m>(&self, batch: &'m [Dead]) -> Result<Vec<&'m Dead>, Failure> {
        let mut held = Vec::new();
        for part in batch.chunks(ENTRIES) {
            let request = self.client.change_message_visibility_batch().queue_url(&self.url);
            let answer = request.set_entries(Some(visibility(part, REDRIVE))).send().await;
            let answer = answer.map_err(aws("hide messages while they are loaded"))?;
            let indexes = answer.successful.iter().filter_map(|entry| entry.id.parse::<usize>().ok());
            held.extend(indexes.filter_map(|index| part.get(index)));
        }
        Ok(held)
    }

    async fn load_batch(
        &self,
        client: &aws_sdk_lambda::Client,
        function: &str,
        batch: &[&Dead],
    ) -> Result<Vec<String>, Failure> {
        let event = json!({"Records": batch.iter().map(|dead| dead.record(&self.arn)).collect::<Vec<_>>()});
        let answer = client.invoke().function_name(function).payload(Blob::new(event.to_string())).send().await;
        let answer = answer.map_err(aws("invoke the function"))?;
        let payload = answer.payload.map(Blob::into_inner).unwrap_or_default();
        let said: Value = serde_json::from_slice(&payload).unwrap_or_default();
        if answer.function_error.is_some() {
            let (kind, message) = (said["errorType"].as_str(), said["errorMessage"].as_str());
            let (kind, message) = (kind.unwrap_or("Unhandled"), message.unwrap_or("no message"));
            return Err(failed(format!(
                "the function failed: {kind}: {message}. Messages that were not loaded are still in the dead-letter queue"
            )));
        }
        let failures = said["batchItemFailures"].as_array();
        let failures = failures
            .ok_or_else(|| failed(format!("{function:?} is not login-etl: its answer has no batchItemFailures")))?;
        let failures: HashSet<&str> =
            failures.iter().filter_map(|failure| failure["itemIdentifier"].as_str()).collect();
        let taken: Vec<_> = batch.iter().filter(|dead| !failures.contains(dead.id())).collect();
        for part in taken.chunks(ENTRIES) {
            let entries = part.iter().enumerate().filter_map(|(number, dead)| {
                let entry = DeleteMessageBatchRequestEntry::builder().id(number.to_string());
                entry.receipt_handle(dead.message.receipt_handle()?).build().ok()
            });
            let delete = self.client.delete_message_batch().queue_url(&self.url).set_entries(Some(entries.collect()));
            let deleted =
                delete.send().await.map_err(aws("delete loaded messages; loading them again does no harm"))?;
            if !deleted.failed.is_empty() {
                return Err(failed("SQS did not delete some loaded messages; loading them again does no harm"));
            }
        }
        Ok(taken.iter().map(|dead| dead.id().to_owned()).collect())
    }
}

/// Splits the messages into batches that fit one invocation, and with a rate, one second.
fn batches(mut fixed: &[Dead], rate: Option<i32>) -> impl Iterator<Item = &[Dead]> {
    let most = rate.map_or(BATCH, |rate| rate.unsigned_abs() as usize).clamp(1, BATCH);
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = |dead: &&Dead| {
            bytes += dead.body().len();
            bytes <= BATCH_BYTES
        };
        let length = fixed.iter().take(most).take_while(fits).count().max(1).min(fixed.len());
        let (batch, rest) = fixed.split_at(length);
        fixed = rest;
        (!batch.is_empty()).then_some(batch)
    })
}
