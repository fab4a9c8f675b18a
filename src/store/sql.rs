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
    /// The types of the arrays, behind the ledger's two.
    pub arrays: Vec<Type>,
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
        // From a select list the elements go to the table one by one, and not to a tuplestore first.
        let unnested: Vec<_> = arrays.iter().map(|array| format!("unnest({array})")).collect();
        let (arrays, unnested) = (arrays.join(", "), unnested.join(", "));
        Self {
            // PostgreSQL runs the main statement, the ledger's, before a `with` that nobody reads from: no row is written for a
            // message that the ledger refuses.
            insert: format!(
                "with inserted as (insert into {table} ({names}) select {unnested}) \
                 insert into etl_ledger (sent_at, message_id) \
                 select unnest($1::timestamptz[]), unnest($2::uuid[])"
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
            arrays: mapping.columns().iter().map(|column| array_type(column.column_type)).collect(),
        }
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
