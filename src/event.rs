//! Reads the fields of an SQS event that the function needs.
//!
//! Most of a message's cost is the JSON around it. The types of `aws_lambda_events` own some twenty strings and maps a message,
//! and a general parser validates fields that nobody reads. So events of the usual shape are scanned. All others go to
//! serde_json, which also reports where they break.

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt,
    time::{Duration, SystemTime},
};

use login_etl_scan::Reader;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// The event is not from SQS. The caller's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the event is not an SQS event (line {line}, column {column}): is the function invoked by a queue's event source mapping?"
)]
pub struct NotAnSqsEvent {
    /// Line of the error in the event's JSON, from 1.
    pub line: usize,
    /// Column in that line, from 1.
    pub column: usize,
}

/// The schedule's ARN, if the event is exactly a maintenance event: `{"maintenance": "the schedule's ARN"}`.
pub fn maintenance(event: &[u8]) -> Option<String> {
    // Longer than any ARN, and shorter than a batch.
    const LONGEST: usize = 2048;
    let event = Some(event).filter(|event| event.len() <= LONGEST)?;
    let mut fields: HashMap<String, String> = serde_json::from_slice(event).ok()?;
    let schedule = fields.remove("maintenance")?;
    fields.is_empty().then_some(schedule)
}

/// A message, borrowed from the event. `Debug` shows none of it.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Message<'a> {
    #[serde(borrow)]
    message_id: Option<Text<'a>>,
    #[serde(borrow)]
    body: Option<Json<'a>>,
    #[serde(borrow)]
    receipt_handle: Option<Text<'a>>,
    #[serde(borrow, rename = "eventSourceARN")]
    event_source_arn: Option<Text<'a>>,
    #[serde(borrow)]
    attributes: Option<Attributes<'a>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Attributes<'a> {
    #[serde(borrow)]
    sent_timestamp: Option<Text<'a>>,
    #[serde(borrow)]
    approximate_receive_count: Option<Text<'a>>,
    #[serde(borrow)]
    message_group_id: Option<Text<'a>>,
}

/// Borrowed if it has no escapes. Without this type, serde would make every `Cow` in an `Option` owned.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// A raw JSON value.
struct Json<'a>(&'a str);

impl<'de: 'a, 'a> Deserialize<'de> for Json<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        <&RawValue>::deserialize(deserializer).map(|json| Self(json.get()))
    }
}

/// The messages of an event, any number of them.
///
/// # Errors
/// [`NotAnSqsEvent`].
pub fn messages(event: &[u8]) -> Result<Vec<Message<'_>>, NotAnSqsEvent> {
    str::from_utf8(event).ok().and_then(scanned_messages).map_or_else(|| parsed_messages(event), Ok)
}

/// The messages of an event, read in place. `None` for an unusual event: it has no list of messages, or a known field is
/// repeated, is not a string, or has escapes where only the body may have them. It does not validate what it skips, as Lambda has
/// checked that the event is JSON. From valid JSON it reads the same as serde_json.
pub fn scanned_messages(event: &str) -> Option<Vec<Message<'_>>> {
    let mut reader = Reader::new(event);
    let mut messages = None;
    reader.object(|reader, name| match name {
        "Records" => {
            // Most messages are about this long, or shorter.
            let mut records = Vec::with_capacity(event.len() / 1024);
            reader.array(|reader| {
                records.push(Message::scan(reader)?);
                Some(())
            })?;
            set(&mut messages, records)
        }
        _ => reader.skip(),
    })?;
    if reader.is_at_end() { messages } else { None }
}

/// Sets a field; `None` if it was set before.
fn set<T>(field: &mut Option<T>, value: T) -> Option<()> {
    field.replace(value).is_none().then_some(())
}

impl<'a> Message<'a> {
    fn scan(reader: &mut Reader<'a>) -> Option<Self> {
        let mut message = Self::default();
        reader.object(|reader, name| match name {
            "messageId" => set(&mut message.message_id, Text::scan(reader)?),
            "body" => set(&mut message.body, Json(reader.raw_string()?)),
            "receiptHandle" => set(&mut message.receipt_handle, Text::scan(reader)?),
            "eventSourceARN" => set(&mut message.event_source_arn, Text::scan(reader)?),
            "attributes" => set(&mut message.attributes, Attributes::scan(reader)?),
            _ => reader.skip(),
        })?;
        Some(message)
    }
}

impl<'a> Attributes<'a> {
    fn scan(reader: &mut Reader<'a>) -> Option<Self> {
        let mut attributes = Self::default();
        reader.object(|reader, name| match name {
            "SentTimestamp" => set(&mut attributes.sent_timestamp, Text::scan(reader)?),
            "ApproximateReceiveCount" => set(&mut attributes.approximate_receive_count, Text::scan(reader)?),
            "MessageGroupId" => set(&mut attributes.message_group_id, Text::scan(reader)?),
            _ => reader.skip(),
        })?;
        Some(attributes)
    }
}

impl<'a> Text<'a> {
    fn scan(reader: &mut Reader<'a>) -> Option<Self> {
        reader.string().map(|text| Self(Cow::Borrowed(text)))
    }
}

/// The messages of an event, as serde_json reads them.
///
/// # Errors
/// [`NotAnSqsEvent`].
pub fn parsed_messages(event: &[u8]) -> Result<Vec<Message<'_>>, NotAnSqsEvent> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct SqsEvent<'a> {
        #[serde(borrow)]
        records: Vec<Message<'a>>,
    }

    serde_json::from_slice(event)
        .map(|SqsEvent { records }| records)
        // The error itself may quote the event, so only its position is kept.
        .map_err(|error| NotAnSqsEvent { line: error.line(), column: error.column() })
}

impl<'a> Message<'a> {
    /// Its SQS message id.
    pub fn id(&self) -> Option<&str> {
        text(&self.message_id)
    }

    /// The receipt handle of this receive.
    pub fn receipt_handle(&self) -> Option<&str> {
        text(&self.receipt_handle)
    }

    /// The ARN of its queue.
    pub fn queue_arn(&self) -> Option<&str> {
        text(&self.event_source_arn)
    }

    /// The name of its queue.
    pub fn queue_name(&self) -> Option<&str> {
        self.queue_arn()?.rsplit(':').next()
    }

    /// Its message group, if its queue is FIFO. Standard queues have groups too, but only for fairness.
    pub fn fifo_group(&self) -> Option<&str> {
        let group = text(&self.attributes.as_ref()?.message_group_id)?;
        self.queue_arn()?.ends_with(".fifo").then_some(group)
    }

    /// When it was sent, in milliseconds since the epoch.
    pub fn sent_timestamp(&self) -> Option<u64> {
        text(&self.attributes.as_ref()?.sent_timestamp)?.parse().ok()
    }

    /// When it was sent.
    pub fn sent(&self) -> Option<SystemTime> {
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(self.sent_timestamp()?))
    }

    /// How often it was received.
    pub fn receive_count(&self) -> Option<u64> {
        text(&self.attributes.as_ref()?.approximate_receive_count)?.parse().ok()
    }

    /// Its body as raw JSON: a string with its quotes. `None` if it is missing or not a string.
    pub fn body(&self) -> Option<&'a str> {
        self.body.as_ref().map(|Json(body)| *body).filter(|body| body.starts_with('"'))
    }
}

fn text<'a>(text: &'a Option<Text<'_>>) -> Option<&'a str> {
    text.as_ref().map(|Text(text)| &**text)
}

impl fmt::Debug for Message<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that the function reads from an event.
    fn content(messages: &[Message<'_>]) -> Vec<impl PartialEq + fmt::Debug + use<>> {
        let own = |text: Option<&str>| text.map(ToOwned::to_owned);
        messages
            .iter()
            .map(|message| {
                let texts =
                    [message.id(), message.receipt_handle(), message.queue_arn(), message.fifo_group()].map(own);
                let body = message.body().map(ToOwned::to_owned);
                (texts, body, message.sent_timestamp(), message.receive_count())
            })
            .collect()
    }

    #[test]
    fn sample_events_are_scanned_and_parsed_alike() {
        for event in [
            include_str!("../events/valid.json"),
            include_str!("../events/mixed.json"),
            include_str!("../events/fifo.json"),
            include_str!("../events/duplicates.json"),
            include_str!("../events/empty.json"),
        ] {
            let scanned = scanned_messages(event).expect("an event of the usual shape");
            assert_eq!(content(&scanned), content(&parsed_messages(event.as_bytes()).unwrap()));
        }
    }

    #[test]
    fn debug_shows_no_content() {
        let event = include_str!("../events/valid.json");
        assert!(scanned_messages(event).unwrap().iter().all(|message| format!("{message:?}") == "Message { .. }"));
    }

    #[test]
    fn only_an_arn_and_nothing_else_is_a_maintenance_event() {
        assert_eq!(maintenance(br#"{"maintenance": "arn"}"#).as_deref(), Some("arn"));
        for other in [
            r#"{"Records": []}"#,
            r#"{"maintenance": true}"#,
            r#"{"maintenance": "arn", "Records": []}"#,
            r#"["maintenance"]"#,
            "",
            &format!(r#"{{"maintenance": "{}"}}"#, "a".repeat(3000)),
        ] {
            assert_eq!(maintenance(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn repeated_fields_are_left_to_the_parser() {
        for twice in [
            r#"{"Records": [], "Records": []}"#,
            r#"{"Records": [{"body": "a", "body": "b"}]}"#,
            r#"{"Records": [{"attributes": {"SentTimestamp": "1", "SentTimestamp": "2"}}]}"#,
        ] {
            assert!(scanned_messages(twice).is_none() && messages(twice.as_bytes()).is_err(), "{twice}");
        }
    }

    #[test]
    fn scanning_agrees_with_parsing() {
        let message =
            r#"{"messageId": "m", "body": "b", "attributes": {"SentTimestamp": "1"}, "other": [1, {"a": "]}"}]}"#;
        let event = format!(r#"{{"Records": [{message}, {message}], "more": {{"Records": []}}}}"#);
        assert!(scanned_messages(&event).is_some());
        // Each byte removed, or replaced by another.
        for position in 0..event.len() {
            for put in ["", "\"", "\\", "{", "}", "[", "]", ",", ":", " ", "n", "0", "é"] {
                let event = format!("{}{put}{}", &event[..position], &event[position + 1..]);
                let parsed = parsed_messages(event.as_bytes());
                if let (Some(scanned), Ok(parsed)) = (scanned_messages(&event), &parsed) {
                    assert_eq!(content(&scanned), content(parsed), "{event}");
                }
            }
        }
    }
}
