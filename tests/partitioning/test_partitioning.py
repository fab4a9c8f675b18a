"""Partitions the tables while the function inserts: no row is lost, doubled or refused, and all tools work as before."""

import json
import random
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta

import psycopg
import pytest
from world import paths

STORE = paths.ROOT / "src" / "store"
INSERT, INSERT_UNKNOWN = ((paths.ROOT / "tests" / "statements" / f"{name}.sql").read_text() for name in ("insert", "insert_unknown"))
PRUNE = (STORE / "prune.sql").read_text()
PARTITIONS = (paths.ROOT / "schema" / "partitioning" / "partitions.sql").read_text()
TABLES = ("user_logins", "etl_ledger")
# How far ahead partitions are made.
USUAL = {"user_logins": "2 months", "etl_ledger": "3 weeks"}
EPOCH = datetime.fromtimestamp(0, UTC)
# Rows from before partitioning that fit no range: without a day, or with a day far in the future.
STRAYS = 500


class Function:
    """The function as the database sees it: its user and its statements. After every third batch, an earlier batch is redelivered."""

    def __init__(self, world, batch_size: int = 50):
        self.world, self.batch_size = world, batch_size
        self.sent: list[list[tuple[datetime, uuid.UUID]]] = []

    def connect(self) -> psycopg.Connection:
        session = self.world.servers.postgres.connect(self.world.name, autocommit=True, cursor_factory=psycopg.RawCursor)
        session.execute("set session authorization login_etl")
        return session

    def insert(self, session, keys, masked_ip: str = "ip") -> int:
        """Inserts a row for each key, with the message's id as its user; returns the number of new rows."""
        keys = sorted(keys)
        sent_at, ids = zip(*keys)
        users, devices, count = [str(id) for id in ids], [f"device {id}" for id in ids], len(ids)
        columns = users, ["ios"] * count, [masked_ip] * count, devices, [None] * count, [230] * count, [datetime.now(UTC).date()] * count
        batch = [list(sent_at), list(ids), *columns]
        # As in the function, the first is prepared and the second is not: this may change the order in which tables are locked.
        try:
            return session.execute(INSERT, batch, prepare=True).rowcount
        except psycopg.errors.UniqueViolation:
            return session.execute(INSERT_UNKNOWN, batch, prepare=False).rowcount

    def run(self, number: int, stop: threading.Event) -> None:
        chance = random.Random(number)
        sent: list[list[tuple[datetime, uuid.UUID]]] = []
        with self.connect() as session:
            while not stop.is_set():
                now = datetime.now(UTC)
                batch = [(now - timedelta(seconds=chance.random() * 86400), uuid.uuid4()) for _ in range(self.batch_size)]
                assert self.insert(session, batch) == self.batch_size
                sent.append(batch)
                if len(sent) % 3 == 0:
                    again, fresh = chance.choice(sent), (now, uuid.uuid4())
                    assert self.insert(session, [*again, fresh]) == 1
                    sent.append([fresh])
        self.sent += sent

    @contextmanager
    def running(self, sessions: int = 2):
        """Inserts in the background; a refused statement fails the test."""
        stop = threading.Event()
        with ThreadPoolExecutor(sessions) as pool:
            inserting = [pool.submit(self.run, number, stop) for number in range(sessions)]
            try:
                yield
            finally:
                stop.set()
        for session in inserting:
            session.result()

    def messages(self) -> list[tuple[datetime, uuid.UUID]]:
        return [key for batch in self.sent for key in batch]


def fill(world) -> set[str]:
    """Inserts rows and keys from before partitioning; returns the rows' users."""
    with world.connect() as database:
        database.execute("""
            insert into user_logins
            select 'before ' || number, 'ios', 'ip', 'device ' || number, 'RU', 230, '2026-01-01'::date + number % 300
            from generate_series(1, 20000) as number""")
        database.execute(f"""
            insert into user_logins
            select 'stray ' || number, 'ios', 'ip', 'device ' || number, 'RU', 230, case number % 2 when 0 then '9999-12-31'::date end
            from generate_series(1, {STRAYS}) as number""")
        database.execute("""
            insert into etl_ledger
            select now() - number * interval '2 minutes', gen_random_uuid() from generate_series(1, 20000) as number
            union all
            select 'epoch', gen_random_uuid() from generate_series(1, 10)""")
        return {user for (user,) in database.execute("select user_id from user_logins")}


def call(world, procedure: str, *tables: str) -> list[str]:
    """Calls a procedure for each table; returns its notices."""
    said: list[str] = []
    with world.connect() as database:
        database.add_notice_handler(lambda notice: said.append(notice.message_primary))
        database.execute("set client_min_messages = debug1")
        for table in tables:
            database.execute(f"call login_etl_{procedure}('{table}')")
    return said


def partition(world) -> list[str]:
    return call(world, "partition", *TABLES)


def tend(world, tries: int = 3) -> list[str]:
    """Makes and drops partitions as the function does; if a lock is not available, tries again, as the schedule does."""
    try:
        with world.connect() as database:
            database.execute("set role login_etl")
            return [done for (done,) in database.execute("select login_etl_tend_partitions()").fetchall()]
    except psycopg.errors.LockNotAvailable:
        if tries == 1:
            raise
        return tend(world, tries - 1)


def pass_time(world, **ahead: str) -> None:
    """Changes how far ahead partitions are made: `-3 months` simulates a table that was partitioned long ago. Without arguments, resets it."""
    text = PARTITIONS
    for table, usual in USUAL.items():
        assert f"interval '{usual}'" in text
        text = text.replace(f"interval '{usual}'", f"interval '{ahead.get(table, usual)}'")
    with world.connect() as database:
        database.execute(text)


def query(world, text: str) -> list[tuple]:
    with world.connect() as database:
        return database.execute(text).fetchall()


def users(world) -> Counter:
    return Counter(user for (user,) in query(world, "select user_id from user_logins"))


def keys(world) -> Counter:
    return Counter(query(world, "select sent_at, message_id from etl_ledger"))


def in_default(world) -> list[int]:
    return [query(world, f"select count(*) from {table}_default")[0][0] for table in TABLES]


def where(world, user: str) -> str:
    return query(world, f"select tableoid::regclass::text from user_logins where user_id = '{user}'")[0][0]


def relations(world) -> set[tuple]:
    """The schema's relations, with owners, rights, options and view definitions."""
    return set(
        query(
            world,
            """select relname, relkind, relowner, relacl::text, reloptions::text, case relkind when 'v' then pg_get_viewdef(oid) end,
                      (select string_agg(attname || attacl::text, ', ' order by attnum) from pg_attribute where attrelid = pg_class.oid)
               from pg_class where relnamespace = 'public'::regnamespace""",
        )
    )


# During inserts.


def test_partitioning_and_unpartitioning_during_inserts_loses_and_doubles_no_row(world):
    before, keys_before, function = fill(world), keys(world), Function(world)
    counts, reading = set(), threading.Event()

    def read():
        with world.connect() as database:
            while not reading.is_set():
                those = "where device_type = 'ios' and user_id ~ '^(before|stray)'"
                counts.add(database.execute(f"select count(*), count(distinct user_id) from user_logins {those}").fetchone())

    with ThreadPoolExecutor(1) as pool, function.running():
        reader = pool.submit(read)
        try:
            for step in (partition, tend, lambda world: call(world, "unpartition", *TABLES), partition, tend):
                step(world)
        finally:
            reading.set()
    reader.result()
    assert counts == {(len(before), len(before))}, "a reader always sees each earlier row once"
    sent = function.messages()
    assert len(sent) > 1000
    assert users(world) == Counter([*before, *(str(id) for _, id in sent)])
    assert keys(world) == keys_before + Counter(sent)
    assert query(world, "select count(*) from user_logins_default") == [(STRAYS,)]
    with function.connect() as session:
        assert [function.insert(session, batch) for batch in function.sent] == [0] * len(function.sent)


def test_late_partitions_take_over_the_rows_in_the_default_partition(world):
    pass_time(world, user_logins="-3 months", etl_ledger="-2 weeks")
    partition(world)
    pass_time(world)
    function = Function(world)
    with function.connect() as session:
        early = [(datetime.now(UTC), uuid.uuid4()) for _ in range(100)]
        assert function.insert(session, early) == 100
    assert in_default(world) == [100, 100]
    with function.running():
        made = tend(world)
    assert len(made) > 5
    sent = [*early, *function.messages()]
    assert users(world) == Counter(str(id) for _, id in sent)
    assert keys(world) == Counter(sent)
    assert in_default(world) == [0, 0]
    assert tend(world) == []


def test_an_uncommitted_row_in_the_default_partition_moves_with_the_others(world):
    partition(world)
    function = Function(world)
    ahead = query(world, "select max(ends) from login_etl_partitions('etl_ledger')")[0][0].replace(tzinfo=UTC)
    row = [(ahead, uuid.uuid4())]
    with function.connect() as session, ThreadPoolExecutor(1) as pool:
        with session.transaction():
            function.insert(session, row)
            tending = pool.submit(tend, world)
            waiting = "select from pg_locks where not granted and relation::regclass::text like 'etl_ledger%'"
            world.until(lambda: query(world, waiting))
        assert tending.result()
        assert function.insert(session, row) == 0
    assert in_default(world) == [0, 0]


def test_a_long_read_delays_the_function_only_for_moments(world):
    fill(world)
    function, said = Function(world), []
    sessions = world.locked("user_logins", "access share"), world.connect(), function.connect()
    with sessions[0], sessions[1] as database, sessions[2] as session, ThreadPoolExecutor(1) as pool:
        database.add_notice_handler(lambda notice: said.append(notice.message_primary))
        calling = pool.submit(database.execute, "call login_etl_partition('user_logins')")
        try:
            world.until(lambda: sum("trying again" in text for text in said) >= 2)
            session.execute("set statement_timeout = '5s'")
            assert function.insert(session, [(datetime.now(UTC), uuid.uuid4())]) == 1
        finally:
            database.cancel()
        with pytest.raises(psycopg.errors.QueryCanceled):
            calling.result()


def test_the_table_is_scanned_once_under_a_lock_that_blocks_nobody(world):
    fill(world)
    said = partition(world)
    assert sum(text.startswith("verifying table") for text in said) == len(TABLES)
    assert sum("is implied by existing constraints" in text for text in said) == 2 * len(TABLES)


# Rows in partitions.


def test_rows_of_any_day_or_none_are_in_their_partition(world):
    partition(world)
    tend(world)
    today = datetime.now(UTC).date()
    after = query(world, "select part::text, ends::date from login_etl_partitions('user_logins') order by ends")
    days = {"past": date(1999, 1, 1), "today": today, "next": after[0][1], "far": date(9999, 12, 31), "none": None}
    with world.connect() as database:
        for user, day in days.items():
            database.execute("insert into user_logins (user_id, create_date) values (%s, %s)", [user, day])
    first, second = after[0][0], after[1][0]
    assert {user: where(world, user) for user in days} == {
        "past": first,
        "today": first,
        "next": second,
        "far": "user_logins_default",
        "none": "user_logins_default",
    }
    function = Function(world)
    now = datetime.now(UTC)
    messages = [(time, uuid.uuid4()) for time in (EPOCH, datetime(2020, 1, 1, tzinfo=UTC), now, now + timedelta(days=400))]
    with function.connect() as session:
        assert [function.insert(session, messages), function.insert(session, messages)] == [4, 0]


def test_a_week_is_dropped_once_its_messages_cannot_be_redelivered_and_keys_under_the_epoch_stay(world):
    pass_time(world, etl_ledger="-10 weeks")
    function, now = Function(world), datetime.now(UTC)
    epoch, old = [(EPOCH, uuid.uuid4())], [(now - timedelta(days=100), uuid.uuid4())]
    with function.connect() as session:
        assert function.insert(session, epoch + old) == 2
        partition(world)
        pass_time(world)
        since = [(now - timedelta(days=days), uuid.uuid4()) for days in range(70)]
        assert function.insert(session, since) == 70
        assert {text.split()[0] for text in tend(world)} == {"made", "dropped"}
        kept = {sent_at for sent_at, _ in keys(world)}
        assert {sent_at for sent_at, _ in since if sent_at > now - timedelta(days=28)} <= kept
        assert EPOCH in kept
        assert min(kept - {EPOCH}) > now - timedelta(days=35, minutes=1)
        # A message that claims to be from a dropped week.
        late = [(now - timedelta(days=99), uuid.uuid4())]
        assert [function.insert(session, batch) for batch in (late, late, epoch)] == [1, 0, 0]
    assert tend(world) == []
    with pytest.raises(psycopg.errors.RaiseException, match="28 days"):
        query(world, "select login_etl_tend_partitions('27 days')")


def test_pruning_deletes_an_expired_key_and_no_key_with_the_same_ctid_in_another_partition(world):
    pass_time(world, etl_ledger="-10 weeks")
    partition(world)
    pass_time(world)
    query(world, "select login_etl_tend_partitions('100 days')")
    function, now = Function(world), datetime.now(UTC)
    epoch, expired, live = ((sent_at, uuid.uuid4()) for sent_at in (EPOCH, now - timedelta(days=50), now))
    with function.connect() as session:
        assert function.insert(session, [epoch, expired, live]) == 3
        places = "select count(distinct tableoid), count(distinct ctid) from etl_ledger"
        assert query(world, places) == [(3, 1)]
        assert session.execute(PRUNE, [now - timedelta(days=42), 1000]).rowcount == 1
    assert keys(world) == Counter([epoch, live])


# Tools, views and rights.


def test_etlctl_works_as_before(world):
    def doctor():
        return [(check["area"], check["state"]) for check in json.loads(world.run("doctor", "--json").stdout)]

    ip, device = (world.masks(field, value)[""] for field, value in (("ip", "198.18.0.1"), ("device_id", "593-47-5928")))
    health = doctor()
    partition(world)
    tend(world)
    bound = query(world, "select min(ends)::date from login_etl_partitions('user_logins')")[0][0]
    with world.connect() as database:
        for day in (date(2026, 1, 1), datetime.now(UTC).date(), bound, None):
            row = "insert into user_logins (user_id, masked_ip, masked_device_id, create_date) values (%s, %s, %s, %s)"
            database.execute(row, [str(day), ip, device, day])
    function = Function(world)
    with function.connect() as session:
        function.insert(session, [(datetime.now(UTC), uuid.uuid4())])
    operator = world.user("login_etl_operator")
    assert world.json("migrate") == {"applied": []}
    assert {migration["state"] for migration in world.json("migrate", "--check")} == {"applied"}
    assert doctor() == health
    rows = world.json("status", environment=operator)["rows"]
    assert (rows["today"], rows["estimate"], rows["ledger"]["estimate"]) == (2, 5, 1)
    assert world.json("find", "--ip", "198.18.0.1", environment=operator)["row_count"] == 4
    without_day = "select masked_ip from user_logins where create_date is null"
    recovered = world.json("recover", "--reason", "a test", "--yes", "--query", without_day, environment=operator)
    assert [row["ip"] for row in recovered] == ["198.18.0.1"]
    assert query(world, "select count(*) from etl_audit") == [(1,)]
    world.json("keys", "add", "2026-12")
    world.json("keys", "activate", "2026-12")
    remasked = world.json("keys", "remask", status=1, environment=operator)
    assert (remasked["changed"], remasked["read"], remasked["unrecoverable"], remasked["rows_under_other_keys"]) == (4, 5, 1, 1)
    assert query(world, "select row_count from user_logins_masked_ip_duplicates") == [(4,)]
    assert world.json("find", "--ip", "198.18.0.1", "--since", str(bound), environment=operator)["row_count"] == 1


def test_status_counts_each_row_once_after_a_partitioned_table_was_analysed(world):
    fill(world)
    partition(world)
    tend(world)
    with world.connect() as database:
        for table in TABLES:
            database.execute(f"analyze {table}")
    rows = world.json("status")["rows"]
    counted = [query(world, f"select count(*) from {table}")[0][0] for table in TABLES]
    assert [rows["estimate"], rows["ledger"]["estimate"]] == counted


def test_owner_rights_views_and_the_names_of_indexes_are_carried_over_and_back(world):
    owner = world.user()["DATABASE_USER"]
    with world.connect() as database:
        database.execute(f"grant create on schema public to {owner}")
        latest = "select * from user_logins where create_date > now() - interval '1 day'"
        database.execute(f"create view latest with (security_barrier = true) as {latest}")
        database.execute("create index user_logins_create_date_idx on user_logins (create_date)")
        database.execute(f"grant select (user_id) on user_logins to {owner} with grant option; grant select on user_logins to public")
        for table in TABLES:
            database.execute(f"alter table {table} owner to {owner}")
    before = relations(world)
    partition(world)
    tend(world)
    for table in TABLES:
        parts = f"""
            select relowner, relacl::text from pg_class left join pg_inherits on inhrelid = pg_class.oid
            where '{table}'::regclass in (pg_class.oid, inhparent)"""
        assert len(query(world, parts)) == 4
        assert len(set(query(world, parts))) == 1, "partitions have the table's owner and rights"
    partitioned = relations(world)
    assert {name for name, *_ in partitioned} >= {name for name, *_ in before}
    assert {view for view in partitioned if view[1] == "v"} == {view for view in before if view[1] == "v"}
    world.servers.apply_schema(world.name)
    assert relations(world) == partitioned, "the schema's files change nothing when they are applied again"
    function = Function(world)
    with function.connect() as session:
        function.insert(session, [(datetime.now(UTC), uuid.uuid4())])
    assert query(world, "select count(*) from latest") == [(1,)]
    call(world, "unpartition", *TABLES)
    assert relations(world) == before


@pytest.mark.parametrize(
    "obstacle",
    [
        "alter table user_logins add id bigint generated always as identity",
        "create materialized view by_day as select create_date, count(*) from user_logins group by 1",
        "create trigger same before update on user_logins for each row execute procedure suppress_redundant_updates_trigger()",
        "create policy own on user_logins for select using (user_id = current_user)",
        "create publication one for table user_logins",
        "create table child () inherits (user_logins)",
        "alter table user_logins enable row level security",
    ],
)
def test_an_object_that_would_not_be_carried_over_is_refused_before_any_change(world, obstacle):
    with world.connect() as database:
        database.execute(obstacle)
    before = relations(world)
    with pytest.raises(psycopg.errors.RaiseException, match="would not be carried over"):
        partition(world)
    assert relations(world) == before


def test_an_interrupted_call_is_undone_during_inserts_and_repeated(world):
    before, function = fill(world), Function(world)
    original = relations(world)
    bound = "date_trunc('month', now() at time zone 'UTC') + interval '2 months'"
    first = query(world, f"select 'user_logins_before_' || to_char({bound}, 'YYYY_MM_DD')")[0][0]
    with function.running():
        with world.connect() as database:
            # The last step needs the name.
            database.execute(f"create table {first} ()")
            with pytest.raises(psycopg.errors.DuplicateTable):
                partition(world)
            database.execute(f"drop table {first}")
            assert database.execute("select count(*) from user_logins where user_id like 'stray%'").fetchone() == (STRAYS,)
        with pytest.raises(psycopg.errors.RaiseException, match="broken off"):
            partition(world)
        call(world, "unpartition", "user_logins")
        assert relations(world) == original
        partition(world)
    assert users(world) == Counter([*before, *(str(id) for _, id in function.messages())])
