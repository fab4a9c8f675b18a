"""Servers, fresh databases and contenders for the sections."""

import json
import os
import select
import subprocess
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from psycopg import sql
from world import paths
from measure.events import Events
from world.localstack import CREDENTIALS
from world.servers import DATABASE_SECRET, Servers

# AES-256 in CBC mode with a fixed IV: the original's masking, and the only one that all contenders support.
KEYRING_SECRET = "login-etl/bench"
KEYRING = {"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4", "iv": "000102030405060708090a0b0c0d0e0f"}
SCHEMA = ("001_ledger.sql", "002_roles.sql", "003_audit.sql", "004_privacy.sql", "user_logins.sql")
INDEXES = ("user_logins_masked_ip_idx", "user_logins_masked_device_id_idx")
LEDGER_DATABASE = "bench_ledger"
# Less than the ledger's retention, so that none of its keys is pruned.
LEDGER_DAYS = 14
# Names of the Python contenders, in benches/peers; cargo builds the others.
PYTHON = ("original", "best", "powertools")
PATIENCE_SECONDS = 300


class ContenderFailed(Exception):
    """A contender ended or does not answer; the text includes the end of its log."""


@dataclass
class Bench:
    """One run of the benchmark: its servers, and the events that it sends."""

    servers: Servers
    quick: bool
    seed: int
    binaries: Path
    # The function as it is deployed.
    function: Path
    peers_python: Path
    directory: Path
    keyring_secret: str = KEYRING_SECRET
    # Results of the earlier sections, by name; from an earlier run for sections that this run does not measure.
    results: dict[str, dict] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for log in self.directory.glob("*.log"):
            log.unlink()
        self.servers.localstack.client("secretsmanager").create_secret(Name=self.keyring_secret, SecretString=json.dumps(KEYRING))
        with self.servers.postgres.connect() as connection:
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                if connection.execute(sql.SQL("show {}").format(sql.Identifier(setting))).fetchone() != ("on",):
                    raise RuntimeError(f"PostgreSQL runs with {setting} off, so its figures would be worthless")

    @cached_property
    def events(self) -> Events:
        return Events(self.seed)

    @property
    def ledger_keys(self) -> int:
        """The number of keys in a long ledger."""
        return 300_000 if self.quick else 10_000_000

    # Databases.

    def database(self, name: str, indexes: bool = False, ledger: bool = False) -> str:
        """Makes a fresh database with the product's schema, optionally with the analysts' indexes and a long ledger."""
        if ledger:
            self._need_ledger()
        self.drop(name)
        with self.servers.postgres.connect(autocommit=True) as connection:
            template = sql.SQL("template {}").format(sql.Identifier(LEDGER_DATABASE)) if ledger else sql.SQL("")
            # Otherwise the WAL would get a copy of the whole ledger.
            strategy = "strategy file_copy" if ledger and connection.info.server_version >= 150_000 else ""
            connection.execute(sql.SQL("create database {} {} {}").format(sql.Identifier(name), template, sql.SQL(strategy)))
        with self.servers.postgres.connect(name) as connection:
            for file in SCHEMA:
                connection.execute((paths.ROOT / "schema" / file).read_text())
            if not indexes:
                connection.execute(f"drop index {', '.join(INDEXES)}")
        return name

    def drop(self, name: str) -> None:
        with self.servers.postgres.connect(autocommit=True) as connection:
            connection.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [name])
            connection.execute(sql.SQL("drop database if exists {}").format(sql.Identifier(name)))

    def _need_ledger(self) -> None:
        """Makes the database with the long ledger if it does not exist yet: `LEDGER_DAYS` of keys, up to the time of the first event."""
        with self.servers.postgres.connect(autocommit=True) as connection:
            if connection.execute("select from pg_database where datname = %s", [LEDGER_DATABASE]).fetchone():
                return
        self.say(f"making a ledger of {self.ledger_keys:,} keys")
        self.database(LEDGER_DATABASE)
        with self.servers.postgres.connect(LEDGER_DATABASE, autocommit=True) as connection:
            connection.execute(
                """insert into etl_ledger
                   select now() - interval '3 hours' - %(days)s * interval '1 day' * (1 - number / %(keys)s::float8),
                          md5(random()::text || number)::uuid
                   from generate_series(1, %(keys)s) as number""",
                {"days": LEDGER_DAYS, "keys": self.ledger_keys},
            )
            connection.execute("vacuum analyze")
            connection.execute("checkpoint")

    def checkpoint(self) -> None:
        with self.servers.postgres.connect(autocommit=True) as connection:
            connection.execute("checkpoint")

    # Contenders.

    def environment(self, database: str, tls: bool = True, port: int | None = None) -> dict[str, str]:
        """The function's settings for one of our databases, and Lambda's own variables; `port` can be a proxy's instead of PostgreSQL's."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            "AWS_ENDPOINT_URL": self.servers.localstack.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            **CREDENTIALS,
            "AWS_LAMBDA_FUNCTION_NAME": "login-etl",
            "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "256",
            "AWS_LAMBDA_LOG_GROUP_NAME": "/aws/lambda/login-etl",
            "AWS_LAMBDA_LOG_STREAM_NAME": "bench",
            "AWS_LAMBDA_LOG_FORMAT": "JSON",
            "AWS_LAMBDA_LOG_LEVEL": "INFO",
            "MASKING_SECRET_ID": self.keyring_secret,
            "DATABASE_SECRET_ID": DATABASE_SECRET,
            **self.servers.database_settings(),
            "DATABASE_NAME": database,
            "DATABASE_PORT": str(port or self.servers.postgres.port),
            "DATABASE_TLS": "verify-full" if tls else "disable",
        }

    def command(self, name: str) -> list[str]:
        if name in PYTHON:
            return [str(self.peers_python), str(paths.ROOT / "benches" / "peers" / f"{name}.py")]
        return [str(self.program(name))]

    def program(self, name: str) -> Path:
        return self.function if name == "login-etl" else self.binaries / name

    def contender(self, name: str, environment: dict[str, str]) -> "Contender":
        """Starts a contender, and returns when it is ready."""
        return Contender(self.command(name), environment, self.directory / f"{name}.log")

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:5.0f} s  {text}", flush=True)


class Contender:
    """Owns a contender's process, which reads names of event files, handles the events, and answers with its times."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        """Returns when the contender has read its secrets and is connected. Raises `ContenderFailed`."""
        self.name, self._log = Path(command[-1]).stem, log
        self._answers, answers = os.pipe()
        self._unread = b""
        try:
            # Several contenders with the same name share the log.
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    env=environment | {"BENCH_ANSWERS": f"/dev/fd/{answers}"},
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    pass_fds=[answers],
                    start_new_session=True,  # keeps the terminal's Ctrl-C from it: we stop it in order
                )
        finally:
            os.close(answers)
        try:
            if (said := self._answer()) != b"ready":
                raise ContenderFailed(f"{self.name} answered {said!r} instead of 'ready'")
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, events: Path) -> dict:
        """Has it handle a file of events; returns the `ns` of each event, the `cpu_ns` of all, and the number of `failures`."""
        self.start(events)
        return self.result()

    def start(self, events: Path) -> None:
        """Has it start on a file of events; `result` waits for the answer."""
        try:
            self._process.stdin.write(f"{events}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("has ended") from None

    def result(self) -> dict:
        return json.loads(self._answer())

    def kill(self) -> None:
        if self._answers >= 0:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            os.close(self._answers)
            self._answers = -1

    def _answer(self) -> bytes:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while b"\n" not in self._unread:
            if not select.select([self._answers], [], [], max(0, deadline - time.monotonic()))[0]:
                raise self._failed(f"did not answer within {PATIENCE_SECONDS} s")
            if not (some := os.read(self._answers, 1 << 20)):
                raise self._failed(f"ended with status {self._process.wait()}")
            self._unread += some
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _failed(self, what: str) -> ContenderFailed:
        tail = "\n  ".join(self._log.read_text(errors="replace").splitlines()[-20:])
        return ContenderFailed(f"{self.name} {what}; the end of {self._log}:\n  {tail}")
