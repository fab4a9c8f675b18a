-- Who recovered what, and why. Rows are added, and never changed or removed.
create table if not exists user_logins_audit (
    id         bigint generated always as identity primary key,
    at         timestamptz not null default clock_timestamp(),
    db_user    text        not null default session_user,
    db_client  inet                 default inet_client_addr(),
    operator   text        not null, -- the AWS identity, and the user and host, as the tool found them
    action     text        not null check (action in ('recover', 'reveal')),
    reason     text        not null check (reason ~ '\S'),
    source     text        not null, -- where the masks came from: arguments, a file's name, a query, a message's id
    requested  integer     not null,
    recovered  integer     not null,
    key_ids    text[]      not null, -- the keys of those that were recovered; '' is the unnamed key
    masks      text[]                -- those that were recovered, up to a thousand
);

create or replace function user_logins_audit_only_grows() returns trigger language plpgsql as $$
begin
    raise exception 'user_logins_audit only grows' using errcode = 'insufficient_privilege';
end
$$;
drop trigger if exists user_logins_audit_only_grows on user_logins_audit;
create trigger user_logins_audit_only_grows
    before update or delete or truncate on user_logins_audit
    for each statement execute procedure user_logins_audit_only_grows();

-- The rights of the people who operate the pipeline: grant login_etl_operator to alice;
do $$
begin
    if not exists (select from pg_roles where rolname = 'login_etl_operator') then
        create role login_etl_operator nologin;
    end if;
end
$$;
grant select on user_logins_ledger, duplicate_ips, duplicate_devices to login_etl_operator;
-- To read rows and to bring them under a new key, in each partition too: that is where it is done.
do $$
declare
    part regclass;
begin
    for part in
        with recursive tree (oid) as (
            select 'user_logins'::regclass::oid
            union all
            select inhrelid from pg_inherits join tree on inhparent = tree.oid
        )
        select oid from tree
    loop
        execute format('grant select, update (masked_ip, masked_device_id) on %s to login_etl_operator', part);
    end loop;
end
$$;
-- Not who and when, which the server says.
grant insert (operator, action, reason, source, requested, recovered, key_ids, masks) on user_logins_audit to login_etl_operator;
