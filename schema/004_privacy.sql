-- The rights of those who answer requests of the persons whom rows are about: grant login_etl_privacy to carol;
-- They may erase one person's rows, which is recorded, and neither read a row nor recover a value. What they may call comes
-- with each table.
do $$
begin
    if not exists (select from pg_roles where rolname = 'login_etl_privacy') then
        create role login_etl_privacy nologin;
    end if;
end
$$;

-- The audit also records exports and erasures.
alter table etl_audit
    add column if not exists erased_rows     bigint,
    add column if not exists erased_messages integer;
do $$
declare
    name text;
begin
    for name in
        select conname from pg_constraint
        where conrelid = 'etl_audit'::regclass and contype = 'c' and pg_catalog.pg_get_constraintdef(oid) like '%reveal%'
    loop
        execute pg_catalog.format('alter table etl_audit drop constraint %I', name);
    end loop;
end
$$;
alter table etl_audit
    add constraint etl_audit_action_check check (action in ('recover', 'reveal', 'export', 'erase'));

-- When the schedule last had expired ledger keys and rows deleted.
create table if not exists etl_maintenance (
    only_row boolean     primary key default true check (only_row),
    done_at  timestamptz not null
);
grant select, insert, update on etl_maintenance to login_etl;
grant select on etl_maintenance to login_etl_operator;
