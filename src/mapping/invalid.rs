//! The reasons for refusing a message. Each text is static except for the field's name, so it never shows message content.

use std::sync::Arc;

use super::{ColumnType, Shape};

/// Why a message has no valid row. Always the message's fault. No variant holds message content.
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
    /// The mapping unwraps SNS notifications, and the body is not an SNS notification.
    #[error("body is not an SNS notification, which `unwrap = \"sns\"` expects")]
    NotWrapped,
    /// A field broke a rule.
    #[error("{field} {fault}{}", seems(*.shape))]
    Field {
        /// The field's path, or the name of the attribute.
        field: Arc<str>,
        /// The rule.
        fault: Fault,
        /// What the body seems to be, if that explains the fault.
        shape: Option<Shape>,
    },
}

fn seems(shape: Option<Shape>) -> String {
    shape.map(|shape| format!(": {shape}")).unwrap_or_default()
}

/// What is wrong with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Absent or null, and the column is not optional.
    #[error("is missing")]
    Missing,
    /// A parent on its path is a string, number, boolean or array.
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
    /// Given more than once, so its value would depend on the JSON reader.
    #[error("is given twice")]
    Twice,
    /// The empty string.
    #[error("is empty")]
    Empty,
    /// Longer than its column. For a masked field, the mask is too long.
    #[error("is too long")]
    TooLong,
    /// Has U+0000, which PostgreSQL's text cannot store.
    #[error("contains a NUL character")]
    Nul,
    /// Not a version: something other than digits separated by single dots.
    #[error("is not digits and dots")]
    NotAVersion,
    /// Out of the type's range.
    #[error("does not fit {}", article(*.0))]
    Overflow(ColumnType),
    /// Not an IP address, and the field is `strict`.
    #[error("is not an IP address")]
    NotAnAddress,
    /// Not a day like `2026-11-28`.
    #[error("is not a date (YYYY-MM-DD)")]
    NotADate,
    /// Not a time like `2026-11-28T12:00:00Z`.
    #[error("is not a time (RFC 3339)")]
    NotATime,
    /// Not a UUID.
    #[error("is not a UUID")]
    NotAUuid,
    /// JSON that PostgreSQL may refuse: half a surrogate pair, a number beyond a double, more than 127 levels.
    #[error("has a number, character or nesting that jsonb cannot store")]
    NotJsonb,
    /// Not a version of up to three parts, with minor and patch up to 999.
    #[error("is not major.minor.patch, with minor and patch up to 999")]
    NotAnOrderedVersion,
}

fn article(column_type: ColumnType) -> String {
    let article = if column_type == ColumnType::Integer { "an" } else { "a" };
    format!("{article} {}", column_type.name())
}
