//! Shows, checks and tries a mapping, and prints its SQL. None of it needs a database or a queue.

mod privacy;

use std::{fs, io::Read, path::Path, time::SystemTime};

use bytes::BytesMut;
use jiff::{Timestamp, civil, civil::date};
use login_etl::{
    event,
    keyring::{Keyring, MASKED_MAX, Mask},
    mapping::{
        Attribute, Column, ColumnType, Convert, Envelope, Field, Invalid, Mapping, Row, Source, Table, Unwrap, quoted,
    },
};
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio_postgres::types::{FromSql, Type};

use crate::{
    cli,
    migrate::sql_type,
    output::{BAD, Failure, GOOD, Reply, count, failed, printable, table},
};

/// The keyring of `try` without `--keyring`. Its keys are made up.
const MADE_UP: &str = r#"{"active": "made-up", "one_way": "made-up-hmac", "keys": {
    "made-up": {"cipher": "aes-siv", "key": "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"},
    "made-up-hmac": {"cipher": "hmac-sha256", "key": "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"}}}"#;
const NO_ID: &str = "00000000-0000-0000-0000-000000000000";

pub fn run(mapping: Option<&Path>, command: &cli::MappingCommand) -> Result<Reply, Failure> {
    let load = |file: Option<&Path>| Mapping::load(file.map(Path::to_owned)).map_err(|error| failed(error.to_string()));
    match command {
        cli::MappingCommand::Show => Ok(show(&load(mapping)?)),
        cli::MappingCommand::Check { file } => Ok(check(file.as_deref().or(mapping))),
        cli::MappingCommand::Ddl => {
            let text = ddl(&load(mapping)?);
            Ok(Reply::new(text.clone(), json!({"sql": text})))
        }
        cli::MappingCommand::Try { file, keyring } => try_messages(&load(mapping)?, file, keyring.as_deref()),
    }
}

fn show(mapping: &Mapping) -> Reply {
    let rows: Vec<_> = mapping
        .columns()
        .iter()
        .map(|column| {
            let (from, keep) = match &column.source {
                Source::Field(field) => (field.path.to_string(), kept(field)),
                Source::Envelope(attribute) => (format!("({})", attribute.name()), ""),
            };
            [column.name.clone(), sql_type(column), from, keep.to_owned(), refused(column)]
        })
        .collect();
    let json: Vec<_> = rows
        .iter()
        .map(|row| json!({"column": row[0], "type": row[1], "from": row[2], "keep": row[3], "refused": row[4]}))
        .collect();
    let text = table(&["column", "type", "from", "kept", "refused"], rows.into_iter().map(Vec::from));
    let table = mapping.table().plain();
    Reply::new(format!("{table}\n{text}"), json!({"table": table, "columns": json}))
}

/// How a field is kept, in the mapping's words.
fn kept(field: &Field) -> &'static str {
    match field.masked {
        None => "plain",
        Some(Mask::Recoverable) => "masked",
        Some(Mask::OneWay) => "one-way",
    }
}

/// The reasons for which this column lets a message be refused.
fn refused(column: &Column) -> String {
    let field = match &column.source {
        Source::Field(field) => field,
        Source::Envelope(Attribute::SentDate | Attribute::SentTime | Attribute::Queue) if !column.optional => {
            return "not known".to_owned();
        }
        Source::Envelope(_) => return String::new(),
    };
    let mut refused = vec![if column.optional { "given twice" } else { "missing, given twice" }.to_owned()];
    refused.push(match (column.column_type, field.convert) {
        (_, Some(convert)) => format!("not {}", convert.takes()),
        (ColumnType::Text, None) => "not a string".to_owned(),
        (ColumnType::Integer | ColumnType::Bigint, None) => "not an integer".to_owned(),
        (ColumnType::DoublePrecision, None) => "not a number".to_owned(),
        (ColumnType::Boolean, None) => "not true or false".to_owned(),
        (ColumnType::Date, None) => "not YYYY-MM-DD".to_owned(),
        (ColumnType::Timestamptz, None) => "not RFC 3339".to_owned(),
        (ColumnType::Uuid, None) => "not a UUID".to_owned(),
        (ColumnType::Jsonb, None) => "with a NUL character".to_owned(),
    });
    if column.column_type == ColumnType::Text {
        refused.push(if column.optional { "with a NUL character" } else { "empty, with a NUL character" }.to_owned());
        match column.max_length {
            _ if field.masked.is_some() => refused.push(format!("a mask of over {MASKED_MAX} characters")),
            Some(max) => refused.push(format!("over {max} characters")),
            None => {}
        }
    }
    if field.strict {
        refused.push("not an IP address".to_owned());
    }
    refused.join(", ")
}

fn check(file: Option<&Path>) -> Reply {
    let mapping = match Mapping::load(file.map(Path::to_owned)) {
        Ok(mapping) => mapping,
        Err(error) => {
            let (line, column) = error.position.unzip();
            let json =
                json!({"valid": false, "file": error.file, "line": line, "column": column, "error": error.message});
            return Reply { no: true, ..Reply::new(format!("{BAD}Not valid:{BAD:#} {error}\n"), json) };
        }
    };
    let (columns, masked) = (mapping.columns().len(), mapping.masked().count());
    let name = mapping.table().plain();
    let whose = file.map_or("the built-in mapping".to_owned(), |file| file.display().to_string());
    let columns_of = count(columns as i128, "column");
    let text = format!("{GOOD}Valid:{GOOD:#} {whose}: {columns_of} of {name}, {masked} of them masked\n");
    Reply::new(text, json!({"valid": true, "table": name, "columns": columns, "masked": masked}))
}

/// The SQL of the table, the index and the view of duplicates of each masked column, and the grants. It can be run repeatedly.
pub fn ddl(mapping: &Mapping) -> String {
    let table = mapping.table();
    let width = mapping.columns().iter().map(|column| quoted(&column.name).len()).max().unwrap_or_default();
    let columns: Vec<_> = mapping
        .columns()
        .iter()
        .map(|column| format!("    {:width$} {}", quoted(&column.name), sql_type(column)))
        .collect();
    let masked: Vec<_> = mapping.masked().map(|(column, _)| column).collect();
    let recoverable: Vec<_> = mapping.recoverable().map(|(column, _)| column).collect();

    let mut text = format!(
        "-- The table {}, as `etlctl mapping ddl` prints it; `etlctl migrate` makes the roles before it.\n",
        table.plain()
    );
    if let Some(schema) = &table.schema {
        let schema = quoted(schema);
        text += &format!(
            "create schema if not exists {schema};\ngrant usage on schema {schema} to login_etl, login_etl_operator, login_etl_privacy;\n"
        );
    }
    text += &format!("create table if not exists {table} (\n{}\n);\n", columns.join(",\n"));
    text += &format!("grant insert on {table} to login_etl;\n{}", operator_grants(table, &recoverable));
    if !masked.is_empty() {
        text += "\n-- Equal values have equal masks: what finds the rows that share one.\n";
    }
    let subject = mapping.subject().map(|column| quoted(&column.name));
    let day = mapping.day().map(|column| quoted(&column.name));
    for column in masked {
        let masked = quoted(&column.name);
        let index = quoted(&table.beside(&format!("{}_idx", column.name)).name);
        let view = table.beside(&format!("{}_duplicates", column.name));
        let mut facts = vec![masked.clone(), "pg_catalog.count(*) as row_count".to_owned()];
        facts.extend(subject.iter().map(|subject| format!("pg_catalog.count(distinct {subject}) as subject_count")));
        facts.extend(day.iter().flat_map(|day| {
            [format!("pg_catalog.min({day}) as first_day"), format!("pg_catalog.max({day}) as last_day")]
        }));
        text += &format!(
            "create index if not exists {index} on {table} ({masked});\n\
             create or replace view {view} as\n\
             select {}\nfrom {table}\nwhere {masked} is not null\ngroup by {masked}\nhaving pg_catalog.count(*) > 1;\n\
             grant select on {view} to login_etl_operator;\n",
            facts.join(", ")
        );
    }
    text += &privacy::ddl(mapping);
    text
}

/// Grants operators to read rows and to remask, in each partition too, because remasking works on partitions.
fn operator_grants(table: &Table, recoverable: &[&Column]) -> String {
    if recoverable.is_empty() {
        return format!("grant select on {table} to login_etl_operator;\n");
    }
    let columns: Vec<_> = recoverable.iter().map(|column| quoted(&column.name)).collect();
    let block = format!(
        "
declare
    part regclass;
begin
    for part in
        with recursive tree (oid) as (
            select {}::regclass::oid
            union all
            select inhrelid from pg_inherits join tree on inhparent = tree.oid
        )
        select oid from tree
    loop
        execute pg_catalog.format('grant select, update ({}) on %s to login_etl_operator', part);
    end loop;
end
",
        literal(&table.to_string()),
        // Doubled, because `format` interprets percent signs.
        columns.join(", ").replace('\'', "''").replace('%', "%%"),
    );
    format!("do {};\n", dollar_quoted("grants", &block))
}

/// The text dollar-quoted, with a tag that does not occur in it.
fn dollar_quoted(tag: &str, text: &str) -> String {
    let tag = (1..)
        .map(|number| if number == 1 { format!("${tag}$") } else { format!("${tag}{number}$") })
        .find(|tag| !text.contains(tag.as_str()))
        .unwrap_or_default();
    format!("{tag}{text}{tag}")
}

/// The text as an SQL literal.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn try_messages(mapping: &Mapping, file: &Path, keyring: Option<&Path>) -> Result<Reply, Failure> {
    let keyring = match keyring {
        None => MADE_UP.to_owned(),
        Some(file) => read(file)?,
    };
    let keyring = Keyring::from_json(&keyring).and_then(|keyring| keyring.for_masks(mapping.masks()));
    let keyring = keyring.map_err(|error| failed(format!("the keyring {error}")))?;
    let (mut text, mut json, mut good) = (String::new(), Vec::new(), 0);
    let lines = read(file)?;
    // The file may be one event, like the samples, or one body. A body may have a field `Records`, too, but no message ids there.
    let is_event = |text: &str| {
        let messages = event::messages(text.as_bytes());
        messages.is_ok_and(|messages| messages.iter().all(|message| message.id().is_some()))
    };
    let is_one = is_event(&lines) || serde_json::from_str::<IgnoredAny>(&lines).is_ok();
    let lines: Vec<&str> = if is_one { vec![&lines] } else { lines.lines().collect() };
    for line in lines.into_iter().filter(|line| !line.trim().is_empty()) {
        let events = event::messages(line.as_bytes()).ok().filter(|_| is_event(line));
        let messages: Vec<_> = match &events {
            Some(messages) => messages
                .iter()
                .map(|message| {
                    let body = message.body().and_then(|json| serde_json::from_str::<String>(json).ok());
                    (body, message.id(), message.sent(), message.queue_name())
                })
                .collect(),
            None => vec![(Some(line.to_owned()), None, Some(SystemTime::now()), Some("queue"))],
        };
        for (body, id, sent, queue) in messages {
            let envelope = Envelope { message_id: id.unwrap_or(NO_ID), sent, queue, now: SystemTime::now() };
            let row = body.ok_or(Invalid::NoBody);
            let row = row.and_then(|body| mapping.row(&body, &envelope, &keyring, &mut BytesMut::new()));
            let number = json.len() + 1;
            match row {
                Ok(row) => {
                    good += 1;
                    let cells: Vec<_> = cells(mapping, &row).collect();
                    let shown = cells.iter().map(|(name, cell)| {
                        vec![format!("  {name}"), cell.as_deref().map_or("NULL".to_owned(), printable)]
                    });
                    text += &format!("{GOOD}{number}: a row{GOOD:#}\n{}", table(&["", ""], shown));
                    let row: serde_json::Map<_, _> =
                        cells.into_iter().map(|(name, cell)| (name.to_owned(), json!(cell))).collect();
                    json.push(json!({"row": row}));
                }
                Err(invalid) => {
                    text += &format!("{BAD}{number}: refused{BAD:#}  {invalid}\n");
                    json.push(json!({"refused": invalid.to_string()}));
                }
            }
        }
    }
    let (all, refused) = (json.len(), json.len() - good);
    if all == 0 {
        return Err(Failure::Usage("no message in the file: put a body or an SQS event on each line".to_owned()));
    }
    text += &format!(
        "\n{} would be rows of {}, {refused} refused\n",
        count(good as i128, "message"),
        mapping.table().plain()
    );
    Ok(Reply { no: refused > 0, ..Reply::new(text, Value::Array(json)) })
}

fn read(file: &Path) -> Result<String, Failure> {
    let mut text = String::new();
    let read = match file.as_os_str() == "-" {
        true => std::io::stdin().read_to_string(&mut text).map(|_| text),
        false => fs::read_to_string(file),
    };
    read.map_err(|error| failed(format!("cannot read {}: {error}", file.display())))
}

/// A row of a made-up message. `None` if the mapping refuses that message.
pub fn example_row(mapping: &Mapping, keyring: &Keyring) -> Option<Row> {
    let mut body = json!({});
    for column in mapping.columns() {
        let Source::Field(field) = &column.source else { continue };
        let mut place = &mut body;
        for name in field.path.split('.') {
            place = place.as_object_mut()?.entry(name).or_insert_with(|| json!({}));
        }
        *place = example(column, field);
    }
    let mut body = body.to_string();
    if mapping.unwrap() == Some(Unwrap::Sns) {
        body = json!({"Type": "Notification", "Message": body}).to_string();
    }
    let now = SystemTime::now();
    let envelope = Envelope { message_id: NO_ID, sent: Some(now), queue: Some("login-etl-doctor"), now };
    mapping.row(&body, &envelope, keyring, &mut BytesMut::new()).ok()
}

fn example(column: &Column, field: &Field) -> Value {
    let now = Timestamp::now();
    match (column.column_type, field.convert) {
        (_, Some(Convert::VersionDigits | Convert::VersionOrdered)) => json!("1.0"),
        (_, Some(Convert::FromNumber | Convert::EpochSeconds | Convert::EpochMillis)) => json!(1),
        (_, Some(Convert::FromText)) => json!("1"),
        // An address reserved for documentation, because the field may have to be an IP address.
        (ColumnType::Text, None) if field.masked.is_some() || field.strict => json!("192.0.2.1"),
        (ColumnType::Text, None) => json!("doctor".chars().take(column.max_length.unwrap_or(6)).collect::<String>()),
        (ColumnType::Integer | ColumnType::Bigint | ColumnType::DoublePrecision, None) => json!(1),
        (ColumnType::Boolean, None) => json!(true),
        (ColumnType::Date, None) => json!(now.strftime("%Y-%m-%d").to_string()),
        (ColumnType::Timestamptz, None) => json!(now.to_string()),
        (ColumnType::Uuid, None) => json!(NO_ID),
        (ColumnType::Jsonb, None) => json!({}),
    }
}

/// A row's cells as text, each with its column's name.
fn cells<'a>(mapping: &'a Mapping, row: &'a Row) -> impl Iterator<Item = (&'a str, Option<String>)> {
    mapping.columns().iter().zip(row.cells()).map(|(column, cell)| {
        (
            column.name.as_str(),
            cell.map(|cell| text(column.column_type, cell).unwrap_or("(cannot be shown)".to_owned())),
        )
    })
}

/// A value in PostgreSQL's binary format, as text.
fn text(column_type: ColumnType, cell: &[u8]) -> Option<String> {
    fn of<'a, T: FromSql<'a>>(sql_type: &Type, cell: &'a [u8]) -> Option<T> {
        T::from_sql(sql_type, cell).ok()
    }
    Some(match column_type {
        ColumnType::Text => of(&Type::TEXT, cell)?,
        ColumnType::Integer => of::<i32>(&Type::INT4, cell)?.to_string(),
        ColumnType::Bigint => of::<i64>(&Type::INT8, cell)?.to_string(),
        ColumnType::DoublePrecision => of::<f64>(&Type::FLOAT8, cell)?.to_string(),
        ColumnType::Boolean => of::<bool>(&Type::BOOL, cell)?.to_string(),
        ColumnType::Date => {
            const EPOCH: civil::Date = date(2000, 1, 1);
            let days = i32::from_be_bytes(cell.try_into().ok()?);
            EPOCH.checked_add(jiff::Span::new().try_days(days).ok()?).ok()?.to_string()
        }
        ColumnType::Timestamptz => Timestamp::try_from(of::<SystemTime>(&Type::TIMESTAMPTZ, cell)?).ok()?.to_string(),
        ColumnType::Uuid => {
            let digits = hex::encode(cell);
            [(0, 8), (8, 12), (12, 16), (16, 20), (20, 32)].map(|(from, to)| &digits[from..to]).join("-")
        }
        // A version byte comes before the text.
        ColumnType::Jsonb => String::from_utf8(cell.get(1..)?.to_vec()).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_shown_as_text() {
        let mapping = |column_type: &str| {
            let text = format!(
                "table = \"t\"\n[[column]]\nname = \"c\"\nfrom = \"f\"\nkeep = \"plain\"\ntype = \"{column_type}\""
            );
            Mapping::from_toml(&text, "m").unwrap()
        };
        let keyring = Keyring::from_json(MADE_UP).unwrap();
        for (column_type, value, shown) in [
            ("text", "\"é\"", "é"),
            ("integer", "-7", "-7"),
            ("bigint", "9000000000", "9000000000"),
            ("double precision", "0.5", "0.5"),
            ("boolean", "true", "true"),
            ("date", "\"1999-02-28\"", "1999-02-28"),
            ("timestamptz", "\"2026-11-28T01:00:00+01:00\"", "2026-11-28T00:00:00Z"),
            ("uuid", "\"059F36B4-87A3-44AB-83D2-661975830A7D\"", "059f36b4-87a3-44ab-83d2-661975830a7d"),
            ("jsonb", "{\"a\": 1}", "{\"a\": 1}"),
        ] {
            let mapping = mapping(column_type);
            let envelope = Envelope { message_id: NO_ID, sent: None, queue: None, now: SystemTime::now() };
            let body = format!("{{\"f\": {value}}}");
            let row = mapping.row(&body, &envelope, &keyring, &mut BytesMut::new()).unwrap();
            assert_eq!(cells(&mapping, &row).next().unwrap().1.as_deref(), Some(shown));
        }
    }
}
