//! The SQL statements for a mapping, made once.

use tokio_postgres::types::Type;

use crate::mapping::{ColumnType, Mapping, quoted};

/// The statements that write a batch.
#[derive(Debug)]
pub struct Sql {
    /// Inserts rows and enters their messages in the ledger, in one atomic statement. Fails if the ledger has one of the
    /// messages. Takes one array a column, the ledger's two first, all of one length. Returns the number of messages.
    pub insert: String,
    /// Inserts the rows whose messages the ledger does not have, and enters those messages, in one atomic statement. Takes the
    /// same arrays. The keys must be unique within the call. Returns the number of rows inserted.
    pub insert_unknown: String,
    /// Copies rows in the [binary format](https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.55.9.4).
    pub copy_rows: String,
    /// Copies keys to the ledger in the binary format. Fails if the ledger has one of them.
    pub copy_ledger: &'static str,
    /// Selects whether `COPY` would write the same as `INSERT`: `COPY` does not convert values to another column type, and
    /// ignores rules. Takes the table, the columns' names and their types.
    pub copy_fits: &'static str,
    /// Deletes rows older than the mapping's retention. Takes the maximum; returns how many rows and partitions were deleted.
    pub expire: Option<String>,
    /// The table's quoted SQL name.
    pub table: String,
    /// The type OIDs of the columns.
    pub types: Vec<u32>,
    /// The types of the arrays, after the ledger's two.
    pub arrays: Vec<Type>,
    /// The names of the written columns.
    pub names: Vec<String>,
}

impl Sql {
    /// The statements for a mapping's table.
    pub fn new(mapping: &Mapping) -> Self {
        let table = mapping.table();
        let names: Vec<_> = mapping.columns().iter().map(|column| quoted(&column.name)).collect();
        let names = names.join(", ");
        // A mapping may have a column named like a ledger column, so both get unique aliases.
        let aliases: Vec<_> = (1..=mapping.columns().len()).map(|column| format!("column_{column}")).collect();
        let aliases = aliases.join(", ");
        let arrays: Vec<_> = (3..)
            .zip(mapping.columns())
            .map(|(parameter, column)| format!("${parameter}::{}[]", column.column_type.name()))
            .collect();
        // Qualified, as `public` might have an `unnest` of one array. Of several arrays, PostgreSQL never calls another function.
        // In a select list, the elements go to the table one by one, and not to a tuplestore first.
        let unnested: Vec<_> = arrays.iter().map(|array| format!("pg_catalog.unnest({array})")).collect();
        let (arrays, unnested) = (arrays.join(", "), unnested.join(", "));
        Self {
            // PostgreSQL runs the main statement (the ledger's) before a `with` that nobody reads from. So no row is written for
            // a message that the ledger refuses.
            insert: format!(
                "with inserted as (insert into {table} ({names}) select {unnested}) \
                 insert into etl_ledger (sent_at, message_id) \
                 select pg_catalog.unnest($1::timestamptz[]), pg_catalog.unnest($2::uuid[])"
            ),
            insert_unknown: format!(
                "with entered as ( \
                     insert into etl_ledger (sent_at, message_id) \
                     select * from unnest($1::timestamptz[], $2::uuid[]) \
                     on conflict do nothing \
                     returning sent_at as ledger_sent_at, message_id as ledger_message_id \
                 ) \
                 insert into {table} ({names}) \
                 select {aliases} \
                 from unnest($1::timestamptz[], $2::uuid[], {arrays}) \
                     as batch (ledger_sent_at, ledger_message_id, {aliases}) \
                 join entered using (ledger_sent_at, ledger_message_id)"
            ),
            copy_rows: format!("copy {table} ({names}) from stdin (format binary)"),
            copy_ledger: "copy etl_ledger (sent_at, message_id) from stdin (format binary)",
            copy_fits: COPY_FITS,
            expire: mapping
                .retention_days()
                .map(|_| format!("select deleted, partitions from {}($1)", table.beside("expire"))),
            table: table.to_string(),
            types: mapping.columns().iter().map(|column| element_type(column.column_type).oid()).collect(),
            arrays: mapping.columns().iter().map(|column| array_type(column.column_type)).collect(),
            names: mapping.columns().iter().map(|column| column.name.clone()).collect(),
        }
    }
}

/// `text`, `varchar` and `bpchar` have the same binary format, so they count as equal.
const COPY_FITS: &str = "
    select not exists (
        select from unnest($2::text[], $3::oid[]) as wanted (name, type)
        left join pg_catalog.pg_attribute on attrelid = pg_catalog.to_regclass($1)::oid and attname::text = wanted.name
        left join pg_catalog.pg_type on pg_type.oid = atttypid
        where atttypid is distinct from wanted.type and not (wanted.type = 25::oid and typname in ('varchar', 'bpchar'))
    ) and not exists (
        select from pg_catalog.pg_rewrite where ev_class = pg_catalog.to_regclass($1)::oid and ev_type = '3'
    )";

fn element_type(column_type: ColumnType) -> Type {
    match column_type {
        ColumnType::Text => Type::TEXT,
        ColumnType::Integer => Type::INT4,
        ColumnType::Bigint => Type::INT8,
        ColumnType::DoublePrecision => Type::FLOAT8,
        ColumnType::Boolean => Type::BOOL,
        ColumnType::Date => Type::DATE,
        ColumnType::Timestamptz => Type::TIMESTAMPTZ,
        ColumnType::Uuid => Type::UUID,
        ColumnType::Jsonb => Type::JSONB,
    }
}

fn array_type(column_type: ColumnType) -> Type {
    match column_type {
        ColumnType::Text => Type::TEXT_ARRAY,
        ColumnType::Integer => Type::INT4_ARRAY,
        ColumnType::Bigint => Type::INT8_ARRAY,
        ColumnType::DoublePrecision => Type::FLOAT8_ARRAY,
        ColumnType::Boolean => Type::BOOL_ARRAY,
        ColumnType::Date => Type::DATE_ARRAY,
        ColumnType::Timestamptz => Type::TIMESTAMPTZ_ARRAY,
        ColumnType::Uuid => Type::UUID_ARRAY,
        ColumnType::Jsonb => Type::JSONB_ARRAY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_statements_are_those_in_tests_statements() {
        let sql = Sql::new(&Mapping::built_in().unwrap());
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(words(&sql.insert), words(include_str!("../../tests/statements/insert.sql")));
        assert_eq!(words(&sql.insert_unknown), words(include_str!("../../tests/statements/insert_unknown.sql")));
    }
}
