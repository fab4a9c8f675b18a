-- Whoever may create functions in a schema that everybody's statements look into can have others run them. From version 15 on,
-- nobody may.
do $$
begin
    if exists (select from pg_namespace where nspname = 'public') then
        revoke create on schema public from public;
    end if;
end
$$;

-- The function's own user, with the rights it needs and no others; those on its table come with the table. It has no
-- password yet, so nobody can log in as it:
--   alter role login_etl password '...';
-- And the rights of the people who operate the pipeline: grant login_etl_operator to alice;
do $$
begin
    if not exists (select from pg_roles where rolname = 'login_etl') then
        create role login_etl login;
    end if;
    if not exists (select from pg_roles where rolname = 'login_etl_operator') then
        create role login_etl_operator nologin;
    end if;
end
$$;

-- To know what was inserted before, and to delete, and so to lock, what has expired.
grant select, insert, update, delete on etl_ledger to login_etl;
grant select on etl_ledger to login_etl_operator;
-- The ledger's old name, where there is one.
do $$
begin
    if pg_catalog.to_regclass('user_logins_ledger') is not null then
        grant select, insert, update, delete on user_logins_ledger to login_etl;
    end if;
end
$$;

-- What was acknowledged to SQS is on disk, whatever the server's own setting is: only remote_apply says more.
do $$
begin
    if pg_catalog.current_setting('synchronous_commit') <> 'remote_apply' then
        alter role login_etl set synchronous_commit = on;
    end if;
end
$$;

-- No statement outlives its invocation: the server ends it at the template's FunctionTimeout, behind a pooler too, and
-- from version 14 on as soon as the connection is gone.
alter role login_etl set statement_timeout = '30s';
do $$
begin
    if pg_catalog.current_setting('server_version_num')::integer >= 140000 then
        alter role login_etl set client_connection_check_interval = '1s';
    end if;
end
$$;
-- A large batch is written in a transaction of several statements. One that was left open, with its locks on the ledger, ends
-- with the invocation's time, and so does the session of an environment that is no more.
alter role login_etl set idle_in_transaction_session_timeout = '30s';
alter role login_etl set tcp_keepalives_idle = 10;
alter role login_etl set tcp_keepalives_interval = 5;
alter role login_etl set tcp_keepalives_count = 4;
