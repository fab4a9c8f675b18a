with inserted as (insert into "user_logins" ("user_id", "device_type", "masked_ip", "masked_device_id", "locale", "app_version", "create_date")
select unnest($3::text[]), unnest($4::text[]), unnest($5::text[]), unnest($6::text[]), unnest($7::text[]), unnest($8::integer[]), unnest($9::date[]))
insert into etl_ledger (sent_at, message_id)
select unnest($1::timestamptz[]), unnest($2::uuid[])
