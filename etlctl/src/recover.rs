//! `recover`: from masks back to values. The audit record is committed before a value is shown.

use std::{
    fs::{File, OpenOptions},
    io::{self, IsTerminal, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use futures_util::TryStreamExt;
use login_etl::{
    keyring::Mask,
    mapping::{Field, Mapping},
};
use serde_json::{Value, json};
use tokio_postgres::Client;
use zeroize::Zeroizing;

use crate::{
    audit,
    cli::Recover,
    output::{Failure, Reply, WARNING, confirm, count, failed, json_text, printable, spinner, sql, sql_reason},
    settings::Settings,
};

/// The masks to recover.
enum Source<'a> {
    /// Masks of one field. Each becomes one line of output.
    Masks(&'a Field, Vec<String>),
    /// Rows under headings; some columns hold masks.
    Table { headings: csv::StringRecord, rows: Vec<csv::StringRecord>, masked: Vec<(usize, &'a Field)> },
}

pub async fn run(settings: &Settings, options: &Recover, as_json: bool) -> Result<Reply, Failure> {
    audit::check_reason(&options.reason)?;
    let mut connection = settings.database().await?;
    let (source, origin) = read(settings, options, &connection.client).await?;
    let masks = source.masks();
    if masks.is_empty() {
        return Err(Failure::Usage(format!("{origin}: nothing to recover")));
    }
    let one_by_hand = masks.len() == 1 && !options.masks.is_empty();
    if !one_by_hand {
        confirm(&format!("Recover {} ({origin})?", count(masks.len() as i128, "value")), options.yes)?;
    }
    // Created before the record is written, so that a failure here leaves no record.
    let mut output = options.output.as_deref().map(create).transpose()?;

    let keyring = settings.keyring().await;
    // Without a keyring, the attempt is recorded as recovering nothing.
    let recover = |(field, masked): &(&Field, &str)| keyring.as_ref().ok()?.recover(&field.path, masked).ok();
    let values: Vec<Option<Zeroizing<String>>> = masks.iter().map(recover).collect();
    let recovered: Vec<&str> =
        masks.iter().zip(&values).filter(|(_, value)| value.is_some()).map(|((_, masked), _)| *masked).collect();
    let lost = masks.len() - recovered.len();
    let record = audit::Record {
        action: "recover",
        reason: &options.reason,
        source: &origin,
        requested: masks.len(),
        recovered: recovered.len(),
        masks: &recovered,
    };
    let written = audit::write(&mut connection.client, settings, &record).await;
    let ready = written.and(keyring.map(drop));
    if let (Err(_), Some(path)) = (&ready, &options.output) {
        // This run created the file, and it is still empty.
        drop(std::fs::remove_file(path));
    }
    ready?;

    let shown = if as_json { source.json(&values) } else { Value::Null };
    let mut reply = Reply { no: lost > 0, ..Reply::default() };
    let text = if as_json { json_text(&shown) } else { source.text(&values)? };
    match &mut output {
        Some(file) => {
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            let path = options.output.as_deref().unwrap_or(Path::new("")).display().to_string();
            reply.text = format!("{} recovered into {}\n", count(recovered.len() as i128, "value"), printable(&path));
            reply.json = json!({"recovered": recovered.len(), "lost": lost, "output": path});
        }
        None => {
            // The senders of the messages chose the values.
            let to_terminal = io::stdout().is_terminal();
            let made_harmless = || Zeroizing::new(text.lines().map(|line| printable(line) + "\n").collect());
            reply.data = Some(if to_terminal { made_harmless() } else { text });
            reply.json = shown;
        }
    }
    if lost > 0 {
        let told = format!("{} cannot be recovered with this keyring", count(lost as i128, "value"));
        writeln!(anstream::stderr(), "{WARNING}{told}{WARNING:#}")?;
    }
    Ok(reply)
}

/// The source, and its name in the audit.
async fn read<'a>(settings: &'a Settings, options: &Recover, client: &Client) -> Result<(Source<'a>, String), Failure> {
    let mapping = &settings.mapping;
    let field = options.field.as_deref().map(|name| settings.masked_field(name)).transpose()?.map(|(_, field)| field);
    if let Some(field) = field.filter(|field| field.masked == Some(Mask::OneWay)) {
        return Err(failed(format!("the masks of {} are one-way: nobody can recover them", field.path)));
    }
    if let Some(query) = &options.query {
        let text = run_query(client, query).await?;
        return Ok((Source::table(mapping, &text, options.column.as_deref(), field)?, format!("query {query}")));
    }
    if let Some(path) = &options.csv {
        let source = Source::table(mapping, &read_file(path)?, options.column.as_deref(), field)?;
        return Ok((source, named(path)));
    }
    let field = field.ok_or_else(|| Failure::Usage("give --field".to_owned()))?;
    let Some(path) = &options.file else {
        return Ok((Source::Masks(field, options.masks.clone()), "arguments".to_owned()));
    };
    let text = String::from_utf8(read_file(path)?).map_err(|_| failed(format!("{} is not text", path.display())))?;
    let masks = text.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect();
    Ok((Source::Masks(field, masks), named(path)))
}

fn named(path: &Path) -> String {
    if path.as_os_str() == "-" { "standard input".to_owned() } else { format!("file {}", path.display()) }
}

fn read_file(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut text = Vec::new();
    let read = if path.as_os_str() == "-" {
        io::stdin().read_to_end(&mut text)
    } else {
        File::open(path).and_then(|mut file| file.read_to_end(&mut text))
    };
    read.map_err(|error| failed(format!("cannot read {}: {error}", path.display())))?;
    Ok(text)
}

/// The rows of one query, as CSV. The query cannot change anything: it runs within a `copy` statement, in a read-only
/// transaction.
async fn run_query(client: &Client, query: &str) -> Result<Vec<u8>, Failure> {
    let _spinner = spinner("Running the query");
    // The query finds tables as in the user's own sessions.
    client
        .batch_execute("begin read only; set local search_path to default")
        .await
        .map_err(sql("start a transaction"))?;
    let query = query.trim().trim_end_matches(';');
    let rows = async {
        let rows = client.copy_out(&format!("copy (\n{query}\n) to stdout with (format csv, header)")).await?;
        rows.map_ok(|part| part.to_vec()).try_concat().await
    };
    let rows = rows.await.map_err(|error| failed(format!("the query failed: {}", sql_reason(&error))))?;
    client.batch_execute("rollback").await.map_err(sql("end the transaction"))?;
    Ok(rows)
}

impl<'m> Source<'m> {
    fn table(
        mapping: &'m Mapping,
        text: &[u8],
        column: Option<&str>,
        field: Option<&'m Field>,
    ) -> Result<Self, Failure> {
        let not_csv = |error: csv::Error| match error.position() {
            // The error itself may quote the line.
            Some(position) => failed(format!("line {} is not CSV, or its number of fields differs", position.line())),
            None => failed("the input is not CSV"),
        };
        let mut reader = csv::Reader::from_reader(text);
        let headings = reader.headers().map_err(not_csv)?.clone();
        let position = |name: &str| headings.iter().position(|heading| heading == name);
        let masked = match (column, field) {
            (Some(column), Some(field)) => {
                vec![(position(column).ok_or_else(|| failed(format!("there is no column {column:?}")))?, field)]
            }
            _ => mapping
                .recoverable()
                .filter(|(_, masked)| field.is_none_or(|field| field.path == masked.path))
                .filter_map(|(column, field)| Some((position(&column.name)?, field)))
                .collect(),
        };
        if masked.is_empty() {
            let names: Vec<_> = mapping.recoverable().map(|(column, _)| column.name.as_str()).collect();
            let names = names.join(" or ");
            return Err(failed(format!("there is no column {names}: name it with --column and --field")));
        }
        let rows = reader.records().collect::<Result<_, _>>().map_err(not_csv)?;
        Ok(Self::Table { headings, rows, masked })
    }

    /// All masks, in order. Empty cells are nulls, and are left out.
    fn masks(&self) -> Vec<(&'m Field, &str)> {
        match self {
            Self::Masks(field, masks) => masks.iter().map(|masked| (*field, masked.as_str())).collect(),
            Self::Table { rows, masked, .. } => {
                let cells =
                    rows.iter().flat_map(|row| masked.iter().map(|(position, field)| (*field, &row[*position])));
                cells.filter(|(_, cell)| !cell.is_empty()).collect()
            }
        }
    }

    /// The headings and rows, with the recovered values in further columns.
    fn extended<'a>(
        headings: &'a csv::StringRecord,
        rows: &'a [csv::StringRecord],
        masked: &'a [(usize, &'m Field)],
        values: &'a [Option<Zeroizing<String>>],
    ) -> (Vec<String>, impl Iterator<Item = Vec<&'a str>>) {
        // A column of that name may be there already.
        let name = |field: &Field| match headings.iter().any(|heading| heading == &*field.path) {
            false => field.path.to_string(),
            true => format!("recovered_{}", field.path),
        };
        let headings = headings.iter().map(str::to_owned).chain(masked.iter().map(|(_, field)| name(field))).collect();
        let mut values = values.iter();
        let rows = rows.iter().map(move |row| {
            let recovered = masked.iter().map(|(position, _)| match &row[*position] {
                "" => "",
                _ => values.next().and_then(Option::as_ref).map_or("", |value| value.as_str()),
            });
            row.iter().chain(recovered.collect::<Vec<_>>()).collect()
        });
        (headings, rows)
    }

    /// One value per line, with line breaks escaped; for a table, CSV with the values in columns named after the fields.
    fn text(&self, values: &[Option<Zeroizing<String>>]) -> Result<Zeroizing<String>, Failure> {
        let Self::Table { headings, rows, masked } = self else {
            let values = values.iter().map(|value| value.as_ref().map_or("", |value| value.as_str()));
            return Ok(Zeroizing::new(values.map(|value| one_line(value) + "\n").collect()));
        };
        let (headings, rows) = Self::extended(headings, rows, masked, values);
        let mut writer = csv::Writer::from_writer(Vec::new());
        let mut write = |row: Vec<&str>| writer.write_record(row).map_err(|_| failed("a row cannot be written as CSV"));
        write(headings.iter().map(String::as_str).collect())?;
        for row in rows {
            write(row)?;
        }
        let text = writer.into_inner().map_err(|_| failed("the rows cannot be written as CSV"))?;
        String::from_utf8(text).map(Zeroizing::new).map_err(|_| failed("the rows are not text"))
    }

    fn json(&self, values: &[Option<Zeroizing<String>>]) -> Value {
        match self {
            Self::Masks(_, masks) => {
                let pairs = masks.iter().zip(values);
                pairs
                    .map(|(masked, value)| json!({"mask": masked, "value": value.as_ref().map(|value| value.as_str())}))
                    .collect()
            }
            Self::Table { headings, rows, masked } => {
                let (headings, rows) = Self::extended(headings, rows, masked, values);
                let object = |row: Vec<&str>| -> serde_json::Map<String, Value> {
                    headings.iter().zip(row).map(|(name, cell)| (name.clone(), json!(cell))).collect()
                };
                rows.map(object).collect()
            }
        }
    }
}

fn one_line(value: &str) -> String {
    value.replace('\n', r"\u{a}").replace('\r', r"\u{d}")
}

/// Creates a file that only its owner can read. Fails if the path exists.
pub fn create(path: &Path) -> Result<File, Failure> {
    let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    created.map_err(|error| failed(format!("cannot create {}: {error}", path.display())))
}
