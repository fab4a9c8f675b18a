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
