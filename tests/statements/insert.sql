with inserted as (insert into "user_logins" ("user_id", "device_type", "masked_ip", "masked_device_id", "locale", "app_version", "create_date")
select pg_catalog.unnest($3::text[]), pg_catalog.unnest($4::text[]), pg_catalog.unnest($5::text[]), pg_catalog.unnest($6::text[]), pg_catalog.unnest($7::text[]), pg_catalog.unnest($8::integer[]), pg_catalog.unnest($9::date[]))
insert into etl_ledger (sent_at, message_id)
select pg_catalog.unnest($1::timestamptz[]), pg_catalog.unnest($2::uuid[])
