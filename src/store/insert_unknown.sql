-- Inserts the rows whose messages the ledger does not know, and enters those messages, in one atomic statement.
-- Takes one array a column; the keys are unique within the call. Returns the number of rows inserted.
with entered as (
    insert into user_logins_ledger (sent_at, message_id)
    select sent_at, message_id
    from unnest($1::timestamptz[], $2::uuid[]) as batch (sent_at, message_id)
    on conflict do nothing
    returning sent_at, message_id
)
insert into user_logins (user_id, device_type, masked_ip, masked_device_id, locale, app_version, create_date)
select user_id, device_type, masked_ip, masked_device_id, locale, app_version, create_date
from unnest(
        $1::timestamptz[], $2::uuid[],
        $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::integer[], $9::date[]
    )
    as batch (
        sent_at, message_id,
        user_id, device_type, masked_ip, masked_device_id, locale, app_version, create_date
    )
join entered using (sent_at, message_id)
