-- Turns a table into a partitioned one and back, while the function goes on inserting: see docs/partition-the-tables.md.
-- Needs partitions.sql, PostgreSQL 11 or later, and to be called by the tables' owner:
--   call login_etl_partition('user_logins');
--   call login_etl_unpartition('user_logins');

-- The views that read a table.
create or replace function login_etl_views(of regclass) returns setof regclass language sql stable as $$
    select distinct ev_class::regclass
    from pg_depend
    join pg_rewrite on classid = 'pg_rewrite'::regclass and objid = pg_rewrite.oid
    join pg_class on pg_class.oid = ev_class
    where refclassid = 'pg_class'::regclass and refobjid = of and relkind = 'v'
$$;

-- Runs a command that has to have the table to itself. Who waits for an exclusive lock keeps all others waiting behind it,
-- so it waits for half a second at most, and tries again.
create or replace procedure login_etl_alone(name text, command text) language plpgsql as $$
declare
    -- A reader of a view has that before it asks for the table.
    relations text := (select pg_catalog.string_agg(relation, ', ') from (
        select login_etl_views::text as relation from login_etl_views(name::regclass) union all select name
    ) as relations);
    since timestamptz;
begin
    for attempt in 1..100 loop
        begin
            -- Nobody's insert waits for this one; autovacuum, which it waits for, makes way.
            execute pg_catalog.format('lock table only %s in share update exclusive mode', name);
            perform pg_catalog.set_config('lock_timeout', '500ms', true);
            execute pg_catalog.format('lock table %s in access exclusive mode', relations);
            since := pg_catalog.clock_timestamp();
            execute command;
            raise notice 'had % alone for % ms', name, pg_catalog.round(1000 * extract(epoch from pg_catalog.clock_timestamp() - since)::numeric, 1);
            return;
        exception when lock_not_available or deadlock_detected then
            raise notice 'somebody else has %, trying again', name;
        end;
        commit;
        perform pg_catalog.pg_sleep(0.5 + pg_catalog.random());
    end loop;
    raise exception 'somebody has had a lock on % all the time: end that, and call this again', name;
end
$$;

-- How these views are made again, to read whatever table has the name then.
create or replace function login_etl_view_definitions(of regclass) returns text language sql stable as $$
    select pg_catalog.string_agg(
        pg_catalog.format(
            'create or replace view %s%s as %s',
            oid::regclass,
            case when reloptions is not null then pg_catalog.format(' with (%s)', pg_catalog.array_to_string(reloptions, ', ')) end,
            pg_catalog.pg_get_viewdef(oid)
        ),
        ' '
    )
    from pg_class
    where oid in (select * from login_etl_views(of))
$$;

-- The moment itself: the table becomes the first partition of the one that was prepared. None of it reads a row.
create or replace function login_etl_turn(name text, first text, bound text) returns void language plpgsql as $$
declare
    fallback text := name || '_default';
    prepared text := name || '_partitioned';
    definitions text := login_etl_view_definitions(name::regclass);
    index record;
begin
    if exists (select from pg_inherits where inhrelid = fallback::regclass) then
        execute pg_catalog.format('alter table %I no inherit %I', fallback, name);
    end if;
    execute pg_catalog.format('alter table %I rename to %I', name, first);
    execute pg_catalog.format('alter table %I rename to %I', prepared, name);
    execute pg_catalog.format('alter table %I attach partition %I for values from (minvalue) to (%L)', name, first, bound);
    execute pg_catalog.format('alter table %I attach partition %I default', name, fallback);
    execute pg_catalog.format('alter table %I drop constraint login_etl_bound', first);
    execute pg_catalog.format('alter table %I drop constraint login_etl_beyond', fallback);
    -- The files of the schema know indexes by their names.
    for index in
        select part.relname as known, whole.relname as new
        from pg_inherits
        join pg_index on indexrelid = inhrelid
        join pg_class part on part.oid = inhrelid
        join pg_class whole on whole.oid = inhparent
        where indrelid = first::regclass
    loop
        execute pg_catalog.format('alter index %I rename to %I', index.known, 'login_etl_index');
        execute pg_catalog.format('alter index %I rename to %I', index.new, index.known);
        execute pg_catalog.format('alter index login_etl_index rename to %I', pg_catalog.left(pg_catalog.replace(index.new, prepared, first), 63));
    end loop;
    execute coalesce(definitions, 'select');
end
$$;

create or replace procedure login_etl_partition(name text) language plpgsql as $$
declare
    fallback text := name || '_default';
    prepared text := name || '_partitioned';
    scheme record;
    bound text;
    first text;
    beyond text;
    obstacles text;
    strays bigint := 0;
begin
    select * into strict scheme from login_etl_partitioning where login_etl_partitioning.name = login_etl_partition.name;
    if (select relkind from pg_class where oid = name::regclass) <> 'r' then
        raise exception '% is partitioned', name;
    elsif pg_catalog.to_regclass(prepared) is not null or pg_catalog.to_regclass(fallback) is not null then
        raise exception 'an earlier call was broken off: call login_etl_unpartition(%), then this again', pg_catalog.quote_literal(name);
    end if;
    select pg_catalog.string_agg(obstacle, '; ') into obstacles from (
        select pg_catalog.pg_describe_object(classid, objid, objsubid) as obstacle
        from pg_depend
        left join pg_class on classid = 'pg_class'::regclass and pg_class.oid = objid
        left join pg_constraint on classid = 'pg_constraint'::regclass and pg_constraint.oid = objid
        left join pg_rewrite on classid = 'pg_rewrite'::regclass and pg_rewrite.oid = objid
        where refclassid = 'pg_class'::regclass and refobjid = name::regclass
            and classid not in ('pg_type'::regclass, 'pg_attrdef'::regclass, 'pg_statistic_ext'::regclass)
            and relkind is distinct from 't' and relkind is distinct from 'i' and objid <> refobjid
            and (conrelid is distinct from refobjid or contype = 'f')
            and not coalesce(ev_class in (select * from login_etl_views(name::regclass)), false)
        union all
        select 'row-level security' from pg_class where oid = name::regclass and relrowsecurity
    ) as obstacles;
    if obstacles is not null then
        raise exception '% has what would not be carried over: %', name, obstacles;
    end if;

    -- Far enough ahead that nothing is written beyond it before the end of this.
    bound := pg_catalog.to_char(pg_catalog.date_trunc(scheme.unit, pg_catalog.now() at time zone 'UTC') + scheme.ahead, 'YYYY-MM-DD 00:00+00');
    first := name || pg_catalog.to_char(bound::date, '_"before"_YYYY_MM_DD');
    beyond := pg_catalog.format('%1$I is null or %1$I >= %2$L', scheme.key, bound);
    if name = 'etl_ledger' and exists (select from etl_ledger where sent_at >= bound::timestamptz) then
        raise exception 'the ledger has keys of messages that were sent after %: they cannot be SQS''s, delete them', bound;
    end if;

    execute pg_catalog.format('create table %I (like %I including all) partition by range (%I)', prepared, name, scheme.key);
    perform login_etl_dress(prepared::regclass, name::regclass);
    execute pg_catalog.format('create table %I (like %I including all, constraint login_etl_beyond check (%s))', fallback, name, beyond);
    perform login_etl_dress(fallback::regclass, name::regclass);
    commit;

    call login_etl_alone(name, pg_catalog.format(
        'alter table %I add constraint login_etl_bound check (not (%s)) no inherit not valid', name, beyond
    ));
    commit;
    if name <> 'etl_ledger' then
        -- Whoever reads the table sees them all the same, once, as what inherits from a table is read with it.
        call login_etl_alone(name, pg_catalog.format('alter table %I inherit %I', fallback, name));
        commit;
        execute pg_catalog.format(
            'with moved as (delete from only %I where %s returning %s) insert into %I (%3$s) select * from moved',
            name, beyond, login_etl_columns(name::regclass), fallback
        );
        get diagnostics strays = row_count;
        commit;
    end if;
    raise notice '% rows moved to %; reading % through', strays, fallback, name;
    execute pg_catalog.format('alter table only %I validate constraint login_etl_bound', name);
    commit;
    call login_etl_alone(name, pg_catalog.format('select login_etl_turn(%L, %L, %L)', name, first, bound));
    commit;
    raise notice '% is partitioned: what there was is in %, for all before %', name, first, bound;
end
$$;

-- Back to one table, the first partition, with the rows of all others; they are copied while everybody else waits.
create or replace function login_etl_turn_back(name text) returns void language plpgsql as $$
declare
    prepared text := name || '_partitioned';
    definitions text := login_etl_view_definitions(name::regclass);
    first regclass := (
        select inhrelid from pg_inherits join pg_class on pg_class.oid = inhrelid
        where inhparent = name::regclass and pg_catalog.pg_get_expr(relpartbound, inhrelid) like '%(MINVALUE)%'
    );
    indexes text;
begin
    if first is null then
        raise exception 'the table that % once was has been dropped', name;
    end if;
    select pg_catalog.string_agg(pg_catalog.format('alter index %s rename to %I', inhrelid::regclass, relname), ';') into indexes
    from pg_inherits
    join pg_index on indexrelid = inhrelid
    join pg_class on pg_class.oid = inhparent
    where indrelid = first;
    execute pg_catalog.format('alter table %I detach partition %s', name, first);
    execute pg_catalog.format('insert into %s (%s) select %2$s from %I', first, login_etl_columns(first), name);
    perform login_etl_dress(first, name::regclass);
    execute pg_catalog.format('alter table %I rename to %I', name, prepared);
    execute pg_catalog.format('alter table %s rename to %I', first, name);
    execute coalesce(definitions, 'select');
    execute pg_catalog.format('drop table %I', prepared);
    execute coalesce(indexes, 'select');
end
$$;

-- Undoes a call of login_etl_partition, also one that was broken off.
create or replace procedure login_etl_unpartition(name text) language plpgsql as $$
declare
    fallback text := name || '_default';
    prepared text := name || '_partitioned';
begin
    if (select relkind from pg_class where oid = name::regclass) = 'p' then
        call login_etl_alone(name, pg_catalog.format('select login_etl_turn_back(%L)', name));
        commit;
        raise notice '% is one table again', name;
        return;
    end if;
    call login_etl_alone(name, pg_catalog.format('alter table %I drop constraint if exists login_etl_bound', name));
    commit;
    if pg_catalog.to_regclass(fallback) is not null then
        execute pg_catalog.format(
            'with moved as (delete from only %I returning %s) insert into %I (%2$s) select * from moved',
            fallback, login_etl_columns(fallback::regclass), name
        );
        commit;
        call login_etl_alone(name, pg_catalog.format('drop table %I', fallback));
    end if;
    execute pg_catalog.format('drop table if exists %I', prepared);
    commit;
    raise notice '% is as it was', name;
end
$$;
