"""Several invocations at once in one environment, as Lambda Managed Instances have it: the binary against a Runtime API that asks for it."""

import json
import os
import queue
import random
import subprocess
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from world import messages, paths


class RuntimeApi(ThreadingHTTPServer):
    """Hands out events to whoever asks, and keeps the answers by request id."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), RuntimeApiHandler)
        self.events = queue.SimpleQueue()
        self.answers = {}
        self.answered = threading.Condition()

    def invoke(self, event, seconds):
        request_id = str(uuid.uuid4())
        self.events.put((request_id, int((time.time() + seconds) * 1000), json.dumps(event).encode()))
        return request_id

    def answer(self, request_id, seconds=30):
        with self.answered:
            assert self.answered.wait_for(lambda: request_id in self.answers, seconds)
            return self.answers[request_id]


class RuntimeApiHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        request_id, deadline, event = self.server.events.get()
        headers = {"Lambda-Runtime-Aws-Request-Id": request_id, "Lambda-Runtime-Deadline-Ms": deadline}
        headers |= {"Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:us-east-1:000000000000:function:login-etl"}
        self.reply(200, event, headers | {"Lambda-Runtime-Trace-Id": "Root=1-5bef4de7-ad49b0e87f6ef6c87fc2e700"})

    def do_POST(self):
        *_, request_id, kind = self.path.split("/")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.answered:
            self.server.answers[request_id] = (kind, body)
            self.server.answered.notify_all()
        self.reply(202, b"{}", {})

    def reply(self, status, body, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def runtime_api(servers, stack, tmp_path):
    """A Runtime API with one environment of four invocations at once behind it."""
    api = RuntimeApi()
    threading.Thread(target=api.serve_forever, daemon=True).start()
    settings = servers.environment() | stack.environment()
    lambdas = {
        "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{api.server_port}",
        "AWS_LAMBDA_MAX_CONCURRENCY": "4",
        "AWS_LAMBDA_FUNCTION_NAME": "login-etl",
        "AWS_LAMBDA_FUNCTION_VERSION": "1",
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "256",
    }
    with (tmp_path / "log").open("wb") as log:
        bootstrap = paths.SAM_BUILD / "LoginFunction" / "bootstrap"
        process = subprocess.Popen([bootstrap], env={"PATH": os.environ["PATH"]} | settings | lambdas, stdout=log, stderr=log)
        yield api
        process.kill()
        process.wait()
    api.shutdown()


def event(chance, count):
    records = [
        {
            "messageId": str(uuid.uuid4()),
            "receiptHandle": "handle",
            "body": json.dumps(messages.login(chance)),
            "attributes": {"SentTimestamp": str(int(time.time() * 1000)), "ApproximateReceiveCount": "1"},
            "eventSourceARN": "arn:aws:sqs:us-east-1:000000000000:none",
        }
        for _ in range(count)
    ]
    return {"Records": records}


def test_invocations_run_at_once_each_within_its_own_deadline(servers, runtime_api):
    chance = random.Random(5)
    with servers.postgres.connect(autocommit=True) as admin:
        before = admin.execute("select count(*) from user_logins").fetchone()[0]
        with admin.transaction():
            admin.execute("lock table user_logins")
            long = [runtime_api.invoke(event(chance, 10), seconds=30) for _ in range(2)]
            # Answered while the others are still under way.
            short = runtime_api.invoke(event(chance, 10), seconds=2)
            kind, answer = runtime_api.answer(short, seconds=10)
            assert (kind, answer["errorType"]) == ("error", "Deadline")
            assert not runtime_api.answers.keys() & set(long)
        for request_id in long:
            assert runtime_api.answer(request_id) == ("response", {"batchItemFailures": []})
        assert admin.execute("select count(*) from user_logins").fetchone()[0] == before + 20
