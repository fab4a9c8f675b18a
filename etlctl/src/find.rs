//! `mask` and `find`: a value's masks, and the rows that have one of them.

use std::{borrow::Cow, collections::BTreeSet, io};

use jiff::civil::Date;
use login_etl::{
    keyring::{Keyring, Mask},
    mapping::{Column, ColumnType, Field, quoted},
};
use serde_json::{Value, json};
use tokio_postgres::types::{ToSql, Type};
use zeroize::Zeroizing;

use crate::{
    cli,
    output::{FAINT, Failure, Reply, count, failed, spinner, sql, table},
    settings::Settings,
};

pub async fn mask(settings: &Settings, options: &cli::Mask) -> Result<Reply, Failure> {
    let (_, field) = settings.masked_field(&options.field)?;
    let value = value(&options.value)?;
    let keyring = settings.keyring().await?;
    let masks = masks(&keyring, field, &value)?;
    let cipher = |id: &str| keyring.keys().find(|(key, _)| *key == id).map_or("", |(_, cipher)| cipher);
    let in_use = match field.masked {
        Some(Mask::OneWay) => keyring.one_way(),
        _ => Some(keyring.active()),
    };
    let is_active = |id: &str| Some(id) == in_use;
    let rows = masks.iter().map(|(id, masked)| {
        let active = if is_active(id) { "active" } else { "" };
        vec![key_name(id), cipher(id), active, masked.as_str()]
    });
    let text = table(&["key", "cipher", "", "mask"], rows);
    let json = masks
        .iter()
        .map(|(id, masked)| json!({"key": id, "cipher": cipher(id), "active": is_active(id), "mask": masked}));
    Ok(Reply::new(text, json.collect()))
}

/// A person, identified by a value. Their rows have one of `values` in `column`.
pub struct Person<'a> {
    pub column: &'a Column,
    pub field: &'a Field,
    /// The value as it was given, and normalized.
    pub spellings: Vec<Zeroizing<String>>,
    /// What to look for in the column: masks, or the spellings.
    pub values: Vec<String>,
}

impl<'a> Person<'a> {
    /// The person with a value in `field`: a masked field, or the mapping's subject if none is named. With `-` as `given`, the
    /// value is read from standard input.
    pub async fn new(settings: &'a Settings, field: Option<&str>, given: &str) -> Result<Self, Failure> {
        let (column, field) = settings.person_field(field)?;
        let given = value(given)?;
        if given.is_empty() {
            return Err(Failure::Usage("the value is empty".to_owned()));
        }
        // PostgreSQL would quote such a value in its log.
        if field.masked.is_none() && !fits(column.column_type, &given) {
            let column_type = column.column_type.name();
            return Err(failed(format!("the value is not of type {column_type}, so no row has it")));
        }
        let values = if field.masked.is_some() {
            let keyring = settings.keyring().await?;
            let masks = masks(&keyring, field, &given)?;
            // Rows written before values were normalized have the mask of the value as it was sent.
            let as_given = keyring.mask_under_all(field.masked.unwrap_or(Mask::Recoverable), &field.path, &given);
            let as_given = as_given.iter().map(|(_, masked)| masked.as_str().to_owned());
            masks.into_iter().map(|(_, masked)| masked).chain(as_given).collect()
        } else {
            BTreeSet::from([given.to_string(), normalized(field, &given)?.into_owned()])
        };
        let spelling = Zeroizing::new(normalized(field, &given)?.into_owned());
        Ok(Self { column, field, spellings: vec![given, spelling], values: values.into_iter().collect() })
    }

    /// The SQL condition for the person's rows; `$1` is [`values`](Self::values).
    pub fn condition(&self) -> String {
        format!("{} = any ($1::text[]::{}[])", quoted(&self.column.name), self.column.column_type.name())
    }
}

pub async fn find(settings: &Settings, options: &cli::Find) -> Result<Reply, Failure> {
    let (name, given) = match (&options.short, &options.field, &options.value) {
        (Some((field, value)), ..) | (None, Some(field), Some(value)) => (field, value),
        _ => return Err(Failure::Usage("give --field and --value".to_owned())),
    };
    settings.masked_field(name)?;
    rows(settings, &Person::new(settings, Some(name), given).await?, options.since, options.limit).await
}

/// The person's latest rows, and how many there are in all.
pub async fn rows(settings: &Settings, person: &Person<'_>, since: Option<Date>, limit: u32) -> Result<Reply, Failure> {
    let mapping = &settings.mapping;
    let since = since.map(|day| day.to_string());
    let day = mapping.day().map(|day| quoted(&day.name));
    if day.is_none() && since.is_some() {
        return Err(Failure::Usage("--since needs a date column, and the mapping has none".to_owned()));
    }
    let since_day = day.as_ref().map_or("true".to_owned(), |day| format!("{day} >= $2::text::date"));
    let matching =
        format!("from {} where {} and ($2::text is null or {since_day})", mapping.table(), person.condition());
    // Without a date column, rows are not sorted, and there is no first and last day.
    let day = day.unwrap_or("null::date".to_owned());
    let subject = mapping.subject().map_or("null".to_owned(), |subject| quoted(&subject.name));

    let connection = settings.database().await?;
    let _spinner = spinner("Looking for rows");
    let query =
        format!("select row_to_json(row)::text from (select * {matching} order by {day} desc nulls last limit $3) row");
    let limit = i64::from(limit);
    let parameters: [(&(dyn ToSql + Sync), Type); 3] =
        [(&person.values, Type::TEXT_ARRAY), (&since, Type::TEXT), (&limit, Type::INT8)];
    let rows = connection.client.query_typed(&query, &parameters).await.map_err(sql("look for rows"))?;
    let rows = rows.iter().map(|row| serde_json::from_str(row.get(0)));
    let rows: Vec<Value> =
        rows.collect::<Result<_, _>>().map_err(|_| failed("a row's jsonb is nested too deep to show"))?;
    let counted = format!("select count(*), count(distinct {subject}), min({day})::text, max({day})::text {matching}");
    let total = connection.client.query_typed(&counted, &parameters[..2]).await.map_err(sql("count rows"))?;
    let total = total.first().ok_or_else(|| failed("cannot count rows: no answer"))?;
    let (row_count, subject_count): (i64, i64) = (total.get(0), total.get(1));
    let days: (Option<String>, Option<String>) = (total.get(2), total.get(3));

    let mut text = if rows.is_empty() { "No row has this value.\n".to_owned() } else { row_table(&rows) };
    if row_count > 0 {
        let days = match &days {
            (Some(first), Some(last)) => format!(", {first} to {last}"),
            _ => String::new(),
        };
        let subjects =
            mapping.subject().map_or(String::new(), |subject| format!(", {subject_count} different {}", subject.name));
        text += &format!("\n{}{subjects}{days}\n", count(row_count, "row"));
    }
    if row_count > limit {
        text += &format!("{FAINT}The latest {limit} are shown; --limit shows more.{FAINT:#}\n");
    }
    let mut json = json!({"row_count": row_count, "subject_count": subject_count, "first_day": days.0, "last_day": days.1, "rows": rows});
    if person.field.masked.is_some() {
        json["masks"] = json!(person.values);
    }
    Ok(Reply::new(text, json))
}

/// Rows with the same columns, as a table.
fn row_table(rows: &[Value]) -> String {
    let fields = rows.first().and_then(Value::as_object);
    let names: Vec<&str> = fields.into_iter().flat_map(|fields| fields.keys()).map(String::as_str).collect();
    table(&names, rows.iter().map(|row| names.iter().map(|name| cell(&row[*name])).collect()))
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The key id and mask of a value, for each key of the keyring.
fn masks(keyring: &Keyring, field: &Field, given: &str) -> Result<Vec<(String, String)>, Failure> {
    let value = normalized(field, given)?;
    let way = field.masked.unwrap_or(Mask::Recoverable);
    let masks = keyring.mask_under_all(way, &field.path, &value);
    if masks.is_empty() && way == Mask::OneWay {
        return Err(failed("the keyring has no hmac-sha256 key, so no row has a one-way mask of it"));
    }
    if masks.is_empty() {
        return Err(failed("the value is too long to be masked, so no row has it"));
    }
    Ok(masks.into_iter().map(|(id, masked)| (id.to_owned(), masked.as_str().to_owned())).collect())
}

/// Whether PostgreSQL would accept a text as a value of a type.
fn fits(column_type: ColumnType, text: &str) -> bool {
    match column_type {
        ColumnType::Integer => text.parse::<i32>().is_ok(),
        ColumnType::Bigint => text.parse::<i64>().is_ok(),
        ColumnType::DoublePrecision => text.parse::<f64>().is_ok_and(f64::is_finite),
        ColumnType::Boolean => matches!(text, "true" | "false"),
        ColumnType::Date => text.parse::<Date>().is_ok(),
        ColumnType::Timestamptz => text.parse::<jiff::Timestamp>().is_ok(),
        ColumnType::Uuid => {
            let digits = text.replace('-', "");
            digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
        }
        ColumnType::Jsonb => serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok(),
        ColumnType::Text => !text.contains('\0'),
    }
}

fn normalized<'v>(field: &Field, given: &'v str) -> Result<Cow<'v, str>, Failure> {
    field.normalized(given).map_err(|fault| failed(format!("the value {fault}, so no row has it")))
}

/// The value given, or the first line of standard input.
fn value(given: &str) -> Result<Zeroizing<String>, Failure> {
    if given != "-" {
        return Ok(Zeroizing::new(given.to_owned()));
    }
    let mut line = Zeroizing::new(String::new());
    io::stdin().read_line(&mut line)?;
    Ok(Zeroizing::new(line.trim_end_matches(['\n', '\r']).to_owned()))
}

/// A key's id for display: the unnamed key's is empty.
pub fn key_name(id: &str) -> &str {
    if id.is_empty() { "(unnamed)" } else { id }
}
