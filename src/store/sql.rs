//! The statements, made once from the mapping.

use tokio_postgres::types::Type;

use crate::mapping::{ColumnType, Mapping, quoted};

/// The statements that write a batch.
#[derive(Debug)]
pub struct Sql {
    /// Inserts rows and enters their messages in the ledger, in one atomic statement, which fails if the ledger has one of
    /// them. Takes one array a column, the ledger's two first, all of one length. Returns the number of messages.
    pub insert: String,
    /// Inserts the rows whose messages the ledger does not have, and enters those messages, in one atomic statement. Takes the
    /// same arrays; the keys are unique within the call. Returns the number of rows inserted.
    pub insert_unknown: String,
    /// Takes rows in the [binary format](https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.55.9.4).
    pub copy_rows: String,
    /// Enters messages in the ledger, and fails if it has one of them. Takes the binary format.
    pub copy_ledger: &'static str,
    /// Whether `COPY` would write what the statements write: it asks for no conversion where a column's type is another one, and
    /// passes by rules. Takes the table, the columns' names and their types.
    pub copy_fits: &'static str,
    /// Deletes rows that the mapping does not keep any longer. Takes the most; returns how many rows and how many partitions went.
    pub expire: Option<String>,
    /// The table, as SQL has it.
    pub table: String,
    /// The types of the columns.
    pub types: Vec<u32>,
    /// The types of the arrays, behind the ledger's two.
    pub arrays: Vec<Type>,
    /// The names of the columns that are written.
    pub names: Vec<String>,
}

impl Sql {
    /// The statements for a mapping's table.
    pub fn new(mapping: &Mapping) -> Self {
        let table = mapping.table();
        let names: Vec<_> = mapping.columns().iter().map(|column| quoted(&column.name)).collect();
        let names = names.join(", ");
        // A mapping may call a column as the ledger calls its own, so these have names that say whose they are.
        let aliases: Vec<_> = (1..=mapping.columns().len()).map(|column| format!("column_{column}")).collect();
        let aliases = aliases.join(", ");
        let arrays: Vec<_> = (3..)
            .zip(mapping.columns())
            .map(|(parameter, column)| format!("${parameter}::{}[]", column.column_type.name()))
            .collect();
        // Of several arrays, PostgreSQL takes no other function of that name; of one, it might take one of `public`.
        // From a select list the elements go to the table one by one, and not to a tuplestore first.
        let unnested: Vec<_> = arrays.iter().map(|array| format!("pg_catalog.unnest({array})")).collect();
        let (arrays, unnested) = (arrays.join(", "), unnested.join(", "));
        Self {
            // PostgreSQL runs the main statement, the ledger's, before a `with` that nobody reads from: no row is written for a
            // message that the ledger refuses.
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

/// Texts are sent alike to all types of text.
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
    fn the_statements_of_the_mapping_that_ships_are_the_ones_that_are_measured_and_tried_on_partitions() {
        let sql = Sql::new(&Mapping::built_in().unwrap());
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(words(&sql.insert), words(include_str!("../../tests/statements/insert.sql")));
        assert_eq!(words(&sql.insert_unknown), words(include_str!("../../tests/statements/insert_unknown.sql")));
    }
}
