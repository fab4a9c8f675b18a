//! The functions of a mapping's table that delete rows: one person's, for the role `login_etl_privacy`, and expired ones, for
//! `login_etl`. They run with the rights of the table's owner, so that neither role may delete, or read, any other row.

use login_etl::mapping::{Column, Mapping, quoted};

use super::literal;
use crate::migrate::sql_type;

/// The columns by which a person can be found.
pub fn columns_of_persons(mapping: &Mapping) -> impl Iterator<Item = &Column> {
    let subject = mapping.subject().filter(|subject| mapping.masked().all(|(column, _)| column.name != subject.name));
    subject.into_iter().chain(mapping.masked().map(|(column, _)| column))
}

pub(super) fn ddl(mapping: &Mapping) -> String {
    let persons = if columns_of_persons(mapping).next().is_some() { of_persons(mapping) } else { Vec::new() };
    let retention = mapping.retention_days().zip(mapping.day()).map(|(days, day)| of_retention(mapping, days, day));
    let functions: Vec<_> = persons.into_iter().chain(retention).collect();
    if functions.is_empty() {
        return String::new();
    }
    let index = mapping.retention_days().and(mapping.day()).map_or(String::new(), |day| {
        let index = quoted(&mapping.table().beside(&format!("{}_idx", day.name)).name);
        format!("create index if not exists {index} on {} ({});\n", mapping.table(), quoted(&day.name))
    });
    format!(
        "
-- What deletes rows, with the owner's rights. So these find tables where they were made, and nobody's temporary ones.
{index}do $functions$
declare
    place text := (
        select pg_catalog.string_agg(distinct relnamespace::regnamespace::text, ', ') from pg_class
        where oid in ({}::regclass, 'etl_audit'::regclass)
    );
begin
{}end
$functions$;
",
        literal(&mapping.table().to_string()),
        functions.concat()
    )
}

/// One function, made and granted.
fn function(
    mapping: &Mapping,
    suffix: &str,
    parameters: &str,
    types: &str,
    returns: &str,
    grantee: &str,
    body: &str,
) -> String {
    let name = mapping.table().beside(suffix);
    format!(
        "    execute $create$create or replace function {name}({parameters})
        returns {returns} language plpgsql security definer set search_path = $create$ || place || $create$, pg_temp as $body$
{body}$body$$create$;
    revoke all on function {name}({types}) from public;
    grant execute on function {name}({types}) to {grantee};
"
    )
}

/// What counts and what erases the rows that have one of some values in a column.
///
/// Columns have their table's alias, and parameters their numbers, as a column may have a parameter's name.
fn of_persons(mapping: &Mapping) -> Vec<String> {
    let table = mapping.table();
    let each = |statement: &dyn Fn(&str) -> String| -> String {
        columns_of_persons(mapping)
            .map(|column| {
                let element = sql_type(column);
                let element = element.split('(').next().unwrap_or_default();
                let theirs = format!("t.{} = any ($2::{element}[])", quoted(&column.name));
                format!("        when {} then\n            {};\n", literal(&column.name), statement(&theirs))
            })
            .collect()
    };
    let count = each(&|theirs| format!("return (select pg_catalog.count(*) from {table} as t where {theirs})"));
    // Said twice, as partitions share their rows' places.
    let delete = each(&|theirs| {
        format!(
            "delete from {table} as t where {theirs}
                and t.ctid = any (array(select t.ctid from {table} as t where {theirs} limit $3))"
        )
    });
    let count = format!("begin\n    case $1\n{count}    end case;\nend\n");
    let erase = format!(
        "declare
    erased bigint;
begin
    case $1
{delete}    end case;
    get diagnostics erased = row_count;
    if erased > 0 or messages is not null then
        insert into etl_audit (operator, action, reason, source, requested, recovered, key_ids, erased_rows, erased_messages)
        values (who, 'erase', why, {} || $1, 0, 0, '{{}}', erased, coalesce(messages, 0));
        if not found then
            raise exception 'etl_audit swallows what is written to it, so nothing is erased';
        end if;
    end if;
    return erased;
end
",
        literal(&format!("{} by ", table.plain()))
    );
    vec![
        function(
            mapping,
            "rows_of",
            "of_column text, wanted text[]",
            "text, text[]",
            "bigint",
            "login_etl_privacy",
            &count,
        ),
        function(
            mapping,
            "erase",
            "of_column text, wanted text[], most bigint, who text, why text, messages integer",
            "text, text[], bigint, text, text, integer",
            "bigint",
            "login_etl_privacy",
            &erase,
        ),
    ]
}

/// What deletes rows whose day is past keeping: some of them, or whole partitions.
fn of_retention(mapping: &Mapping, days: u32, day: &Column) -> String {
    let (table, day) = (mapping.table(), quoted(&day.name));
    let name = literal(&table.to_string());
    let expired = format!("{day} < (pg_catalog.now() at time zone 'UTC')::date - {days}");
    let body = format!(
        "declare
    part regclass;
    -- Of a partitioned table, rows are deleted one by one from the default partition alone. (PostgreSQL 10 has none.)
    whole oid := coalesce(
        (select (pg_catalog.to_jsonb(pg_partitioned_table) ->> 'partdefid')::oid from pg_partitioned_table where partrelid = {name}::regclass),
        {name}::regclass
    );
begin
    partitions := 0;
    for part in
        select inhrelid from pg_inherits join pg_class on pg_class.oid = inhrelid
        where inhparent = {name}::regclass and relispartition
            and substring(pg_catalog.pg_get_expr(relpartbound, inhrelid) from 'TO \\(''([^'']+)')::date
                <= (pg_catalog.now() at time zone 'UTC')::date - {days}
    loop
        execute pg_catalog.format('drop table %s', part);
        partitions := partitions + 1;
    end loop;
    execute pg_catalog.format(
        'delete from only %1$s where {expired} and ctid = any (array(
            select ctid from only %1$s where {expired} limit $1 for update skip locked))',
        whole::regclass
    ) using most;
    get diagnostics deleted = row_count;
end
",
        expired = expired.replace('%', "%%").replace('\'', "''"),
    );
    let function = function(
        mapping,
        "expire",
        "most bigint, out deleted bigint, out partitions bigint",
        "bigint",
        "record",
        "login_etl",
        &body,
    );
    // A lock that is not to be had soon is tried for again at the next run.
    function.replacen(", pg_temp as $body$", ", pg_temp set lock_timeout = '500ms' set timezone = 'UTC' as $body$", 1)
}
