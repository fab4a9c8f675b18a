//! Finds a person's dead messages, and deletes them.
//!
//! A message is the person's if the field has the value. If the field is missing or the body is broken, a message that contains
//! the value may still be another person's. Such messages are reported, and deleted only with `--mentions`.

use std::{borrow::Cow, collections::BTreeSet, fmt};

use aws_sdk_sqs::types::DeleteMessageBatchRequestEntry;
use login_etl::mapping::{ColumnType, Mapping, Unwrap};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{Dead, ENTRIES, Queue, ROUND};
use crate::{
    find::Person,
    output::{Failure, aws, failed},
};

/// Seconds that all messages are hidden during a search, so that each is read once.
const HIDDEN: i32 = 120;

/// How a dead message relates to a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relation {
    Theirs,
    /// It has the value somewhere, but not the field.
    Mentions,
    Others,
}

/// All dead messages that SQS shows, with their relation to a person. They stay hidden until [`Queue::let_go`] or
/// [`Queue::delete`].
pub struct Looked {
    dead: Vec<(Dead, Relation)>,
}

impl Looked {
    /// The number of the person's messages.
    pub fn theirs(&self) -> usize {
        self.dead.iter().filter(|(_, relation)| *relation == Relation::Theirs).count()
    }

    /// The ids of messages that mention the person.
    pub fn mentions(&self) -> Vec<String> {
        let mentions = self.dead.iter().filter(|(_, relation)| *relation == Relation::Mentions);
        mentions.map(|(dead, _)| dead.id().to_owned()).collect()
    }

    /// The number of messages read.
    pub fn count(&self) -> usize {
        self.dead.len()
    }

    /// Treats messages that mention the person as theirs.
    pub fn with_mentions(mut self) -> Self {
        for (_, relation) in &mut self.dead {
            if *relation == Relation::Mentions {
                *relation = Relation::Theirs;
            }
        }
        self
    }
}

impl Queue<'_> {
    /// Reads and hides all dead messages that SQS shows.
    pub async fn look_for(&self, person: &Person<'_>) -> Result<Looked, Failure> {
        let mut dead = Vec::new();
        loop {
            let before = dead.len();
            let read = self.read(&mut dead, ROUND, HIDDEN, None).await;
            if let Err(failure) = read {
                self.release(&dead).await;
                return Err(failure);
            }
            if dead.len() == before {
                break;
            }
        }
        let mapping = &self.settings.mapping;
        let related = dead.into_iter().map(|dead| {
            let relation = relation(person, mapping, dead.body());
            (dead, relation)
        });
        Ok(Looked { dead: related.collect() })
    }

    /// Makes all of them visible again.
    pub async fn let_go(&self, looked: Looked) {
        self.release(looked.dead.iter().map(|(dead, _)| dead)).await;
    }

    /// Deletes the person's messages, and makes the others visible again.
    pub async fn delete(&self, looked: Looked) -> Result<(), Failure> {
        let (theirs, others): (Vec<_>, Vec<_>) =
            looked.dead.into_iter().partition(|(_, relation)| *relation == Relation::Theirs);
        self.release(others.iter().map(|(dead, _)| dead)).await;
        for part in theirs.chunks(ENTRIES) {
            let entries = part.iter().enumerate().filter_map(|(number, (dead, _))| {
                let entry = DeleteMessageBatchRequestEntry::builder().id(number.to_string());
                entry.receipt_handle(dead.message.receipt_handle()?).build().ok()
            });
            let delete = self.client.delete_message_batch().queue_url(&self.url).set_entries(Some(entries.collect()));
            let deleted = delete.send().await.map_err(aws("delete the person's dead messages: run this again"))?;
            if !deleted.failed.is_empty() {
                return Err(failed("SQS did not delete some of the person's dead messages: run this again"));
            }
        }
        Ok(())
    }

    /// Whether the queue is FIFO: SQS then shows only ten messages of a group at a time.
    pub fn is_fifo(&self) -> bool {
        self.arn.ends_with(".fifo")
    }
}

/// An object's fields in their order, duplicates included.
struct Fields<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OfObject;

        impl<'de> Visitor<'de> for OfObject {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut fields = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
                    fields.push((Cow::Owned(name), value));
                }
                Ok(Fields(fields))
            }
        }

        deserializer.deserialize_map(OfObject)
    }
}

fn relation(person: &Person<'_>, mapping: &Mapping, body: &str) -> Relation {
    let message = match mapping.unwrap() {
        None => Some(Cow::Borrowed(body)),
        Some(Unwrap::Sns) => texts(body, &["Message"]).into_iter().flatten().next().map(Cow::Owned),
    };
    let path: Vec<_> = person.field.path.split('.').collect();
    let found = message.map_or_else(Vec::new, |message| texts(&message, &path));
    // Null, lists and objects do not tell whose message it is.
    let found: Vec<_> = found.into_iter().flatten().collect();
    if found.iter().any(|text| is_value(person, text)) {
        return Relation::Theirs;
    }
    let mentions = found.is_empty() && {
        let body = body.to_lowercase();
        needles(person).iter().any(|needle| has_word(&body, needle))
    };
    if mentions { Relation::Mentions } else { Relation::Others }
}

/// The values at a path as text, one for each time that the message gives it; `None` for null, a list or an object.
fn texts(message: &str, path: &[&str]) -> Vec<Option<String>> {
    let Some((first, rest)) = path.split_first() else {
        let text = match message.as_bytes().first() {
            Some(b'"') => serde_json::from_str(message).ok(),
            Some(b'-' | b'0'..=b'9' | b't' | b'f') => Some(message.to_owned()),
            _ => None,
        };
        return vec![text];
    };
    let Ok(Fields(fields)) = serde_json::from_str::<Fields<'_>>(message) else { return Vec::new() };
    fields.iter().filter(|(name, _)| name == first).flat_map(|(_, value)| texts(value.get(), rest)).collect()
}

/// Whether a text equals the person's value by the rules of the column's type.
fn is_value(person: &Person<'_>, text: &str) -> bool {
    let normalized = person.field.normalized(text).unwrap_or(Cow::Borrowed(text));
    person.spellings.iter().any(|spelling| {
        let same = |canonical: &dyn Fn(&str) -> Option<String>| {
            canonical(spelling).is_some_and(|spelling| canonical(text) == Some(spelling))
        };
        **spelling == *normalized
            || match person.column.column_type {
                ColumnType::Uuid => same(&|text| {
                    let digits = text.replace('-', "").to_lowercase();
                    (digits.len() == 32).then_some(digits)
                }),
                ColumnType::Integer | ColumnType::Bigint | ColumnType::DoublePrecision => {
                    same(&|text| text.trim().parse::<f64>().ok().map(|number| number.to_string()))
                }
                _ => false,
            }
    })
}

/// The forms, in lower case, that the person's value can have in a body: plain, JSON-escaped, ASCII-escaped, and each of them
/// in a JSON string within a string.
fn needles(person: &Person<'_>) -> BTreeSet<String> {
    let escaped = |text: &str| serde_json::Value::from(text).to_string().trim_matches('"').to_owned();
    let ascii = |text: &str| {
        let mut units = [0; 2];
        let unit = |unit: &u16| format!("\\u{unit:04x}");
        let shown = |character: char| match character.is_ascii() {
            true => escaped(&character.to_string()),
            false => character.encode_utf16(&mut units).iter().map(unit).collect(),
        };
        text.chars().map(shown).collect::<String>()
    };
    let mut needles = BTreeSet::new();
    for spelling in &person.spellings {
        for once in [spelling.to_string(), escaped(spelling), ascii(spelling)] {
            needles.insert(escaped(&once).to_lowercase());
            needles.insert(once.to_lowercase());
        }
    }
    needles
}

/// Whether a text contains this word, not as a part of a longer word.
fn has_word(text: &str, word: &str) -> bool {
    let is_edge = |character: Option<char>| character.is_none_or(|character| !character.is_alphanumeric());
    !word.is_empty()
        && text
            .match_indices(word)
            .any(|(at, _)| is_edge(text[..at].chars().next_back()) && is_edge(text[at + word.len()..].chars().next()))
}

#[cfg(test)]
mod tests {
    use login_etl::mapping::Source;
    use zeroize::Zeroizing;

    use super::*;

    fn related(column: &str, value: &str, body: &str) -> Relation {
        let mapping =
            Mapping::from_toml(&format!("table = \"t\"\n[[column]]\nname = \"c\"\nsubject = true\n{column}"), "m");
        let mapping = mapping.unwrap();
        let column = mapping.subject().unwrap();
        let Source::Field(field) = &column.source else { unreachable!() };
        let spellings = vec![Zeroizing::new(value.to_owned())];
        relation(&Person { column, field, spellings, values: Vec::new() }, &mapping, body)
    }

    #[test]
    fn the_field_decides_whose_message_it_is_and_a_mention_elsewhere_does_not() {
        let text = "from = \"user.id\"\nkeep = \"plain\"\ntype = \"text\"";
        for (body, relation) in [
            (r#"{"user": {"id": "zoë"}}"#, Relation::Theirs),
            (r#"{"user": {"id": "zo\u00eb"}}"#, Relation::Theirs),
            (r#"{"user": {"id": "zoë", "id": "bob"}}"#, Relation::Theirs),
            (r#"{"user": {"id": "bob"}, "friend": "zoë"}"#, Relation::Others),
            (r#"{"user": "zoë"}"#, Relation::Mentions),
            (r#"{"userId": "anna-zoë"}"#, Relation::Mentions),
            (r#"{"user": {"id": null}, "name": "ZOË"}"#, Relation::Mentions),
            (r#"{"user": {"id": "zo\u00eb"#, Relation::Mentions),
            (r#"{"Message": "{\"name\": \"zo\\u00eb\"}"}"#, Relation::Mentions),
            ("mail to zoë, please", Relation::Mentions),
            ("zoës", Relation::Others),
            ("", Relation::Others),
        ] {
            assert_eq!(related(text, "zoë", body), relation, "{body}");
        }
    }

    #[test]
    fn values_are_compared_by_the_column_type() {
        let of_type = |column_type: &str| format!("from = \"u\"\nkeep = \"plain\"\ntype = \"{column_type}\"");
        let uuid = "059f36b4-87a3-44ab-83d2-661975830a7d";
        for (column_type, value, body, relation) in [
            ("uuid", uuid, r#"{"u": "059F36B4-87A3-44AB-83D2-661975830A7D"}"#, Relation::Theirs),
            ("uuid", uuid, r#"{"u": "059f36b487a344ab83d2661975830a7d"}"#, Relation::Theirs),
            ("bigint", "42", r#"{"u": "042"}"#, Relation::Theirs),
            ("bigint", "42", r#"{"u": 42.0}"#, Relation::Theirs),
            ("bigint", "42", r#"{"u": 421}"#, Relation::Others),
            ("text", "12345678901234567890123", r#"{"u": 12345678901234567890123}"#, Relation::Theirs),
        ] {
            assert_eq!(related(&of_type(column_type), value, body), relation, "{body}");
        }
    }
}
