with entered as (
insert into etl_ledger (sent_at, message_id)
select * from unnest($1::timestamptz[], $2::uuid[])
on conflict do nothing
returning sent_at as ledger_sent_at, message_id as ledger_message_id
)
insert into "user_logins" ("user_id", "device_type", "masked_ip", "masked_device_id", "locale", "app_version", "create_date")
select column_1, column_2, column_3, column_4, column_5, column_6, column_7
from unnest($1::timestamptz[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::integer[], $9::date[])
as batch (ledger_sent_at, ledger_message_id, column_1, column_2, column_3, column_4, column_5, column_6, column_7)
join entered using (ledger_sent_at, ledger_message_id)
