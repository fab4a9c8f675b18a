//! A row: its columns in PostgreSQL's binary format.

use std::{borrow::Cow, fmt};

use bytes::{BufMut, Bytes, BytesMut};
use uuid::Uuid;

use super::{
    Attribute, Column, ColumnType, Convert, Envelope, Fault, Field,
    body::Value,
    convert::{self, normalized},
};
use crate::keyring::{Keyring, Mask};

/// Initial bytes of the buffer in which rows are made: room for about four hundred rows.
pub const ROWS_CAPACITY: usize = 64 * 1024;

/// A row with its personal fields masked. Each column is in PostgreSQL's binary format after its length (a big-endian `i32`, -1
/// for NULL), as `COPY` and arrays expect. `Debug` prints only the type's name.
///
/// Only a [`Mapping`](super::Mapping) makes one.
#[derive(Clone, PartialEq, Eq)]
pub struct Row(Bytes);

impl fmt::Debug for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Row").finish_non_exhaustive()
    }
}

/// A column of a row in PostgreSQL's binary format; `None` is NULL.
pub type Cell<'a> = Option<&'a [u8]>;

impl Row {
    pub(super) fn new(cells: BytesMut) -> Self {
        Self(cells.freeze())
    }

    /// All cells, each after its length.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The cells in the order of the mapping's columns.
    pub fn cells(&self) -> impl Iterator<Item = Cell<'_>> {
        let mut rest = &self.0[..];
        std::iter::from_fn(move || {
            let (len, cells) = rest.split_first_chunk()?;
            let cell = usize::try_from(i32::from_be_bytes(*len)).ok().map(|len| cells.split_at(len));
            rest = cell.map_or(cells, |(_, cells)| cells);
            Some(cell.map(|(cell, _)| cell))
        })
    }
}

fn push(row: &mut BytesMut, cell: Cell<'_>) {
    row.extend_from_slice(&cell.map_or(-1, |cell| cell.len() as i32).to_be_bytes());
    row.extend_from_slice(cell.unwrap_or_default());
}

impl Column {
    /// Writes the column's cell from the value of a field.
    pub(super) fn write_field(
        &self,
        field: &Field,
        value: &Value<'_>,
        keyring: &Keyring,
        row: &mut BytesMut,
    ) -> Result<(), Fault> {
        match value {
            Value::Absent | Value::Null if self.optional => push(row, None),
            Value::Absent | Value::Null => return Err(Fault::Missing),
            Value::Twice => return Err(Fault::Twice),
            Value::NoParent => return Err(Fault::NoParent),
            value => match (self.column_type, field.convert) {
                // Every masked column is text: the arms below write plain values.
                (ColumnType::Text, _) => {
                    let text = self.text(field, value)?;
                    match field.masked {
                        Some(way) => push_masked(row, keyring, way, field, &text)?,
                        None => push(row, Some(text.as_bytes())),
                    }
                }
                (_, Some(Convert::VersionDigits)) => push(row, Some(&version(value, false)?.to_be_bytes())),
                (_, Some(Convert::VersionOrdered)) => push(row, Some(&version(value, true)?.to_be_bytes())),
                (ColumnType::Integer, from) => {
                    push(row, Some(&(integer(value, from, ColumnType::Integer)? as i32).to_be_bytes()));
                }
                (ColumnType::Bigint, from) => {
                    push(row, Some(&integer(value, from, ColumnType::Bigint)?.to_be_bytes()));
                }
                (ColumnType::DoublePrecision, from) => {
                    push(row, Some(&convert::double(&digits(value, from)?)?.to_be_bytes()));
                }
                (ColumnType::Boolean, _) => match value {
                    Value::Json("true") => push(row, Some(&[1])),
                    Value::Json("false") => push(row, Some(&[0])),
                    _ => return Err(Fault::NotABoolean),
                },
                (ColumnType::Date, _) => push(row, Some(&convert::parsed_day(&string(value)?)?.to_be_bytes())),
                (ColumnType::Timestamptz, None) => {
                    push(row, Some(&convert::parsed_time(&string(value)?)?.to_be_bytes()));
                }
                (ColumnType::Timestamptz, Some(from)) => {
                    let number = integer(value, None, ColumnType::Timestamptz)?;
                    let a_second = if from == Convert::EpochMillis { 1_000 } else { 1 };
                    push(row, Some(&convert::epoch(number, a_second)?.to_be_bytes()));
                }
                (ColumnType::Uuid, _) => {
                    let uuid = Uuid::try_parse(&string(value)?).map_err(|_| Fault::NotAUuid)?;
                    push(row, Some(uuid.as_bytes()));
                }
                (ColumnType::Jsonb, _) => push_jsonb(row, value)?,
            },
        }
        Ok(())
    }

    /// The normalized text of a text column, before masking.
    fn text<'a>(&self, field: &Field, value: &'a Value<'_>) -> Result<Cow<'a, str>, Fault> {
        let text = match field.convert {
            Some(Convert::FromNumber) => number(value)?.into(),
            None
            | Some(
                Convert::VersionDigits
                | Convert::VersionOrdered
                | Convert::EpochSeconds
                | Convert::EpochMillis
                | Convert::FromText,
            ) => string(value)?,
        };
        let text = normalized(text, &field.normalize, field.strict)?;
        if text.is_empty() && !self.optional {
            return Err(Fault::Empty);
        }
        // JSON can only hold a NUL as an escape, and text with escapes is never borrowed.
        if matches!(&text, Cow::Owned(text) if text.contains('\0')) {
            return Err(Fault::Nul);
        }
        // Characters are counted only if the bytes exceed the limit. The keyring checks the length of masks.
        match self.max_length {
            Some(max) if field.masked.is_none() && text.len() > max && text.chars().count() > max => {
                Err(Fault::TooLong)
            }
            _ => Ok(text),
        }
    }

    /// Writes the column's cell from an attribute of the message.
    pub(super) fn write_attribute(
        &self,
        attribute: Attribute,
        envelope: &Envelope<'_>,
        row: &mut BytesMut,
    ) -> Result<(), Fault> {
        match attribute {
            Attribute::ProcessingDate => push(row, Some(&convert::day(envelope.now).to_be_bytes())),
            Attribute::ProcessingTime => push(row, Some(&convert::microseconds(envelope.now).to_be_bytes())),
            Attribute::SentDate => match envelope.sent {
                Some(sent) => push(row, Some(&convert::day(sent).to_be_bytes())),
                None => self.push_missing(row)?,
            },
            Attribute::SentTime => match envelope.sent {
                Some(sent) => push(row, Some(&convert::microseconds(sent).to_be_bytes())),
                None => self.push_missing(row)?,
            },
            Attribute::MessageId if self.column_type == ColumnType::Uuid => {
                let uuid = Uuid::try_parse(envelope.message_id).map_err(|_| Fault::NotAUuid)?;
                push(row, Some(uuid.as_bytes()));
            }
            Attribute::MessageId => push(row, Some(envelope.message_id.as_bytes())),
            Attribute::Queue => match envelope.queue {
                Some(queue) => push(row, Some(queue.as_bytes())),
                None => self.push_missing(row)?,
            },
        }
        Ok(())
    }

    fn push_missing(&self, row: &mut BytesMut) -> Result<(), Fault> {
        if !self.optional {
            return Err(Fault::Missing);
        }
        push(row, None);
        Ok(())
    }
}

fn push_masked(row: &mut BytesMut, keyring: &Keyring, way: Mask, field: &Field, text: &str) -> Result<(), Fault> {
    push(row, Some(&[]));
    let start = row.len();
    keyring.mask_onto(row, way, &field.path, text).map_err(|_| Fault::TooLong)?;
    let len = (row.len() - start) as i32;
    row[start - 4..start].copy_from_slice(&len.to_be_bytes());
    Ok(())
}

/// <https://github.com/postgres/postgres/blob/REL_17_STABLE/src/backend/utils/adt/jsonb.c>: `jsonb_recv` reads a version and a text.
const JSONB_VERSION: u8 = 1;

fn push_jsonb(row: &mut BytesMut, value: &Value<'_>) -> Result<(), Fault> {
    let Value::Json(json) = value else { return Err(Fault::Missing) };
    if has_nul(json) {
        return Err(Fault::Nul);
    }
    // PostgreSQL may refuse what this parser refuses: half surrogate pairs, numbers beyond a double, nesting beyond its stack.
    if serde_json::from_str::<serde_json::Value>(json).is_err() {
        return Err(Fault::NotJsonb);
    }
    row.put_i32(json.len() as i32 + 1);
    row.put_u8(JSONB_VERSION);
    row.extend_from_slice(json.as_bytes());
    Ok(())
}

/// Whether a string in a JSON text has U+0000, which JSON can only hold as an escape.
fn has_nul(json: &str) -> bool {
    json.match_indices("\\u0000").any(|(position, _)| {
        let backslashes = json[..position].bytes().rev().take_while(|byte| *byte == b'\\').count();
        backslashes % 2 == 0
    })
}

/// A string's text.
fn string<'a>(value: &'a Value<'_>) -> Result<Cow<'a, str>, Fault> {
    match value {
        Value::Text(Cow::Borrowed(text)) => Ok(Cow::Borrowed(text)),
        Value::Text(text) => Ok(text.clone()),
        Value::Json(json) => serde_json::from_str::<String>(json).map(Cow::Owned).map_err(|_| Fault::NotAString),
        _ => Err(Fault::NotAString),
    }
}

/// A number's text as written in the body.
fn number<'a>(value: &'a Value<'_>) -> Result<&'a str, Fault> {
    match value {
        Value::Json(json) if json.starts_with(|first: char| first == '-' || first.is_ascii_digit()) => Ok(json),
        _ => Err(Fault::NotANumber),
    }
}

/// The text of a number; with [`Convert::FromText`], of a string that holds a number.
fn digits<'a>(value: &'a Value<'_>, from: Option<Convert>) -> Result<Cow<'a, str>, Fault> {
    if from != Some(Convert::FromText) {
        return number(value).map(Cow::Borrowed);
    }
    let text = string(value)?;
    if convert::is_number(&text) { Ok(text) } else { Err(Fault::NotANumber) }
}

fn integer(value: &Value<'_>, from: Option<Convert>, column_type: ColumnType) -> Result<i64, Fault> {
    convert::integer(&digits(value, from)?, column_type)
}

fn version(value: &Value<'_>, ordered: bool) -> Result<i32, Fault> {
    let text = string(value)?;
    if text.is_empty() { Err(Fault::Empty) } else { convert::version(&text, ordered) }
}
