"""`etlctl` as a process, against a real PostgreSQL and LocalStack; `./local/test` starts both and deploys the stack."""

import fcntl
import json
import os
import pty
import select
import subprocess
import termios
import threading
import time
import uuid
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request

import psycopg
import pytest
from world import delivery, paths
from world.localstack import CREDENTIALS, DIRECTLY
from world.servers import DATABASE_SECRET, OPERATOR_SECRET, Servers
from world.stack import Stack

ETLCTL = paths.ROOT / "target" / "debug" / "etlctl"
# NIST SP 800-38A's AES-256 key, in the one-key form of the original script.
ONE_KEY = {"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4", "iv": "000102030405060708090a0b0c0d0e0f"}


@pytest.fixture(scope="session")
def servers():
    directory = os.environ.get("LOGIN_ETL_WORLD")
    assert directory, "LOGIN_ETL_WORLD is not set: run ./local/test"
    return Servers.attach(Path(directory))


@pytest.fixture(scope="session")
def stack(servers):
    return Stack(servers)


class Etlctl:
    """The tool, with these settings and in this directory."""

    def __init__(self, environment: dict[str, str], directory: Path):
        self.environment = {"PATH": os.environ["PATH"]} | environment
        self.directory = directory

    def start(self, *arguments: str, environment: dict[str, str | None] | None = None, **options) -> subprocess.Popen:
        """Starts `etlctl`, with pipes where a person would have a terminal. `environment` overrides variables; None unsets one."""
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
        """Runs `etlctl` on a terminal, where `answer` is typed once it asks; returns what could be seen there, and the exit status."""
        with Terminal(self, *arguments, **options) as terminal:
            seen = ""
            if answer:
                seen = terminal.until("[y/N]")
                terminal.type(f"{answer}\n")
            return seen + terminal.until(None), terminal.end()

    def json(self, *arguments: str, status: int = 0, **options):
        """What `etlctl --json` answers."""
        result = self.run("--json", *arguments, **options)
        assert result.returncode == status, result.stderr
        return json.loads(result.stdout)


@pytest.fixture
def etlctl(tmp_path):
    """Without any setting."""
    return Etlctl({}, tmp_path)


class World(Etlctl):
    """A database and a keyring of one test's own, and `etlctl` pointed at them."""

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
            "DATABASE_NAME": self.name,
            "DATABASE_SECRET_ID": DATABASE_SECRET,
            "ETLCTL_DATABASE_SECRET_ID": OPERATOR_SECRET,
            "MASKING_SECRET_ID": self.masking_secret,
        }
        super().__init__(environment, servers.localstack.directory)

    def connect(self) -> psycopg.Connection:
        """A session of the database's owner, each statement committed by itself."""
        return self.servers.postgres.connect(self.name, autocommit=True)

    def user(self, *roles: str) -> dict[str, str | None]:
        """A database user of the test's own in these roles: the environment that makes `etlctl` be that user."""
        user, password = f"{self.name}_user", uuid.uuid4().hex
        with self.connect() as database:
            database.execute(f"create role {user} login password '{password}' {'in role ' if roles else ''}{', '.join(roles)}")
        return {"DATABASE_USER": user, "DATABASE_PASSWORD": password, "ETLCTL_DATABASE_SECRET_ID": None}

    @contextmanager
    def locked(self, table: str, mode: str):
        """Holds a lock that keeps others waiting."""
        with self.connect() as database, database.transaction():
            database.execute(f"lock table {table} in {mode} mode")
            yield

    def sessions(self) -> list[str | None]:
        """The sessions of `etlctl` in this database: what kind of lock each waits for, or None."""
        query = "select case wait_event_type when 'Lock' then wait_event end from pg_stat_activity where datname = %s and application_name = 'etlctl'"
        with self.servers.postgres.connect(autocommit=True) as database:
            return [kind for (kind,) in database.execute(query, [self.name])]

    def until(self, condition, seconds: float = 30):
        """Waits for what `condition` returns to be true."""
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


@pytest.fixture
def empty_world(servers):
    """Without the schema."""
    world = World(servers)
    yield world
    with servers.postgres.connect(autocommit=True) as database:
        database.execute(f"drop database {world.name} with (force)")
        database.execute(f"drop role if exists {world.name}_user")


@pytest.fixture
def world(empty_world):
    result = empty_world.run("migrate")
    assert result.returncode == 0, result.stderr
    return empty_world


class Terminal:
    """`etlctl` on a terminal that a test looks at while it runs, and types into."""

    def __init__(self, world: World, *arguments: str, **options):
        self.ours, theirs = pty.openpty()
        self.unread = ""
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        # A session whose terminal it is, so that Ctrl-C reaches it.
        session = {"start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
        options["environment"] = {"TERM": "xterm-256color"} | options.get("environment", {})
        self.process = world.start(*arguments, **streams, **session, **options)
        os.close(theirs)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)

    def until(self, text: str | None, seconds: float = 30) -> str:
        """Waits for a text, or for the end, and returns what there was up to it since the last wait."""
        deadline = time.monotonic() + seconds
        while text is None or text not in self.unread:
            assert select.select([self.ours], [], [], max(0, deadline - time.monotonic()))[0], f"no {text or 'end'} in {self.unread!r}"
            try:
                self.unread += os.read(self.ours, 65536).decode().replace("\r\n", "\n")
            except OSError:
                # Nobody is left at the other end.
                assert text is None, f"ended without {text}: {self.unread!r}"
                break
        seen = self.unread if text is None else self.unread[: self.unread.index(text) + len(text)]
        self.unread = self.unread[len(seen) :]
        return seen

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def end(self, seconds: float = 30) -> int:
        """Waits for its end, and returns its exit status."""
        self.until(None, seconds)
        return self.process.wait(10)


class Wiretap(ThreadingHTTPServer):
    """Between `etlctl` and LocalStack: passes requests on, notes what messages are received, and keeps requests of the kind `hold` for ever."""

    daemon_threads = True

    def __init__(self, localstack, hold=None):
        super().__init__(("127.0.0.1", 0), WiretapHandler)
        self.localstack, self.hold = localstack, hold
        self.received, self.held, self.over = [], threading.Event(), threading.Event()
        self.environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_port}"}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_):
        self.over.set()
        self.shutdown()
        self.server_close()


class WiretapHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.hold and self.headers.get("X-Amz-Target", "").endswith(self.server.hold):
            self.server.held.set()
            self.server.over.wait()
            self.close_connection = True
            return
        request = Request(self.server.localstack.endpoint + self.path, body, dict(self.headers), method=self.command)
        try:
            answer = DIRECTLY.open(request)
        except HTTPError as error:
            answer = error
        with answer:
            said = answer.read()
        if b"ReceiptHandle" in said:
            self.server.received += json.loads(said)["Messages"]
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in ("connection", "content-length", "date", "server", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_POST

    def log_message(self, *_):
        pass


class Queues:
    """A queue and its dead-letter queue, of one test's own; `delivery` takes them for a stack. `attributes` are the queue's."""

    def __init__(self, servers: Servers, kind: str = "", receives: int = 5, **attributes: str):
        self.localstack, self.sqs = servers.localstack, servers.localstack.client("sqs")
        name, kinds = f"etlctl_{uuid.uuid4().hex[:12]}", {"FifoQueue": "true"} if kind == ".fifo" else {}
        dead = self.sqs.create_queue(QueueName=f"{name}_dead{kind}", Attributes=kinds | {"MessageRetentionPeriod": "1209600"})
        self.dead_letter_queue_url = dead["QueueUrl"]
        policy = {"deadLetterTargetArn": self.arn(self.dead_letter_queue_url), "maxReceiveCount": receives}
        attributes = kinds | {"RedrivePolicy": json.dumps(policy)} | attributes
        self.queue_url = self.sqs.create_queue(QueueName=name + kind, Attributes=attributes)["QueueUrl"]
        self.urls = (self.queue_url, self.dead_letter_queue_url)
        self.environment = {"QUEUE_URL": self.queue_url, "DLQ_URL": self.dead_letter_queue_url}

    def arn(self, url: str) -> str:
        return self.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]

    def delete(self) -> None:
        for url in self.urls:
            self.sqs.delete_queue(QueueUrl=url)


class Pipeline(World):
    """Besides, a queue of its own and behind it the stack's function, loading into that database and logging for itself."""

    VARIABLES = ("DATABASE_HOST", "DATABASE_PORT", "DATABASE_NAME", "DATABASE_CA_FILE", "DATABASE_SECRET_ID", "MASKING_SECRET_ID")

    def __init__(self, servers: Servers, stack: Stack):
        super().__init__(servers)
        self.localstack, self.function_name = servers.localstack, self.name
        # What failed does not come back while a test looks at it.
        self.queues = Queues(servers, VisibilityTimeout="300")
        self.queue_url = self.queues.queue_url
        self.environment |= self.queues.environment | {"FUNCTION_NAME": self.name}
        self.functions = servers.localstack.client("lambda")
        of_stack = self.functions.get_function(FunctionName=stack.function_name)
        with DIRECTLY.open(of_stack["Code"]["Location"]) as code:
            self.functions.create_function(
                FunctionName=self.name,
                **{name: of_stack["Configuration"][name] for name in ("Runtime", "Handler", "Role", "Architectures")},
                Code={"ZipFile": code.read()},
                Timeout=10,
                LoggingConfig={"LogFormat": "JSON", "ApplicationLogLevel": "INFO"},
                Environment={"Variables": {name: self.environment[name] for name in self.VARIABLES}},
            )
        self.functions.get_waiter("function_active_v2").wait(FunctionName=self.name, WaiterConfig={"Delay": 0.1})
        self.mapping = self.lead(self.queues)

    def lead(self, queues: Queues, **options) -> str:
        """Has the function handle what is in a queue; returns the mapping's id."""
        usual = {"Enabled": True, "FunctionResponseTypes": ["ReportBatchItemFailures"], "ScalingConfig": {"MaximumConcurrency": 2}}
        mapping = self.functions.create_event_source_mapping(
            FunctionName=self.name,
            EventSourceArn=queues.arn(queues.queue_url),
            BatchSize=100,
            MaximumBatchingWindowInSeconds=1,
            **usual | options,
        )["UUID"]
        self.until(lambda: self.functions.get_event_source_mapping(UUID=mapping)["State"] in ("Enabled", "Disabled"))
        return mapping

    def invoke(self, messages: list[dict]) -> set[str]:
        """Hands the function messages as they were received, and returns the ids of those that it did not take."""
        event = json.dumps({"Records": [delivery.record(message) for message in messages]})
        answer = self.functions.invoke(FunctionName=self.name, Payload=event)
        return {failure["itemIdentifier"] for failure in json.load(answer["Payload"])["batchItemFailures"]}

    @contextmanager
    def without(self, table: str):
        """The database lacks a table for a while, so that no batch can be loaded."""
        with self.connect() as database:
            database.execute(f"alter table {table} rename to away")
            try:
                yield
            finally:
                database.execute(f"alter table away rename to {table}")

    def logged(self, text: str) -> list[dict]:
        """The lines of the function's log that have a text, as soon as there are any."""
        logs, group = self.localstack.client("logs"), f"/aws/lambda/{self.name}"
        lines = lambda: (event["message"] for event in logs.filter_log_events(logGroupName=group)["events"])  # noqa: E731
        return self.until(lambda: [json.loads(line) for line in lines() if text in line])

    def forget_log(self) -> None:
        """Empties the function's log."""
        logs, group = self.localstack.client("logs"), f"/aws/lambda/{self.name}"
        for stream in logs.describe_log_streams(logGroupName=group)["logStreams"]:
            logs.delete_log_stream(logGroupName=group, logStreamName=stream["logStreamName"])

    def delete(self) -> None:
        self.functions.delete_event_source_mapping(UUID=self.mapping)
        self.functions.delete_function(FunctionName=self.name)
        self.localstack.client("logs").delete_log_group(logGroupName=f"/aws/lambda/{self.name}")
        self.queues.delete()
        with self.servers.postgres.connect(autocommit=True) as database:
            database.execute(f"drop database {self.name} with (force)")


@pytest.fixture(scope="module")
def pipeline(servers, stack):
    pipeline = Pipeline(servers, stack)
    result = pipeline.run("migrate")
    assert result.returncode == 0, result.stderr
    # Makes the log.
    assert pipeline.invoke([]) == set()
    yield pipeline
    pipeline.delete()
