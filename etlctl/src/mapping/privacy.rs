//! The SQL functions that delete rows of a mapping's table: a person's rows, for the role `login_etl_privacy`, and expired rows,
//! for `login_etl`. They run with the rights of the table's owner, so that neither role may delete, or read, any other row.
//!
//! A function with the owner's rights must not call anything that somebody else made. So its search path is
//! `pg_catalog, pg_temp`, and tables are named with their schemas, which are looked up when the function is made.

use login_etl::mapping::{Column, Mapping, quoted};

use super::{dollar_quoted, literal};
use crate::migrate::sql_type;

/// Placeholders in a function's text: the table's name with its schema, the same as a literal, and the audit table's name.
const TABLE: &str = "@login_etl_table@";
const TABLE_LITERAL: &str = "@login_etl_table_literal@";
const AUDIT: &str = "@login_etl_audit@";

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
    let block = format!(
        "declare
    rows_of text := (
        select pg_catalog.format('%s.%I', relnamespace::regnamespace, relname) from pg_class where oid = {}::regclass
    );
    audit text := (
        select pg_catalog.format('%s.%I', relnamespace::regnamespace, relname) from pg_class where oid = 'etl_audit'::regclass
    );
begin
{}end
",
        literal(&mapping.table().to_string()),
        functions.concat()
    );
    format!(
        "
-- What deletes rows, with the owner's rights: so it finds nothing that others made, and names its tables with their schemas.
{index}do {};
",
        dollar_quoted("functions", &format!("\n{block}"))
    )
}

/// A function to make and grant.
struct Function<'a> {
    suffix: &'a str,
    parameters: &'a str,
    types: &'a str,
    returns: &'a str,
    settings: &'a str,
    grantee: &'a str,
    body: &'a str,
}

impl Function<'_> {
    fn sql(&self, mapping: &Mapping) -> String {
        let Self { suffix, parameters, types, returns, settings, grantee, body } = self;
        let name = mapping.table().beside(suffix);
        let create = format!(
            "create or replace function {name}({parameters}) returns {returns}
        language plpgsql security definer set search_path = pg_catalog, pg_temp{settings} as {}",
            dollar_quoted("body", &format!("\n{body}"))
        );
        format!(
            "    execute pg_catalog.replace(pg_catalog.replace(pg_catalog.replace({},
        '{TABLE}', rows_of), '{TABLE_LITERAL}', pg_catalog.quote_literal(rows_of)), '{AUDIT}', audit);
    revoke all on function {name}({types}) from public;
    grant execute on function {name}({types}) to {grantee};
",
            dollar_quoted("create", &create)
        )
    }
}

/// The functions that count and erase the rows with one of the given values in a column.
///
/// Columns are qualified and parameters numbered, because a column may have a parameter's name.
fn of_persons(mapping: &Mapping) -> Vec<String> {
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
    let count = each(&|theirs| format!("return (select count(*) from {TABLE} as t where {theirs})"));
    // The condition is given twice, because rows of different partitions may have the same ctid.
    let delete = each(&|theirs| {
        format!(
            "delete from {TABLE} as t where {theirs}
                and t.ctid = any (array(select t.ctid from {TABLE} as t where {theirs} limit $3))"
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
    if erased > 0 or $6 is not null then
        insert into {AUDIT} (operator, action, reason, source, requested, recovered, key_ids, erased_rows, erased_messages)
        values ($4, 'erase', $5, {} || $1, 0, 0, '{{}}', erased, $6);
        if not found then
            raise exception 'etl_audit swallows what is written to it, so nothing is erased';
        end if;
    end if;
    return erased;
end
",
        literal(&format!("{} by ", mapping.table().plain()))
    );
    let rows_of = Function {
        suffix: "rows_of",
        parameters: "of_column text, wanted text[]",
        types: "text, text[]",
        returns: "bigint",
        settings: "",
        grantee: "login_etl_privacy",
        body: &count,
    };
    let erase = Function {
        suffix: "erase",
        parameters: "of_column text, wanted text[], most bigint, who text, why text, messages integer",
        types: "text, text[], bigint, text, text, integer",
        body: &erase,
        ..rows_of
    };
    vec![rows_of.sql(mapping), erase.sql(mapping)]
}

/// The function that deletes rows past their retention. If the table is partitioned by the day, it drops whole partitions, and
/// deletes single rows only from the default partition.
fn of_retention(mapping: &Mapping, days: u32, day: &Column) -> String {
    let last = format!("(now() at time zone 'UTC')::date - {days}");
    let expired = format!("t.{} < {last}", quoted(&day.name));
    let body = format!(
        "declare
    part regclass;
    whole regclass := {TABLE_LITERAL};
    by_day boolean := exists (
        select from pg_partitioned_table
        join pg_attribute on attrelid = partrelid and attnum = partattrs[0]
        where partrelid = whole and partstrat = 'r' and partnatts = 1 and attname = {day}
    );
begin
    partitions := 0;
    deleted := 0;
    if by_day then
        for part in
            select inhrelid from pg_inherits join pg_class on pg_class.oid = inhrelid
            where inhparent = whole and relispartition
                and substring(pg_get_expr(relpartbound, inhrelid) from 'TO \\(''([^'']+)')::date <= {last}
        loop
            begin
                execute format('drop table %s', part);
                partitions := partitions + 1;
            exception when lock_not_available then
                -- Somebody reads it: the next run drops it.
                null;
            end;
        end loop;
        -- PostgreSQL 10 has no default partition, and no such column.
        whole := (
            select nullif((to_jsonb(pg_partitioned_table) ->> 'partdefid')::oid, 0::oid)
            from pg_partitioned_table where partrelid = whole
        );
    end if;
    if whole is not null then
        execute format({delete}, whole) using most;
        get diagnostics deleted = row_count;
    end if;
end
",
        day = literal(&day.name),
        delete = literal(
            &"delete from %1$s as t where {expired}
            and t.ctid = any (array(select t.ctid from %1$s as t where {expired} limit $1 for update skip locked))"
                .replace("{expired}", &expired.replace('%', "%%"))
        ),
    );
    Function {
        suffix: "expire",
        parameters: "most bigint, out deleted bigint, out partitions bigint",
        types: "bigint",
        returns: "record",
        // If a lock is not available soon, the next run tries again.
        settings: " set lock_timeout = '500ms' set timezone = 'UTC' set datestyle = 'ISO'",
        grantee: "login_etl",
        body: &body,
    }
    .sql(mapping)
}
