"""Runs LocalStack in host mode: one process, on loopback only, with its state in one directory."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import boto3
import psutil
import trustme
from botocore.config import Config

from world import paths

REGION = "us-east-1"
ACCOUNT = "000000000000"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": REGION, "AWS_DEFAULT_REGION": REGION}
USUAL_PORT = 4566
READY_SECONDS = 60
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class LocalStackError(RuntimeError):
    """LocalStack cannot be started or does not run; the text has the reason, for the user."""


class LocalStack:
    """Owns one LocalStack process and the directory with its log, its state and its temporary files.

    ``python`` is the interpreter of the environment made from ``requirements/localstack.txt`` and ``executor``. The default ``port`` is
    4566, or another free one if that is taken. A later process finds a running LocalStack with :meth:`attach`.
    """

    def __init__(self, directory: Path, python: Path = Path(sys.executable), port: int | None = None) -> None:
        self.directory = directory.absolute()
        self.python = python
        self.port = port
        self._process: psutil.Process | None = None

    @classmethod
    def attach(cls, directory: Path) -> "LocalStack":
        """The LocalStack that another process started in ``directory``.

        Raises ``LocalStackError`` if none runs there.
        """
        localstack = cls(directory)
        if not localstack._find():
            raise LocalStackError(f"no LocalStack runs in {directory}")
        return localstack

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def ca_file(self) -> Path:
        """The certificate of the authority that issued LocalStack's own, for clients that use TLS."""
        return self.directory / "volume" / "ca.pem"

    @property
    def log(self) -> Path:
        return self.directory / "localstack.log"

    @property
    def function_logs(self) -> Path:
        """The directory with one log file for each execution environment of each function."""
        return self.directory / "functions"

    @property
    def identities(self) -> Path:
        """The directory with each environment's AWS identity: a file named by the access key, with the secret key and the session token."""
        return self.directory / "identities"

    def client(self, service: str):
        """A boto3 client of this LocalStack."""
        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            region_name=REGION,
            config=Config(proxies={}),
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        )

    def start(self) -> None:
        """Starts LocalStack without the state of earlier runs, and waits until it is ready.

        Raises ``LocalStackError`` if one already runs in the directory, if the port is taken, if the process ends, or if it is not ready
        within a minute.
        """
        if self._find():
            raise LocalStackError(f"LocalStack already runs in {self.directory} (pid {self.pid})")
        # Without the lock, two that start at once would choose the same port.
        with (paths.LOCAL / "localstack.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._start()

    def _start(self) -> None:
        if self.port is None:
            self.port = USUAL_PORT if is_free(USUAL_PORT) else free_port()
        elif not is_free(self.port):
            raise LocalStackError(f"port {self.port} is taken; LocalStack cannot listen there")
        for directory in (*(self.directory / name for name in ("volume", "home", "tmp", "cache")), self.function_logs, self.identities):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        libraries = self.directory / "volume" / "usr" / "lib"
        libraries.mkdir(parents=True)
        (libraries / "localstack").symlink_to(self._index_of_services())
        # LocalStack itself fails to make a certificate with pyOpenSSL 26.
        authority = trustme.CA(organization_name="login-etl")
        authority.cert_pem.write_to_path(self.ca_file)
        authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(self._certificate)
        with self.log.open("wb") as output:
            self._process = child = psutil.Popen(
                [self.python, "-m", "localstack.runtime.main"],
                cwd=self.directory,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # keeps the terminal's Ctrl-C from it: we stop it in order
            )
        self._state.write_text(json.dumps({"pid": child.pid, "started": child.create_time(), "port": self.port}))
        deadline = time.monotonic() + READY_SECONDS
        while not self._is_ready():
            if child.poll() is not None:
                raise LocalStackError(f"LocalStack ended with status {child.returncode} while starting.\n{self._tail()}")
            if time.monotonic() > deadline:
                self.stop()
                raise LocalStackError(f"LocalStack was not ready within {READY_SECONDS} s.\n{self._tail()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kills LocalStack and the functions it runs; does nothing if it is not running."""
        if not self._process:
            return
        with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            functions = self._process.children(recursive=True)
            # LocalStack 4.13 does not end on SIGTERM. psutil refuses to kill a pid that has been reused.
            for process in (self._process, *functions):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait(timeout=10)
        self._process = None
        self._state.unlink(missing_ok=True)

    def _index_of_services(self) -> Path:
        """The directory with LocalStack's index of AWS's services, which LocalStack would make again at each start, in four seconds. It is part
        of the environment, because it depends on its packages."""
        root = self.python.parent.parent / "localstack"
        if not root.exists():
            new = root.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            (new / "usr" / "lib" / "localstack").mkdir(parents=True)
            environment = self._environment() | {"FILESYSTEM_ROOT": str(new)}
            words = [self.python, "-m", "localstack.aws.spec"]
            made = subprocess.run(words, env=environment, cwd=self.directory, capture_output=True, text=True, check=False)
            if made.returncode:
                raise LocalStackError(f"LocalStack cannot make its index of services.\n{made.stdout}{made.stderr}")
            new.rename(root)
        return root / "usr" / "lib" / "localstack"

    @property
    def _certificate(self) -> Path:
        return self.directory / "volume" / "server.pem"

    @property
    def _state(self) -> Path:
        return self.directory / "localstack.json"

    def _find(self) -> bool:
        """Whether the process in the state file still runs; if so, attaches to it."""
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
            state = json.loads(self._state.read_text())
            process = psutil.Process(state["pid"])
            # A reused pid has another start time. Allows for a clock that was adjusted a little since.
            if abs(process.create_time() - state["started"]) < 2 and process.status() != psutil.STATUS_ZOMBIE:
                self._process, self.port = process, state["port"]
                return True
        return False

    def _environment(self) -> dict[str, str]:
        # Passes nothing else on: a user's AWS profile or DEBUG=1 would change LocalStack's behaviour.
        inherited = {name: os.environ[name] for name in ("PATH", "USER", "LANG") if name in os.environ}
        return inherited | {
            # The default server ignores GATEWAY_LISTEN and binds every address.
            "GATEWAY_SERVER": "hypercorn",
            "GATEWAY_LISTEN": f"127.0.0.1:{self.port}",
            "DNS_ADDRESS": "0",
            # Addresses that resolve without a network, for example in queue URLs.
            "LOCALSTACK_HOST": f"127.0.0.1:{self.port}",
            "SQS_ENDPOINT_STRATEGY": "path",
            # No telemetry, no downloads.
            "DISABLE_EVENTS": "1",
            "SKIP_SSL_CERT_DOWNLOAD": "1",
            "SQS_DISABLE_CLOUDWATCH_METRICS": "1",
            # The newer engine cannot update a stack whose template uses Fn::FindInMap with parameters.
            "PROVIDER_OVERRIDE_CLOUDFORMATION": "engine-legacy",
            # In a container, LocalStack would otherwise keep its state in /var/lib/localstack.
            "OVERRIDE_IN_DOCKER": "0",
            # Replaces /var/lib, /usr/lib and /etc.
            "FILESYSTEM_ROOT": str(self.directory / "volume"),
            "HOME": str(self.directory / "home"),
            "TMPDIR": str(self.directory / "tmp"),
            "XDG_CACHE_HOME": str(self.directory / "cache"),
            "CUSTOM_SSL_CERT_PATH": str(self._certificate),
            # LocalStack's default S3 keeps objects in /tmp/localstack-s3-storage, which belongs to the machine's first user.
            "PROVIDER_OVERRIDE_S3": "private",
            "LAMBDA_RUNTIME_EXECUTOR": "process",
            "LAMBDA_PROCESS_LOG_DIR": str(self.function_logs),
            "LAMBDA_PROCESS_IDENTITIES": str(self.identities),
            # Seconds between two batches of an event source mapping, and the most between two polls of an empty queue.
            "LAMBDA_EVENT_SOURCE_MAPPING_POLL_INTERVAL_SEC": "0.05",
            "LAMBDA_EVENT_SOURCE_MAPPING_MAX_BACKOFF_ON_EMPTY_POLL_SEC": "0.5",
        }

    def _is_ready(self) -> bool:
        url = f"{self.endpoint}/_localstack/init/ready"
        with contextlib.suppress(OSError, ValueError), DIRECTLY.open(url, timeout=1) as answer:
            return json.load(answer)["completed"]
        return False

    def _tail(self, lines: int = 20) -> str:
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join([f"The end of {self.log}:", *text[-lines:]])


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
