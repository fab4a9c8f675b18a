//! The declared mapping: which fields of a message become which columns, and which of them are masked.
//!
//! - `file` reads and checks `mapping.toml`.
//! - `body` finds the declared fields in a message.
//! - `convert` normalizes texts, and converts them to numbers and times.
//! - `row` writes columns in PostgreSQL's binary format.
//! - `invalid` has the reasons for refusing a message.
//! - `shape` recognises other kinds of body, such as an SNS notification.

mod body;
mod convert;
mod file;
mod invalid;
mod row;
mod shape;

use std::{borrow::Cow, fmt, path::PathBuf, sync::Arc, time::SystemTime};

use bytes::BytesMut;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use self::body::{Fields, Value};
pub use self::{
    convert::{Convert, Normalize},
    file::MappingError,
    invalid::{Fault, Invalid},
    row::{Cell, ROWS_CAPACITY, Row},
    shape::Shape,
};
use crate::keyring::{Keyring, Mask};

/// The built-in mapping: login messages into `user_logins`.
const BUILT_IN: &str = include_str!("../../mapping.toml");

/// Which fields of a message become which columns of a table. Always valid: only a checked file makes one.
#[derive(Clone, Debug)]
pub struct Mapping {
    table: Table,
    unwrap: Option<Unwrap>,
    retention_days: Option<u32>,
    columns: Vec<Column>,
    fields: Fields,
}

/// The table that the rows go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its schema. `None`: the search path decides.
    pub schema: Option<String>,
    /// Its name.
    pub name: String,
}

/// The envelope around the message in a body.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Unwrap {
    /// An SNS notification: the message is its `Message`.
    Sns,
}

/// A column, and what fills it.
#[derive(Clone, Debug)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Its type.
    pub column_type: ColumnType,
    /// Maximum characters of a text column; of a masked column, maximum characters of the mask.
    pub max_length: Option<usize>,
    /// Whether the column is NULL if the message has no value for it.
    pub optional: bool,
    /// Whether the column identifies the subject, the person the row is about.
    pub subject: bool,
    /// Where its value comes from.
    pub source: Source,
}

/// Where a column's value comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A field of the message's body.
    Field(Field),
    /// An attribute of the message outside its body.
    Envelope(Attribute),
}

/// A field of the message's body.
#[derive(Clone, Debug)]
pub struct Field {
    /// Its path: names joined by dots. `aes-siv` and `hmac-sha256` masks depend on it.
    pub path: Arc<str>,
    /// How it is masked. `None`: plain.
    pub masked: Option<Mask>,
    /// How its value is converted to the column's type.
    pub convert: Option<Convert>,
    /// How its text is normalized, in this order.
    pub normalize: Vec<Normalize>,
    /// With [`Normalize::Ip`]: whether a text that is not an IP address is refused.
    pub strict: bool,
    /// Its index among the mapping's fields.
    slot: usize,
}

/// The attributes of a message that a column can store, besides fields of its body.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Attribute {
    /// The day (UTC) on which the function handles the message.
    ProcessingDate,
    /// When the function handles the message.
    ProcessingTime,
    /// The day (UTC) on which the message was sent.
    SentDate,
    /// When the message was sent.
    SentTime,
    /// The message id that SQS assigned.
    MessageId,
    /// The name of the queue.
    Queue,
}

impl Attribute {
    /// Its name in the mapping.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ProcessingDate => "processing-date",
            Self::ProcessingTime => "processing-time",
            Self::SentDate => "sent-date",
            Self::SentTime => "sent-time",
            Self::MessageId => "message-id",
            Self::Queue => "queue",
        }
    }
}

/// A column's type in PostgreSQL.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the names are PostgreSQL's")]
pub enum ColumnType {
    Text,
    Integer,
    Bigint,
    #[serde(rename = "double precision")]
    DoublePrecision,
    Boolean,
    Date,
    Timestamptz,
    Uuid,
    Jsonb,
}

impl ColumnType {
    /// All types.
    pub const ALL: [Self; 9] = [
        Self::Text,
        Self::Integer,
        Self::Bigint,
        Self::DoublePrecision,
        Self::Boolean,
        Self::Date,
        Self::Timestamptz,
        Self::Uuid,
        Self::Jsonb,
    ];

    /// Its name in SQL and in the mapping.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Integer => "integer",
            Self::Bigint => "bigint",
            Self::DoublePrecision => "double precision",
            Self::Boolean => "boolean",
            Self::Date => "date",
            Self::Timestamptz => "timestamptz",
            Self::Uuid => "uuid",
            Self::Jsonb => "jsonb",
        }
    }
}

/// What the function knows of a message besides its body.
#[derive(Clone, Copy, Debug)]
pub struct Envelope<'a> {
    /// The message id that SQS assigned.
    pub message_id: &'a str,
    /// When the message was sent.
    pub sent: Option<SystemTime>,
    /// The name of the queue.
    pub queue: Option<&'a str>,
    /// When the function handles the message.
    pub now: SystemTime,
}

impl Mapping {
    /// The built-in mapping.
    ///
    /// # Errors
    /// [`MappingError`], if the built-in file breaks a rule.
    pub fn built_in() -> Result<Self, MappingError> {
        Self::from_toml(BUILT_IN, "mapping.toml (built in)")
    }

    /// Reads the mapping from `file`, else from `mapping.toml` beside the running program, else returns the built-in mapping.
    ///
    /// # Errors
    /// [`MappingError`], if the file cannot be read or breaks a rule. The operator's fault.
    pub fn load(file: Option<PathBuf>) -> Result<Self, MappingError> {
        let beside = || {
            let file = std::env::current_exe().ok()?.parent()?.join("mapping.toml");
            file.is_file().then_some(file)
        };
        let Some(file) = file.or_else(beside) else { return Self::built_in() };
        let name = file.display().to_string();
        match std::fs::read_to_string(&file) {
            Ok(text) => Self::from_toml(&text, &name),
            Err(error) => Err(MappingError::unreadable(&name, &error)),
        }
    }

    /// The table that the rows go to.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// The columns of a row, in order.
    pub fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// The same mapping with the table in `schema`, unless it already names a schema.
    pub fn in_schema(mut self, schema: String) -> Self {
        self.table.schema.get_or_insert(schema);
        self
    }

    /// The envelope around the messages.
    pub fn unwrap(&self) -> Option<Unwrap> {
        self.unwrap
    }

    /// How many days after its [`day`](Self::day) a row is deleted. `None`: never.
    pub fn retention_days(&self) -> Option<u32> {
        self.retention_days
    }

    /// The masked columns, each with its field.
    pub fn masked(&self) -> impl Iterator<Item = (&Column, &Field)> {
        self.columns.iter().filter_map(|column| match &column.source {
            Source::Field(field) if field.masked.is_some() => Some((column, field)),
            _ => None,
        })
    }

    /// The masked columns whose values can be recovered and re-masked under another key.
    pub fn recoverable(&self) -> impl Iterator<Item = (&Column, &Field)> {
        self.masked().filter(|(_, field)| field.masked == Some(Mask::Recoverable))
    }

    /// The kinds of mask that the mapping needs.
    pub fn masks(&self) -> impl Iterator<Item = Mask> {
        self.masked().filter_map(|(_, field)| field.masked)
    }

    /// The masked column of the field with this path.
    pub fn masked_field(&self, path: &str) -> Option<(&Column, &Field)> {
        self.masked().find(|(_, field)| &*field.path == path)
    }

    /// The fields of the body, in the order of their columns.
    pub fn fields(&self) -> impl Iterator<Item = &Field> {
        self.columns.iter().filter_map(|column| match &column.source {
            Source::Field(field) => Some(field),
            Source::Envelope(_) => None,
        })
    }

    /// The column that identifies the subject, the person a row is about.
    pub fn subject(&self) -> Option<&Column> {
        self.columns.iter().find(|column| column.subject)
    }

    /// The column with a row's day: the first date column not filled from the body, else the first date column.
    pub fn day(&self) -> Option<&Column> {
        let dates = || self.columns.iter().filter(|column| column.column_type == ColumnType::Date);
        dates().find(|column| matches!(column.source, Source::Envelope(_))).or_else(|| dates().next())
    }

    /// Makes the row of a message. Rows made in one `buffer` share its memory.
    ///
    /// # Errors
    /// [`Invalid`], the message's fault: the first broken rule, in the order of the columns.
    pub fn row(
        &self,
        body: &str,
        envelope: &Envelope<'_>,
        keyring: &Keyring,
        buffer: &mut BytesMut,
    ) -> Result<Row, Invalid> {
        let unwrapped;
        let message = match self.unwrap {
            None => body,
            Some(Unwrap::Sns) => {
                unwrapped = shape::sns_message(body).ok_or(Invalid::NotWrapped)?;
                &*unwrapped
            }
        };
        let values = self.fields.values(message)?;
        self.write(&values, envelope, keyring, buffer).map_err(|(column, fault)| column.invalid(fault, message))
    }

    /// Makes the row of a message from its undecoded body: `json` is a JSON string literal with its quotes, as in the event.
    ///
    /// # Errors
    /// As [`row`](Self::row).
    #[inline(never)] // A frame of its own in profiles.
    pub fn row_of_json_string(
        &self,
        json: &str,
        envelope: &Envelope<'_>,
        keyring: &Keyring,
        buffer: &mut BytesMut,
    ) -> Result<Row, Invalid> {
        // The common case. For anything else, the parser below finds the reason for the refusal.
        if self.unwrap.is_none()
            && let Some(values) = self.fields.scanned(json)
            && let Ok(row) = self.write(&values, envelope, keyring, buffer)
        {
            return Ok(row);
        }
        let body: String = serde_json::from_str(json).map_err(|_| Invalid::NotJson(None))?;
        self.row(&body, envelope, keyring, buffer)
    }

    fn write(
        &self,
        values: &[Value<'_>],
        envelope: &Envelope<'_>,
        keyring: &Keyring,
        buffer: &mut BytesMut,
    ) -> Result<Row, (&Column, Fault)> {
        buffer.clear();
        for column in &self.columns {
            let written = match &column.source {
                Source::Field(field) => column.write_field(field, &values[field.slot], keyring, buffer),
                Source::Envelope(attribute) => column.write_attribute(*attribute, envelope, buffer),
            };
            written.map_err(|fault| (column, fault))?;
        }
        Ok(Row::new(buffer.split()))
    }
}

impl Column {
    #[cold]
    fn invalid(&self, fault: Fault, message: &str) -> Invalid {
        let field = match &self.source {
            Source::Field(field) => Arc::clone(&field.path),
            Source::Envelope(attribute) => attribute.name().into(),
        };
        let shape = if fault == Fault::Missing { shape::of_object(message) } else { None };
        Invalid::Field { field, fault, shape }
    }
}

impl Field {
    /// Normalizes a value of this field, so that equal values have equal masks.
    ///
    /// # Errors
    /// [`Fault::NotAnAddress`], if the field is `strict` and the value is not an IP address.
    pub fn normalized<'a>(&self, value: &'a str) -> Result<Cow<'a, str>, Fault> {
        convert::normalized(value.into(), &self.normalize, self.strict)
    }
}

impl Table {
    /// Its name as in the mapping, unquoted.
    pub fn plain(&self) -> String {
        self.schema.iter().chain([&self.name]).map(String::as_str).collect::<Vec<_>>().join(".")
    }
}

impl Table {
    /// The name of an object that belongs to the table, such as an index, in the table's schema. PostgreSQL would truncate a long
    /// name, so a digest replaces its end.
    pub fn beside(&self, suffix: &str) -> Self {
        const MAX: usize = 63;
        let mut name = format!("{}_{suffix}", self.name);
        if name.len() > MAX {
            let digest = hex::encode(&Sha256::digest(&name)[..4]);
            let end = (0..=MAX - 9).rev().find(|end| name.is_char_boundary(*end)).unwrap_or_default();
            name = format!("{}_{digest}", &name[..end]);
        }
        Self { schema: self.schema.clone(), name }
    }
}

impl fmt::Display for Table {
    /// Writes the name as a quoted SQL identifier.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(schema) = &self.schema {
            write!(f, "{}.", quoted(schema))?;
        }
        f.write_str(&quoted(&self.name))
    }
}

/// Quotes a name as an SQL identifier. Safe for any text.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests;
