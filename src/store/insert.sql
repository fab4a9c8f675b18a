-- Inserts the rows and enters their messages in the ledger, in one atomic statement, which fails if the ledger has one of
-- them. Takes one array a column. Returns the number of messages.
with logins as (
    insert into user_logins (user_id, device_type, masked_ip, masked_device_id, locale, app_version, create_date)
    select user_id, device_type, masked_ip, masked_device_id, locale, app_version, create_date
    from unnest($3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::integer[], $9::date[])
        as batch (user_id, device_type, masked_ip, masked_device_id, locale, app_version, create_date)
)
-- The statement itself comes first, so that no row is written for what the ledger refuses.
insert into user_logins_ledger (sent_at, message_id)
select sent_at, message_id
from unnest($1::timestamptz[], $2::uuid[]) as batch (sent_at, message_id)
