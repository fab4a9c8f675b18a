-- Which messages have been inserted: a key is written in the same statement as its row, and refuses a second one.
-- sent_at leads, so that new keys go to the end of the index and inserts stay fast as the ledger grows.
-- One ledger serves every mapping of a database. Before there were mappings, it was user_logins_ledger: a function of
-- that time goes on inserting through the view, until it is replaced.
do $$
begin
    if pg_catalog.to_regclass('etl_ledger') is null and pg_catalog.to_regclass('user_logins_ledger') is not null then
        alter table user_logins_ledger rename to etl_ledger;
        create view user_logins_ledger as select sent_at, message_id from etl_ledger;
    end if;
end
$$;
create table if not exists etl_ledger (
    sent_at    timestamptz not null,
    message_id uuid        not null,
    primary key (sent_at, message_id)
);
