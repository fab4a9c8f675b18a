-- Inserts the rows and enters their messages in the ledger, in one atomic statement, which fails if the ledger has one of
-- them. Takes one array a column, all of one length; from a select list their elements go to the table one by one, and not to
-- a tuplestore first. Returns the number of messages.
with logins as (
    insert into user_logins (user_id, device_type, masked_ip, masked_device_id, locale, app_version, create_date)
    select
        unnest($3::text[]), unnest($4::text[]), unnest($5::text[]), unnest($6::text[]), unnest($7::text[]),
        unnest($8::integer[]), unnest($9::date[])
)
-- The statement itself comes first, so that no row is written for what the ledger refuses.
insert into user_logins_ledger (sent_at, message_id)
select unnest($1::timestamptz[]), unnest($2::uuid[])
