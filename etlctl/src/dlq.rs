//! The dead-letter queue: what died, why, and back again.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use aws_sdk_lambda::{
    config::{retry::RetryConfig, timeout::TimeoutConfig},
    primitives::Blob,
};
use aws_sdk_sqs::{
    Client,
    types::{
        ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry, Message, MessageSystemAttributeName,
        QueueAttributeName,
    },
};
use jiff::Timestamp;
use login_etl::{
    login::{AppVersionEncoding, Field, Login},
    mask::Keyring,
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::{
    audit,
    cli::Dlq,
    keys::age,
    logs,
    output::{
        BAD, FAINT, Failure, GOOD, Reply, WARNING, aws, confirm, count, failed, printable, progress, spinner, table,
        time,
    },
    settings::Settings,
};

/// Seconds that a message is hidden while it is looked at; it is shown again as soon as that is done.
const LOOK: i32 = 60;
/// Seconds that a message is hidden while it is redriven.
const REDRIVE: i32 = 900;
/// Entries of a request to SQS, at most.
const ENTRIES: usize = 10;
/// Messages of one invocation, at most.
const BATCH: usize = 500;
/// Bytes of one invocation's bodies, well within its 6 MB.
const BATCH_BYTES: usize = 2_000_000;
/// Most messages that are hidden at once to be redriven; SQS allows 120,000, and 20,000 of a FIFO queue.
const ROUND: usize = 10_000;
/// Why a valid message died of which the log has nothing.
const NOT_LOGGED: &str = "nothing in the log: its batches failed, or ran out of time";
/// As long as a message can live.
const LIFE: Duration = Duration::from_secs(14 * 86_400);

pub async fn run(settings: &Settings, command: &Dlq) -> Result<Reply, Failure> {
    let queue = Queue::new(settings).await?;
    match command {
        Dlq::List { limit } => queue.list(*limit).await,
        Dlq::Explain { limit } => queue.explain(*limit).await,
        Dlq::Show { message_id, reveal, reason } => queue.show(message_id, *reveal, reason.as_deref()).await,
        Dlq::Redrive { fixed: false, rate, yes } => queue.move_all(*rate, *yes).await,
        Dlq::Redrive { fixed: true, rate, yes } => queue.redrive_fixed(*rate, *yes).await,
        Dlq::Purge { yes } => queue.purge(*yes).await,
    }
}

/// A dead message, and why the function refuses it, if it does.
#[derive(Clone)]
struct Dead {
    message: Message,
    reason: Option<String>,
}

impl Dead {
    fn id(&self) -> &str {
        self.message.message_id().unwrap_or_default()
    }

    fn attribute(&self, name: &MessageSystemAttributeName) -> Option<&str> {
        Some(self.message.attributes()?.get(name)?.as_str())
    }

    fn sent(&self) -> Option<Timestamp> {
        let milliseconds = self.attribute(&MessageSystemAttributeName::SentTimestamp)?.parse().ok()?;
        Timestamp::from_millisecond(milliseconds).ok()
    }

    fn body(&self) -> &str {
        self.message.body().unwrap_or_default()
    }

    /// In the form in which Lambda hands messages to the function.
    fn record(&self, queue_arn: &str) -> Value {
        let attributes: BTreeMap<_, _> =
            self.message.attributes().into_iter().flatten().map(|(name, value)| (name.as_str(), value)).collect();
        json!({
            "messageId": self.id(), "receiptHandle": self.message.receipt_handle(), "body": self.message.body(),
            "attributes": attributes, "messageAttributes": {}, "md5OfBody": self.message.md5_of_body(),
            "eventSource": "aws:sqs", "eventSourceARN": queue_arn, "awsRegion": queue_arn.split(':').nth(3),
        })
    }
}

/// What a redrive has hidden, and the ids of what it has loaded of that.
#[derive(Default)]
struct Taken {
    dead: Vec<Dead>,
    loaded: HashSet<String>,
}

struct Queue<'a> {
    settings: &'a Settings,
    client: Client,
    url: String,
    /// How many messages can be read, roughly, and how many are hidden by somebody who does that now.
    depth: u64,
    hidden: u64,
    arn: String,
}

impl<'a> Queue<'a> {
    async fn new(settings: &'a Settings) -> Result<Self, Failure> {
        let client = Client::new(&settings.aws);
        let url = settings.require("DLQ_URL")?;
        let names = [
            QueueAttributeName::ApproximateNumberOfMessages,
            QueueAttributeName::ApproximateNumberOfMessagesNotVisible,
            QueueAttributeName::QueueArn,
        ];
        let attributes =
            client.get_queue_attributes().queue_url(&url).set_attribute_names(Some(names.to_vec())).send().await;
        let attributes = attributes.map_err(aws("look at the dead-letter queue"))?.attributes.unwrap_or_default();
        let attribute = |name| attributes.get(&name).cloned().unwrap_or_default();
        let number = |name| attribute(name).parse().unwrap_or(0);
        let depth = number(QueueAttributeName::ApproximateNumberOfMessages);
        let hidden = number(QueueAttributeName::ApproximateNumberOfMessagesNotVisible);
        Ok(Self { settings, url, depth, hidden, arn: attribute(QueueAttributeName::QueueArn), client })
    }

    /// Reads messages, up to `limit` of them, and hides them for so many seconds. What it had read is there also if it fails or
    /// is cut off.
    async fn read(&self, dead: &mut Vec<Dead>, limit: usize, hidden: i32) -> Result<(), Failure> {
        let bar = progress(self.depth.min(limit as u64), "Reading dead messages {bar:30} {pos} of about {len}");
        let validation = Validation::new(self.settings).await?;
        let asked = Instant::now();
        let mut known: HashSet<_> = dead.iter().map(|dead| dead.id().to_owned()).collect();
        let first = dead.len();
        loop {
            let before = dead.len();
            let wanted = ENTRIES.min(first + limit - before) as i32;
            if wanted == 0 {
                break;
            }
            let receive = self.client.receive_message().queue_url(&self.url).max_number_of_messages(wanted);
            // Waiting asks all of SQS's servers; a short look asks some, and may miss messages.
            let receive = receive.wait_time_seconds(if self.depth == 0 { 0 } else { 1 }).visibility_timeout(hidden);
            let received = receive.message_system_attribute_names(MessageSystemAttributeName::All).send().await;
            let messages = received.map_err(aws("read the dead-letter queue"))?.messages.unwrap_or_default();
            for message in messages {
                if known.insert(message.message_id().unwrap_or_default().to_owned()) {
                    let reason = validation.reason(message.body().unwrap_or_default());
                    dead.push(Dead { message, reason });
                }
            }
            // Nothing more; or time is up for the first ones, which then come back into sight.
            if dead.len() == before || asked.elapsed() > Duration::from_secs(hidden.unsigned_abs().into()) * 9 / 10 {
                break;
            }
            bar.set_position((dead.len() - first) as u64);
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Lets others see the messages again.
    async fn release<'m>(&self, dead: impl IntoIterator<Item = &'m Dead>) {
        let dead: Vec<_> = dead.into_iter().collect();
        for part in dead.chunks(ENTRIES) {
            let entries = part.iter().enumerate().filter_map(|(number, dead)| {
                let entry =
                    ChangeMessageVisibilityBatchRequestEntry::builder().id(number.to_string()).visibility_timeout(0);
                entry.receipt_handle(dead.message.receipt_handle()?).build().ok()
            });
            let request = self.client.change_message_visibility_batch().queue_url(&self.url);
            // They come back by themselves, only later.
            drop(request.set_entries(Some(entries.collect())).send().await);
        }
    }

    async fn look(&self, limit: usize) -> Result<Vec<Dead>, Failure> {
        let mut dead = Vec::new();
        let read = self.read(&mut dead, limit, LOOK).await;
        self.release(&dead).await;
        read.map(|()| dead)
    }

    async fn list(&self, limit: usize) -> Result<Reply, Failure> {
        let mut dead = self.look(limit).await?;
        dead.sort_by_key(Dead::sent);
        let sent = |dead: &Dead| dead.sent().map(|at| at.strftime("%Y-%m-%d %H:%M:%S").to_string());
        let receives = |dead: &Dead| -> Option<u64> {
            dead.attribute(&MessageSystemAttributeName::ApproximateReceiveCount)?.parse().ok()
        };
        let rows = dead.iter().map(|dead| {
            let reason = dead.reason.clone().unwrap_or_else(|| "valid now".to_owned());
            vec![dead.id().to_owned(), sent(dead).unwrap_or_default(), dead.body().len().to_string(), reason]
        });
        let text = self.with_total(dead.len(), table(&["message", "sent (UTC)", "bytes", "reason"], rows));
        let json = dead.iter().map(|dead| {
            json!({
                "message_id": dead.id(), "sent_at": dead.sent().map(time), "bytes": dead.body().len(),
                "receives": receives(dead), "valid": dead.reason.is_none(), "reason": dead.reason,
                "group": dead.attribute(&MessageSystemAttributeName::MessageGroupId).is_some(),
            })
        });
        Ok(Reply::new(text, json.collect()))
    }

    /// The table, if there is anything in it, and how much of the queue that is.
    fn with_total(&self, read: usize, table: String) -> String {
        match read {
            0 if self.hidden == 0 => format!("{GOOD}No dead messages.{GOOD:#}\n"),
            0 => format!(
                "{WARNING}None in sight: {} hidden for a while, as somebody reads them, or did and was cut off.{WARNING:#}\n",
                count(self.hidden, "message")
            ),
            _ if (read as u64) < self.depth && self.arn.ends_with(".fifo") => {
                format!("{table}\n{read} of about {}; of a message group SQS shows ten at a time\n", self.depth)
            }
            _ if (read as u64) < self.depth => {
                format!("{table}\n{read} of about {} read; --limit reads more\n", count(self.depth, "message"))
            }
            _ => format!("{table}\n{}\n", count(read as i128, "message")),
        }
    }

    async fn explain(&self, limit: usize) -> Result<Reply, Failure> {
        let dead = self.look(limit).await?;
        let oldest = dead.iter().filter(|dead| dead.reason.is_none()).filter_map(Dead::sent).min();
        let logged = match oldest {
            Some(oldest) => {
                let _spinner = spinner("Looking into the function's log");
                logs::reasons(self.settings, age(oldest).min(LIFE) + Duration::from_secs(60)).await
            }
            None => Ok(HashMap::new()),
        };
        let mut groups: BTreeMap<(bool, String), Vec<&Dead>> = BTreeMap::new();
        for dead in &dead {
            let why = dead.reason.clone().unwrap_or_else(|| match &logged {
                Ok(logged) => logged.get(dead.id()).map(String::as_str).unwrap_or(NOT_LOGGED).to_owned(),
                Err(_) => "not known, as the function's log cannot be read".to_owned(),
            });
            groups.entry((dead.reason.is_none(), why)).or_default().push(dead);
        }
        let mut groups: Vec<_> = groups.into_iter().collect();
        groups.sort_by_key(|(_, dead)| std::cmp::Reverse(dead.len()));
        let day = |at: Option<Timestamp>| at.map_or_else(String::new, |at| at.strftime("%Y-%m-%d %H:%M").to_string());
        let first = |dead: &[&Dead]| dead.iter().filter_map(|dead| dead.sent()).min();
        let last = |dead: &[&Dead]| dead.iter().filter_map(|dead| dead.sent()).max();
        let rows = groups.iter().map(|((valid, why), dead)| {
            let now = if *valid { "valid" } else { "invalid" };
            let example = dead.first().map_or("", |dead| dead.id());
            vec![
                dead.len().to_string(),
                now.to_owned(),
                why.clone(),
                day(first(dead)),
                day(last(dead)),
                example.to_owned(),
            ]
        });
        let headings = ["messages", "now", "why", "first sent", "last sent", "for example"];
        let mut text = self.with_total(dead.len(), table(&headings, rows));
        if let Err(Failure::Failed(why)) = &logged {
            text += &format!("{WARNING}{}{WARNING:#}\n", printable(why));
        }
        let valid = dead.iter().filter(|dead| dead.reason.is_none()).count();
        if valid > 0 {
            text +=
                &format!("{} valid now: `etlctl dlq redrive --fixed` loads them.\n", count(valid as i128, "message"));
        }
        let json = groups.iter().map(|((valid, why), dead)| {
            json!({
                "messages": dead.len(), "valid": valid, "why": why, "first_sent_at": first(dead).map(time),
                "last_sent_at": last(dead).map(time),
                "message_ids": dead.iter().map(|dead| dead.id()).collect::<Vec<_>>(),
            })
        });
        Ok(Reply::new(text, json.collect()))
    }

    async fn show(&self, id: &str, reveal: bool, reason: Option<&str>) -> Result<Reply, Failure> {
        let all = self.look(ROUND).await?;
        let dead = all.iter().find(|dead| dead.id() == id);
        let dead = dead.ok_or_else(|| failed(format!("the dead-letter queue has no message {id:?} in sight")))?;
        let why = dead.reason.as_deref().unwrap_or("valid now");
        let sent = dead.sent().map(time);
        let mut rows = vec![
            vec!["message".to_owned(), id.to_owned()],
            vec!["sent".to_owned(), sent.clone().unwrap_or_default()],
            vec!["bytes".to_owned(), dead.body().len().to_string()],
            vec!["reason".to_owned(), why.to_owned()],
        ];
        let mut json = json!({"message_id": id, "sent_at": sent, "bytes": dead.body().len(), "valid": dead.reason.is_none(), "reason": dead.reason});
        let mut text = String::new();
        if reveal {
            let reason = reason.unwrap_or_default();
            audit::check_reason(reason)?;
            let source = format!("the dead message {id}");
            let record =
                audit::Record { action: "reveal", reason, source: &source, requested: 1, recovered: 1, masks: &[] };
            audit::write(&mut self.settings.database().await?.client, &self.settings.aws, &record).await?;
            json["body"] = json!(dead.body());
            text = format!("\n{}\n", dead.body().lines().map(printable).collect::<Vec<_>>().join("\n"));
        } else {
            let shape = shape(dead.body());
            json["body_shape"] = shape.iter().map(|(name, is)| json!({"field": name, "is": is})).collect();
            rows.extend(shape.into_iter().map(|(name, is)| vec![format!("  {name}"), is]));
        }
        Ok(Reply::new(table(&["", ""], rows) + &text, json))
    }

    async fn move_all(&self, rate: Option<i32>, yes: bool) -> Result<Reply, Failure> {
        if self.depth == 0 {
            return Ok(Reply::new(self.with_total(0, String::new()), json!({"moved": 0})));
        }
        let about = count(self.depth, "dead message");
        confirm(&format!("Send about {about} back to the queue, each under a new id?"), yes)?;
        let task =
            self.client.start_message_move_task().source_arn(&self.arn).set_max_number_of_messages_per_second(rate);
        task.send().await.map_err(aws("start the redrive"))?;
        let bar = progress(self.depth, "Redriving {bar:30} {pos} of about {len}  {eta} to go; it goes on without you");
        loop {
            let tasks = self.client.list_message_move_tasks().source_arn(&self.arn).max_results(1).send().await;
            let tasks = tasks.map_err(aws("follow the redrive"))?.results.unwrap_or_default();
            let Some(task) = tasks.first() else {
                return Err(failed("the redrive cannot be followed: SQS does not list it"));
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

    async fn redrive_fixed(&self, rate: Option<i32>, yes: bool) -> Result<Reply, Failure> {
        if !yes {
            let valid = self.look(ROUND).await?.iter().filter(|dead| dead.reason.is_none()).count();
            confirm(&format!("Load {} that are valid now?", count(valid as i128, "dead message")), yes)?;
        }
        // Cut off, it lets others see again what is left.
        let mut taken = Taken::default();
        let result = tokio::select! {
            result = self.load_all(&mut taken, rate) => result,
            _ = tokio::signal::ctrl_c() => Err(failed("interrupted; what the function had not taken is still in the queue")),
        };
        let spinner = spinner("Letting others see what is left");
        self.release(taken.dead.iter().filter(|dead| !taken.loaded.contains(dead.id()))).await;
        drop(spinner);
        result?;

        let left = |valid: bool| {
            let left =
                taken.dead.iter().filter(|dead| dead.reason.is_none() == valid && !taken.loaded.contains(dead.id()));
            left.count() as i128
        };
        let (loaded, refused, invalid) = (taken.loaded.len() as i128, left(true), left(false));
        let mut text = format!("{GOOD}{} loaded{GOOD:#} and gone from the queue\n", count(loaded, "message"));
        if refused > 0 {
            let refused = count(refused, "valid message");
            text +=
                &format!("{BAD}{refused} refused by the function once more; `etlctl dlq explain` says why{BAD:#}\n");
        }
        if invalid > 0 {
            text += &format!("{FAINT}{} left, not valid{FAINT:#}\n", count(invalid, "message"));
        }
        let json = json!({"loaded": loaded, "refused": refused, "invalid": invalid});
        Ok(Reply { no: refused > 0, ..Reply::new(text, json) })
    }

    /// Reads and loads, round by round, until there is nothing new: of a FIFO queue's group, SQS shows ten, and the next ten
    /// when those are gone.
    async fn load_all(&self, taken: &mut Taken, rate: Option<i32>) -> Result<(), Failure> {
        let function = self.settings.require("FUNCTION_NAME")?;
        // An invocation may take 15 minutes, and one that is given up goes on.
        let config = aws_sdk_lambda::config::Builder::from(&self.settings.aws)
            .timeout_config(TimeoutConfig::builder().connect_timeout(Duration::from_secs(5)).build())
            .retry_config(RetryConfig::disabled());
        let client = aws_sdk_lambda::Client::from_conf(config.build());
        loop {
            let first = taken.dead.len();
            self.read(&mut taken.dead, ROUND, REDRIVE).await?;
            let fixed: Vec<_> = taken.dead[first..].iter().filter(|dead| dead.reason.is_none()).cloned().collect();
            if taken.dead.len() == first {
                return Ok(());
            }
            let bar = progress(fixed.len() as u64, "Loading {bar:30} {pos} of {len}  {eta} to go");
            let mut due = Instant::now();
            for batch in batches(&fixed, rate) {
                sleep(due.saturating_duration_since(Instant::now())).await;
                if let Some(rate) = rate {
                    due = Instant::now() + Duration::from_secs_f64(batch.len() as f64 / f64::from(rate));
                }
                taken.loaded.extend(self.load_batch(&client, &function, batch).await?);
                bar.inc(batch.len() as u64);
            }
            bar.finish_and_clear();
        }
    }

    async fn load_batch(
        &self,
        client: &aws_sdk_lambda::Client,
        function: &str,
        batch: &[Dead],
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
                "the function failed: {kind}: {message}. What it had not taken is still in the queue"
            )));
        }
        let failures = said["batchItemFailures"].as_array();
        let failures = failures.ok_or_else(|| failed(format!("{function:?} does not answer as login-etl does")))?;
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
                delete.send().await.map_err(aws("delete what is loaded; it may be loaded again without harm"))?;
            if !deleted.failed.is_empty() {
                return Err(failed("SQS did not delete some of what is loaded; it may be loaded again without harm"));
            }
        }
        Ok(taken.iter().map(|dead| dead.id().to_owned()).collect())
    }

    async fn purge(&self, yes: bool) -> Result<Reply, Failure> {
        if self.depth + self.hidden == 0 {
            return Ok(Reply::new(self.with_total(0, String::new()), json!({"deleted": 0})));
        }
        let about = count(self.depth + self.hidden, "dead message");
        confirm(&format!("Delete about {about} for ever? They are nowhere else."), yes)?;
        self.client.purge_queue().queue_url(&self.url).send().await.map_err(aws("purge the dead-letter queue"))?;
        let text = format!("{WARNING}About {about} deleted.{WARNING:#} SQS takes up to a minute for it.\n");
        Ok(Reply::new(text, json!({"deleted": self.depth + self.hidden})))
    }
}

/// Parts small enough for an invocation, and for a second if there is a rate.
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

/// The function's own judgement of a body.
struct Validation {
    encoding: AppVersionEncoding,
    keyring: Keyring,
}

impl Validation {
    async fn new(settings: &Settings) -> Result<Self, Failure> {
        Ok(Self { encoding: settings.function()?.app_version_encoding, keyring: settings.keyring().await? })
    }

    /// Why the function refuses this body; never any of its content.
    fn reason(&self, body: &str) -> Option<String> {
        let row = Login::parse(body, self.encoding).and_then(|login| login.mask(&self.keyring));
        row.err().map(|invalid| invalid.to_string())
    }
}

/// What kind of value each known field has, without the value. Names that are not ours are the sender's, and not shown.
fn shape(body: &str) -> Vec<(String, String)> {
    let Ok(body) = serde_json::from_str::<Value>(body) else { return vec![("body".to_owned(), "not JSON".to_owned())] };
    let Value::Object(fields) = body else { return vec![("body".to_owned(), kind(&body))] };
    let known = Field::ALL.map(Field::name);
    let mut shape: Vec<_> = known
        .iter()
        .map(|name| ((*name).to_owned(), fields.get(*name).map_or_else(|| "missing".to_owned(), kind)))
        .collect();
    let others = fields.keys().filter(|name| !known.contains(&name.as_str())).count();
    if others > 0 {
        shape.push(("others".to_owned(), count(others as i128, "field").to_string()));
    }
    shape
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "a boolean".to_owned(),
        Value::Number(_) => "a number".to_owned(),
        Value::String(text) => format!("text of {}", count(text.chars().count() as i128, "character")),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(fields) => format!("an object of {}", fields.len()),
    }
}
