"""Runs `etlctl` as a process: with pipes, on a terminal, and with a test's own database and keyring."""

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import termios
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import psycopg
from world import paths
from world.localstack import CREDENTIALS
from world.servers import DATABASE_SECRET, OPERATOR_SECRET, Servers

ETLCTL = paths.ROOT / "target" / "debug" / "etlctl"
# NIST SP 800-38A's AES-256 key, in the one-key form of the original script.
ONE_KEY = {"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4", "iv": "000102030405060708090a0b0c0d0e0f"}


class Etlctl:
    """The tool, with these settings and in this directory."""

    def __init__(self, environment: dict[str, str], directory: Path):
        self.environment = {"PATH": os.environ["PATH"]} | environment
        self.directory = directory

    def start(self, *arguments: str, environment: dict[str, str | None] | None = None, **options) -> subprocess.Popen:
        """Starts `etlctl` with pipes instead of a terminal. `environment` overrides variables; None unsets one."""
        environment = {name: value for name, value in (self.environment | (environment or {})).items() if value is not None}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        options = pipes | {"cwd": self.directory} | options
        return subprocess.Popen([ETLCTL, *arguments], env=environment, **options)

    def run(self, *arguments: str, input: str | None = None, **options) -> subprocess.CompletedProcess:
        """Runs `etlctl` to its end; `options` are those of `start`."""
        if input is not None:
            options["stdin"] = subprocess.PIPE
        with self.start(*arguments, **options) as process:
            try:
                stdout, stderr = process.communicate(input, timeout=120)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def on_terminal(self, *arguments: str, answer: str = "", **options) -> tuple[str, int]:
        """Runs `etlctl` on a terminal and types `answer` once it asks; returns what the terminal showed, and the exit status."""
        with Terminal(self, *arguments, **options) as terminal:
            seen = ""
            if answer:
                seen = terminal.until("[y/N]")
                terminal.type(f"{answer}\n")
            return seen + terminal.until(None), terminal.end()

    def json(self, *arguments: str, status: int = 0, **options):
        """The output of `etlctl --json`."""
        result = self.run("--json", *arguments, **options)
        assert result.returncode == status, result.stderr
        return json.loads(result.stdout)


class Terminal:
    """`etlctl` on a terminal that a test reads and types into while it runs."""

    def __init__(self, etlctl: Etlctl, *arguments: str, **options):
        self.ours, theirs = pty.openpty()
        self.unread = ""
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        session = {"start_new_session": True, "preexec_fn": take_terminal}
        options["environment"] = {"TERM": "xterm-256color"} | options.get("environment", {})
        self.process = etlctl.start(*arguments, **streams, **session, **options)
        os.close(theirs)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)

    def until(self, text: str | None, seconds: float = 30) -> str:
        """Waits for a text, or for the end, and returns the output since the last wait up to it."""
        deadline = time.monotonic() + seconds
        while text is None or text not in self.unread:
            assert select.select([self.ours], [], [], max(0, deadline - time.monotonic()))[0], f"no {text or 'end'} in {self.unread!r}"
            try:
                self.unread += os.read(self.ours, 65536).decode().replace("\r\n", "\n")
            except OSError:
                # The process has ended.
                assert text is None, f"ended without {text}: {self.unread!r}"
                break
        seen = self.unread if text is None else self.unread[: self.unread.index(text) + len(text)]
        self.unread = self.unread[len(seen) :]
        return seen

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def end(self, seconds: float = 30) -> int:
        """Waits for the end, and returns the exit status."""
        self.until(None, seconds)
        return self.process.wait(10)


class World(Etlctl):
    """A test's own database and keyring, and `etlctl` with settings for them."""

    def __init__(self, servers: Servers):
        self.servers = servers
        self.name = f"etlctl_{uuid.uuid4().hex[:12]}"
        self.masking_secret = f"{self.name}/masking"
        self.secrets = servers.localstack.client("secretsmanager")
        self.secrets.create_secret(Name=self.masking_secret, SecretString=json.dumps(ONE_KEY))
        with servers.postgres.connect(autocommit=True) as database:
            database.execute(f"create database {self.name}")
        environment = {
            "AWS_ENDPOINT_URL": servers.localstack.endpoint,
            **CREDENTIALS,
            **servers.database_settings(),
            **servers.trust(),
            "DATABASE_NAME": self.name,
            "DATABASE_SECRET_ID": DATABASE_SECRET,
            "ETLCTL_DATABASE_SECRET_ID": OPERATOR_SECRET,
            "MASKING_SECRET_ID": self.masking_secret,
            "SECRETS_TTL": "3600",
        }
        super().__init__(environment, servers.localstack.directory)

    def connect(self) -> psycopg.Connection:
        """A session of the database's owner, with autocommit."""
        return self.servers.postgres.connect(self.name, autocommit=True)

    def user(self, *roles: str) -> dict[str, str | None]:
        """Creates a database user with these roles, and returns the environment that makes `etlctl` use it."""
        user, password = f"{self.name}_user", uuid.uuid4().hex
        with self.connect() as database:
            database.execute(f"create role {user} login password '{password}' {'in role ' if roles else ''}{', '.join(roles)}")
        return {"DATABASE_USER": user, "DATABASE_PASSWORD": password, "ETLCTL_DATABASE_SECRET_ID": None}

    @contextmanager
    def locked(self, table: str, mode: str):
        """Holds a lock on a table."""
        with self.connect() as database, database.transaction():
            database.execute(f"lock table {table} in {mode} mode")
            yield

    def sessions(self) -> list[str | None]:
        """The kind of lock that each session of `etlctl` in this database waits for, or None."""
        query = "select case wait_event_type when 'Lock' then wait_event end from pg_stat_activity where datname = %s and application_name = 'etlctl'"
        with self.servers.postgres.connect(autocommit=True) as database:
            return [kind for (kind,) in database.execute(query, [self.name])]

    def until(self, condition, seconds: float = 30):
        """Waits until `condition` returns something true, and returns that."""
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.02)
        return result

    def masks(self, field: str, value: str) -> dict[str, str]:
        """A value's masks, by key."""
        return {mask["key"]: mask["mask"] for mask in self.json("mask", "--field", field, value)}

    def keyring(self) -> dict:
        return json.loads(self.secrets.get_secret_value(SecretId=self.masking_secret)["SecretString"])

    def put_keyring(self, keyring: dict) -> None:
        self.secrets.put_secret_value(SecretId=self.masking_secret, SecretString=json.dumps(keyring))


def take_terminal() -> None:
    """Makes standard input this session's terminal, and restores Ctrl-C, which a shell's background jobs ignore."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
