"""Runs a private PostgreSQL on loopback, with its state in one directory; later processes can attach to it.

The server's superuser is `postgres`, with a random password. The server offers TLS with a certificate from a private CA, and plain text if the
client asks for it. Of the machine's own PostgreSQL, only the programs are used.
"""

import contextlib
import glob
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

import psycopg
import trustme

OLDEST = 10
USUAL_PORT = 5432
# Long enough for crash recovery, or the checkpoint of a fast stop, on a slow disk.
PATIENCE_SECONDS = 60

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    # A socket's path is limited to about 100 bytes, which a checkout's path can exceed; nothing needs a socket.
    "unix_socket_directories": "",
    "ssl": "on",
    # Relative to the data directory.
    "ssl_cert_file": "../server.pem",
    "ssl_key_file": "../server.key",
    "ssl_ca_file": "",
    "logging_collector": "off",
    "log_line_prefix": "%m [%p] ",
}

# Directories of the server's programs outside of PATH: Debian, PGDG's RPMs, openSUSE, Alpine, Homebrew on ARM and on Intel, Postgres.app.
USUAL_PROGRAMS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/lib/postgresql*/bin",
    "/usr/libexec/postgresql*",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
)

HOW_TO_INSTALL = f"""PostgreSQL's server programs (initdb, pg_ctl, postgres; version {OLDEST} or later) are not installed. Install them, then try again:
  Debian, Ubuntu   sudo apt-get install postgresql
  Fedora           sudo dnf install postgresql-server
  macOS            brew install postgresql@17"""

# Debian's package creates and starts a cluster on the usual port, unless postgresql-common's createcluster.conf disables that. The line is removed
# afterwards, so that a PostgreSQL that the user installs later gets its cluster.
APT_SCRIPT = r"""
set -eu
export DEBIAN_FRONTEND=noninteractive
install() { apt-get -qq -o DPkg::Lock::Timeout=120 install --yes --no-install-recommends "$1"; }
install postgresql-common || { apt-get -qq update; install postgresql-common; }
conf=/etc/postgresql-common/createcluster.conf
trap 'sed -i "/# by login-etl$/d" "$conf"' EXIT
echo 'create_main_cluster = false # by login-etl' >> "$conf"
install postgresql
"""


class PostgresError(Exception):
    """The server cannot be installed, made, started or stopped; the text has the reason, for the user."""


class Postgres:
    """Owns one server and its data, kept in `directory`.

    If we are root, the server runs as the user `postgres` or `nobody`, because PostgreSQL refuses to run as root. If that user cannot reach
    `directory`, for example in root's home, it gets a capability for it.
    """

    host = "localhost"

    def __init__(self, directory: Path, port: int | None = None):
        """The default `port` is 5432, or another free one if that is taken. A given port that is taken is an error."""
        self.directory = Path(directory).resolve()
        self.log_file = self.directory / "postgres.log"
        self._port = port

    @classmethod
    def attach(cls, directory: Path) -> "Postgres | None":
        """The server that an earlier process left running from `directory`, or None."""
        server = cls(directory)
        if not server.running:
            return None
        server._port = int(server._lock_file.read_text().splitlines()[3])
        return server

    # Where things are.

    @property
    def port(self) -> int:
        if self._port is None:
            raise PostgresError("PostgreSQL has no port before it is started")
        return self._port

    @property
    def running(self) -> bool:
        return self._pid() is not None

    @property
    def ca_file(self) -> Path:
        """The CA certificate (PEM) for the server, whose certificate names `localhost`, not `127.0.0.1`."""
        return self.directory / "ca.pem"

    @property
    def admin_password(self) -> str:
        return (self.directory / "password").read_text().strip()

    def url(self, database: str, user: str, password: str) -> str:
        """A libpq URL that tokio-postgres also understands; it does not set TLS options."""
        return f"postgresql://{quote(user, safe='')}:{quote(password, safe='')}@{self.host}:{self.port}/{quote(database, safe='')}"

    def connect(self, database: str = "postgres", **options) -> psycopg.Connection:
        """A connection as superuser, over verified TLS; `options` are psycopg's (`autocommit=True`)."""
        return psycopg.connect(
            host=self.host,
            hostaddr="127.0.0.1",
            port=self.port,
            dbname=database,
            user="postgres",
            password=self.admin_password,
            sslmode="verify-full",
            sslrootcert=str(self.ca_file),
            connect_timeout=10,
            **options,
        )

    # Its life.

    def start(self) -> "Postgres":
        """Starts the server and returns when it accepts connections; makes its data first if needed. If this fails or is interrupted, no server runs.

        Stops a server of an earlier run first. The port stays the same for the lifetime of this object.
        """
        self.stop()
        self.directory.mkdir(parents=True, exist_ok=True)
        # First, because their installation may create the user that will own the data.
        _ = self._programs
        if not self._data.exists():
            self._create()
        # A killed server's lock file may contain a pid that another program has by now. Deleting it is safe: as long as any process of the
        # killed server lives, its shared memory keeps a new server from starting.
        self._lock_file.unlink(missing_ok=True)
        try:
            self._launch()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self, mode: str = "fast") -> None:
        """Stops the server and returns when it has ended; `mode` is `fast`, or `immediate` for a crash. Does nothing if no server runs."""
        pid = self._pid()
        if pid is None:
            return
        for stop_signal in (signal.SIGINT, signal.SIGQUIT) if mode == "fast" else (signal.SIGQUIT,):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, stop_signal)
            deadline = time.monotonic() + PATIENCE_SECONDS
            while time.monotonic() < deadline:
                if not serves(pid, self._data):
                    return
                time.sleep(0.02)
        raise PostgresError(f"PostgreSQL (pid {pid}) does not stop{self._log_tail()}")

    def restart(self, mode: str = "fast") -> None:
        """Stops and starts the server on the same port; `immediate` makes it recover from a crash."""
        self.stop(mode)
        self.start()

    def remove(self) -> None:
        """Stops the server and deletes its data; the log stays, in `directory`."""
        # A fast stop would first write everything to disk.
        self.stop("immediate")
        self._discard_unfinished()
        if self._data.exists():
            shutil.rmtree(self._data)
        for file in ("password", "ca.pem", "server.pem", "server.key"):
            (self.directory / file).unlink(missing_ok=True)

    def ask_first(self, rule: str | None) -> None:
        """Makes `rule` the first line of pg_hba.conf; the next call replaces it, and None removes it."""
        mark = "# put first"
        file = self._data / "pg_hba.conf"
        lines = [line for line in file.read_text().splitlines() if mark not in line]
        file.write_text("\n".join([*([f"{rule} {mark}"] if rule else []), *lines, ""]))
        with self.connect() as connection:
            connection.execute("select pg_reload_conf()")

    # The place of the data.

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    @property
    def _lock_file(self) -> Path:
        return self._data / "postmaster.pid"

    @property
    def _account(self) -> pwd.struct_passwd | None:
        """The user to run the server as, or None for ourselves."""
        if os.geteuid() != 0:
            return None
        if self._data.exists():
            return pwd.getpwuid(self._data.stat().st_uid)
        for name in ("postgres", "nobody"):
            with contextlib.suppress(KeyError):
                return pwd.getpwnam(name)
        raise PostgresError("PostgreSQL does not run as root, and there is neither a user `postgres` nor `nobody` to run it as")

    @property
    def as_account(self) -> list[str | Path]:
        """The command prefix that runs a program as that user."""
        account = self._account
        if not account:
            return []
        words = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        if subprocess.run([*words, "test", "-x", self.directory], cwd="/", capture_output=True).returncode == 0:
            return words
        capability = "+dac_override"
        return [*words, f"--inh-caps={capability}", f"--ambient-caps={capability}"]

    def _create(self) -> None:
        # pg_ctl hands the path to a shell, in double quotes.
        if set(str(self._data)) & set('"$`\\'):
            raise PostgresError(f"PostgreSQL's pg_ctl cannot handle {self.directory}: use a path without \", $, ` and \\")
        self.write("password", secrets.token_urlsafe(24).encode(), mode=0o600)
        self._make_certificates()
        # Under a new name: the initdb of a killed run may still be writing to the previous one.
        self._discard_unfinished()
        unfinished = Path(tempfile.mkdtemp(prefix="data.", dir=self.directory))
        if account := self._account:
            os.chown(unfinished, account.pw_uid, account.pw_gid)
        self.log_file.write_bytes(b"")
        if not self._run(
            *("initdb", "--pgdata", str(unfinished), "--username", "postgres", "--pwfile", str(self.directory / "password")),
            *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C"),
        ):
            raise PostgresError(f"PostgreSQL's initdb failed{self._log_tail()}")
        # Last, so that a data directory is always complete.
        unfinished.rename(self._data)

    def _discard_unfinished(self) -> None:
        for unfinished in self.directory.glob("data.*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def write(self, name: str, content: bytes, mode: int) -> None:
        """Writes a file beside the data; if not everyone may read it, the server's user owns it."""
        path = self.directory / name
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
            if not mode & 0o004 and (account := self._account):
                os.fchown(file.fileno(), account.pw_uid, account.pw_gid)

    def _make_certificates(self) -> None:
        """Makes a CA, whose key is not kept, and the server's certificate, only for DNS:localhost: tests need a name that is not in it."""
        authority = trustme.CA(organization_name="login-etl local authority")
        # macOS refuses server certificates that are valid for more than 825 days.
        server = authority.issue_cert(self.host, not_after=datetime.now(UTC) + timedelta(days=800))
        self.write("ca.pem", authority.cert_pem.bytes(), mode=0o644)
        self.write("server.pem", server.cert_chain_pems[0].bytes(), mode=0o644)
        self.write("server.key", server.private_key_pem.bytes(), mode=0o600)

    # The process.

    def _pid(self) -> int | None:
        """The pid of our own server: a live process whose command line has our data directory, unlike another process with a reused pid."""
        try:
            pid = int(self._lock_file.read_text().split("\n", 1)[0])
        except (FileNotFoundError, ValueError):
            return None
        return pid if serves(pid, self._data) else None

    def _launch(self) -> None:
        chosen = self._port is None
        settings = " ".join(f"-c {name}='{value}'" for name, value in SETTINGS.items())
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            port = free_port() if chosen else self._port
            self.log_file.touch()
            log_before = self.log_file.stat().st_size
            if self._run(
                *("pg_ctl", "start", "--pgdata", str(self._data), "--wait", "--timeout", str(PATIENCE_SECONDS)),
                *("--options", f"-p {port} {settings}"),
            ):
                break
            complaint = self._log_tail(log_before)
            passing = "shared memory block" in complaint or (chosen and "could not bind" in complaint)
            if not passing or time.monotonic() > deadline:
                raise PostgresError(f"PostgreSQL does not start on port {port}{complaint}")
            time.sleep(0.5)
        self._port = port

    def _run(self, program: str, *arguments: str) -> bool:
        """Runs one of PostgreSQL's programs, with its output in the log, and returns whether it succeeded.

        It has its own session, so that Ctrl-C reaches only us, and it always finishes: an interrupted pg_ctl could leave an unknown server.
        """
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        with open(self.log_file, "ab") as log:
            process = subprocess.Popen(
                [*self.as_account, self._programs / program, *arguments],
                cwd="/",
                # For each session that signs in with a token, PostgreSQL's LDAP client would load SASL's plugins, which nobody uses.
                env=environment | {"LC_ALL": "C", "TZ": "UTC", "SASL_PATH": "/nonexistent"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait() == 0
            except BaseException:
                process.wait()
                raise

    def _log_tail(self, offset: int = 0) -> str:
        lines = self.log_file.read_bytes()[offset:].decode(errors="replace").splitlines()[-15:]
        return "\n  ".join([f"; the end of {self.log_file}:", *lines])

    # The programs.

    @cached_property
    def _programs(self) -> Path:
        """The directory of the server's programs: of the data's version, else the one on PATH, else the newest."""
        found = self._find_programs()
        if not found:
            install()
            found = self._find_programs()
        if not found:
            raise PostgresError(HOW_TO_INSTALL)
        with contextlib.suppress(FileNotFoundError):
            made_by = int((self._data / "PG_VERSION").read_text())
            for programs, version in found:
                if version == made_by:
                    return programs
            raise PostgresError(f"{self._data} needs PostgreSQL {made_by}, which is not installed: install it, or delete the data with `./local/down`")
        return found[0][0]

    def _find_programs(self) -> list[tuple[Path, int]]:
        """Directories of programs that are new enough, with their major versions."""
        on_path = shutil.which("initdb")
        first = [Path(on_path).resolve().parent] if on_path else []
        usual = sorted((Path(match) for pattern in USUAL_PROGRAMS for match in glob.glob(pattern)), key=self._version, reverse=True)
        return [(directory, version) for directory in first + usual if (version := self._version(directory)) >= OLDEST]

    def _version(self, directory: Path) -> int:
        """The major version of the programs in `directory`; 0 if one is missing, or the server's user may not run them."""
        if not all((directory / program).exists() for program in ("initdb", "pg_ctl", "postgres")):
            return 0
        try:
            answer = subprocess.run([*self.as_account, directory / "postgres", "--version"], cwd="/", capture_output=True, text=True)
        except (FileNotFoundError, PermissionError):
            return 0
        major = re.search(r"\(PostgreSQL\) (\d+)", answer.stdout)
        return int(major[1]) if major else 0


def install() -> None:
    """Installs PostgreSQL with apt, if apt exists and needs no password."""
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not shutil.which("apt-get") or not succeeds(*as_root, "true"):
        raise PostgresError(HOW_TO_INSTALL)
    print("PostgreSQL is not installed: installing Debian's package `postgresql`, without a cluster (a minute or two)")
    apt = subprocess.run([*as_root, "sh", "-c", APT_SCRIPT], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if apt.returncode != 0:
        said = "\n  ".join((apt.stdout + apt.stderr).splitlines()[-15:])
        raise PostgresError(f"apt could not install PostgreSQL:\n  {said}\n{HOW_TO_INSTALL}")


def succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def serves(pid: int, data: Path) -> bool:
    """Whether the process is a server with this data directory."""
    if Path("/proc/self").exists():
        try:
            return b"\0-D\0%b\0" % os.fsencode(data) in Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return False
    return f"-D {data} " in subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(pid)], stdout=subprocess.PIPE, text=True).stdout


def free_port() -> int:
    """The usual port if nothing listens on it, else another free one. Checks ::1 too, which clients may try first for `localhost`."""

    def answers(family: int, address: str) -> bool:
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.settimeout(1)
            return probe.connect_ex((address, USUAL_PORT)) == 0
        return False

    with socket.socket() as listener:
        # As PostgreSQL does, so that lingering connections of an earlier server do not matter.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if not answers(socket.AF_INET, "127.0.0.1") and not answers(socket.AF_INET6, "::1"):
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", USUAL_PORT))
                return USUAL_PORT
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
