//! The schema: what of it the database has, and the rest of it applied.

use login_etl::mapping::{Column, ColumnType, Mapping};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio_postgres::{Client, GenericClient};

use crate::{
    cli,
    output::{Failure, GOOD, Reply, WARNING, failed, spinner, sql, table},
    settings::Settings,
};

/// `schema/`, in order.
const MIGRATIONS: [(&str, &str); 6] = [
    ("001_user_logins", include_str!("../../schema/001_user_logins.sql")),
    ("002_ledger", include_str!("../../schema/002_ledger.sql")),
    ("003_duplicates", include_str!("../../schema/003_duplicates.sql")),
    ("004_role", include_str!("../../schema/004_role.sql")),
    ("005_audit", include_str!("../../schema/005_audit.sql")),
    ("006_open_transactions", include_str!("../../schema/006_open_transactions.sql")),
];

/// Held while migrating. The number is this tool's, made up.
const LOCK: i64 = 0x6c6f_6769_6e65_746c;

const RECORDS: &str = "
create table if not exists login_etl_migrations (
    name       text primary key,
    checksum   text not null,
    applied_at timestamptz not null default now(),
    applied_by text not null default session_user
)";

/// What became of one migration.
enum State {
    Applied,
    Pending,
    /// The file is not what was applied under its name.
    Changed,
}

pub async fn run(settings: &Settings, options: &cli::Migrate) -> Result<Reply, Failure> {
    let mut connection = settings.database().await?;
    if options.check {
        return check(&connection.client).await;
    }
    let client = &mut connection.client;
    let waiting = spinner("Waiting for another migration to end");
    client.query("select pg_advisory_lock($1)", &[&LOCK]).await.map_err(sql("lock the schema"))?;
    drop(waiting);
    client
        .batch_execute(&format!("set client_min_messages = warning; {RECORDS}"))
        .await
        .map_err(sql("record migrations"))?;
    let mut applied = Vec::new();
    for (name, text, state) in states(client).await? {
        match state {
            State::Applied => continue,
            State::Changed => return Err(failed(changed_text(name))),
            State::Pending => {}
        }
        let _spinner = spinner(format!("Applying {name}"));
        apply(client, name, text).await?;
        applied.push(name);
    }
    client
        .batch_execute("grant select on login_etl_migrations to login_etl_operator")
        .await
        .map_err(sql("grant rights"))?;
    let mut text = match applied.len() {
        0 => format!("{GOOD}The schema is up to date.{GOOD:#}\n"),
        _ => format!("{GOOD}Applied:{GOOD:#} {}\n", applied.join(", ")),
    };
    if applied.contains(&"004_role") {
        text += "If they are new: login_etl, the function's user, has no password yet (`\\password login_etl` in psql); and give\n\
                 those who operate the pipeline their rights (`grant login_etl_operator to NAME`).\n";
    }
    Ok(Reply::new(text, json!({ "applied": applied })))
}

async fn apply(client: &mut Client, name: &str, text: &str) -> Result<(), Failure> {
    let what = || format!("apply {name}");
    let transaction = client.transaction().await.map_err(sql(what()))?;
    transaction.batch_execute(text).await.map_err(sql(what()))?;
    if name == MIGRATIONS[0].0 {
        let mapping = Mapping::built_in().map_err(|error| failed(error.to_string()))?;
        // Another mapping's table is not this migration's.
        let misfits = match mapping.table().plain() == "user_logins" {
            true => misfits(&mapping, &transaction).await?,
            false => Vec::new(),
        };
        if !misfits.is_empty() {
            return Err(failed(format!("the table user_logins does not fit: {}", misfits.join("; "))));
        }
    }
    let record = "insert into login_etl_migrations (name, checksum) values ($1, $2)";
    transaction.execute(record, &[&name, &checksum(text)]).await.map_err(sql(what()))?;
    transaction.commit().await.map_err(sql(what()))
}

async fn check(client: &Client) -> Result<Reply, Failure> {
    let states = states(client).await?;
    let no = states.iter().any(|(_, _, state)| !matches!(state, State::Applied));
    let rows = states.iter().map(|(name, _, state)| match state {
        State::Applied => vec![*name, "applied"],
        State::Pending => vec![*name, "missing"],
        State::Changed => vec![*name, "applied, but the file has changed since"],
    });
    let rows: Vec<_> = rows.collect();
    let json = rows.iter().map(|row| json!({"name": row[0], "state": row[1]})).collect();
    let changed = states.iter().find(|(_, _, state)| matches!(state, State::Changed));
    let last = match no {
        true if changed.is_some() => {
            let name = changed.map_or("", |(name, ..)| name);
            format!("\n{WARNING}{}{WARNING:#}\n", changed_text(name))
        }
        true => format!("\n{WARNING}The schema is not up to date: run `etlctl migrate`.{WARNING:#}\n"),
        false => format!("\n{GOOD}The schema is up to date.{GOOD:#}\n"),
    };
    Ok(Reply { no, ..Reply::new(table(&["migration", "state"], rows) + &last, json) })
}

fn changed_text(name: &str) -> String {
    format!(
        "{name} was applied with another content than this etlctl has: use the etlctl of the version that is deployed, or \
         put the difference into a new file"
    )
}

/// How many migrations are not in the database as this tool has them.
pub async fn outstanding(client: &impl GenericClient) -> Result<Vec<&'static str>, Failure> {
    let states = states(client).await?;
    Ok(states.into_iter().filter(|(_, _, state)| !matches!(state, State::Applied)).map(|(name, ..)| name).collect())
}

async fn states(client: &impl GenericClient) -> Result<Vec<(&'static str, &'static str, State)>, Failure> {
    let there = client.query_one("select to_regclass('login_etl_migrations') is not null", &[]).await;
    let records = match there.map_err(sql("read the schema"))?.get(0) {
        true => client
            .query("select name, checksum from login_etl_migrations", &[])
            .await
            .map_err(sql("read the migrations"))?,
        false => Vec::new(),
    };
    let unknown = records.iter().map(|record| record.get::<_, String>("name"));
    let unknown: Vec<_> = unknown.filter(|name| !MIGRATIONS.iter().any(|(known, _)| known == name)).collect();
    if !unknown.is_empty() {
        let names = unknown.join(", ");
        return Err(failed(format!(
            "the database is ahead of this etlctl, which does not know {names}: use a newer one"
        )));
    }
    let states = MIGRATIONS.into_iter().map(|(name, text)| {
        let record = records.iter().find(|record| record.get::<_, &str>("name") == name);
        let state = match record.map(|record| record.get::<_, &str>("checksum") == checksum(text)) {
            None => State::Pending,
            Some(true) => State::Applied,
            Some(false) => State::Changed,
        };
        (name, text, state)
    });
    Ok(states.collect())
}

fn checksum(text: &str) -> String {
    hex::encode(Sha256::digest(text))
}

/// Where the table's columns would not take what the function writes, each with what to do.
pub async fn misfits(mapping: &Mapping, client: &impl GenericClient) -> Result<Vec<String>, Failure> {
    let query = "select attname::text, format_type(atttypid, atttypmod), attnotnull, attnotnull and not atthasdef and attidentity = '' \
                 from pg_attribute where attrelid = to_regclass($1) and attnum > 0 and not attisdropped";
    let table = mapping.table().to_string();
    let columns = client.query(query, &[&table]).await.map_err(sql("read the table's columns"))?;
    let found = |wanted: &str| columns.iter().find(|column| column.get::<_, &str>(0) == wanted);
    let mut misfits = Vec::new();
    for column in mapping.columns() {
        let (name, wanted) = (&column.name, sql_type(column));
        match found(name).map(|column| column.get::<_, &str>(1)) {
            None => misfits.push(format!("it has no column {name} {wanted}: add it")),
            Some(found) if fits(found, &wanted) => {}
            Some(found) => misfits.push(format!("its column {name} is {found}: make it {wanted} (without the views duplicate_*, which are to be made again after)")),
        }
    }
    for column in &columns {
        let (name, not_null, needs_value): (&str, bool, bool) = (column.get(0), column.get(2), column.get(3));
        match mapping.columns().iter().find(|column| column.name == name) {
            Some(column) if column.optional && not_null => {
                misfits.push(format!("its column {name} takes no null, which the function writes: drop that"));
            }
            None if needs_value => {
                misfits.push(format!("its column {name} takes no null, and is not written: give it a default"));
            }
            _ => {}
        }
    }
    Ok(misfits)
}

/// The type that a column should have, as SQL has it.
pub fn sql_type(column: &Column) -> String {
    match (column.column_type, column.max_length) {
        (ColumnType::Text, Some(max_length)) => format!("varchar({max_length})"),
        (ColumnType::Timestamptz, _) => "timestamp with time zone".to_owned(),
        (column_type, _) => column_type.name().to_owned(),
    }
}

/// Whether a column of type `found`, as `format_type` says it, takes whatever one of type `wanted` would.
fn fits(found: &str, wanted: &str) -> bool {
    let width = |kind: &str| kind.split_once('(').and_then(|(_, rest)| rest.trim_end_matches(')').parse::<u32>().ok());
    if !wanted.starts_with("varchar") {
        return found == wanted || (wanted == "integer" && found == "bigint");
    }
    match (found.starts_with("character varying"), width(found), width(wanted)) {
        (true, Some(found), Some(wanted)) => found >= wanted,
        (true, ..) => true,
        _ => found == "text",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_the_schema_is_known() {
        let mut files: Vec<_> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../schema"))
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".sql"))
            .collect();
        files.sort_unstable();
        assert_eq!(files, MIGRATIONS.map(|(name, _)| format!("{name}.sql")));
    }

    #[test]
    fn the_table_of_the_exercise_is_what_the_mapping_that_ships_expects() {
        let inner = MIGRATIONS[0].1.lines().filter(|line| line.starts_with("    "));
        let columns = inner.filter_map(|line| line.trim().trim_end_matches(',').split_once(' '));
        let columns: Vec<_> = columns.map(|(name, kind)| (name.to_owned(), kind.trim().to_owned())).collect();
        let mapping = Mapping::built_in().unwrap();
        let expected: Vec<_> = mapping.columns().iter().map(|column| (column.name.clone(), sql_type(column))).collect();
        assert_eq!(columns, expected);
    }

    #[test]
    fn a_wider_column_fits_and_a_narrower_one_does_not() {
        for (found, wanted, does) in [
            ("character varying(256)", "varchar(256)", true),
            ("character varying(300)", "varchar(256)", true),
            ("character varying", "varchar(256)", true),
            ("text", "varchar(256)", true),
            ("character varying(255)", "varchar(256)", false),
            ("bytea", "varchar(256)", false),
            ("integer", "integer", true),
            ("bigint", "integer", true),
            ("smallint", "integer", false),
            ("date", "date", true),
            ("timestamp without time zone", "date", false),
        ] {
            assert_eq!(fits(found, wanted), does, "{found} for {wanted}");
        }
    }
}
