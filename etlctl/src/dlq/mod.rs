//! The dead-letter queue: list, explain, show, redrive and purge dead messages.

mod person;
mod redrive;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, SystemTime},
};

use aws_sdk_sqs::{
    Client,
    types::{ChangeMessageVisibilityBatchRequestEntry, Message, MessageSystemAttributeName, QueueAttributeName},
};
use bytes::BytesMut;
use futures_util::{StreamExt, stream};
use jiff::Timestamp;
use login_etl::{
    keyring::Keyring,
    mapping::{Envelope, Invalid, Mapping, Row},
    store::LedgerKey,
};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    audit,
    cli::Dlq,
    keys::age,
    logs,
    output::{Failure, GOOD, Reply, WARNING, aws, confirm, count, failed, printable, progress, spinner, table, time},
    settings::Settings,
};

/// Seconds that a message is hidden while it is read; it is made visible again right after.
const LOOK: i32 = 60;
/// Entries of a request to SQS, at most.
const ENTRIES: usize = 10;
/// Reason of a valid message that is not in the searched part of a log too large to be searched whole.
const NOT_FOUND: &str = "not found in the latest part of the log";
/// Most messages that a redrive hides at once. SQS allows 120,000, and 20,000 of a FIFO queue.
const ROUND: usize = 10_000;
/// Reason of a valid message that the log does not mention.
const NOT_LOGGED: &str = "nothing in the log: its batches failed or timed out";
/// Most rows of one trial in the database.
const TRIED_TOGETHER: usize = 500;
/// Concurrent requests.
const REQUESTS: usize = 16;
/// The longest that SQS keeps a message.
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

/// A dead message, and the reason for which it is refused, if any.
#[derive(Clone)]
struct Dead {
    message: Message,
    reason: Option<String>,
    /// Whether the database refuses it.
    refused: bool,
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
}

/// The dead-letter queue.
pub struct Queue<'a> {
    settings: &'a Settings,
    client: Client,
    url: String,
    /// Approximate number of visible messages.
    depth: u64,
    /// Approximate number of messages in flight: hidden by another reader.
    hidden: u64,
    arn: String,
}

impl<'a> Queue<'a> {
    pub async fn new(settings: &'a Settings) -> Result<Self, Failure> {
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

    /// Approximate number of visible messages when this was made.
    pub fn depth(&self) -> u64 {
        self.depth
    }

    /// Approximate number of hidden messages when this was made.
    pub fn hidden(&self) -> u64 {
        self.hidden
    }

    /// Appends up to `limit` messages to `dead`, and hides them for `hidden` seconds. With `validation`, each gets its reason.
    /// On an error or a cancellation, `dead` has what was read until then, which is still hidden.
    async fn read(
        &self,
        dead: &mut Vec<Dead>,
        limit: usize,
        hidden: i32,
        validation: Option<&Validation<'_>>,
    ) -> Result<(), Failure> {
        let bar = progress(self.depth.min(limit as u64), "Reading dead messages {bar:30} {pos} of about {len}");
        let asked = Instant::now();
        let mut known: HashSet<_> = dead.iter().map(|dead| dead.id().to_owned()).collect();
        let first = dead.len();
        loop {
            let wanted = ENTRIES.min(first + limit - dead.len()) as i32;
            if wanted == 0 {
                break;
            }
            let receive = self.client.receive_message().queue_url(&self.url).max_number_of_messages(wanted);
            // Long polling asks all of SQS's servers; short polling asks some, and may miss messages.
            let receive = receive.wait_time_seconds(1).visibility_timeout(hidden);
            let received = receive.message_system_attribute_names(MessageSystemAttributeName::All).send().await;
            let messages = received.map_err(aws("read the dead-letter queue"))?.messages.unwrap_or_default();
            let is_end = messages.is_empty();
            for message in messages {
                let id = message.message_id().unwrap_or_default();
                if known.insert(id.to_owned()) {
                    let body = message.body().unwrap_or_default();
                    let reason = validation.and_then(|validation| validation.reason(body));
                    dead.push(Dead { message, reason, refused: false });
                } else if let Some(known) = dead.iter_mut().find(|dead| dead.id() == id) {
                    // It had become visible again, and this receive gave it a new receipt handle.
                    known.message = message;
                }
            }
            // The queue is empty, or the first messages are about to become visible again.
            if is_end || asked.elapsed() > Duration::from_secs(hidden.unsigned_abs().into()) * 9 / 10 {
                break;
            }
            bar.set_position((dead.len() - first) as u64);
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Makes the messages visible to others again.
    async fn release<'m>(&self, dead: impl IntoIterator<Item = &'m Dead>) {
        let dead: Vec<_> = dead.into_iter().collect();
        let requests = dead.chunks(ENTRIES).map(|part| {
            let request = self.client.change_message_visibility_batch().queue_url(&self.url);
            request.set_entries(Some(visibility(part.iter().copied(), 0))).send()
        });
        // Messages whose request fails become visible by themselves, only later.
        stream::iter(requests).buffer_unordered(REQUESTS).for_each(|answer| async { drop(answer) }).await;
    }

    /// Reads messages, and tries the rows of valid ones in the database. Also returns why that was not possible, if so.
    async fn look(&self, limit: usize) -> Result<(Vec<Dead>, Option<Failure>), Failure> {
        let mut dead = Vec::new();
        let validation = Validation::new(self.settings).await?;
        let read = self.read(&mut dead, limit, LOOK, Some(&validation)).await;
        self.release(&dead).await;
        read?;
        let untried = self.try_all(&mut dead).await.err();
        Ok((dead, untried))
    }

    /// Gives a reason to valid messages whose rows PostgreSQL refuses. The rows are tried as the function's user, in a
    /// transaction that is rolled back.
    async fn try_all(&self, dead: &mut [Dead]) -> Result<(), Failure> {
        let mut valid: Vec<_> = dead.iter_mut().filter(|dead| dead.reason.is_none()).collect();
        if valid.is_empty() {
            return Ok(());
        }
        let bar = progress(valid.len() as u64, "Trying their rows {bar:30} {pos} of {len}");
        let validation = Validation::new(self.settings).await?;
        let trial = self.settings.trial().await?;
        let horizon = SystemTime::now() - self.settings.function()?.database.ledger_retention;
        for part in valid.chunks_mut(TRIED_TOGETHER) {
            let (mut messages, mut rows) = (Vec::new(), Vec::new());
            for dead in part.iter_mut() {
                if let Ok(row) = validation.row(dead.body()) {
                    let sent = dead.sent().and_then(|at| u64::try_from(at.as_millisecond()).ok());
                    rows.push((LedgerKey::new(dead.id(), sent, horizon), row));
                    messages.push(dead);
                }
            }
            let refusals = trial.refusals(rows).await.map_err(|error| failed(error.to_string()))?;
            bar.inc(messages.len() as u64);
            for (dead, refusal) in messages.into_iter().zip(refusals) {
                dead.refused = refusal.is_some();
                dead.reason = refusal.map(|error| format!("refused by the database: {error}"));
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    async fn list(&self, limit: usize) -> Result<Reply, Failure> {
        let (mut dead, untried) = self.look(limit).await?;
        dead.sort_by_key(Dead::sent);
        let sent = |dead: &Dead| dead.sent().map(|at| at.strftime("%Y-%m-%d %H:%M:%S").to_string());
        let receives = |dead: &Dead| -> Option<u64> {
            dead.attribute(&MessageSystemAttributeName::ApproximateReceiveCount)?.parse().ok()
        };
        let rows = dead.iter().map(|dead| {
            let reason = dead.reason.clone().unwrap_or_else(|| "valid now".to_owned());
            vec![dead.id().to_owned(), sent(dead).unwrap_or_default(), dead.body().len().to_string(), reason]
        });
        let mut text = self.with_total(dead.len(), table(&["message", "sent (UTC)", "bytes", "reason"], rows));
        text += &not_tried(untried.as_ref());
        let json = dead.iter().map(|dead| {
            json!({
                "message_id": dead.id(), "sent_at": dead.sent().map(time), "bytes": dead.body().len(),
                "receives": receives(dead), "valid": dead.reason.is_none(), "reason": dead.reason,
                "group": dead.attribute(&MessageSystemAttributeName::MessageGroupId).is_some(),
            })
        });
        Ok(Reply::new(text, json.collect()))
    }

    /// The table, followed by the number of messages read. Without a message, a line that says why.
    fn with_total(&self, read: usize, table: String) -> String {
        match read {
            0 if self.hidden == 0 => format!("{GOOD}No dead messages.{GOOD:#}\n"),
            0 => format!(
                "{WARNING}None visible: {} hidden for now, because another command reads them or was interrupted.{WARNING:#}\n",
                count(self.hidden, "message")
            ),
            _ if (read as u64) < self.depth && self.arn.ends_with(".fifo") => {
                format!("{table}\n{read} of about {}; SQS shows ten messages of a group at a time\n", self.depth)
            }
            _ if (read as u64) < self.depth => {
                format!("{table}\n{read} of about {} read; --limit reads more\n", count(self.depth, "message"))
            }
            _ => format!("{table}\n{}\n", count(read as i128, "message")),
        }
    }

    async fn explain(&self, limit: usize) -> Result<Reply, Failure> {
        let (dead, untried) = self.look(limit).await?;
        let oldest = dead.iter().filter(|dead| dead.reason.is_none()).filter_map(Dead::sent).min();
        let logged = match oldest {
            Some(oldest) => {
                let _spinner = spinner("Looking into the function's log");
                logs::reasons(self.settings, age(oldest).min(LIFE) + Duration::from_secs(60)).await
            }
            None => Ok((HashMap::new(), true)),
        };
        let mut groups: BTreeMap<(bool, String), Vec<&Dead>> = BTreeMap::new();
        for dead in &dead {
            let why = dead.reason.clone().unwrap_or_else(|| match &logged {
                Ok((logged, whole)) => {
                    let otherwise = if *whole { NOT_LOGGED } else { NOT_FOUND };
                    logged.get(dead.id()).map_or(otherwise, String::as_str).to_owned()
                }
                Err(_) => "unknown: the function's log cannot be read".to_owned(),
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
        text += &not_tried(untried.as_ref());
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
        let (all, _) = self.look(ROUND).await?;
        let dead = all.iter().find(|dead| dead.id() == id);
        let dead = dead.ok_or_else(|| failed(format!("the dead-letter queue has no visible message {id:?}")))?;
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
            audit::write(&mut self.settings.database().await?.client, self.settings, &record).await?;
            json["body"] = json!(dead.body());
            text = format!("\n{}\n", dead.body().lines().map(printable).collect::<Vec<_>>().join("\n"));
        } else {
            let shape = shape(&self.settings.mapping, dead.body());
            json["body_shape"] = shape.iter().map(|(name, is)| json!({"field": name, "is": is})).collect();
            rows.extend(shape.into_iter().map(|(name, is)| vec![format!("  {name}"), is]));
        }
        Ok(Reply::new(table(&["", ""], rows) + &text, json))
    }

    async fn purge(&self, yes: bool) -> Result<Reply, Failure> {
        if self.depth + self.hidden == 0 {
            return Ok(Reply::new(self.with_total(0, String::new()), json!({"deleted": 0})));
        }
        let about = count(self.depth + self.hidden, "dead message");
        confirm(&format!("Delete about {about} for ever? There is no other copy."), yes)?;
        self.client.purge_queue().queue_url(&self.url).send().await.map_err(aws("purge the dead-letter queue"))?;
        let text = format!("{WARNING}About {about} deleted.{WARNING:#} SQS takes up to a minute to finish.\n");
        Ok(Reply::new(text, json!({"deleted": self.depth + self.hidden})))
    }
}

/// A line that says why rows were not tried in the database, if they were not.
fn not_tried(failure: Option<&Failure>) -> String {
    failure.map_or(String::new(), |failure| {
        format!("{WARNING}Not tried against the database: {}{WARNING:#}\n", printable(failure.why()))
    })
}

/// Entries of a request that hides messages for `seconds`. The id of each is its index.
fn visibility<'m>(
    messages: impl IntoIterator<Item = &'m Dead>,
    seconds: i32,
) -> Vec<ChangeMessageVisibilityBatchRequestEntry> {
    let entry = |(index, dead): (usize, &Dead)| {
        let entry = ChangeMessageVisibilityBatchRequestEntry::builder().id(index.to_string());
        entry.visibility_timeout(seconds).receipt_handle(dead.message.receipt_handle()?).build().ok()
    };
    messages.into_iter().enumerate().filter_map(entry).collect()
}

/// The function's own validation of a body.
struct Validation<'a> {
    mapping: &'a Mapping,
    keyring: Keyring,
}

impl<'a> Validation<'a> {
    async fn new(settings: &'a Settings) -> Result<Self, Failure> {
        let keyring = settings.keyring().await?.for_masks(settings.mapping.masks());
        let keyring = keyring.map_err(|error| failed(format!("the keyring {error}")))?;
        Ok(Self { mapping: &settings.mapping, keyring })
    }

    /// Why the function refuses this body, without any of its content.
    fn reason(&self, body: &str) -> Option<String> {
        self.row(body).err().map(|invalid| invalid.to_string())
    }

    fn row(&self, body: &str) -> Result<Row, Invalid> {
        let now = SystemTime::now();
        // Placeholders: the function always knows a message's id, time and queue.
        let envelope =
            Envelope { message_id: "00000000-0000-0000-0000-000000000000", sent: Some(now), queue: Some("queue"), now };
        self.mapping.row(body, &envelope, &self.keyring, &mut BytesMut::new())
    }
}

/// The kind of each mapped field's value, without the value. Names of other fields are the sender's data, and only counted.
fn shape(mapping: &Mapping, body: &str) -> Vec<(String, String)> {
    let Ok(body) = serde_json::from_str::<Value>(body) else { return vec![("body".to_owned(), "not JSON".to_owned())] };
    let Value::Object(fields) = body else { return vec![("body".to_owned(), kind(&body))] };
    let mut paths: Vec<&str> = Vec::new();
    for field in mapping.fields() {
        if !paths.contains(&&*field.path) {
            paths.push(&field.path);
        }
    }
    let value = |path: &str| {
        path.split('.').skip(1).try_fold(fields.get(path.split('.').next()?)?, |value, name| value.get(name))
    };
    let mut shape: Vec<_> =
        paths.iter().map(|path| ((*path).to_owned(), value(path).map_or_else(|| "missing".to_owned(), kind))).collect();
    let known = |name: &str| paths.iter().any(|path| path.split('.').next() == Some(name));
    let others = fields.keys().filter(|name| !known(name)).count();
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
