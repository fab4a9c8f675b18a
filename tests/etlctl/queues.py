"""A test's own queues, the function behind them, and a proxy that records requests to LocalStack."""

import json
import threading
import uuid
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request

from driver import World
from world import delivery
from world.localstack import DIRECTLY
from world.servers import Servers
from world.stack import Stack


class Queues:
    """A test's own queue and dead-letter queue, usable as a stack by `delivery`. `attributes` are the queue's."""

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
    """A world with its own queue and its own copy of the stack's function, which loads into its database and has its own log."""

    VARIABLES = ("DATABASE_HOST", "DATABASE_PORT", "DATABASE_NAME", "DATABASE_CA", "DATABASE_SECRET_ID", "MASKING_SECRET_ID", "OUTAGE_DELAY")

    def __init__(self, servers: Servers, stack: Stack):
        super().__init__(servers)
        self.localstack, self.function_name = servers.localstack, self.name
        # Long enough that no failed message returns to the queue during a test.
        self.queues = Queues(servers, VisibilityTimeout="300")
        self.queue_url = self.queues.queue_url
        self.environment |= self.queues.environment | {"FUNCTION_NAME": self.name, "OUTAGE_DELAY": "0"}
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
        """Creates an event source mapping from a queue to the function; returns its id."""
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
        """Invokes the function with received messages, and returns the ids of the batch item failures."""
        event = json.dumps({"Records": [delivery.record(message) for message in messages]})
        answer = self.functions.invoke(FunctionName=self.name, Payload=event)
        return {failure["itemIdentifier"] for failure in json.load(answer["Payload"])["batchItemFailures"]}

    @contextmanager
    def without(self, table: str):
        """Renames a table for a while, so that no batch can be loaded."""
        with self.connect() as database:
            database.execute(f"alter table {table} rename to away")
            try:
                yield
            finally:
                database.execute(f"alter table away rename to {table}")

    def logged(self, text: str) -> list[dict]:
        """Waits for lines of the function's log that contain a text, and returns them."""
        logs, group = self.localstack.client("logs"), f"/aws/lambda/{self.name}"

        def lines() -> list[dict]:
            events = logs.filter_log_events(logGroupName=group)["events"]
            return [json.loads(event["message"]) for event in events if text in event["message"]]

        return self.until(lines)

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


class Wiretap(ThreadingHTTPServer):
    """A proxy between `etlctl` and LocalStack. Records the messages that are received, and never answers requests of the kind `hold`."""

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
