"""Runs ./local/rotation."""

import json
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from functools import cache, partial
from pathlib import Path

import psycopg
from world import arguments, build, down, paths
from world.command import CommandFailed
from world.localstack import LocalStackError
from world.postgres import PostgresError
from world.servers import Servers, alone
from world.soak.checker import mask

WORLD = paths.ROTATION_WORLD
MASKING_SECRET = "login-etl/masking"
INSERT = (paths.ROOT / "tests" / "statements" / "insert.sql").read_text()
# The run rotates from the original's cipher to AES-SIV, to the next AES-SIV key, and back.
KEYS = {
    "": {"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4", "iv": "000102030405060708090a0b0c0d0e0f"},
    "2026-11": {"cipher": "aes-siv", "key": "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"},
    "2026-12": {"cipher": "aes-siv", "key": "7f7e7d7c7b7a79787776757473727170404142434445464748494a4b4c4d4e4f"},
}
FUNCTIONS, BATCH_SIZE, BATCHES = 3, 100, 50
DISTINCT = 150_000
MASKED = {"masked_ip": "ip", "masked_device_id": "device_id"}


def main() -> int:
    options = arguments.parse("rotation")
    with alone(WORLD):
        down.stop(WORLD)
        if not options.etlctl:
            build.etlctl()
        with Servers(WORLD) as servers:
            etlctl = options.etlctl or paths.ROOT / "target" / "debug" / "etlctl"
            return Bench(servers, etlctl.resolve(), options.rows).run(options.seconds, options.rate)


class Bench:
    """A filled table. A row's user consists of its row, address and device numbers, so that the row itself tells its correct masks."""

    def __init__(self, servers: Servers, etlctl: Path, rows: int):
        self.servers, self.etlctl, self.rows = servers, etlctl, rows
        self.masked = cache(partial(mask, {"keys": KEYS}))
        self.active = ""
        self.secrets = servers.localstack.client("secretsmanager")
        self.secrets.create_secret(Name=MASKING_SECRET, SecretString=self.keyring())
        self.database = servers.postgres.connect(autocommit=True)
        print(f"Inserting {rows} rows, with {DISTINCT} addresses and devices ...\n")
        self.fill(rows)

    def keyring(self) -> str:
        return json.dumps({"active": self.active, "keys": KEYS})

    def masks(self, ip: int, device: int) -> tuple[str, str]:
        """The masks of an address and a device under the active key."""
        address = f"10.{ip >> 16}.{ip >> 8 & 255}.{ip & 255}"
        return self.masked(self.active, "ip", address), self.masked(self.active, "device_id", f"{device:09}")

    def fill(self, rows: int) -> None:
        chance, today = random.Random(1), date.today()
        with self.database.cursor().copy("copy user_logins from stdin") as copy:
            for number in range(rows):
                ip, device = chance.randrange(DISTINCT), chance.randrange(DISTINCT)
                copy.write_row((f"{number}-{ip}-{device}", "android", *self.masks(ip, device), "RU", 230, today))
        self.database.execute("create table masks (field text, number integer, mask text)")
        with self.database.cursor().copy("copy masks from stdin") as copy:
            for number in range(DISTINCT):
                for field, masked in zip(MASKED.values(), self.masks(number, number)):
                    copy.write_row((field, number, masked))
        self.database.execute("vacuum analyze")
        self.database.execute("checkpoint")

    def run(self, seconds: float, rate: int) -> int:
        line = "{:32} {:>9} {:>8} {:>8} {:>14} {:>8} {:>9} {:>11}"
        print(line.format("", "inserts/s", "p50 ms", "p99 ms", "remasked/s", "s", "table MB", "indexes MB"))

        def show(what: str, figures: dict) -> None:
            sizes = self.database.execute("select pg_table_size('user_logins') / 1e6, pg_indexes_size('user_logins') / 1e6").fetchone()
            figures = {name: f"{figure:.{1 if name in ('p50', 'p99') else 0}f}" for name, figure in figures.items()}
            shown = [figures.get(name, "") for name in ("inserts", "p50", "p99", "remasked", "seconds")]
            print(line.format(what, *shown, *(f"{size:.0f}" for size in sizes)))

        show("filled", {})
        show("inserts alone", self.measure(seconds=seconds))
        self.activate("2026-11")
        show("remask alone, CBC to SIV", self.measure("keys", "remask", inserts=False))
        self.activate("2026-12")
        show("remask and inserts, SIV to SIV", self.measure("keys", "remask", seconds=seconds))
        self.activate("")
        show(f"remask --rate {rate} and inserts", self.measure("keys", "remask", "--rate", str(rate), seconds=seconds))
        show("remask alone, the rest", self.measure("keys", "remask", inserts=False))
        return self.verdict()

    def activate(self, key: str) -> None:
        self.active = key
        self.secrets.put_secret_value(SecretId=MASKING_SECRET, SecretString=self.keyring())

    def measure(self, *remask: str, inserts: bool = True, seconds: float | None = None) -> dict[str, float]:
        """Inserts while a remask runs, or alone if there is none; for at most `seconds`."""
        batches = [[self.batch(random.Random(f"{self.active} {number} {batch}")) for batch in range(BATCHES)] for number in range(FUNCTIONS)]
        stop = threading.Event()
        left = self.left()
        with ThreadPoolExecutor(FUNCTIONS) as pool:
            began = time.monotonic()
            functions = [pool.submit(self.function, batches[number], stop) for number in range(FUNCTIONS)] if inserts else []
            try:
                if remask:
                    self.etlctl_runs(*remask, seconds=seconds)
                else:
                    time.sleep(seconds)
            finally:
                stop.set()
                elapsed = time.monotonic() - began
        latencies = sorted(latency for function in functions for latency in function.result())
        self.rows += len(latencies) * BATCH_SIZE
        figures = {"seconds": elapsed}
        if latencies:
            per_mille = [1000 * latencies[int(len(latencies) * share)] for share in (0.5, 0.99)]
            figures |= {"inserts": len(latencies) * BATCH_SIZE / elapsed, "p50": per_mille[0], "p99": per_mille[1]}
        return figures | ({"remasked": (left - self.left()) / elapsed} if remask else {})

    def left(self) -> int:
        """The number of rows that are not under the active key."""
        under = f"like '{self.active}:%'" if self.active else "not like '%:%'"
        return self.database.execute(f"select count(*) from user_logins where not (masked_ip {under} and masked_device_id {under})").fetchone()[0]

    def etlctl_runs(self, *arguments: str, seconds: float | None) -> None:
        """Runs etlctl to its end or for `seconds`; killing it is harmless."""
        environment = {"PATH": os.environ["PATH"], **self.servers.environment(), "MASKING_SECRET_ID": MASKING_SECRET}
        with subprocess.Popen([self.etlctl, *arguments], env=environment, stdout=subprocess.DEVNULL, cwd=WORLD) as process:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                return
            finally:
                process.kill()
            if process.returncode != 0:
                sys.exit(f"etlctl {' '.join(arguments)} ended with status {process.returncode}")

    def batch(self, chance: random.Random) -> list[list]:
        """The parameters of the function's statement, without the messages' times and ids."""
        places = [(chance.randrange(DISTINCT), chance.randrange(DISTINCT)) for _ in range(BATCH_SIZE)]
        ips, devices = zip(*(self.masks(*place) for place in places))
        users = [f"{uuid.uuid4().hex}-{ip}-{device}" for ip, device in places]
        today = datetime.now(UTC).date()
        return [users, ["ios"] * BATCH_SIZE, list(ips), list(devices), [None] * BATCH_SIZE, [230] * BATCH_SIZE, [today] * BATCH_SIZE]

    def function(self, batches: list[list[list]], stop: threading.Event) -> list[float]:
        """Inserts as the function does; returns each batch's seconds."""
        latencies = []
        with self.servers.postgres.connect(autocommit=True, cursor_factory=psycopg.RawCursor) as database:
            while not stop.is_set():
                batch = batches[len(latencies) % len(batches)]
                messages = [datetime.now(UTC)] * BATCH_SIZE, [uuid.uuid4() for _ in range(BATCH_SIZE)]
                began = time.monotonic()
                inserted = database.execute(INSERT, [*messages, *batch], prepare=True).rowcount
                latencies.append(time.monotonic() - began)
                assert inserted == BATCH_SIZE
        return latencies

    def verdict(self) -> int:
        """Checks that every row is there and has its correct mask; returns the exit status."""
        wrong = " or ".join(
            f"{column} is distinct from (select mask from masks where field = '{field}' and number = split_part(user_id, '-', {place})::integer)"
            for place, (column, field) in enumerate(MASKED.items(), 2)
        )
        self.database.execute("create index on masks (field, number) include (mask)")
        rows, filled, wrong = self.database.execute(
            f"select count(*), count(distinct user_id) filter (where length(user_id) < 32), count(*) filter (where {wrong}) from user_logins"
        ).fetchone()
        inserted = self.database.execute("select count(*) from etl_ledger").fetchone()[0]
        good = (rows, filled + inserted, wrong, self.left()) == (self.rows, self.rows, 0, 0)
        print(f"\n{rows} of {self.rows} rows found, {wrong} of them with a wrong mask, {self.left()} not under the active key.")
        print("Passed: no row lost, doubled or damaged." if good else "FAILED.")
        return 0 if good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (PostgresError, LocalStackError, CommandFailed, subprocess.CalledProcessError) as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; everything is stopped.")
