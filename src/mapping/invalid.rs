//! Why a message is refused. The text is static but for the field's name, and never has any of the message's content.

use std::sync::Arc;

use super::{ColumnType, Shape};

/// Why a message makes no row. Always the message's fault; no variant holds any of its content.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// The event carried no body for the message.
    #[error("body is missing")]
    NoBody,
    /// The body does not parse as JSON.
    #[error("body is not JSON{}", seems(*.0))]
    NotJson(Option<Shape>),
    /// The body is JSON, but an array or a scalar.
    #[error("body is not a JSON object{}", seems(*.0))]
    NotAnObject(Option<Shape>),
    /// The mapping unwraps SNS notifications, and this is none.
    #[error("body is not an SNS notification, which `unwrap = \"sns\"` expects")]
    NotWrapped,
    /// A field broke a rule.
    #[error("{field} {fault}{}", seems(*.shape))]
    Field {
        /// The field's path, or the name of the attribute.
        field: Arc<str>,
        /// The rule.
        fault: Fault,
        /// What the body seems to be, where that explains the fault.
        shape: Option<Shape>,
    },
}

fn seems(shape: Option<Shape>) -> String {
    shape.map(|shape| format!(": {shape}")).unwrap_or_default()
}

/// What is wrong with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Absent, or null where null means nothing.
    #[error("is missing")]
    Missing,
    /// A part of its path is a text, a number, a boolean or a list.
    #[error("is not inside an object")]
    NoParent,
    /// A number, boolean, array or object.
    #[error("is not a string")]
    NotAString,
    /// A string, boolean, array or object.
    #[error("is not a number")]
    NotANumber,
    /// A number with a fraction or an exponent.
    #[error("is not an integer")]
    NotAnInteger,
    /// Neither true nor false.
    #[error("is not true or false")]
    NotABoolean,
    /// Given more than once, so that its value depends on the reader.
    #[error("is given twice")]
    Twice,
    /// The empty string.
    #[error("is empty")]
    Empty,
    /// Longer than its column, once masked where it is masked.
    #[error("is too long")]
    TooLong,
    /// Holds U+0000, which PostgreSQL's text cannot.
    #[error("contains a NUL character")]
    Nul,
    /// A version of other characters than digits and single dots between them.
    #[error("is not digits and dots")]
    NotAVersion,
    /// More than its type holds.
    #[error("does not fit {}", article(*.0))]
    Overflow(ColumnType),
    /// Not an IP address, where only that will do.
    #[error("is not an IP address")]
    NotAnAddress,
    /// Not a day as `2026-11-28`.
    #[error("is not a date (YYYY-MM-DD)")]
    NotADate,
    /// Not a moment as `2026-11-28T12:00:00Z`.
    #[error("is not a time (RFC 3339)")]
    NotATime,
    /// Not a UUID.
    #[error("is not a UUID")]
    NotAUuid,
    /// JSON that PostgreSQL might not take: half a surrogate pair, a number beyond a double, more than 127 levels.
    #[error("has a number, a character or a nesting that jsonb does not take")]
    NotJsonb,
    /// Not a version of three parts at most, the last two up to 999.
    #[error("is not major.minor.patch, the last two up to 999")]
    NotAnOrderedVersion,
}

fn article(column_type: ColumnType) -> String {
    let article = if column_type == ColumnType::Integer { "an" } else { "a" };
    format!("{article} {}", column_type.name())
}
