"""PgBouncer in transaction mode between the function and the local PostgreSQL: each transaction may use another session."""

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path

from world import paths
from world.postgres import Postgres

DIRECTORY = paths.LOCAL / "pgbouncer"
# PgBouncer, and a library that it needs and few machines have.
PACKAGES = ("pgbouncer", "libc-ares2")
PATIENCE_SECONDS = 10
MISSING = "pgbouncer is not installed (apt-get install pgbouncer)"


def program() -> list[str] | None:
    """The command: the installed program, or Debian's package unpacked into the checkout, which starts no service. None if there is neither."""
    if installed := shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/opt/homebrew/bin:/usr/local/bin"):
        return [installed]
    unpacked = DIRECTORY / "root"
    if not unpacked.exists() and shutil.which("apt-get") and shutil.which("dpkg"):
        DIRECTORY.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
            subprocess.run(["apt-get", "-qq", "download", *PACKAGES], cwd=DIRECTORY, check=True, capture_output=True, timeout=120)
            for package in DIRECTORY.glob("*.deb"):
                subprocess.run(["dpkg", "-x", package, unpacked], check=True, capture_output=True)
    libraries = ":".join(str(found.parent) for found in unpacked.glob("usr/lib/*/libcares.so.2"))
    words = ["env", f"LD_LIBRARY_PATH={libraries}", str(unpacked / "usr" / "sbin" / "pgbouncer")]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run([*words, "--version"], capture_output=True, check=False).returncode == 0:
            return words
    return None


class PgBouncer:
    """Owns a PgBouncer, as a context manager; clients sign in as `user`, over TLS with PostgreSQL's certificate."""

    def __init__(self, words: list[str], postgres: Postgres, user: str, password: str, sessions: int, port: int = 0):
        """All clients share at most `sessions` sessions of the server."""
        directory = postgres.directory
        with socket.create_server(("127.0.0.1", port)) as listener:
            self.port = listener.getsockname()[1]
        postgres.write("pgbouncer.users", f'"{user}" "{password}"\n'.encode(), mode=0o600)
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": directory / "pgbouncer.users",
            "pool_mode": "transaction",
            "default_pool_size": sessions,
            # The next transaction uses another session, as with many clients.
            "server_round_robin": 1,
            "client_tls_sslmode": "require",
            "client_tls_key_file": directory / "server.key",
            "client_tls_cert_file": directory / "server.pem",
        }
        lines = ["[databases]", f"postgres = host=127.0.0.1 port={postgres.port}", "[pgbouncer]", *(f"{name} = {value}" for name, value in settings.items())]
        postgres.write("pgbouncer.ini", "\n".join([*lines, ""]).encode(), mode=0o600)
        self._words = [*postgres.as_account, *words, directory / "pgbouncer.ini"]
        self._log = directory / "pgbouncer.log"

    def __enter__(self) -> "PgBouncer":
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(list(map(str, self._words)), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return self
            time.sleep(0.05)
        self.__exit__()
        raise RuntimeError(f"PgBouncer did not start: {self._log.read_text(errors='replace')[-500:]}")

    def __exit__(self, *_) -> None:
        self._process.terminate()
        self._process.wait()
