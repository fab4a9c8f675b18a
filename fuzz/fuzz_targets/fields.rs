//! Any body under any small mapping: the row equals that of a simple model over serde_json, however the event escapes the body.
#![no_main]

use std::{fmt, sync::LazyLock, time::SystemTime};

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use login_etl::{
    keyring::Keyring,
    mapping::{ColumnType, Envelope, Mapping, Row},
};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

static KEYRING: LazyLock<Keyring> = LazyLock::new(|| {
    let text = r#"{"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"}"#;
    Keyring::from_json(text).expect("a keyring")
});

const PATHS: [&str; 8] = ["a", "b", "c", "a.a", "a.b", "b.a.b", "b.a.c", "a.b.c"];
const TYPES: [ColumnType; 6] = [
    ColumnType::Text,
    ColumnType::Integer,
    ColumnType::Bigint,
    ColumnType::DoublePrecision,
    ColumnType::Boolean,
    ColumnType::Jsonb,
];

struct Column {
    path: &'static str,
    /// `None` if the column is masked.
    column_type: Option<ColumnType>,
    optional: bool,
}

type Cell = Option<Vec<u8>>;

fuzz_target!(|input: (&[u8], &str)| {
    let (choices, text) = input;
    let columns: Vec<_> = choices.chunks_exact(2).take(4).map(column).collect();
    // The parser refuses some, such as a field that is masked and plain.
    let Ok(mapping) = Mapping::from_toml(&toml(&columns), "fuzz.toml") else { return };
    for body in [text, &json_of(&mut text.bytes(), 0)] {
        let envelope = Envelope {
            message_id: "059f36b4-87a3-44ab-83d2-661975830a7d",
            sent: None,
            queue: None,
            now: SystemTime::UNIX_EPOCH,
        };
        let expected: Option<Vec<Cell>> =
            is_object(body).then(|| columns.iter().map(|column| cell(column, body)).collect()).flatten();
        let mut buffer = BytesMut::new();
        let agrees = |row: Option<Row>| {
            let found: Option<Vec<Cell>> = row.map(|row| row.cells().map(|cell| cell.map(<[u8]>::to_vec)).collect());
            assert_eq!(found, expected, "{body:?} under\n{}", toml(&columns));
        };
        agrees(mapping.row(body, &envelope, &KEYRING, &mut buffer).ok());
        for json in [serde_json::to_string(body).expect("a string"), escaped(body)] {
            agrees(mapping.row_of_json_string(&json, &envelope, &KEYRING, &mut buffer).ok());
        }
    }
});

fn column(choice: &[u8]) -> Column {
    let path = PATHS[usize::from(choice[0]) % PATHS.len()];
    let column_type = TYPES.get(usize::from(choice[1] >> 1) % (TYPES.len() + 1)).copied();
    Column { path, column_type, optional: choice[1] & 1 == 1 }
}

fn toml(columns: &[Column]) -> String {
    let column = |(index, column): (usize, &Column)| {
        let kind = match column.column_type {
            None => "keep = \"masked\"".to_owned(),
            Some(column_type) => format!("keep = \"plain\"\ntype = {:?}", column_type.name()),
        };
        format!("[[column]]\nname = \"c{index}\"\nfrom = {:?}\n{kind}\noptional = {}\n", column.path, column.optional)
    };
    format!("table = \"t\"\n{}", columns.iter().enumerate().map(column).collect::<String>())
}

/// A JSON text chosen by the bytes, so that chance need not find matching brackets.
fn json_of(bytes: &mut impl Iterator<Item = u8>, depth: usize) -> String {
    const SCALARS: [&str; 20] = [
        "null",
        "true",
        "false",
        "0",
        "-0",
        "17",
        "-1.5",
        "2147483648",
        "9223372036854775808",
        "1e3",
        "1e400",
        r#""""#,
        r#""x""#,
        r#""7""#,
        r#""\u0000""#,
        r#""\ud800""#,
        r#""\ud83d\ude00""#,
        r#""\\u0000""#,
        r#""ü\n\"""#,
        r#" "y" "#,
    ];
    let choice = bytes.next().unwrap_or(0);
    let several = |bytes: &mut _, element: &mut dyn FnMut(&mut _) -> String| {
        (0..choice / 8 % 4).map(|_| element(bytes)).collect::<Vec<_>>().join(",")
    };
    match choice % 8 {
        _ if depth > 4 => "1".to_owned(),
        6 => format!("[{}]", several(bytes, &mut |bytes| json_of(bytes, depth + 1))),
        0..6 if depth < 3 => {
            let mut member = |bytes: &mut _| {
                let key = ["a", "b", "c", "\\u0061", "d", "a.b", "", "\\ud800"];
                let choice: u8 = Iterator::next(bytes).unwrap_or(0);
                // The first three keys most often.
                let key = key[usize::from(if choice > 64 { choice % 3 } else { choice % 8 })];
                format!("\"{key}\":{}", json_of(bytes, depth + 1))
            };
            format!("{{{}}}", several(bytes, &mut member))
        }
        _ => SCALARS[usize::from(choice) / 8 % SCALARS.len()].to_owned(),
    }
}

/// A JSON string in which each character is an escape.
fn escaped(text: &str) -> String {
    let units: String = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
    format!("\"{units}\"")
}

fn is_object(json: &str) -> bool {
    serde_json::from_str::<&RawValue>(json).is_ok_and(|value| value.get().starts_with('{'))
}

/// The column's cell; `None` if the message is refused.
fn cell(column: &Column, body: &str) -> Option<Cell> {
    let path: Vec<_> = column.path.split('.').collect();
    let Some(json) = value(body.trim(), &path)? else { return column.optional.then_some(None) };
    let json = json.trim();
    let is_number = json.starts_with(|first: char| first == '-' || first.is_ascii_digit());
    let cell = match column.column_type {
        None | Some(ColumnType::Text) => {
            let text: String = serde_json::from_str(json).ok()?;
            if text.contains('\0') || (text.is_empty() && !column.optional) {
                return None;
            }
            match column.column_type {
                None => KEYRING.mask(column.path, &text).ok()?.as_str().as_bytes().to_vec(),
                Some(_) => text.into_bytes(),
            }
        }
        Some(ColumnType::Boolean) => vec![u8::from(serde_json::from_str::<bool>(json).ok()?)],
        Some(ColumnType::Jsonb) => {
            serde_json::from_str::<serde_json::Value>(json).ok().filter(|_| !has_nul(json))?;
            [&[1], json.as_bytes()].concat()
        }
        Some(_) if !is_number => return None,
        Some(ColumnType::Integer) => json.parse::<i32>().ok()?.to_be_bytes().to_vec(),
        Some(ColumnType::Bigint) => json.parse::<i64>().ok()?.to_be_bytes().to_vec(),
        Some(_) => json.parse::<f64>().ok().filter(|number| number.is_finite())?.to_be_bytes().to_vec(),
    };
    Some(Some(cell))
}

/// The value at the end of a path; `Some(None)` if it is missing, `None` if it is ambiguous or its parent is not an object.
fn value<'a>(object: &'a str, path: &[&str]) -> Option<Option<&'a str>> {
    let members: Members<'a> = serde_json::from_str(object).ok()?;
    let mut found = members.0.into_iter().filter(|(key, _)| key == path[0]).map(|(_, value)| value.get());
    match (found.next(), found.next(), path) {
        (_, Some(_), _) => None,
        (None | Some("null"), None, _) => Some(None),
        (Some(value), None, [_]) => Some(Some(value)),
        (Some(inner), None, [_, rest @ ..]) if inner.starts_with('{') => value(inner, rest),
        _ => None,
    }
}

fn has_nul(json: &str) -> bool {
    if let Ok(text) = serde_json::from_str::<String>(json) {
        text.contains('\0')
    } else if let Ok(elements) = serde_json::from_str::<Vec<&RawValue>>(json) {
        elements.iter().any(|element| has_nul(element.get()))
    } else if let Ok(members) = serde_json::from_str::<Members<'_>>(json) {
        members.0.iter().any(|(key, value)| key.contains('\0') || has_nul(value.get()))
    } else {
        false
    }
}

/// An object's members, including repeated ones.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Read)
    }
}
