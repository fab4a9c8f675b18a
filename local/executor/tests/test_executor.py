"""Tests the runtime executor in its own LocalStack, with ``bootstrap.py`` as the function."""

import io
import json
import os
import platform
import signal
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from world.localstack import LocalStack

ROLE = "arn:aws:iam::000000000000:role/function"
HOST = "arm64" if platform.machine() in ("aarch64", "arm64") else "x86_64"


@pytest.fixture(scope="module")
def localstack(tmp_path_factory):
    localstack = LocalStack(tmp_path_factory.mktemp("localstack"))
    localstack.start()
    yield localstack
    localstack.stop()


@pytest.fixture
def function(localstack, request):
    return Function(localstack, request.node.name)


class Function:
    """A deployed ``bootstrap.py``, with a timeout of one second."""

    def __init__(self, localstack, name, architecture=HOST, log_format="Text", **environment):
        self.localstack, self.name = localstack, name[:60]
        bootstrap = Path(__file__).with_name("bootstrap.py").read_text()
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            # A script that sh and Python can both read, because a #! line cannot name an interpreter whose path has a space.
            beginning = f"""#!/bin/sh\n'''exec' "{sys.executable}" "$0" "$@"\n' '''\n"""
            file.writestr("bootstrap", beginning + bootstrap)
        self.client = localstack.client("lambda")
        self.client.create_function(
            FunctionName=self.name,
            Runtime="provided.al2023",
            Handler="bootstrap",
            Role=ROLE,
            Code={"ZipFile": archive.getvalue()},
            Architectures=[architecture],
            Timeout=1,
            MemorySize=256,
            Environment={"Variables": environment},
            LoggingConfig={"LogFormat": log_format},
        )

    def wait(self):
        wait_for(lambda: self.state["State"] != "Pending")
        return self

    @property
    def state(self):
        return self.client.get_function_configuration(FunctionName=self.name)

    def invoke(self, action):
        self.wait()
        answer = self.client.invoke(FunctionName=self.name, Payload=json.dumps({"do": action}))
        return json.load(answer["Payload"]) | {"failed": "FunctionError" in answer, "id": answer["ResponseMetadata"]["RequestId"]}

    def log(self):
        return "".join(path.read_text() for path in self.localstack.function_logs.glob(f"{self.name}-*.log"))


class Queue:
    """A queue that feeds a function, and its dead-letter queue."""

    def __init__(self, function, max_receive_count, batch_size):
        function.wait()
        self.sqs = function.localstack.client("sqs")
        self.dead_letters = self.sqs.create_queue(QueueName=f"{function.name}-dlq")["QueueUrl"]
        redrive = {"deadLetterTargetArn": self.arn(self.dead_letters), "maxReceiveCount": max_receive_count}
        self.url = self.sqs.create_queue(
            QueueName=function.name, Attributes={"VisibilityTimeout": "1", "RedrivePolicy": json.dumps(redrive)}
        )["QueueUrl"]
        function.client.create_event_source_mapping(
            FunctionName=function.name,
            EventSourceArn=self.arn(self.url),
            BatchSize=batch_size,
            FunctionResponseTypes=["ReportBatchItemFailures"],
        )

    def arn(self, url):
        return self.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]

    def send(self, action="succeed", receipts=()):
        body = json.dumps({"do": action, "receipts": [str(receipt) for receipt in receipts]})
        return self.sqs.send_message(QueueUrl=self.url, MessageBody=body)["MessageId"]

    def depth(self, url):
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        return sum(map(int, self.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"].values()))

    def wait_until_empty(self):
        wait_for(lambda: self.depth(self.url) == 0)

    def dead(self):
        answer = self.sqs.receive_message(QueueUrl=self.dead_letters, MaxNumberOfMessages=10)
        return {message["MessageId"] for message in answer.get("Messages", [])}


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_context_and_environment_are_lambdas(function):
    before = time.time()
    seen = function.invoke("succeed")
    context, environment = seen["context"], seen["environment"]
    assert context["Lambda-Runtime-Aws-Request-Id"] == seen["id"]
    assert context["Lambda-Runtime-Invoked-Function-Arn"] == function.state["FunctionArn"]
    assert context["Lambda-Runtime-Trace-Id"].startswith("Root=")
    assert before + 1 <= int(context["Lambda-Runtime-Deadline-Ms"]) / 1000 + 0.001 <= time.time() + 1
    expected = {
        "AWS_LAMBDA_FUNCTION_NAME": function.name,
        "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "256",
        "AWS_LAMBDA_INITIALIZATION_TYPE": "on-demand",
        "AWS_LAMBDA_LOG_GROUP_NAME": f"/aws/lambda/{function.name}",
        "AWS_ENDPOINT_URL": function.localstack.endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "TZ": ":UTC",
        "_HANDLER": "bootstrap",
    }
    assert {name: environment.get(name) for name in expected} == expected
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_LAMBDA_LOG_STREAM_NAME"} <= environment.keys()
    assert Path(environment["LAMBDA_TASK_ROOT"], "bootstrap").is_file()
    assert not {"HOME", "LAMBDA_PROCESS_LOG_DIR", "EDGE_PORT"} & environment.keys()


def test_a_function_error_fails_the_invocation_and_keeps_the_process(function):
    pid = function.invoke("succeed")["pid"]
    error = function.invoke("raise")
    assert (error["failed"], error["errorType"], error["errorMessage"]) == (True, "ValueError", "no good")
    assert function.invoke("succeed")["pid"] == pid


def test_a_timeout_kills_the_process_group_and_the_next_invocation_starts_a_fresh_process(function):
    pid = function.invoke("succeed")["pid"]
    started = time.monotonic()
    error = function.invoke("sleep")
    assert time.monotonic() - started < 2
    assert (error["failed"], error["errorType"]) == (True, "Sandbox.Timedout")
    assert error["errorMessage"] == f"RequestId: {error['id']} Error: Task timed out after 1.00 seconds"
    child = int(function.log().partition("child ")[2].split()[0])
    assert not runs(pid)
    assert not runs(child)
    assert function.invoke("succeed")["pid"] != pid


def test_an_exit_during_an_invocation_is_an_exit_error(function):
    error = function.invoke("exit")
    assert (error["failed"], error["errorType"]) == (True, "Runtime.ExitError")
    assert error["errorMessage"] == f"RequestId: {error['id']} Error: Runtime exited with error: exit status 1"
    assert not function.invoke("succeed")["failed"]


def test_a_failed_init_fails_the_invocation_and_is_retried(localstack, tmp_path):
    init = tmp_path / "init"
    function = Function(localstack, "init", INIT_FILE=str(init))
    init.write_text("report")
    error = function.invoke("succeed")
    assert (error["failed"], error["errorType"], error["errorMessage"]) == (True, "BadSetting", "QUEUE is not set")
    init.write_text("exit")
    error = function.invoke("succeed")
    assert (error["failed"], error["errorType"]) == (True, "Runtime.ExitError")
    assert error["errorMessage"].endswith("exit status 3")
    assert not function.invoke("succeed")["failed"]
    assert function.log().count("failing at init") == 2


@pytest.mark.parametrize("log_format", ["Text", "JSON"])
def test_the_functions_output_reaches_its_log_group(localstack, log_format):
    function = Function(localstack, f"logs-{log_format}", log_format=log_format)
    environment = function.invoke("succeed")["environment"]
    group = environment["AWS_LAMBDA_LOG_GROUP_NAME"]
    assert environment.get("AWS_LAMBDA_LOG_FORMAT") == ("JSON" if log_format == "JSON" else None)
    assert environment.get("AWS_LAMBDA_LOG_LEVEL") == ("INFO" if log_format == "JSON" else None)
    logs = localstack.client("logs")
    wait_for(lambda: logs.describe_log_groups(logGroupNamePrefix=group)["logGroups"])
    wait_for(lambda: logs.filter_log_events(logGroupName=group)["events"])
    lines = [event["message"].strip() for event in logs.filter_log_events(logGroupName=group)["events"]]
    if log_format == "JSON":
        start, report = map(json.loads, lines)
        assert (start["type"], report["type"]) == ("platform.start", "platform.report")
        assert report["record"]["status"] == "success"
        assert report["record"]["metrics"]["maxMemoryUsedMB"] > 0
    else:
        assert [line.split()[0] for line in lines] == ["START", "END", "REPORT"]
        assert "Init Duration" in lines[2]


def test_a_function_for_another_architecture_is_refused(localstack):
    other = {"arm64": "x86_64", "x86_64": "arm64"}[HOST]
    function = Function(localstack, "other", architecture=other).wait()
    assert function.state["State"] == "Failed"
    assert f"the function is built for {other}, this machine is {HOST}" in function.state["StateReason"]


def test_poison_is_received_max_receive_count_times_and_then_dead_lettered(function):
    queue = Queue(function, max_receive_count=3, batch_size=10)
    poison = set()
    for number in range(100):
        if number in (7, 50, 93):
            poison.add(queue.send("refuse", receipts=range(1, 10)))
        else:
            queue.send()
    queue.wait_until_empty()
    assert queue.dead() == poison
    received = [line.split()[1] for line in function.log().splitlines() if line.startswith("received")]
    assert len(set(received)) == 100
    assert {message: received.count(message) for message in set(received) if received.count(message) > 1} == dict.fromkeys(poison, 3)


def test_a_batch_that_fails_as_a_whole_is_redelivered(function):
    queue = Queue(function, max_receive_count=5, batch_size=1)
    for action in ("raise", "exit", "sleep"):
        queue.send(action, receipts=[1])
    queue.wait_until_empty()
    assert queue.dead() == set()
    assert [function.log().count(f"Status: {status}") for status in ("error", "timeout")] == [2, 1]


def test_functions_die_with_localstack(tmp_path):
    localstack = LocalStack(tmp_path)
    localstack.start()
    try:
        pid = Function(localstack, "orphan").invoke("succeed")["pid"]
        assert runs(pid)
        os.kill(localstack.pid, signal.SIGKILL)
        wait_for(lambda: not runs(pid), seconds=5)
    finally:
        localstack.stop()
