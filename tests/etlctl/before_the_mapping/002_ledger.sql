-- Which messages have been inserted: a key is written in the same statement as its row, and refuses a second one.
-- sent_at leads, so that new keys go to the end of the index and inserts stay fast as the ledger grows.
create table if not exists user_logins_ledger (
    sent_at    timestamptz not null,
    message_id uuid        not null,
    primary key (sent_at, message_id)
);
