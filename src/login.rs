//! A message's body as a login: parsed, validated, and turned into the columns of `user_logins`.
//!
//! This module, the inserts in `store/` and `schema/` are all that know the fields of a login.
//! To load another kind of message, change these three.

use std::{borrow::Cow, error::Error, fmt, net::IpAddr, time::SystemTime};

use bytes::{BufMut, Bytes, BytesMut};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};

use crate::{mask::Keyring, scan::Reader};

/// Most characters of `user_id`, the width of its column.
const USER_ID_MAX: usize = 128;
/// Most characters of `device_type` and of `locale`, the width of their columns.
const SHORT_MAX: usize = 32;

/// How `app_version` becomes an integer (setting `APP_VERSION_ENCODING`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AppVersionEncoding {
    /// The dots go: `2.3.0` is 230. The original's rule; versions collide (`0.26` and `2.6`) and do not sort.
    #[default]
    Digits,
    /// major · 10⁶ + minor · 10³ + patch: `2.3.0` is 2003000. Sorts as versions do, and only equal ones are equal
    /// (`6.2`, `6.02` and `6.2.0` are). Minor and patch reach 999, and more than three parts are refused.
    Ordered,
}

impl AppVersionEncoding {
    /// The column's integer, or `None` when the version does not fit it or is not digits and dots.
    fn encode(self, version: &str) -> Option<i32> {
        let digits = |text: &str, before: i32| {
            let digit = |number: i32, byte: u8| {
                number.checked_mul(10)?.checked_add(byte.is_ascii_digit().then(|| i32::from(byte - b'0'))?)
            };
            if text.is_empty() { None } else { text.bytes().try_fold(before, digit) }
        };
        let mut parts = version.split('.');
        match self {
            Self::Digits => parts.try_fold(0, |before, part| digits(part, before)),
            Self::Ordered => {
                let mut next = || parts.next().map_or(Some(0), |part| digits(part, 0));
                let (major, minor, patch) = (next()?, next()?, next()?);
                if parts.next().is_some() || minor > 999 || patch > 999 {
                    return None;
                }
                major.checked_mul(1_000_000)?.checked_add(minor * 1_000 + patch)
            }
        }
    }
}

/// Why a body is not a login. Always the message's fault; no variant holds any of its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// The event carried no body for the message.
    #[error("body is missing")]
    NoBody,
    /// The body does not parse as JSON.
    #[error("body is not JSON")]
    NotJson,
    /// The body is JSON, but an array or a scalar.
    #[error("body is not a JSON object")]
    NotAnObject,
    /// A field broke a rule.
    #[error("{0} {1}")]
    Field(Field, Fault),
}

/// A field of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the wire's")]
pub enum Field {
    UserId,
    AppVersion,
    DeviceType,
    Ip,
    Locale,
    DeviceId,
}

impl Field {
    /// All of them, in the order in which they are checked.
    pub const ALL: [Self; 6] =
        [Self::UserId, Self::AppVersion, Self::DeviceType, Self::Ip, Self::Locale, Self::DeviceId];

    /// The field's name on the wire; for masked fields also what binds an `aes-siv` mask to its column.
    pub const fn name(self) -> &'static str {
        match self {
            Self::UserId => "user_id",
            Self::AppVersion => "app_version",
            Self::DeviceType => "device_type",
            Self::Ip => "ip",
            Self::Locale => "locale",
            Self::DeviceId => "device_id",
        }
    }
}

impl Field {
    /// The field of this name. A `match` because the compiler makes one comparison of it.
    const fn named(name: &str) -> Option<Self> {
        Some(match name.as_bytes() {
            b"user_id" => Self::UserId,
            b"app_version" => Self::AppVersion,
            b"device_type" => Self::DeviceType,
            b"ip" => Self::Ip,
            b"locale" => Self::Locale,
            b"device_id" => Self::DeviceId,
            _ => return None,
        })
    }
}

/// The fields that are masked, each with the column that has its mask.
pub const MASKED: [(Field, &str); 2] = [(Field::Ip, "masked_ip"), (Field::DeviceId, "masked_device_id")];

impl Field {
    /// The one spelling of a value of this field, so that equal values have equal masks.
    pub fn canonical(self, value: &str) -> Cow<'_, str> {
        match self {
            Self::Ip => canonical_ip(value),
            _ => Cow::Borrowed(value),
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is wrong with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Absent, or null where null means nothing.
    #[error("is missing")]
    Missing,
    /// A number, boolean, array or object.
    #[error("is not a string")]
    NotAString,
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
    /// An `app_version` of other characters than digits and single dots between them.
    #[error("is not digits and dots")]
    NotAVersion,
    /// An `app_version` beyond what its encoding fits into an `integer`.
    #[error("does not fit an integer")]
    Overflow,
}

/// A valid login, not yet masked. It never shows its content: `Debug` prints the type's name alone.
pub struct Login<'a> {
    user_id: Cow<'a, str>,
    app_version: i32,
    device_type: Cow<'a, str>,
    ip: Cow<'a, str>,
    locale: Option<Cow<'a, str>>,
    device_id: Cow<'a, str>,
}

impl fmt::Debug for Login<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login").finish_non_exhaustive()
    }
}

impl<'a> Login<'a> {
    /// Parses and validates a message's body.
    ///
    /// # Errors
    /// [`Invalid`], the message's fault: the first broken rule, in the order of [`Field`]'s variants.
    pub fn parse(body: &'a str, encoding: AppVersionEncoding) -> Result<Self, Invalid> {
        let body = serde_json::from_str(body).map_err(|error| {
            // The error itself may quote the body, so only its kind is kept.
            if error.is_data() { Invalid::NotAnObject } else { Invalid::NotJson }
        })?;
        Self::validate(body, encoding)
    }

    /// Parses and validates a body of the usual shape, as it stands in the event: `json` is a string with its quotes. `None` for
    /// any other.
    pub fn scan(json: &'a str, encoding: AppVersionEncoding) -> Option<Result<Self, Invalid>> {
        scanned(json).map(|body| Self::validate(body, encoding))
    }

    fn validate(Body(mut values): Body<'a>, encoding: AppVersionEncoding) -> Result<Self, Invalid> {
        let mut take = |field: Field| std::mem::take(&mut values[field as usize]);

        let user_id = required(take(Field::UserId), Field::UserId, USER_ID_MAX)?;
        let version = required(take(Field::AppVersion), Field::AppVersion, usize::MAX)?;
        let app_version = encoding.encode(&version).ok_or_else(|| {
            let shaped = version.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
            Invalid::Field(Field::AppVersion, if shaped { Fault::Overflow } else { Fault::NotAVersion })
        })?;
        let device_type = required(take(Field::DeviceType), Field::DeviceType, SHORT_MAX)?;
        let ip = required(take(Field::Ip), Field::Ip, usize::MAX)?;
        let locale = optional(take(Field::Locale), Field::Locale, SHORT_MAX)?;
        let device_id = required(take(Field::DeviceId), Field::DeviceId, usize::MAX)?;
        Ok(Self { user_id, app_version, device_type, ip, locale, device_id })
    }

    /// Masks the personal fields, which yields the row of a login that is processed on `day`. Rows that are made in one
    /// `buffer` share its memory.
    ///
    /// # Errors
    /// [`Invalid`], the message's fault: a value that would not fit its column once masked.
    pub fn mask(&self, keyring: &Keyring, day: Day, buffer: &mut BytesMut) -> Result<Row, Invalid> {
        buffer.clear();
        push(buffer, Some(self.user_id.as_bytes()));
        push(buffer, Some(self.device_type.as_bytes()));
        push_masked(buffer, keyring, Field::Ip, &self.ip)?;
        push_masked(buffer, keyring, Field::DeviceId, &self.device_id)?;
        push(buffer, self.locale.as_ref().map(|locale| locale.as_bytes()));
        push(buffer, Some(&self.app_version.to_be_bytes()));
        push(buffer, Some(&day.0.to_be_bytes()));
        Ok(Row(buffer.split().freeze()))
    }
}

impl Row {
    /// The row of the login that a message's body is. `json` is that as it stands in the event: a string with its quotes.
    ///
    /// # Errors
    /// [`Invalid`], as [`Login::parse`] and [`Login::mask`] have it.
    #[inline(never)] // So that a profile tells it from what is done for a message besides.
    pub fn of(
        json: &str,
        encoding: AppVersionEncoding,
        keyring: &Keyring,
        day: Day,
        buffer: &mut BytesMut,
    ) -> Result<Self, Invalid> {
        if let Some(login) = Login::scan(json, encoding) {
            return login?.mask(keyring, day, buffer);
        }
        let body: String = serde_json::from_str(json).map_err(|_| Invalid::NotJson)?;
        Login::parse(&body, encoding)?.mask(keyring, day, buffer)
    }
}

/// One spelling for each address; other text stays as it is, and so does IPv4, which has but one.
fn canonical_ip(text: &str) -> Cow<'_, str> {
    if !text.contains(':') {
        return Cow::Borrowed(text);
    }
    text.parse::<IpAddr>().map_or(Cow::Borrowed(text), |address| Cow::Owned(address.to_string()))
}

fn required(value: Value<'_>, field: Field, max: usize) -> Result<Cow<'_, str>, Invalid> {
    match optional(value, field, max)? {
        None => Err(Invalid::Field(field, Fault::Missing)),
        Some(text) if text.is_empty() => Err(Invalid::Field(field, Fault::Empty)),
        Some(text) => Ok(text),
    }
}

fn optional(value: Value<'_>, field: Field, max: usize) -> Result<Option<Cow<'_, str>>, Invalid> {
    let text = match value {
        Value::Absent => return Ok(None),
        Value::Text(text) => text,
        Value::NoText => return Err(Invalid::Field(field, Fault::NotAString)),
        Value::Twice => return Err(Invalid::Field(field, Fault::Twice)),
    };
    // Only an escape can stand for it, and text with escapes is not borrowed.
    let fault = if matches!(&text, Cow::Owned(text) if text.contains('\0')) {
        Fault::Nul
    } else if text.len() > max && text.chars().count() > max {
        // A character is one to four bytes, so most texts need no count.
        Fault::TooLong
    } else {
        return Ok(Some(text));
    };
    Err(Invalid::Field(field, fault))
}

/// The values of the known fields, by `Field as usize`.
struct Body<'a>([Value<'a>; Field::ALL.len()]);

#[derive(Default)]
enum Value<'a> {
    /// Or null.
    #[default]
    Absent,
    Text(Cow<'a, str>),
    NoText,
    Twice,
}

/// The values of a body, an object of strings without escapes and of nulls; `None` for any other.
fn scanned(json: &str) -> Option<Body<'_>> {
    let mut reader = Reader::in_string(json)?;
    let mut values: [Option<Value<'_>>; Field::ALL.len()] = Default::default();
    reader.object(|reader, name| {
        let value = match reader.peek()? {
            b'n' => reader.null().map(|()| Value::Absent),
            _ => reader.string().map(|text| Value::Text(Cow::Borrowed(text))),
        };
        match Field::named(name) {
            Some(field) => values[field as usize].replace(value?).is_none().then_some(()),
            None => value.map(drop),
        }
    })?;
    reader.is_at_end().then(|| Body(values.map(Option::unwrap_or_default)))
}

impl<'de: 'a, 'a> Deserialize<'de> for Body<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BodyVisitor;

        impl<'de> Visitor<'de> for BodyVisitor {
            type Value = Body<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut values: [Value<'de>; Field::ALL.len()] = Default::default();
                let mut given = [false; Field::ALL.len()];
                while let Some(Key(field)) = map.next_key()? {
                    let Some(field) = field else {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    };
                    let value = map.next_value()?;
                    let twice = std::mem::replace(&mut given[field as usize], true);
                    values[field as usize] = if twice { Value::Twice } else { value };
                }
                Ok(Body(values))
            }
        }

        deserializer.deserialize_map(BodyVisitor)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Value<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ValueVisitor;

        impl<'de> Visitor<'de> for ValueVisitor {
            type Value = Value<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("anything")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Value::Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Value::Text(Cow::Owned(text.to_owned())))
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Value::Absent)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
                Ok(Value::NoText)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
                Ok(Value::NoText)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
                Ok(Value::NoText)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
                Ok(Value::NoText)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
                IgnoredAny.visit_seq(seq).map(|_| Value::NoText)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                IgnoredAny.visit_map(map).map(|_| Value::NoText)
            }
        }

        deserializer.deserialize_any(ValueVisitor)
    }
}

/// An object's key: the field it names, if it is one of ours.
struct Key(Option<Field>);

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;

        impl Visitor<'_> for KeyVisitor {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E>(self, name: &str) -> Result<Key, E> {
                Ok(Key(Field::named(name)))
            }
        }

        deserializer.deserialize_str(KeyVisitor)
    }
}

/// A day of UTC, as PostgreSQL has it: counted from 2000-01-01.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Day(i32);

impl Day {
    /// The day that this moment is in.
    pub fn of(time: SystemTime) -> Self {
        const SECONDS: u64 = 24 * 60 * 60;
        const FROM_1970_TO_2000: i32 = 10_957;
        let since_1970 = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs() / SECONDS;
        Self(i32::try_from(since_1970).unwrap_or(i32::MAX) - FROM_1970_TO_2000)
    }
}

/// The columns that a row fills, in its order, and the types of their arrays, in which `store/insert.sql` takes them.
const COLUMNS: [Type; 7] = [
    Type::TEXT_ARRAY, // user_id
    Type::TEXT_ARRAY, // device_type
    Type::TEXT_ARRAY, // masked_ip
    Type::TEXT_ARRAY, // masked_device_id
    Type::TEXT_ARRAY, // locale
    Type::INT4_ARRAY, // app_version
    Type::DATE_ARRAY, // create_date
];
/// Bytes of a buffer that rows are made in, some four hundred of them, before the next piece of memory is taken.
pub const ROWS_CAPACITY: usize = 64 * 1024;

/// A row of `user_logins`, personal fields masked: its fields in PostgreSQL's binary format, each behind its length (a
/// big-endian `i32`, -1 for null), as `COPY` and arrays have them alike. `Debug` prints the type's name alone.
pub struct Row(Bytes);

fn push(row: &mut BytesMut, field: Option<&[u8]>) {
    row.extend_from_slice(&field.map_or(-1, |field| field.len() as i32).to_be_bytes());
    row.extend_from_slice(field.unwrap_or_default());
}

fn push_masked(row: &mut BytesMut, keyring: &Keyring, field: Field, value: &str) -> Result<(), Invalid> {
    push(row, Some(&[]));
    let start = row.len();
    keyring.mask_onto(row, field.name(), &field.canonical(value)).map_err(|_| Invalid::Field(field, Fault::TooLong))?;
    let len = (row.len() - start) as i32;
    row[start - 4..start].copy_from_slice(&len.to_be_bytes());
    Ok(())
}

impl Row {
    fn fields(&self) -> impl Iterator<Item = Cell<'_>> {
        let mut rest = &self.0[..];
        std::iter::from_fn(move || {
            let (len, fields) = rest.split_first_chunk()?;
            let field = usize::try_from(i32::from_be_bytes(*len)).ok().map(|len| fields.split_at(len));
            rest = field.map_or(fields, |(_, fields)| fields);
            Some(Cell(field.map(|(field, _)| field)))
        })
    }

    /// Adds the row to what `store/copy_rows.sql` reads.
    pub fn copy(&self, to: &mut impl BufMut) {
        to.put_i16(COLUMNS.len() as i16);
        to.put_slice(&self.0);
    }
}

impl fmt::Debug for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Row").finish_non_exhaustive()
    }
}

/// Rows turned on their side: one array a column.
pub struct Columns<'a>([Vec<Cell<'a>>; COLUMNS.len()]);

impl fmt::Debug for Columns<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Columns").finish_non_exhaustive()
    }
}

impl<'a> FromIterator<&'a Row> for Columns<'a> {
    fn from_iter<I: IntoIterator<Item = &'a Row>>(rows: I) -> Self {
        let rows = rows.into_iter();
        let mut columns = COLUMNS.map(|_| Vec::with_capacity(rows.size_hint().0));
        for row in rows {
            for (column, cell) in columns.iter_mut().zip(row.fields()) {
                column.push(cell);
            }
        }
        Self(columns)
    }
}

impl Columns<'_> {
    /// The arrays in the order of the statement's parameters, behind the ledger's two.
    pub fn parameters(&self) -> impl Iterator<Item = (&(dyn ToSql + Sync), Type)> {
        self.0.iter().map(|column| column as &(dyn ToSql + Sync)).zip(COLUMNS)
    }
}

/// A field that is in PostgreSQL's binary format already.
struct Cell<'a>(Option<&'a [u8]>);

impl fmt::Debug for Cell<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cell").finish_non_exhaustive()
    }
}

impl ToSql for Cell<'_> {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        let Some(field) = self.0 else { return Ok(IsNull::Yes) };
        out.extend_from_slice(field);
        Ok(IsNull::No)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"user_id":"u","app_version":"2.3.0","device_type":"ios","ip":"199.172.111.135","locale":null,"device_id":"593-47-5928"}"#;

    fn rejected(body: &str) -> Option<String> {
        let invalid = Login::parse(body, AppVersionEncoding::Digits).err();
        let json = serde_json::to_string(body).unwrap();
        if let Some(login) = Login::scan(&json, AppVersionEncoding::Digits) {
            assert_eq!(login.err(), invalid, "{body}");
        }
        invalid.map(|invalid| invalid.to_string())
    }

    /// The good body with one field's value replaced by `value` (JSON text), or the field gone.
    fn with(field: &str, value: Option<&str>) -> String {
        let mut body: serde_json::Map<String, serde_json::Value> = serde_json::from_str(GOOD).unwrap();
        body.remove(field);
        let rest = serde_json::to_string(&body).unwrap();
        match value {
            Some(value) => rest.replacen('{', &format!(r#"{{"{field}":{value},"#), 1),
            None => rest,
        }
    }

    #[test]
    fn each_broken_rule_has_its_own_reason() {
        assert_eq!(rejected(GOOD), None);
        for (body, reason) in [
            ("", "body is not JSON"),
            ("not json", "body is not JSON"),
            ("{", "body is not JSON"),
            (r#"{"user_id":"\ud800"}"#, "body is not JSON"),
            ("[]", "body is not a JSON object"),
            ("null", "body is not a JSON object"),
            ("\"text\"", "body is not a JSON object"),
            ("12", "body is not a JSON object"),
            (r#"{"foo": "oops_wrong_msg_type", "bar": "123"}"#, "user_id is missing"),
        ] {
            assert_eq!(rejected(body).as_deref(), Some(reason), "{body}");
        }
        let long = |count: usize| format!("\"{}\"", "é".repeat(count));
        for (field, value, reason) in [
            ("user_id", None, "is missing"),
            ("user_id", Some("null"), "is missing"),
            ("user_id", Some("\"\""), "is empty"),
            ("user_id", Some(r#""a\u0000b""#), "contains a NUL character"),
            ("user_id", Some(long(129).as_str()), "is too long"),
            ("app_version", None, "is missing"),
            ("app_version", Some("230"), "is not a string"),
            ("app_version", Some("\"\""), "is empty"),
            ("app_version", Some("\"2.3-beta\""), "is not digits and dots"),
            ("app_version", Some("\"2..3\""), "is not digits and dots"),
            ("app_version", Some("\".\""), "is not digits and dots"),
            ("app_version", Some("\"٢.٣\""), "is not digits and dots"),
            ("app_version", Some("\"+2\""), "is not digits and dots"),
            ("app_version", Some("\"2147483648\""), "does not fit an integer"),
            ("device_type", None, "is missing"),
            ("device_type", Some("[\"ios\"]"), "is not a string"),
            ("device_type", Some("\"\""), "is empty"),
            ("device_type", Some(long(33).as_str()), "is too long"),
            ("ip", None, "is missing"),
            ("ip", Some("{\"v4\":1}"), "is not a string"),
            ("ip", Some("\"\""), "is empty"),
            ("ip", Some(r#""\u0000""#), "contains a NUL character"),
            ("locale", Some("false"), "is not a string"),
            ("locale", Some("-1e4"), "is not a string"),
            ("locale", Some(long(33).as_str()), "is too long"),
            ("locale", Some(r#""\u0000""#), "contains a NUL character"),
            ("device_id", None, "is missing"),
            ("device_id", Some("1.5"), "is not a string"),
            ("device_id", Some("\"\""), "is empty"),
        ] {
            assert_eq!(rejected(&with(field, value)), Some(format!("{field} {reason}")), "{field}: {value:?}");
        }
        let twice = GOOD.replacen('{', r#"{"ip":"8.8.8.8","#, 1);
        assert_eq!(rejected(&twice).as_deref(), Some("ip is given twice"));
    }

    #[test]
    fn whatever_is_scanned_is_read_as_it_is_parsed() {
        let json = |body: &str| serde_json::to_string(body).unwrap();
        assert!(scanned(&json(GOOD)).is_some());
        // Each byte gone, or another one in its place.
        for place in 0..GOOD.len() {
            for put in ["", "\"", "\\", "{", "}", ",", ":", " ", "\n", "\0", "n", "0", "é"] {
                let body = format!("{}{put}{}", &GOOD[..place], &GOOD[place + 1..]);
                let json = json(&body);
                let Some(Body(values)) = scanned(&json) else { continue };
                let parsed: serde_json::Value = serde_json::from_str(&body).expect(&body);
                for field in Field::ALL {
                    let text = match &values[field as usize] {
                        Value::Text(text) => Some(&**text),
                        Value::Absent => None,
                        Value::NoText | Value::Twice => panic!("{body}"),
                    };
                    assert_eq!(text, parsed[field.name()].as_str(), "{body}");
                }
            }
        }
    }

    #[test]
    fn bodies_of_the_usual_shape_are_scanned() {
        let texts = [1, 15, 16, 17, 33].map(|len| format!("\"{}\"", "x".repeat(len)));
        let texts = texts.iter().map(String::as_str).chain(["null", "\"é🦀\"", "\"\""]);
        for text in texts {
            for body in [with("device_id", Some(text)), with("another", Some(text))] {
                for body in [body.clone(), body.replace(':', ": ").replace(',', " , ")] {
                    let json = serde_json::to_string(&body).unwrap();
                    assert!(Login::scan(&json, AppVersionEncoding::Digits).is_some(), "{body}");
                }
            }
        }
    }

    #[test]
    fn the_widest_and_the_odd_but_valid_pass() {
        let widest = |count: usize| format!("\"{}\"", "é".repeat(count));
        for (field, value) in [
            ("user_id", Some(widest(128).as_str())),
            ("device_type", Some(widest(32).as_str())),
            ("locale", Some(widest(32).as_str())),
            ("locale", Some("\"\"")),
            ("locale", None),
            ("app_version", Some("\"2147483647\"")),
            ("app_version", Some("\"0.26\"")),
            ("ip", Some("\"0.0.0.0\"")),
            ("ip", Some("\"not an address\"")),
            ("extra", Some("{\"deep\":[[[1]]]}")),
        ] {
            assert_eq!(rejected(&with(field, value)), None, "{field}: {value:?}");
        }
    }

    #[test]
    fn versions_become_integers_both_ways() {
        for (version, digits, ordered) in [
            ("2.3.0", Some(230), Some(2_003_000)),
            ("0.26", Some(26), Some(26_000)),
            ("2.6", Some(26), Some(2_006_000)),
            ("6.02", Some(602), Some(6_002_000)),
            ("7", Some(7), Some(7_000_000)),
            ("2147483647", Some(i32::MAX), None),
            ("2147.483.648", None, None),
            ("2147.483.647", Some(i32::MAX), Some(i32::MAX)),
            ("1.1000.0", Some(110_000), None),
            ("1.2.3.4", Some(1234), None),
            ("1.", None, None),
        ] {
            assert_eq!(AppVersionEncoding::Digits.encode(version), digits, "{version}");
            assert_eq!(AppVersionEncoding::Ordered.encode(version), ordered, "{version}");
        }
    }

    #[test]
    fn an_address_has_one_spelling() {
        assert_eq!(canonical_ip("2001:DB8:0:0::1"), "2001:db8::1");
        assert_eq!(canonical_ip("199.172.111.135"), "199.172.111.135");
        assert_eq!(canonical_ip("010.1.1.1"), "010.1.1.1");
    }

    #[test]
    fn debug_shows_no_content() {
        let login = Login::parse(GOOD, AppVersionEncoding::Digits).unwrap();
        assert_eq!(format!("{login:?}"), "Login { .. }");
    }
}
