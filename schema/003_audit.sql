-- Who recovered what, and why. Rows are added, and never changed or removed. Before there were
-- mappings, it was user_logins_audit.
do $$
begin
    if pg_catalog.to_regclass('etl_audit') is null and pg_catalog.to_regclass('user_logins_audit') is not null then
        alter table user_logins_audit rename to etl_audit;
        drop trigger if exists user_logins_audit_only_grows on etl_audit;
        drop function if exists user_logins_audit_only_grows();
    end if;
end
$$;
create table if not exists etl_audit (
    id         bigint generated always as identity primary key,
    at         timestamptz not null default pg_catalog.clock_timestamp(),
    db_user    text        not null default session_user,
    db_client  inet                 default pg_catalog.inet_client_addr(),
    operator   text        not null, -- the AWS identity, and the user and host, as the tool found them
    action     text        not null check (action in ('recover', 'reveal')),
    reason     text        not null check (reason ~ '\S'),
    source     text        not null, -- where the masks came from: arguments, a file's name, a query, a message's id
    requested  integer     not null,
    recovered  integer     not null,
    key_ids    text[]      not null, -- the keys of those that were recovered; '' is the unnamed key
    masks      text[]                -- those that were recovered, up to a thousand
);

create or replace function etl_audit_only_grows() returns trigger language plpgsql as $$
begin
    raise exception 'etl_audit only grows' using errcode = 'insufficient_privilege';
end
$$;
drop trigger if exists etl_audit_only_grows on etl_audit;
create trigger etl_audit_only_grows
    before update or delete or truncate on etl_audit
    for each statement execute procedure etl_audit_only_grows();

-- Not who and when, which the server says.
grant insert (operator, action, reason, source, requested, recovered, key_ids, masks) on etl_audit to login_etl_operator;
