-- The function's own user, with the rights it needs and no others. It has no password yet, so nobody can log in as it:
--   alter role login_etl password '…';
do $$
begin
    if not exists (select from pg_roles where rolname = 'login_etl') then
        create role login_etl login;
    end if;
end
$$;

grant insert on user_logins to login_etl;
-- To know what was inserted before, and to delete, and so to lock, what has expired.
grant select, insert, update, delete on user_logins_ledger to login_etl;

-- No statement outlives its invocation: the server ends it at the template's FunctionTimeout, behind a pooler too, and
-- from version 14 on as soon as the connection is gone.
alter role login_etl set statement_timeout = '30s';
do $$
begin
    if current_setting('server_version_num')::integer >= 140000 then
        alter role login_etl set client_connection_check_interval = '1s';
    end if;
end
$$;
