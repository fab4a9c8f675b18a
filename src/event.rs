//! An SQS event, of which only what the function needs is read.
//!
//! Most of a message's cost is the JSON around it. `aws_lambda_events` has types for it, which own some twenty strings and
//! maps a message, and a general parser looks closely at what is then thrown away. So events of the usual shape are
//! scanned, and all others go to serde_json, which also says where they break.

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt,
    time::{Duration, SystemTime},
};

use login_etl_scan::Reader;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// The event is not one from SQS. The caller's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the event is not an SQS event (line {line}, column {column}): is the function invoked by a queue's event source mapping?"
)]
pub struct NotAnSqsEvent {
    /// Line of the event's JSON where its shape breaks, from 1.
    pub line: usize,
    /// Column of that line, from 1.
    pub column: usize,
}

/// The schedule that an event is of, if it is a maintenance event: `{"maintenance": "the schedule's ARN"}`, and nothing else.
pub fn maintenance(event: &[u8]) -> Option<String> {
    // Longer than any ARN, and shorter than a batch.
    const LONGEST: usize = 2048;
    let event = Some(event).filter(|event| event.len() <= LONGEST)?;
    let mut fields: HashMap<String, String> = serde_json::from_slice(event).ok()?;
    let schedule = fields.remove("maintenance")?;
    fields.is_empty().then_some(schedule)
}

/// A message, as it stands in the event. `Debug` shows nothing of it.
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

/// Borrowed where it has no escapes; serde would own every `Cow` that stands in an `Option`.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// A value as it stands in the event.
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

/// The messages of an event, read in place. `None` if something is unusual: there is no list of messages, a known field is
/// twice there or is no string, or one has an escape that should have none. Of JSON it takes what serde_json would; what it
/// skips may be anything, as Lambda has checked that it is JSON.
pub fn scanned_messages(event: &str) -> Option<Vec<Message<'_>>> {
    let mut reader = Reader::new(event);
    let mut messages = None;
    reader.object(|reader, name| match name {
        "Records" => {
            // A message is about that long, or shorter.
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

/// Sets what was not set before.
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
        // The error itself may quote the event, so only its place is kept.
        .map_err(|error| NotAnSqsEvent { line: error.line(), column: error.column() })
}

impl<'a> Message<'a> {
    /// SQS's id of it.
    pub fn id(&self) -> Option<&str> {
        text(&self.message_id)
    }

    /// What this one receive of it is called.
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

    /// Its group, if its queue keeps an order. Standard queues carry groups too, for fairness alone.
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

    /// What its sender wrote, as it stands in the event: a JSON string with its quotes. `None` if there is none, or it is no string.
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

    /// All that the function takes of an event.
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
    fn the_sample_events_are_read_alike_in_both_ways() {
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
    fn only_a_schedule_s_arn_alone_is_a_maintenance_event() {
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
    fn what_is_given_twice_is_left_to_the_parser() {
        for twice in [
            r#"{"Records": [], "Records": []}"#,
            r#"{"Records": [{"body": "a", "body": "b"}]}"#,
            r#"{"Records": [{"attributes": {"SentTimestamp": "1", "SentTimestamp": "2"}}]}"#,
        ] {
            assert!(scanned_messages(twice).is_none() && messages(twice.as_bytes()).is_err(), "{twice}");
        }
    }

    #[test]
    fn whatever_is_scanned_is_read_as_it_is_parsed() {
        let message =
            r#"{"messageId": "m", "body": "b", "attributes": {"SentTimestamp": "1"}, "other": [1, {"a": "]}"}]}"#;
        let event = format!(r#"{{"Records": [{message}, {message}], "more": {{"Records": []}}}}"#);
        assert!(scanned_messages(&event).is_some());
        // Each byte gone, or another one in its place.
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
