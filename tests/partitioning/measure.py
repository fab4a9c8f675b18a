"""Measures inserts before, during and after partitioning, and the cost of pruning, on its own PostgreSQL.

Not a test. Run `PYTHONPATH=local target/local/venv/bin/python tests/partitioning/measure.py [ROWS] [KEYS]`; the defaults are two million and
five million.
"""

import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
from world import paths
from world.postgres import Postgres

INSERT, PRUNE = ((paths.ROOT / "src" / "store" / f"{name}.sql").read_text() for name in ("insert", "prune"))
PARTITIONING = paths.ROOT / "schema" / "partitioning"
TABLES = ("user_logins", "etl_ledger")
SESSIONS, BATCH_SIZE, SECONDS, TURNS = 3, 100, 15, 3
# The keys that the function deletes at once: twice the number of rows inserted since the last pruning.
PRUNED_AT_ONCE = 20_000


class Bench:
    """A database with rows and with keys of the last 35 days, and sessions that insert as the function does."""

    def __init__(self, postgres: Postgres, rows: int, keys: int):
        self.postgres = postgres
        self.database = postgres.connect(autocommit=True, cursor_factory=psycopg.RawCursor)
        self.database.add_notice_handler(lambda notice: print(f"  {notice.message_primary}"))
        self.database.execute("set client_min_messages = warning")
        for file in (*sorted((paths.ROOT / "schema").glob("*.sql")), *sorted(PARTITIONING.glob("*.sql"))):
            self.database.execute(file.read_text())
        mask = "encode(sha256((random() * 150000)::integer::text::bytea), 'base64')"
        self.database.execute(f"""
            insert into user_logins
            select md5(number::text)::uuid, 'android', {mask}, {mask}, 'RU', 230,
                   case when number % 1000 > 0 then current_date - number % 300 end
            from generate_series(1, {rows}) as number""")
        self.database.execute(f"""
            insert into etl_ledger
            select now() - number * (interval '35 days' / {keys}), md5(random()::text)::uuid
            from generate_series({keys}, 1, -1) as number""")
        self.settle()
        self.database.execute("set client_min_messages = notice")

    def settle(self) -> None:
        self.database.execute("vacuum analyze")
        self.database.execute("checkpoint")

    def insert(self, stop: threading.Event) -> list[float]:
        """Inserts until `stop` is set; returns each batch's seconds."""
        latencies = []
        masks = [f"{number:044}" for number in range(BATCH_SIZE)]
        with self.postgres.connect(autocommit=True, cursor_factory=psycopg.RawCursor) as session:
            while not stop.is_set():
                ids = [uuid.uuid4() for _ in range(BATCH_SIZE)]
                now = datetime.now(UTC)
                columns = [str(id) for id in ids], ["ios"] * BATCH_SIZE, masks, masks, [None] * BATCH_SIZE, [230] * BATCH_SIZE, [now.date()] * BATCH_SIZE
                began = time.monotonic()
                inserted = session.execute(INSERT, [[now] * BATCH_SIZE, ids, *columns], prepare=True).rowcount
                latencies.append(time.monotonic() - began)
                assert inserted == BATCH_SIZE
        return latencies

    @contextmanager
    def beside_inserts(self, what: str):
        stop, began = threading.Event(), time.monotonic()
        with ThreadPoolExecutor(SESSIONS) as pool:
            inserting = [pool.submit(self.insert, stop) for _ in range(SESSIONS)]
            try:
                yield
            finally:
                stop.set()
        seconds = time.monotonic() - began
        latencies = sorted(latency for session in inserting for latency in session.result())
        p50, p99, longest = (1000 * latencies[min(int(len(latencies) * share), len(latencies) - 1)] for share in (0.5, 0.99, 1))
        rate = len(latencies) * BATCH_SIZE / seconds
        print(f"{what}: {seconds:.1f} s, {rate:.0f} rows/s inserted, a batch {p50:.1f} ms, p99 {p99:.1f} ms, longest {longest:.1f} ms")

    def insert_for_a_while(self, what: str) -> None:
        self.settle()
        with self.beside_inserts(what):
            time.sleep(SECONDS)

    def prune(self, before: datetime) -> None:
        """Prunes as the function does, until no key is left to prune."""
        began, wal, deleted = time.monotonic(), self.wal(), 0
        while some := self.database.execute(PRUNE, [before, PRUNED_AT_ONCE]).rowcount:
            deleted += some
        print(f"prune.sql: {deleted} keys deleted in {time.monotonic() - began:.1f} s, {(self.wal() - wal) / 1e6:.0f} MB of WAL", end="")
        began, wal = time.monotonic(), self.wal()
        self.database.execute("vacuum etl_ledger")
        print(f"; vacuum {time.monotonic() - began:.1f} s, {(self.wal() - wal) / 1e6:.0f} MB")

    def drop(self) -> None:
        part, keys = self.database.execute("""
            select part::text, reltuples from login_etl_partitions('etl_ledger') join pg_class on pg_class.oid = part
            order by ends limit 1""").fetchone()
        began, wal = time.monotonic(), self.wal()
        with self.database.transaction():
            self.database.execute(f"alter table etl_ledger detach partition {part}")
            self.database.execute(f"drop table {part}")
        print(f"drop: {keys:.0f} keys in {1000 * (time.monotonic() - began):.1f} ms, {(self.wal() - wal) / 1e6:.2f} MB of WAL")

    def wal(self) -> float:
        return self.database.execute("select (pg_current_wal_lsn() - '0/0')::float8").fetchone()[0]


def main(rows: int = 2_000_000, keys: int = 5_000_000) -> None:
    with tempfile.TemporaryDirectory() as directory:
        postgres = Postgres(Path(directory)).start()
        try:
            bench = Bench(postgres, rows, keys)
            bench.prune(datetime.now(UTC) - timedelta(days=28))
            # In turns, because a machine's speed varies.
            for turn in range(TURNS):
                bench.insert_for_a_while("one table each")
                for table in TABLES:
                    with bench.beside_inserts(f"{table} turned"):
                        bench.database.execute(f"call login_etl_partition('{table}')")
                with bench.beside_inserts("partitions made"):
                    bench.database.execute("select login_etl_tend_partitions()")
                bench.insert_for_a_while("partitioned")
                if turn < TURNS - 1:
                    with bench.beside_inserts("turned back"):
                        for table in TABLES:
                            bench.database.execute(f"call login_etl_unpartition('{table}')")
            bench.settle()
            bench.drop()
        finally:
            postgres.remove()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
