-- Deletes up to $2 keys sent before $1, oldest first. Skips keys that another session is deleting.
-- Keys under the epoch stay. The times appear twice because partitions of the ledger can have equal ctids.
delete from etl_ledger
where sent_at > 'epoch' and sent_at < $1 and ctid = any (array(
    select ctid
    from etl_ledger
    where sent_at > 'epoch' and sent_at < $1
    order by sent_at, message_id
    limit $2
    for update skip locked
))
