//! A person's dead messages: told from others', and deleted.

use std::borrow::Cow;

use aws_sdk_sqs::types::DeleteMessageBatchRequestEntry;
use login_etl::mapping::{Mapping, Unwrap};
use serde_json::Value;

use super::{Dead, ENTRIES, Queue, ROUND};
use crate::{
    find::Person,
    output::{Failure, aws, failed},
};

/// Seconds that all messages are hidden meanwhile, so that each is seen once.
const HIDDEN: i32 = 120;

/// All dead messages, hidden from others, and which of them are a person's.
pub struct Theirs {
    dead: Vec<Dead>,
    theirs: Vec<bool>,
}

impl Theirs {
    /// How many messages are the person's.
    pub fn messages(&self) -> usize {
        self.theirs.iter().filter(|theirs| **theirs).count()
    }

    fn split(self) -> (Vec<Dead>, Vec<Dead>) {
        let (theirs, others): (Vec<_>, Vec<_>) =
            self.dead.into_iter().zip(self.theirs).partition(|(_, theirs)| *theirs);
        let without = |marked: Vec<(Dead, bool)>| marked.into_iter().map(|(dead, _)| dead).collect();
        (without(theirs), without(others))
    }
}

impl Queue<'_> {
    /// Reads all dead messages, and hides them until they are let go.
    pub async fn theirs(&self, person: &Person<'_>) -> Result<Theirs, Failure> {
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
        let theirs = dead.iter().map(|dead| is_of(person, mapping, dead.body())).collect();
        Ok(Theirs { dead, theirs })
    }

    /// Lets others see all of them again.
    pub async fn let_go(&self, theirs: Theirs) {
        self.release(&theirs.dead).await;
    }

    /// Deletes the person's messages, and lets others see the rest again.
    pub async fn delete(&self, theirs: Theirs) -> Result<(), Failure> {
        let (theirs, others) = theirs.split();
        self.release(&others).await;
        for part in theirs.chunks(ENTRIES) {
            let entries = part.iter().enumerate().filter_map(|(number, dead)| {
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
}

/// Whether a message is about the person: its field has one of the spellings. A body without that field may be broken in any way;
/// it is theirs if it has a spelling anywhere, as a word.
fn is_of(person: &Person<'_>, mapping: &Mapping, body: &str) -> bool {
    let Ok(parsed) = serde_json::from_str::<Value>(body) else {
        return person.spellings.iter().any(|spelling| has_word(body, spelling));
    };
    let message = match (mapping.unwrap(), parsed["Message"].as_str().map(serde_json::from_str::<Value>)) {
        (Some(Unwrap::Sns), Some(Ok(message))) => message,
        _ => parsed,
    };
    let field = person.field.path.split('.').try_fold(&message, |value, name| value.get(name));
    let text = match field {
        Some(Value::String(text)) => Cow::Borrowed(text.as_str()),
        Some(Value::Number(number)) => Cow::Owned(number.to_string()),
        _ => return person.spellings.iter().any(|spelling| says(&message, spelling)),
    };
    let text = person.field.normalized(&text).unwrap_or(Cow::Borrowed(&text));
    person.spellings.iter().any(|spelling| **spelling == *text)
}

/// Whether a text within a value has this word.
fn says(value: &Value, word: &str) -> bool {
    match value {
        Value::String(text) => has_word(text, word),
        Value::Number(number) => number.to_string() == word,
        Value::Array(items) => items.iter().any(|item| says(item, word)),
        Value::Object(fields) => fields.iter().any(|(name, value)| has_word(name, word) || says(value, word)),
        Value::Null | Value::Bool(_) => false,
    }
}

/// Whether a text has this word, and not as a part of a longer one.
fn has_word(text: &str, word: &str) -> bool {
    let is_edge = |character: Option<char>| character.is_none_or(|character| !character.is_alphanumeric());
    !word.is_empty()
        && text
            .match_indices(word)
            .any(|(at, _)| is_edge(text[..at].chars().next_back()) && is_edge(text[at + word.len()..].chars().next()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_found_at_any_place_and_not_within_another() {
        for text in ["alice", "{\"user_id\": \"alice\"", "(alice)", "x alice,", "maalice alice"] {
            assert!(has_word(text, "alice"), "{text}");
        }
        for text in ["", "malice", "alice2", "Alice", "aliceé"] {
            assert!(!has_word(text, "alice"), "{text}");
        }
    }
}
