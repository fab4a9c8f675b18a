-- A large batch is written in a transaction of several statements. One that was left open, with its locks on the ledger, ends
-- with the invocation's time, and so does the session of an environment that is no more.
alter role login_etl set idle_in_transaction_session_timeout = '30s';
alter role login_etl set tcp_keepalives_idle = 10;
alter role login_etl set tcp_keepalives_interval = 5;
alter role login_etl set tcp_keepalives_count = 4;
