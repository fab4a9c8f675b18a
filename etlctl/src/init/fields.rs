//! Infers the fields of sample messages, and their types.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{Timestamp, civil::Date};
use serde_json::Value;

/// Words that are common in the names of personal fields.
const PERSONAL: [&str; 14] = [
    "address",
    "birth",
    "device",
    "email",
    "imei",
    "ip",
    "ip_addr",
    "mac",
    "mail",
    "mobile",
    "name",
    "phone",
    "ssn",
    "user_agent",
];

/// A field that occurs in the samples.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its path in the message, as in the mapping's `from`.
    pub path: String,
    /// The type of its column if it is kept plain.
    pub column_type: &'static str,
    /// Whether all of its values are strings. Only then can it be masked.
    pub is_text: bool,
    /// Whether it is missing or null in a message.
    pub optional: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Text,
    Uuid,
    Date,
    Time,
    Integer,
    Number,
    Boolean,
    Json,
    Null,
}

/// The fields of the samples, in their order of appearance, and the names of fields that a mapping cannot declare.
pub fn of_samples(samples: &[Value]) -> (Vec<Seen>, Vec<String>) {
    let mut order = Vec::new();
    let mut kinds: BTreeMap<String, Vec<Kind>> = BTreeMap::new();
    for sample in samples {
        visit(sample, &mut Vec::new(), &mut |path, kind| {
            let name = path.join(".");
            kinds.entry(name.clone()).or_insert_with(|| {
                order.push((name, path.iter().all(|part| can_be_declared(part))));
                Vec::new()
            });
            if let Some(seen) = kinds.get_mut(&path.join(".")) {
                seen.push(kind);
            }
        });
    }
    let (declared, others): (Vec<_>, Vec<_>) = order.into_iter().partition(|(_, can_be_declared)| *can_be_declared);
    let seen = declared.into_iter().map(|(path, _)| {
        let of_field = &kinds[&path];
        let known: BTreeSet<_> = of_field.iter().copied().filter(|kind| *kind != Kind::Null).collect();
        let optional = of_field.len() < samples.len() || of_field.contains(&Kind::Null);
        let is_text = known.iter().all(|kind| *kind <= Kind::Time);
        Seen { column_type: column_type(&known), is_text, optional, path }
    });
    (seen.collect(), others.into_iter().map(|(path, _)| path).collect())
}

/// Whether a field's name suggests that its values are personal.
pub fn is_likely_personal(path: &str) -> bool {
    let name = path.rsplit('.').next().unwrap_or(path).to_lowercase();
    let words: Vec<_> = name.split(|character: char| !character.is_alphanumeric()).collect();
    PERSONAL.iter().any(|part| words.contains(part) || (part.len() > 3 && name.contains(part)))
}

/// Calls `leaf` with the path and the kind of each field that is not an object, or is an empty one.
fn visit<'v>(value: &'v Value, path: &mut Vec<&'v str>, leaf: &mut impl FnMut(&[&str], Kind)) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                path.push(name);
                visit(value, path, leaf);
                path.pop();
            }
        }
        value => leaf(path, kind(value)),
    }
}

fn kind(value: &Value) -> Kind {
    match value {
        Value::Null => Kind::Null,
        Value::Bool(_) => Kind::Boolean,
        Value::Number(number) if number.is_f64() => Kind::Number,
        Value::Number(_) => Kind::Integer,
        Value::Array(_) | Value::Object(_) => Kind::Json,
        Value::String(text) if is_uuid(text) => Kind::Uuid,
        Value::String(text) if text.len() == 10 && text.parse::<Date>().is_ok() => Kind::Date,
        Value::String(text) if text.parse::<Timestamp>().is_ok() => Kind::Time,
        Value::String(_) => Kind::Text,
    }
}

fn is_uuid(text: &str) -> bool {
    let parts: Vec<_> = text.split('-').map(str::len).collect();
    parts == [8, 4, 4, 4, 12] && text.chars().all(|character| character == '-' || character.is_ascii_hexdigit())
}

fn column_type(kinds: &BTreeSet<Kind>) -> &'static str {
    let kinds: Vec<_> = kinds.iter().copied().collect();
    match kinds[..] {
        [Kind::Uuid] => "uuid",
        [Kind::Date] => "date",
        [Kind::Time] => "timestamptz",
        [Kind::Integer] => "bigint",
        [Kind::Integer, Kind::Number] | [Kind::Number] => "double precision",
        [Kind::Boolean] => "boolean",
        _ if kinds.iter().all(|kind| *kind <= Kind::Time) => "text",
        _ => "jsonb",
    }
}

/// Whether a name can be part of a mapping's path.
fn can_be_declared(name: &str) -> bool {
    !name.is_empty() && name.trim() == name && !name.contains(['.', '[', ']']) && name != "$"
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn types_follow_from_all_samples_together() {
        let samples = [
            json!({"id": "059f36b4-87a3-44ab-83d2-661975830a7d", "at": "2026-11-28T08:30:00Z", "n": 1, "x": 1, "tags": [1],
                   "who": {"mail": "a@b.c"}, "day": "2026-11-28", "ok": true, "odd": 1, "no": null, "a.b": 1}),
            json!({"id": "059f36b4-87a3-44ab-83d2-661975830a7e", "at": "2026-11-28T08:30:00+01:00", "n": 2, "x": 1.5, "tags": [],
                   "who": {"mail": "2026-11-28"}, "day": "2026-11-29", "odd": "one"}),
        ];
        let (seen, others) = of_samples(&samples);
        let seen: Vec<_> =
            seen.iter().map(|seen| (&*seen.path, seen.column_type, seen.is_text, seen.optional)).collect();
        assert_eq!(
            seen,
            [
                ("id", "uuid", true, false),
                ("at", "timestamptz", true, false),
                ("n", "bigint", false, false),
                ("x", "double precision", false, false),
                ("tags", "jsonb", false, false),
                ("who.mail", "text", true, false),
                ("day", "date", true, false),
                ("ok", "boolean", false, true),
                ("odd", "jsonb", false, false),
                ("no", "text", true, true),
            ]
        );
        assert_eq!(others, ["a.b"]);
    }

    #[test]
    fn names_say_which_fields_are_likely_personal() {
        for personal in ["ip", "client.ip", "email", "who.emailAddress", "device_id", "phone-number", "UserName"] {
            assert!(is_likely_personal(personal), "{personal}");
        }
        for other in ["zip_files", "total", "shipped", "description", "ip.total"] {
            assert!(!is_likely_personal(other), "{other}");
        }
    }
}
