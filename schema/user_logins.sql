-- The table user_logins, as `etlctl mapping ddl` prints it; `etlctl migrate` makes the roles before it.
create table if not exists "user_logins" (
    "user_id"          varchar(128),
    "device_type"      varchar(32),
    "masked_ip"        varchar(256),
    "masked_device_id" varchar(256),
    "locale"           varchar(32),
    "app_version"      integer,
    "create_date"      date
);
grant insert on "user_logins" to login_etl;
do $grants$
declare
    part regclass;
begin
    for part in
        with recursive tree (oid) as (
            select '"user_logins"'::regclass::oid
            union all
            select inhrelid from pg_inherits join tree on inhparent = tree.oid
        )
        select oid from tree
    loop
        execute pg_catalog.format('grant select, update ("masked_ip", "masked_device_id") on %s to login_etl_operator', part);
    end loop;
end
$grants$;

-- Equal values have equal masks: what finds the rows that share one.
create index if not exists "user_logins_masked_ip_idx" on "user_logins" ("masked_ip");
create or replace view "user_logins_masked_ip_duplicates" as
select "masked_ip", pg_catalog.count(*) as row_count, pg_catalog.count(distinct "user_id") as subject_count, pg_catalog.min("create_date") as first_day, pg_catalog.max("create_date") as last_day
from "user_logins"
where "masked_ip" is not null
group by "masked_ip"
having pg_catalog.count(*) > 1;
grant select on "user_logins_masked_ip_duplicates" to login_etl_operator;
create index if not exists "user_logins_masked_device_id_idx" on "user_logins" ("masked_device_id");
create or replace view "user_logins_masked_device_id_duplicates" as
select "masked_device_id", pg_catalog.count(*) as row_count, pg_catalog.count(distinct "user_id") as subject_count, pg_catalog.min("create_date") as first_day, pg_catalog.max("create_date") as last_day
from "user_logins"
where "masked_device_id" is not null
group by "masked_device_id"
having pg_catalog.count(*) > 1;
grant select on "user_logins_masked_device_id_duplicates" to login_etl_operator;

-- What deletes rows, with the owner's rights: so it finds nothing that others made, and names its tables with their schemas.
do $functions$
declare
    rows_of text := (
        select pg_catalog.format('%s.%I', relnamespace::regnamespace, relname) from pg_class where oid = '"user_logins"'::regclass
    );
    audit text := (
        select pg_catalog.format('%s.%I', relnamespace::regnamespace, relname) from pg_class where oid = 'etl_audit'::regclass
    );
begin
    execute pg_catalog.replace(pg_catalog.replace(pg_catalog.replace($create$create or replace function "user_logins_rows_of"(of_column text, wanted text[]) returns bigint
        language plpgsql security definer set search_path = pg_catalog, pg_temp as $body$
begin
    case $1
        when 'user_id' then
            return (select count(*) from @login_etl_table@ as t where t."user_id" = any ($2::varchar[]));
        when 'masked_ip' then
            return (select count(*) from @login_etl_table@ as t where t."masked_ip" = any ($2::varchar[]));
        when 'masked_device_id' then
            return (select count(*) from @login_etl_table@ as t where t."masked_device_id" = any ($2::varchar[]));
    end case;
end
$body$$create$,
        '@login_etl_table@', rows_of), '@login_etl_table_literal@', pg_catalog.quote_literal(rows_of)), '@login_etl_audit@', audit);
    revoke all on function "user_logins_rows_of"(text, text[]) from public;
    grant execute on function "user_logins_rows_of"(text, text[]) to login_etl_privacy;
    execute pg_catalog.replace(pg_catalog.replace(pg_catalog.replace($create$create or replace function "user_logins_erase"(of_column text, wanted text[], most bigint, who text, why text, messages integer) returns bigint
        language plpgsql security definer set search_path = pg_catalog, pg_temp as $body$
declare
    erased bigint;
begin
    case $1
        when 'user_id' then
            delete from @login_etl_table@ as t where t."user_id" = any ($2::varchar[])
                and t.ctid = any (array(select t.ctid from @login_etl_table@ as t where t."user_id" = any ($2::varchar[]) limit $3));
        when 'masked_ip' then
            delete from @login_etl_table@ as t where t."masked_ip" = any ($2::varchar[])
                and t.ctid = any (array(select t.ctid from @login_etl_table@ as t where t."masked_ip" = any ($2::varchar[]) limit $3));
        when 'masked_device_id' then
            delete from @login_etl_table@ as t where t."masked_device_id" = any ($2::varchar[])
                and t.ctid = any (array(select t.ctid from @login_etl_table@ as t where t."masked_device_id" = any ($2::varchar[]) limit $3));
    end case;
    get diagnostics erased = row_count;
    if erased > 0 or $6 is not null then
        insert into @login_etl_audit@ (operator, action, reason, source, requested, recovered, key_ids, erased_rows, erased_messages)
        values ($4, 'erase', $5, 'user_logins by ' || $1, 0, 0, '{}', erased, $6);
        if not found then
            raise exception 'etl_audit swallows what is written to it, so nothing is erased';
        end if;
    end if;
    return erased;
end
$body$$create$,
        '@login_etl_table@', rows_of), '@login_etl_table_literal@', pg_catalog.quote_literal(rows_of)), '@login_etl_audit@', audit);
    revoke all on function "user_logins_erase"(text, text[], bigint, text, text, integer) from public;
    grant execute on function "user_logins_erase"(text, text[], bigint, text, text, integer) to login_etl_privacy;
end
$functions$;
