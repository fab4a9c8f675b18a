//! `migrate`: applies what the database lacks of the schema.

use std::borrow::Cow;

use login_etl::mapping::{Column, ColumnType, Mapping};
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio_postgres::{Client, GenericClient, error::SqlState};

use crate::{
    cli, mapping,
    output::{Failure, GOOD, Reply, WARNING, failed, spinner, sql, table},
    settings::Settings,
};

/// The files of `schema/` that every mapping needs, in order. The mapping's table is applied after them.
const FILES: [(&str, &str); 4] = [
    ("001_ledger", include_str!("../../schema/001_ledger.sql")),
    ("002_roles", include_str!("../../schema/002_roles.sql")),
    ("003_audit", include_str!("../../schema/003_audit.sql")),
    ("004_privacy", include_str!("../../schema/004_privacy.sql")),
];
/// Files of versions before mappings, which may be recorded, too. The files above upgrade the schema that those left.
const BEFORE_THE_MAPPING: [&str; 6] =
    ["001_user_logins", "002_ledger", "003_duplicates", "004_role", "005_audit", "006_open_transactions"];
/// The tables that the files make.
const TABLES: [(&str, &str); 3] =
    [(FILES[0].0, "etl_ledger"), (FILES[2].0, "etl_audit"), (FILES[3].0, "etl_maintenance")];
/// The prefix of the record of a mapping's table.
pub const TABLE: &str = "table ";

/// The advisory lock that is held while migrating: "loginetl" in ASCII.
const LOCK: i64 = 0x6c6f_6769_6e65_746c;

const RECORDS: &str = "
create table if not exists login_etl_migrations (
    name       text primary key,
    checksum   text not null,
    applied_at timestamptz not null default now(),
    applied_by text not null default session_user
)";

struct Migration {
    name: Cow<'static, str>,
    text: Cow<'static, str>,
    state: State,
}

enum State {
    Applied,
    Pending,
    /// A file of this name with another content was applied.
    Changed,
}

impl Migration {
    /// Whether it is a mapping's table, whose SQL may change and can be run again.
    fn is_table(&self) -> bool {
        self.name.starts_with(TABLE)
    }
}

pub async fn run(settings: &Settings, options: &cli::Migrate) -> Result<Reply, Failure> {
    let mut connection = settings.database().await?;
    let (mapping, schema) = (&settings.declared, &*settings.schema);
    if options.check {
        check_schema(settings, &connection.client).await?;
        return check(settings, &connection.client).await;
    }
    let client = &mut connection.client;
    let waiting = spinner("Waiting for another migration to end");
    client.query("select pg_advisory_lock($1)", &[&LOCK]).await.map_err(sql("lock the schema"))?;
    drop(waiting);
    check_schema(settings, client).await?;
    let misfits = misfits(&settings.mapping, client).await?.unwrap_or_default();
    if !misfits.is_empty() {
        let name = mapping.table().plain();
        return Err(failed(format!("the table {name} does not fit: {}", misfits.join("; "))));
    }
    client
        .batch_execute(&format!("set client_min_messages = warning; set search_path = {schema}, pg_temp; {RECORDS}"))
        .await
        .map_err(sql("record migrations"))?;
    let mut applied = Vec::new();
    for migration in migrations(settings, client).await? {
        match migration.state {
            State::Applied => continue,
            State::Changed => return Err(failed(changed_text(&migration.name))),
            State::Pending => {}
        }
        let _spinner = spinner(format!("Applying {}", migration.name));
        apply(client, &migration).await?;
        applied.push(migration.name);
    }
    client
        .batch_execute("grant select on login_etl_migrations to login_etl_operator")
        .await
        .map_err(sql("grant rights"))?;
    if options.iam {
        grant_iam(client).await?;
    }
    let mut text = match applied.len() {
        0 => format!("{GOOD}The schema is up to date.{GOOD:#}\n"),
        _ => format!("{GOOD}Applied:{GOOD:#} {}\n", applied.join(", ")),
    };
    if applied.iter().any(|name| name == FILES[1].0) {
        text += "If the roles are new, give login_etl, the function's user, a password (`\\password login_etl` in psql), and\n\
                 give operators their rights (`grant login_etl_operator to NAME`).\n";
    }
    if options.iam {
        text += "login_etl signs in with IAM tokens: deploy with DatabaseAuth=iam.\n";
    }
    Ok(Reply::new(text, json!({ "applied": applied })))
}

/// Lets login_etl sign in with tokens. RDS then refuses its password, so this is done only on request.
async fn grant_iam(client: &Client) -> Result<(), Failure> {
    let has_role = client.query_one("select to_regrole('rds_iam') is not null", &[]).await;
    if !has_role.map_err(sql("look for the role rds_iam"))?.get::<_, bool>(0) {
        return Err(failed(
            "there is no role rds_iam, which RDS and Aurora have: turn on IAM database authentication of the instance or cluster",
        ));
    }
    client.batch_execute("grant rds_iam to login_etl").await.map_err(sql("grant rds_iam"))
}

/// Fails if tables are missing in the schema, and are in another: they were moved, or making them would make a second set, which the
/// function might not use.
async fn check_schema(settings: &Settings, client: &Client) -> Result<(), Failure> {
    let schema = &settings.schema;
    let records = format!("{schema}.login_etl_migrations");
    let query = "select to_regnamespace($1) is not null, to_regclass($2) is not null";
    let row = client.query_one(query, &[schema, &records]).await.map_err(sql("look at the schemas"))?;
    let (is_there, has_records): (bool, bool) = (row.get(0), row.get(1));
    if !is_there {
        return Err(failed(format!("there is no schema {schema}: create it, or name another with --database-schema")));
    }
    if !has_records {
        let others = elsewhere(client, schema, &["login_etl_migrations", "etl_ledger", "etl_audit"]).await?;
        return match others.filter(|_| settings.get("DATABASE_SCHEMA").is_none()) {
            Some(others) => Err(failed(format!(
                "there are {others} already: name their schema with --database-schema, or make new tables with --database-schema {schema}"
            ))),
            None => Ok(()),
        };
    }
    let made = client.query(&format!("select name from {records}"), &[]).await.map_err(sql("read the migrations"))?;
    let made: Vec<&str> = made.iter().map(|row| row.get(0)).collect();
    let (table, record) = (settings.declared.table(), table_record(&settings.declared));
    let mut tables = TABLES.to_vec();
    // Otherwise the mapping says where it is.
    if table.schema.is_none() {
        tables.push((&record, &table.name));
    }
    tables.retain(|(record, _)| made.contains(record));
    let names: Vec<_> = tables.iter().map(|(_, name)| *name).collect();
    match elsewhere(client, schema, &names).await? {
        Some(moved) => Err(failed(format!(
            "moved out of the schema {schema}, where the function looks: {moved}; move back what is listed (`alter table NAME set schema {schema}`)"
        ))),
        None => Ok(()),
    }
}

/// Which of these tables the schema lacks and others have, with their schemas.
async fn elsewhere(client: &Client, schema: &str, tables: &[&str]) -> Result<Option<String>, Failure> {
    let query =
        "select string_agg(format('%s.%I', relnamespace::regnamespace, relname), ', ' order by relname) from pg_class
        where relname::text = any($2::text[]) and relkind in ('r', 'p') and relpersistence <> 't'
        and to_regclass(format('%s.%I', $1::text, relname)) is null";
    let row = client.query_one(query, &[&schema, &tables]).await.map_err(sql("look for the tables"))?;
    Ok(row.get(0))
}

async fn apply(client: &mut Client, migration: &Migration) -> Result<(), Failure> {
    let what = || format!("apply {}", migration.name);
    let transaction = client.transaction().await.map_err(sql(what()))?;
    if let Err(error) = transaction.batch_execute(&migration.text).await {
        let makes_roles = [FILES[1].0, FILES[3].0].contains(&&*migration.name);
        let may_not = error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) && makes_roles;
        return Err(match may_not {
            true => failed(
                "your database user may not make the roles login_etl, login_etl_operator and login_etl_privacy (SQLSTATE 42501): run `etlctl migrate` as the \
                 tables' owner with the right to make roles (`alter role NAME createrole`), or as a superuser; on RDS, as the master user",
            ),
            false => sql(what())(error),
        });
    }
    let record = "insert into login_etl_migrations (name, checksum) values ($1, $2)
                  on conflict (name) do update set checksum = excluded.checksum, applied_at = now(), applied_by = session_user";
    transaction.execute(record, &[&migration.name.as_ref(), &checksum(&migration.text)]).await.map_err(sql(what()))?;
    transaction.commit().await.map_err(sql(what()))
}

async fn check(settings: &Settings, client: &Client) -> Result<Reply, Failure> {
    let migrations = migrations(settings, client).await?;
    let no = migrations.iter().any(|migration| !matches!(migration.state, State::Applied));
    let rows = migrations.iter().map(|migration| match migration.state {
        State::Applied => vec![migration.name.as_ref(), "applied"],
        State::Pending => vec![migration.name.as_ref(), "missing"],
        State::Changed => vec![migration.name.as_ref(), "applied, but the file has changed since"],
    });
    let rows: Vec<_> = rows.collect();
    let json = rows.iter().map(|row| json!({"name": row[0], "state": row[1]})).collect();
    let changed = migrations.iter().find(|migration| matches!(migration.state, State::Changed));
    let last = match (changed, no) {
        (Some(changed), _) => format!("\n{WARNING}{}{WARNING:#}\n", changed_text(&changed.name)),
        (None, true) => format!("\n{WARNING}The schema is not up to date: run `etlctl migrate`.{WARNING:#}\n"),
        (None, false) => format!("\n{GOOD}The schema is up to date.{GOOD:#}\n"),
    };
    Ok(Reply { no, ..Reply::new(table(&["migration", "state"], rows) + &last, json) })
}

fn changed_text(name: &str) -> String {
    format!(
        "{name} was applied with another content than this etlctl has: use the etlctl of the deployed version, or put the \
         difference into a new file"
    )
}

/// The names of the migrations that are missing in the database, or differ there.
pub async fn outstanding(settings: &Settings, client: &impl GenericClient) -> Result<Vec<String>, Failure> {
    let migrations = migrations(settings, client).await?.into_iter();
    let outstanding = migrations.filter(|migration| !matches!(migration.state, State::Applied));
    Ok(outstanding.map(|migration| migration.name.into_owned()).collect())
}

async fn migrations(settings: &Settings, client: &impl GenericClient) -> Result<Vec<Migration>, Failure> {
    let (mapping, records) = (&settings.declared, format!("{}.login_etl_migrations", settings.schema));
    let there = client.query_one("select to_regclass($1) is not null", &[&records]).await;
    let records = match there.map_err(sql("read the schema"))?.get(0) {
        true => client
            .query(&format!("select name, checksum from {records}"), &[])
            .await
            .map_err(sql("read the migrations"))?,
        false => Vec::new(),
    };
    let mut unknown = records.iter().map(|record| record.get::<_, &str>("name")).filter(|name| {
        !name.starts_with(TABLE) && !BEFORE_THE_MAPPING.contains(name) && FILES.iter().all(|(known, _)| known != name)
    });
    if let Some(name) = unknown.next() {
        return Err(failed(format!(
            "the database is newer than this etlctl, which does not know {name}: use a newer etlctl"
        )));
    }
    let files = FILES.map(|(name, text)| (Cow::from(name), Cow::from(text)));
    let table = (Cow::from(table_record(mapping)), Cow::from(mapping::ddl(mapping)));
    let migrations = files.into_iter().chain([table]).map(|(name, text)| {
        let record = records.iter().find(|record| record.get::<_, &str>("name") == name);
        let state = match record.map(|record| record.get::<_, &str>("checksum") == checksum(&text)) {
            None => State::Pending,
            Some(true) => State::Applied,
            Some(false) => State::Changed,
        };
        let mut migration = Migration { name, text, state };
        if migration.is_table() && matches!(migration.state, State::Changed) {
            migration.state = State::Pending;
        }
        migration
    });
    Ok(migrations.collect())
}

/// The name under which a mapping's table is recorded.
pub fn table_record(mapping: &Mapping) -> String {
    format!("{TABLE}{}", mapping.table().plain())
}

fn checksum(text: &str) -> String {
    hex::encode(Sha256::digest(text))
}

/// Why the table does not accept what the function writes, with what to do about each column. `None` if there is no table.
pub async fn misfits(mapping: &Mapping, client: &impl GenericClient) -> Result<Option<Vec<String>>, Failure> {
    let query = "select attname::text, format_type(atttypid, atttypmod), attnotnull, attnotnull and not atthasdef and attidentity = '' \
                 from pg_attribute where attrelid = to_regclass($1) and attnum > 0 and not attisdropped";
    let table = mapping.table().to_string();
    let there = "select to_regclass($1) is not null";
    if !client.query_one(there, &[&table]).await.map_err(sql("look for the table"))?.get::<_, bool>(0) {
        return Ok(None);
    }
    let columns = client.query(query, &[&table]).await.map_err(sql("read the table's columns"))?;
    let found = |wanted: &str| columns.iter().find(|column| column.get::<_, &str>(0) == wanted);
    let mut misfits = Vec::new();
    for column in mapping.columns() {
        let (name, wanted) = (&column.name, sql_type(column));
        match found(name).map(|column| column.get::<_, &str>(1)) {
            None => misfits.push(format!("it has no column {name} {wanted}: add it")),
            Some(found) if fits(found, &wanted) => {}
            Some(found) => misfits.push(format!("its column {name} is {found}: make it {wanted}. First drop the view of its duplicates; afterwards `etlctl mapping ddl | psql` makes it again")),
        }
    }
    for column in &columns {
        let (name, not_null, needs_value): (&str, bool, bool) = (column.get(0), column.get(2), column.get(3));
        match mapping.columns().iter().find(|column| column.name == name) {
            Some(column) if column.optional && not_null => {
                misfits
                    .push(format!("its column {name} is not null, but the function writes nulls: drop the constraint"));
            }
            None if needs_value => {
                misfits.push(format!("its column {name} is not null, and is not written: give it a default"));
            }
            _ => {}
        }
    }
    Ok(Some(misfits))
}

/// The SQL type that a column should have.
pub fn sql_type(column: &Column) -> String {
    match (column.column_type, column.max_length) {
        (ColumnType::Text, Some(max_length)) => format!("varchar({max_length})"),
        (ColumnType::Timestamptz, _) => "timestamp with time zone".to_owned(),
        (column_type, _) => column_type.name().to_owned(),
    }
}

/// Whether a column of type `found`, in `format_type`'s words, accepts every value of type `wanted`.
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
        let shipped = table_record(&Mapping::built_in().unwrap()).replace(TABLE, "");
        let names = FILES.map(|(name, _)| name.to_owned()).into_iter().chain([shipped]);
        assert_eq!(files, names.map(|name| format!("{name}.sql")).collect::<Vec<_>>());
    }

    /// Databases record a file's checksum when they apply it. A change belongs into a new file.
    #[test]
    fn released_files_are_unchanged() {
        let released = [
            ("001_ledger", "fff27d604e34e70044080d2b4630c8d1d40c11e35538cfef9053af0ce7e78b5a"),
            ("002_roles", "636485a3e503de1943bef970a97cd5ff342a81d0a0685272b1bf8dfcd1ffcb78"),
            ("003_audit", "59a5c4122b49e876bb727367b216dca29fa2e6dc2c72c9a44c52f9765a13a9d5"),
        ];
        assert_eq!(
            FILES.map(|(name, text)| (name, checksum(text)))[..3],
            released.map(|(name, sum)| (name, sum.to_owned()))
        );
    }

    /// If it fails: `etlctl mapping ddl > schema/user_logins.sql`.
    #[test]
    fn the_schema_has_the_table_of_the_mapping_that_ships() {
        assert_eq!(include_str!("../../schema/user_logins.sql"), mapping::ddl(&Mapping::built_in().unwrap()));
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
