//! The declared mapping: which fields of a message become which columns, and which of them are masked.
//!
//! `file` reads `mapping.toml`, `body` finds the declared fields in a message, `convert` makes one spelling or one
//! number of a text, `row` writes a column in PostgreSQL's binary format, `invalid` has the reasons for refusal, and `shape` names a body that is something else.

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

/// The mapping that is built in: login messages into `user_logins`.
const BUILT_IN: &str = include_str!("../../mapping.toml");

/// Which fields of a message become which columns of a table. Only a valid file makes one.
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
    /// Its schema; without one, the search path decides.
    pub schema: Option<String>,
    /// Its name.
    pub name: String,
}

/// What the message is wrapped in.
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
    /// Most characters of a text; of a masked one, those of the mask.
    pub max_length: Option<usize>,
    /// Whether it is NULL where the message says nothing.
    pub optional: bool,
    /// Whether it names the person whom the row is about.
    pub subject: bool,
    /// Where its value comes from.
    pub source: Source,
}

/// Where a column's value comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A field of the message's body.
    Field(Field),
    /// Something about the message that is not in its body.
    Envelope(Attribute),
}

/// A field of the message's body.
#[derive(Clone, Debug)]
pub struct Field {
    /// Its path: names with dots between them. It also binds an `aes-siv` mask to its column.
    pub path: Arc<str>,
    /// How it is masked, if it is.
    pub masked: Option<Mask>,
    /// How its value becomes the column's.
    pub convert: Option<Convert>,
    /// How its text gets one spelling, in this order.
    pub normalize: Vec<Normalize>,
    /// Whether a text that is no IP address is refused, where addresses are normalized.
    pub strict: bool,
    /// Its index among the mapping's fields.
    slot: usize,
}

/// What can be stored of a message besides its body.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Attribute {
    /// The day (UTC) on which the function handles it.
    ProcessingDate,
    /// When the function handles it.
    ProcessingTime,
    /// The day (UTC) on which it was sent.
    SentDate,
    /// When it was sent.
    SentTime,
    /// SQS's id of it.
    MessageId,
    /// The name of its queue.
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

/// What is known of a message besides its body.
#[derive(Clone, Copy, Debug)]
pub struct Envelope<'a> {
    /// SQS's id of it.
    pub message_id: &'a str,
    /// When it was sent.
    pub sent: Option<SystemTime>,
    /// The name of its queue.
    pub queue: Option<&'a str>,
    /// When the function handles it.
    pub now: SystemTime,
}

impl Mapping {
    /// The mapping that is built in.
    ///
    /// # Errors
    /// [`MappingError`], if the file that was built in breaks a rule.
    pub fn built_in() -> Result<Self, MappingError> {
        Self::from_toml(BUILT_IN, "mapping.toml (built in)")
    }

    /// Reads the mapping of `file`; without one, of a `mapping.toml` beside the running program; without that, the one that
    /// is built in.
    ///
    /// # Errors
    /// [`MappingError`], when the file cannot be read or breaks a rule. The operator's fault.
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

    /// The columns that a row fills, in its order.
    pub fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// The same for a table in this schema, unless the mapping names one.
    pub fn in_schema(mut self, schema: String) -> Self {
        self.table.schema.get_or_insert(schema);
        self
    }

    /// What the messages are wrapped in.
    pub fn unwrap(&self) -> Option<Unwrap> {
        self.unwrap
    }

    /// After how many days rows are deleted, by their [`day`](Self::day). `None` keeps them.
    pub fn retention_days(&self) -> Option<u32> {
        self.retention_days
    }

    /// The columns that are masked, each with the field whose mask it has.
    pub fn masked(&self) -> impl Iterator<Item = (&Column, &Field)> {
        self.columns.iter().filter_map(|column| match &column.source {
            Source::Field(field) if field.masked.is_some() => Some((column, field)),
            _ => None,
        })
    }

    /// Those of them that an authorised person can recover, and bring under another key.
    pub fn recoverable(&self) -> impl Iterator<Item = (&Column, &Field)> {
        self.masked().filter(|(_, field)| field.masked == Some(Mask::Recoverable))
    }

    /// The ways of masking that it asks for.
    pub fn masks(&self) -> impl Iterator<Item = Mask> {
        self.masked().filter_map(|(_, field)| field.masked)
    }

    /// The masked column of the field with this path.
    pub fn masked_field(&self, path: &str) -> Option<(&Column, &Field)> {
        self.masked().find(|(_, field)| &*field.path == path)
    }

    /// The fields of the body, as the columns name them.
    pub fn fields(&self) -> impl Iterator<Item = &Field> {
        self.columns.iter().filter_map(|column| match &column.source {
            Source::Field(field) => Some(field),
            Source::Envelope(_) => None,
        })
    }

    /// The column that names the person whom a row is about.
    pub fn subject(&self) -> Option<&Column> {
        self.columns.iter().find(|column| column.subject)
    }

    /// The column that has a row's day: the first date that is not of the body, else the first date.
    pub fn day(&self) -> Option<&Column> {
        let dates = || self.columns.iter().filter(|column| column.column_type == ColumnType::Date);
        dates().find(|column| matches!(column.source, Source::Envelope(_))).or_else(|| dates().next())
    }

    /// The row of a message. Rows that are made in one `buffer` share its memory.
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

    /// The row of a message whose body is as it stands in the event: `json` is a string with its quotes.
    ///
    /// # Errors
    /// As [`row`](Self::row).
    #[inline(never)] // So that a profile tells it from what is done for a message besides.
    pub fn row_of_json_string(
        &self,
        json: &str,
        envelope: &Envelope<'_>,
        keyring: &Keyring,
        buffer: &mut BytesMut,
    ) -> Result<Row, Invalid> {
        // The usual case; what is wrong with any other, the parser says.
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
    /// The one spelling of a value of this field, so that equal values have equal masks.
    ///
    /// # Errors
    /// [`Fault::NotAnAddress`], where only addresses will do.
    pub fn normalized<'a>(&self, value: &'a str) -> Result<Cow<'a, str>, Fault> {
        convert::normalized(value.into(), &self.normalize, self.strict)
    }
}

impl Table {
    /// Its name as the mapping has it.
    pub fn plain(&self) -> String {
        self.schema.iter().chain([&self.name]).map(String::as_str).collect::<Vec<_>>().join(".")
    }
}

impl Table {
    /// The name of what belongs to the table, such as an index, in the table's schema. PostgreSQL would cut a long name; a digest
    /// of it takes the place of its end.
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
    /// As SQL has it, quoted.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(schema) = &self.schema {
            write!(f, "{}.", quoted(schema))?;
        }
        f.write_str(&quoted(&self.name))
    }
}

/// A name as SQL has it in every position, whatever is in it.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests;
