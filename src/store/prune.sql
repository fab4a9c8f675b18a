-- Deletes up to $2 of the keys that were sent before $1, the oldest first; what another session is deleting is left to it.
-- Keys under the epoch stay. The times stand there twice because the partitions of a ledger share their ctids.
delete from etl_ledger
where sent_at > 'epoch' and sent_at < $1 and ctid = any (array(
    select ctid
    from etl_ledger
    where sent_at > 'epoch' and sent_at < $1
    order by sent_at, message_id
    limit $2
    for update skip locked
))
