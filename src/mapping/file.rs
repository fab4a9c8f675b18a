//! Reads `mapping.toml` and checks it as a whole. Masking is a security control, so nothing is guessed.

use std::{
    collections::{HashMap, HashSet},
    io,
    ops::Range,
    sync::Arc,
};

use serde::Deserialize;
use toml::Spanned;

use super::{Attribute, Column, ColumnType, Convert, Field, Mapping, Normalize, Source, Table, Unwrap, body::Fields};
use crate::keyring::{MASKED_MAX, Mask};

/// PostgreSQL's limit on a name, in bytes: <https://www.postgresql.org/docs/current/limits.html>.
const NAME_MAX: usize = 63;
/// The system columns that PostgreSQL adds to every table: <https://www.postgresql.org/docs/current/ddl-system-columns.html>.
const SYSTEM_COLUMNS: [&str; 6] = ["tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"];
/// PostgreSQL's limit on a `varchar`.
const LENGTH_MAX: usize = 10_485_760;
/// A hundred years.
const RETENTION_DAYS_MAX: u32 = 36_500;
/// PostgreSQL's limit on a table's columns.
const COLUMNS_MAX: usize = 1_600;

/// Why a mapping cannot be used. The operator's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}{}: {message}", position.map(|(line, column)| format!(", line {line}, column {column}")).unwrap_or_default())]
pub struct MappingError {
    /// The file's name.
    pub file: String,
    /// Line and column of the broken rule, from 1.
    pub position: Option<(usize, usize)>,
    /// What is wrong.
    pub message: String,
}

impl MappingError {
    pub(super) fn unreadable(file: &str, error: &io::Error) -> Self {
        Self { file: file.to_owned(), position: None, message: format!("cannot be read: {}", error.kind()) }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    table: Spanned<String>,
    unwrap: Option<Unwrap>,
    retention_days: Option<Spanned<u32>>,
    #[serde(default)]
    column: Vec<ColumnText>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ColumnText {
    name: Spanned<String>,
    from: Option<Spanned<String>>,
    value: Option<Spanned<Attribute>>,
    keep: Option<Spanned<Keep>>,
    #[serde(rename = "type")]
    column_type: Option<Spanned<ColumnType>>,
    max_length: Option<Spanned<usize>>,
    optional: Option<Spanned<bool>>,
    convert: Option<Spanned<Convert>>,
    normalize: Option<Spanned<Steps>>,
    strict: Option<Spanned<bool>>,
    also_plain: Option<Spanned<bool>>,
    subject: Option<Spanned<bool>>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum Keep {
    Plain,
    Masked,
    OneWay,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected \"ip\", \"trim\" or \"lowercase\", or a list of them")]
enum Steps {
    One(Normalize),
    Several(Vec<Normalize>),
}

/// A broken rule, and where.
struct Broken(Range<usize>, String);

fn broken<T>(span: Range<usize>, message: impl Into<String>) -> Result<T, Broken> {
    Err(Broken(span, message.into()))
}

impl Mapping {
    /// Parses a mapping from `text`. Errors name it `file`.
    ///
    /// # Errors
    /// [`MappingError`], for the first broken rule. The operator's fault.
    pub fn from_toml(text: &str, file: &str) -> Result<Self, MappingError> {
        let read = toml::from_str::<File>(text)
            .map_err(|error| {
                let message = match error.message() {
                    "invalid type: map, expected a sequence" => {
                        "each column begins with [[column]], in double brackets".to_owned()
                    }
                    message
                        if ["unwrap", "table", "retention_days"]
                            .iter()
                            .any(|key| message.starts_with(&format!("unknown field `{key}`"))) =>
                    {
                        "move this key to the top, before the first [[column]]".to_owned()
                    }
                    message => message.to_owned(),
                };
                Broken(error.span().unwrap_or_default(), message)
            })
            .and_then(validated);
        read.map_err(|Broken(span, message)| MappingError {
            file: file.to_owned(),
            position: Some(line_and_column(text, span.start)),
            message,
        })
    }
}

fn line_and_column(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line = before.rsplit('\n').next().unwrap_or_default();
    (before.matches('\n').count() + 1, line.chars().count() + 1)
}

fn validated(file: File) -> Result<Mapping, Broken> {
    let table = table(&file.table)?;
    if file.column.is_empty() {
        return broken(file.table.span(), "there is no [[column]]");
    }
    let mut subjects = file.column.iter().filter_map(|column| column.subject.as_ref()).filter(|given| *given.get_ref());
    if let (Some(_), Some(second)) = (subjects.next(), subjects.next()) {
        return broken(second.span(), "only one column can be the subject");
    }
    if file.column.len() > COLUMNS_MAX {
        return broken(file.table.span(), format!("there are more than {COLUMNS_MAX} columns"));
    }
    let mut fields = Fields::default();
    let mut columns = Vec::with_capacity(file.column.len());
    let mut names = HashSet::new();
    for text in &file.column {
        let column = column(text, &mut fields)?;
        if !names.insert(column.name.clone()) {
            return broken(text.name.span(), format!("the column {:?} is declared twice", column.name));
        }
        columns.push(column);
    }
    let retention_days = file.retention_days.as_ref().map(|days| *days.get_ref());
    let mapping = Mapping { table, unwrap: file.unwrap, retention_days, columns, fields };
    if let Some(days) = &file.retention_days {
        if !(1..=RETENTION_DAYS_MAX).contains(days.get_ref()) {
            return broken(days.span(), format!("`retention_days` must be from 1 to {RETENTION_DAYS_MAX}"));
        }
        if mapping.day().is_none() {
            return broken(days.span(), "`retention_days` needs a row's day, but there is no column of type \"date\"");
        }
    }
    keeps_masked_fields_masked(&mapping, &file.column)?;
    masks_a_field_in_one_way(&mapping, &file.column)?;
    Ok(mapping)
}

/// Tables shared by all mappings.
const RESERVED: [&str; 4] = ["etl_ledger", "etl_audit", "etl_maintenance", "login_etl_migrations"];

fn table(text: &Spanned<String>) -> Result<Table, Broken> {
    let parts: Vec<_> = text.get_ref().split('.').collect();
    let (schema, name) = match parts[..] {
        [name] => (None, name),
        [schema, name] => (Some(schema), name),
        _ => return broken(text.span(), "`table` must be \"name\" or \"schema.name\""),
    };
    for part in schema.iter().chain([&name]) {
        is_name(part).or_else(|fault| broken(text.span(), format!("a table name {fault}")))?;
    }
    if RESERVED.contains(&name) {
        return broken(text.span(), format!("{name} is one of login-etl's own tables; choose another name"));
    }
    Ok(Table { schema: schema.map(ToOwned::to_owned), name: name.to_owned() })
}

fn is_name(name: &str) -> Result<(), String> {
    if name.is_empty() {
        Err("must not be empty".to_owned())
    } else if name.len() > NAME_MAX {
        Err(format!("must have at most {NAME_MAX} bytes"))
    } else if name.contains(char::is_control) {
        Err("must not have control characters".to_owned())
    } else {
        Ok(())
    }
}

fn column(text: &ColumnText, fields: &mut Fields) -> Result<Column, Broken> {
    let name = text.name.get_ref().clone();
    is_name(&name).or_else(|fault| broken(text.name.span(), format!("a column name {fault}")))?;
    if SYSTEM_COLUMNS.contains(&&*name) {
        return broken(text.name.span(), "PostgreSQL reserves this name for a system column");
    }
    match (&text.from, &text.value) {
        (Some(from), None) => field_column(name, from, text, fields),
        (None, Some(value)) => attribute_column(name, value, text),
        (Some(_), Some(value)) => broken(value.span(), format!("the column {name:?} has both `from` and `value`")),
        (None, None) => broken(
            text.name.span(),
            format!("the column {name:?} has no source: set `from` (a field of the body) or `value` (an attribute)"),
        ),
    }
}

fn field_column(
    name: String,
    from: &Spanned<String>,
    text: &ColumnText,
    fields: &mut Fields,
) -> Result<Column, Broken> {
    let path = from.get_ref();
    if path.split('.').any(str::is_empty) {
        return broken(from.span(), "`from` must be a name, or names joined by single dots");
    }
    if path.starts_with("$.") || path.contains(['[', ']']) || path.split('.').any(|name| name.trim() != name) {
        return broken(
            from.span(),
            "`from` must be a name, or names joined by dots; elements of an array cannot be selected",
        );
    }
    let Some(keep) = &text.keep else {
        return broken(
            text.name.span(),
            format!("the column {name:?} has no `keep`: set \"plain\", \"masked\" or \"one-way\""),
        );
    };
    let way = match keep.get_ref() {
        Keep::Plain => None,
        Keep::Masked => Some(Mask::Recoverable),
        Keep::OneWay => Some(Mask::OneWay),
    };
    let masked = way.is_some();
    let column_type = match (&text.column_type, masked) {
        (None, true) => ColumnType::Text,
        (None, false) => return broken(text.name.span(), format!("the column {name:?} has no `type`")),
        (Some(given), _) => {
            let column_type = *given.get_ref();
            if masked && column_type != ColumnType::Text {
                return broken(given.span(), "the type of a masked column must be \"text\"");
            }
            column_type
        }
    };
    let convert = match &text.convert {
        None => None,
        Some(given) => {
            let convert = *given.get_ref();
            if !fits(convert, column_type) {
                return broken(given.span(), format!("this conversion does not produce {}", column_type.name()));
            }
            Some(convert)
        }
    };
    let strict = text.strict.as_ref().is_some_and(|strict| *strict.get_ref());
    let normalize = match &text.normalize {
        None => Vec::new(),
        Some(given) if column_type != ColumnType::Text => {
            return broken(given.span(), "only text and masked columns can have `normalize`");
        }
        Some(given) => match given.get_ref() {
            Steps::One(step) => vec![*step],
            Steps::Several(steps) => steps.clone(),
        },
    };
    if let Some(given) = &text.strict
        && !normalize.contains(&Normalize::Ip)
    {
        return broken(given.span(), "`strict` needs `normalize = \"ip\"`");
    }
    if let Some(given) = text.also_plain.as_ref().filter(|_| masked) {
        return broken(given.span(), "`also_plain` belongs on a plain column whose field another column masks");
    }
    let max_length = match &text.max_length {
        None if masked => Some(MASKED_MAX),
        None => None,
        Some(given) if masked => {
            return broken(
                given.span(),
                format!("remove `max_length`: a masked column always holds up to {MASKED_MAX} characters"),
            );
        }
        Some(given) if column_type != ColumnType::Text => {
            return broken(given.span(), "only a text column can have `max_length`");
        }
        Some(given) if !(1..=LENGTH_MAX).contains(given.get_ref()) => {
            return broken(given.span(), format!("`max_length` must be from 1 to {LENGTH_MAX}"));
        }
        Some(given) => Some(*given.get_ref()),
    };
    let as_json = match column_type {
        ColumnType::Text => convert == Some(Convert::FromNumber),
        ColumnType::Integer => {
            !matches!(convert, Some(Convert::VersionDigits | Convert::VersionOrdered | Convert::FromText))
        }
        ColumnType::Bigint | ColumnType::DoublePrecision => convert != Some(Convert::FromText),
        ColumnType::Timestamptz => convert.is_some(),
        ColumnType::Boolean | ColumnType::Jsonb => true,
        ColumnType::Date | ColumnType::Uuid => false,
    };
    let slot = fields.add(path, as_json);
    let field = Field { path: Arc::from(path.as_str()), masked: way, convert, normalize, strict, slot };
    let is_set = |given: &Option<Spanned<bool>>| given.as_ref().is_some_and(|given| *given.get_ref());
    let (optional, subject) = (is_set(&text.optional), is_set(&text.subject));
    Ok(Column { name, column_type, max_length, optional, subject, source: Source::Field(field) })
}

fn attribute_column(name: String, value: &Spanned<Attribute>, text: &ColumnText) -> Result<Column, Broken> {
    let attribute = *value.get_ref();
    let other = [
        text.keep.as_ref().map(|keep| ("keep", keep.span())),
        text.max_length.as_ref().map(|max| ("max_length", max.span())),
        text.convert.as_ref().map(|convert| ("convert", convert.span())),
        text.normalize.as_ref().map(|normalize| ("normalize", normalize.span())),
        text.strict.as_ref().map(|strict| ("strict", strict.span())),
        text.also_plain.as_ref().map(|also_plain| ("also_plain", also_plain.span())),
        text.subject.as_ref().map(|subject| ("subject", subject.span())),
    ];
    if let Some((key, span)) = other.into_iter().flatten().next() {
        return broken(span, format!("`{key}` needs a column with `from`"));
    }
    let possible: &[ColumnType] = match attribute {
        Attribute::ProcessingDate | Attribute::SentDate => &[ColumnType::Date],
        Attribute::ProcessingTime | Attribute::SentTime => &[ColumnType::Timestamptz],
        Attribute::MessageId => &[ColumnType::Uuid, ColumnType::Text],
        Attribute::Queue => &[ColumnType::Text],
    };
    let names = || possible.iter().map(|possible| format!("{:?}", possible.name())).collect::<Vec<_>>().join(" or ");
    let column_type = match &text.column_type {
        None => return broken(text.name.span(), format!("the column {name:?} has no `type`: set {}", names())),
        Some(given) => {
            let column_type = *given.get_ref();
            if !possible.contains(&column_type) {
                return broken(given.span(), format!("the type of {} must be {}", attribute.name(), names()));
            }
            column_type
        }
    };
    let optional = text.optional.as_ref().is_some_and(|optional| *optional.get_ref());
    Ok(Column { name, column_type, max_length: None, optional, subject: false, source: Source::Envelope(attribute) })
}

/// Whether a conversion produces values of a type.
fn fits(convert: Convert, column_type: ColumnType) -> bool {
    match convert {
        Convert::VersionDigits | Convert::VersionOrdered => column_type == ColumnType::Integer,
        Convert::EpochSeconds | Convert::EpochMillis => column_type == ColumnType::Timestamptz,
        Convert::FromNumber => column_type == ColumnType::Text,
        Convert::FromText => {
            matches!(column_type, ColumnType::Integer | ColumnType::Bigint | ColumnType::DoublePrecision)
        }
    }
}

/// Refuses a plain column that shows a masked field, a part of it, or an object around it, unless `also_plain = true`.
fn keeps_masked_fields_masked(mapping: &Mapping, texts: &[ColumnText]) -> Result<(), Broken> {
    let masked: Vec<_> = mapping.masked().map(|(_, field)| Arc::clone(&field.path)).collect();
    for (column, text) in mapping.columns.iter().zip(texts) {
        let Source::Field(field) = &column.source else { continue };
        let hidden = masked.iter().find(|masked| is_within(masked, &field.path) || is_within(&field.path, masked));
        match (hidden, &text.also_plain) {
            _ if field.masked.is_some() => {}
            (Some(masked), None) => {
                return broken(
                    text.name.span(),
                    format!(
                        "the column {:?} shows the field {masked:?}, which another column masks; `also_plain = true` allows it",
                        column.name
                    ),
                );
            }
            (Some(masked), Some(given)) if !given.get_ref() => {
                return broken(given.span(), format!("another column masks the field {masked:?}"));
            }
            (None, Some(given)) => return broken(given.span(), "no other column masks this field"),
            _ => {}
        }
    }
    Ok(())
}

/// Refuses columns that mask one field differently: equal values must have equal masks in every column.
fn masks_a_field_in_one_way(mapping: &Mapping, texts: &[ColumnText]) -> Result<(), Broken> {
    let mut ways = HashMap::new();
    for (column, text) in mapping.columns.iter().zip(texts) {
        let Source::Field(field) = &column.source else { continue };
        let way = (field.masked, field.convert, &field.normalize, field.strict);
        if field.masked.is_some() && ways.insert(&field.path, way).is_some_and(|other| other != way) {
            return broken(text.name.span(), format!("another column masks the field {:?} differently", field.path));
        }
    }
    Ok(())
}

/// Whether `path` is `other`, or below it.
fn is_within(path: &str, other: &str) -> bool {
    path.strip_prefix(other).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}
