-- What partitioned tables need for as long as they live: see docs/partition-the-tables.md. To be run by the tables' owner, and
-- again at will.

-- How each is divided, in UTC. New partitions are made while there is still room for `ahead`.
create or replace view login_etl_partitioning (name, key, unit, step, ahead, suffix) as
values
    ('user_logins', 'create_date', 'month', interval '1 month', interval '2 months', 'YYYY_MM'),
    -- A message lives for 28 days at most, so whole weeks are remembered for 28 to 35.
    ('etl_ledger', 'sent_at', 'week', interval '7 days', interval '3 weeks', 'YYYY_MM_DD');

-- The columns that can be written, for rows that move from one table to another.
create or replace function login_etl_columns(of regclass) returns text language sql stable as $$
    select pg_catalog.string_agg(pg_catalog.quote_ident(column_name), ', ' order by ordinal_position)
    from information_schema.columns
    join pg_class on relname = table_name and relnamespace = pg_catalog.quote_ident(table_schema)::regnamespace
    where pg_class.oid = of and is_generated = 'NEVER'
$$;

-- Gives a new table the owner and the rights of the one that it is to be a partition of, or to replace. `keys remask` works
-- in the partitions themselves, so their rights count, too.
create or replace function login_etl_dress(dressed regclass, model regclass) returns void language plpgsql as $$
declare
    command text;
begin
    for command in
        select pg_catalog.format('alter table %s owner to %s', dressed, relowner::regrole) from pg_class where oid = model
        union all
        select pg_catalog.format(
            'grant %s%s on %s to %s%s',
            privilege_type,
            case when attname is not null then pg_catalog.format(' (%I)', attname) end,
            dressed,
            case grantee when 0 then 'public' else grantee::regrole::text end,
            case when is_grantable then ' with grant option' end
        )
        from (
            select relacl as acl, null as attname from pg_class where oid = model
            union all
            select attacl, attname from pg_attribute where attrelid = model and attnum > 0 and not attisdropped
        ) as rights, pg_catalog.aclexplode(acl)
    loop
        execute command;
    end loop;
end
$$;

-- The partitions with where each ends; not the default one.
create or replace function login_etl_partitions(of regclass, out part regclass, out ends timestamp) returns setof record
    language sql stable set timezone = 'UTC' set datestyle = 'ISO' as $$
    select inhrelid::regclass, substring(pg_catalog.pg_get_expr(relpartbound, inhrelid) from 'TO \(''([^'']+)')::timestamp
    from pg_inherits
    join pg_class on pg_class.oid = inhrelid
    where inhparent = of and pg_catalog.pg_get_expr(relpartbound, inhrelid) <> 'DEFAULT'
$$;

-- Makes the partitions that will be needed, and drops those of the ledger whose messages are all past remembering. Returns
-- what it did. To be run every hour or so; a lock that it does not get soon is tried for again then, and nothing is refused
-- meanwhile: rows without a partition go to the default one, and are taken out of it as soon as they have one. The function's
-- schedule runs it, with the rights of its owner, and so finds tables only where they are now.
create or replace function login_etl_tend_partitions(remember interval default '28 days') returns setof text
    language plpgsql security definer set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' set lock_timeout = '500ms' as $$
declare
    scheme record;
    part text;
    starts timestamp;
    ends timestamp;
    range text;
begin
    if remember < interval '28 days' then
        raise exception 'a message can come back for 28 days, and would be inserted again';
    end if;
    for scheme in
        select login_etl_partitioning.*, parent, partdefid::regclass as fallback, relnamespace::regnamespace as namespace
        from login_etl_partitioning, pg_catalog.to_regclass(name) as parent, pg_partitioned_table, pg_class
        where partrelid = parent and pg_class.oid = parent
        -- The ledger first, in which order the function's statement locks them.
        order by name <> 'etl_ledger'
    loop
        select pg_catalog.max(partitions.ends) into starts from login_etl_partitions(scheme.parent) as partitions;
        while starts <= pg_catalog.now() + scheme.ahead loop
            ends := starts + scheme.step;
            part := pg_catalog.format('%s.%I', scheme.namespace, scheme.name || pg_catalog.to_char(starts, '_' || scheme.suffix));
            execute pg_catalog.format('create table %s (like %s including all)', part, scheme.parent);
            perform login_etl_dress(part, scheme.parent);
            -- Once its time has come, rows may be on their way to the default partition. Before, no insert has to wait; but
            -- PostgreSQL 11 has them all wait anyway, and this first, so that none waits for us while we wait for it.
            if starts <= pg_catalog.now() or pg_catalog.current_setting('server_version_num')::integer < 120000 then
                execute pg_catalog.format('lock table %s in access exclusive mode', scheme.parent);
            end if;
            -- So that no row comes there between the moving and the attaching, which would fail.
            execute pg_catalog.format('lock table %s in share row exclusive mode', scheme.fallback);
            execute pg_catalog.format(
                'with moved as (delete from %1$s where %2$I >= %3$L and %2$I < %4$L returning %5$s)
                 insert into %6$s (%5$s) select * from moved',
                scheme.fallback, scheme.key, starts::text || '+00', ends::text || '+00', login_etl_columns(scheme.parent), part
            );
            range := pg_catalog.format('for values from (%L) to (%L)', starts::text || '+00', ends::text || '+00');
            execute pg_catalog.format('alter table %s attach partition %s %s', scheme.parent, part, range);
            return next pg_catalog.format('made %s', part);
            starts := ends;
        end loop;
        for part in
            select partitions.part from login_etl_partitions(scheme.parent) as partitions
            where scheme.name = 'etl_ledger' and partitions.ends <= pg_catalog.now() - remember
        loop
            execute pg_catalog.format('alter table %s detach partition %s', scheme.parent, part);
            -- Keys under the epoch stay.
            execute pg_catalog.format('insert into %s select * from %s where sent_at <= ''epoch''', scheme.parent, part);
            execute pg_catalog.format('drop table %s', part);
            return next pg_catalog.format('dropped %s', part);
        end loop;
    end loop;
end
$$;
-- Whoever could create there could have the schedule run it.
do $$
begin
    if exists (
        select from pg_namespace, pg_catalog.aclexplode(coalesce(nspacl, pg_catalog.acldefault('n', nspowner))) as acl
        where pg_namespace.oid = (select relnamespace from pg_class where oid = 'login_etl_partitioning'::regclass)
            and acl.grantee = 0 and acl.privilege_type = 'CREATE'
    ) then
        raise exception 'everybody may create in this schema: let its owner revoke create on it from public first';
    end if;
    execute pg_catalog.format('alter function login_etl_tend_partitions(interval) set search_path = %s, pg_temp', (
        select relnamespace::regnamespace from pg_class where oid = 'login_etl_partitioning'::regclass
    ));
    revoke all on function login_etl_tend_partitions(interval) from public;
    if exists (select from pg_roles where rolname = 'login_etl') then
        grant execute on function login_etl_tend_partitions(interval) to login_etl;
    end if;
end
$$;
