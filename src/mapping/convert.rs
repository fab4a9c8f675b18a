//! Converts values to their column's type, and normalizes texts. Each conversion is strict: it refuses what it does not know.

use std::{borrow::Cow, net::IpAddr, time::SystemTime};

use serde::Deserialize;
use time::{Date, OffsetDateTime, format_description::well_known::Rfc3339};

use super::{ColumnType, Fault};

/// How a field's value is converted to its column's type.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Convert {
    /// Removes the dots of a version: `2.3.0` is 230. The exercise's rule; versions collide (`0.26` and `2.6`) and do not sort.
    VersionDigits,
    /// major · 10⁶ + minor · 10³ + patch: `2.3.0` is 2003000. Sorts like versions, and only equal versions are equal
    /// (`6.2`, `6.02` and `6.2.0` are). Refuses minor or patch over 999, and more than three parts.
    VersionOrdered,
    /// Whole seconds since 1970 to a time.
    EpochSeconds,
    /// Whole milliseconds since 1970 to a time.
    EpochMillis,
    /// A number to its text, as written in the body.
    FromNumber,
    /// A string that holds a number to that number.
    FromText,
}

impl Convert {
    /// The input that it accepts, in a few words.
    pub const fn takes(self) -> &'static str {
        match self {
            Self::VersionDigits => "digits and dots, within an integer",
            Self::VersionOrdered => "major.minor.patch, with minor and patch up to 999",
            Self::EpochSeconds | Self::EpochMillis => "an integer, within the years 1 to 9999",
            Self::FromNumber => "a number",
            Self::FromText => "a string with a number",
        }
    }
}

/// A step that normalizes a text.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Normalize {
    /// Gives an IP address its canonical spelling. Any other text is kept, or refused if the field is `strict`.
    Ip,
    /// Removes white space at both ends.
    Trim,
    /// Makes letters lower case.
    Lowercase,
}

/// Applies the steps in order.
pub(super) fn normalized<'a>(text: Cow<'a, str>, steps: &[Normalize], strict: bool) -> Result<Cow<'a, str>, Fault> {
    steps.iter().try_fold(text, |text, step| {
        Ok(match step {
            // IPv4 has only one spelling.
            Normalize::Ip if !strict && !text.contains(':') && text.trim().len() == text.len() => text,
            Normalize::Ip => match canonical_ip(&text) {
                Some(Cow::Owned(address)) => Cow::Owned(address),
                Some(Cow::Borrowed(_)) => text,
                None if strict => return Err(Fault::NotAnAddress),
                None => text,
            },
            Normalize::Trim => match text.trim() {
                trimmed if trimmed.len() == text.len() => text,
                trimmed => Cow::Owned(trimmed.to_owned()),
            },
            Normalize::Lowercase => match text.to_lowercase() {
                lower if lower == text => text,
                lower => Cow::Owned(lower),
            },
        })
    })
}

/// The canonical spelling of an address: no surrounding blanks, no zone, IPv4-mapped IPv6 as IPv4, and IPv6 in RFC 5952 form.
fn canonical_ip(text: &str) -> Option<Cow<'_, str>> {
    let bare = text.trim();
    let is_zone = |zone: &str| !zone.is_empty() && zone.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'%');
    let bare = match bare.split_once('%') {
        None => bare,
        Some((address, zone)) if is_zone(zone) => address,
        Some(_) => return None,
    };
    let address = bare.parse::<IpAddr>().ok()?;
    // Only IPv6 has zones, and IPv4 has only one spelling.
    if address.is_ipv4() {
        return match bare.len() {
            len if len == text.len() => Some(Cow::Borrowed(text)),
            _ if text.contains('%') => None,
            _ => Some(Cow::Owned(bare.to_owned())),
        };
    }
    Some(Cow::Owned(address.to_canonical().to_string()))
}

/// The integer of a version.
pub(super) fn version(text: &str, ordered: bool) -> Result<i32, Fault> {
    encode_version(text, ordered).ok_or_else(|| {
        let is_version = text.split('.').all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()));
        match (is_version, ordered) {
            (false, _) => Fault::NotAVersion,
            (true, false) => Fault::Overflow(ColumnType::Integer),
            (true, true) => Fault::NotAnOrderedVersion,
        }
    })
}

fn encode_version(version: &str, ordered: bool) -> Option<i32> {
    let digits = |text: &str, before: i32| {
        let digit = |number: i32, byte: u8| {
            number.checked_mul(10)?.checked_add(byte.is_ascii_digit().then(|| i32::from(byte - b'0'))?)
        };
        if text.is_empty() { None } else { text.bytes().try_fold(before, digit) }
    };
    let mut parts = version.split('.');
    if !ordered {
        return parts.try_fold(0, |before, part| digits(part, before));
    }
    let mut next = || parts.next().map_or(Some(0), |part| digits(part, 0));
    let (major, minor, patch) = (next()?, next()?, next()?);
    if parts.next().is_some() || minor > 999 || patch > 999 {
        return None;
    }
    major.checked_mul(1_000_000)?.checked_add(minor * 1_000 + patch)
}

/// Parses a JSON number as an integer that fits the type.
pub(super) fn integer(digits: &str, column_type: ColumnType) -> Result<i64, Fault> {
    if digits.contains(['.', 'e', 'E']) {
        return Err(Fault::NotAnInteger);
    }
    let number = digits.parse::<i64>().map_err(|_| Fault::Overflow(column_type))?;
    if column_type == ColumnType::Integer && i32::try_from(number).is_err() {
        return Err(Fault::Overflow(column_type));
    }
    Ok(number)
}

/// Parses a JSON number as the nearest double.
pub(super) fn double(digits: &str) -> Result<f64, Fault> {
    let number = digits.parse::<f64>().map_err(|_| Fault::NotANumber)?;
    if number.is_finite() { Ok(number) } else { Err(Fault::Overflow(ColumnType::DoublePrecision)) }
}

/// Whether a text is exactly a JSON number.
pub(super) fn is_number(text: &str) -> bool {
    text.starts_with(|first: char| first == '-' || first.is_ascii_digit())
        && serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
        && !text.ends_with(|last: char| last.is_ascii_whitespace())
}

/// PostgreSQL's epoch, 2000-01-01, in seconds since 1970.
const EPOCH_SECONDS: i64 = 946_684_800;
const SECONDS_A_DAY: i64 = 24 * 60 * 60;
const EPOCH_JULIAN_DAY: i32 = 2_451_545;
const MICROSECONDS: i64 = 1_000_000;
/// From 0001-01-01T00:00:00Z to 9999-12-31T23:59:59Z, the range that all date readers support.
const SECONDS: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;

/// The day (UTC) of a time, counted from 2000-01-01.
pub(super) fn day(time: SystemTime) -> i32 {
    i32::try_from(microseconds(time).div_euclid(SECONDS_A_DAY * MICROSECONDS)).unwrap_or(i32::MAX)
}

/// A time in microseconds, counted from 2000-01-01.
pub(super) fn microseconds(time: SystemTime) -> i64 {
    let since_1970 = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros();
    i64::try_from(since_1970).unwrap_or(i64::MAX) - EPOCH_SECONDS * MICROSECONDS
}

/// Parses a day like `2026-11-28`; counted from 2000-01-01.
pub(super) fn parsed_day(text: &str) -> Result<i32, Fault> {
    let part = |range: std::ops::Range<usize>| {
        let digits = text.get(range).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))?;
        digits.parse::<u16>().ok()
    };
    let date = || {
        if text.len() != 10 || text.as_bytes()[4] != b'-' || text.as_bytes()[7] != b'-' {
            return None;
        }
        let (year, month, day) = (part(0..4)?, part(5..7)?, part(8..10)?);
        let month = time::Month::try_from(u8::try_from(month).ok()?).ok()?;
        // PostgreSQL has no year 0.
        Date::from_calendar_date(year.into(), month, u8::try_from(day).ok()?).ok().filter(|date| date.year() > 0)
    };
    date().map(|date| date.to_julian_day() - EPOCH_JULIAN_DAY).ok_or(Fault::NotADate)
}

/// Parses an RFC 3339 time, in microseconds counted from 2000-01-01.
pub(super) fn parsed_time(text: &str) -> Result<i64, Fault> {
    // The library accepts any character between date and time.
    if !matches!(text.as_bytes().get(10), Some(b'T' | b't')) {
        return Err(Fault::NotATime);
    }
    let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| Fault::NotATime)?;
    if !SECONDS.contains(&time.unix_timestamp()) {
        return Err(Fault::Overflow(ColumnType::Timestamptz));
    }
    let microseconds = time.unix_timestamp_nanos().div_euclid(1_000) - i128::from(EPOCH_SECONDS * MICROSECONDS);
    i64::try_from(microseconds).map_err(|_| Fault::NotATime)
}

/// Converts a time since 1970, with `a_second` units a second, to microseconds counted from 2000-01-01.
pub(super) fn epoch(number: i64, a_second: i64) -> Result<i64, Fault> {
    if !SECONDS.contains(&number.div_euclid(a_second)) {
        return Err(Fault::Overflow(ColumnType::Timestamptz));
    }
    Ok(number * (MICROSECONDS / a_second) - EPOCH_SECONDS * MICROSECONDS)
}
