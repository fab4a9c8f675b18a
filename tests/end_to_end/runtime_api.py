"""Runs the function's binary as one environment behind our own Runtime API."""

import contextlib
import json
import os
import queue
import subprocess
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from world import messages, paths


class RuntimeApi(ThreadingHTTPServer):
    """Serves events, and keeps the answers by request id."""

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


@contextlib.contextmanager
def environment(settings, log):
    """Starts an environment, and yields its Runtime API; its output goes to the file `log`."""
    api = RuntimeApi()
    threading.Thread(target=api.serve_forever, daemon=True).start()
    lambdas = {
        "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{api.server_port}",
        "AWS_LAMBDA_FUNCTION_NAME": "login-etl",
        "AWS_LAMBDA_FUNCTION_VERSION": "1",
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "256",
    }
    bootstrap = paths.SAM_BUILD / "LoginFunction" / "bootstrap"
    with log.open("wb") as output:
        process = subprocess.Popen([bootstrap], env={"PATH": os.environ["PATH"]} | lambdas | settings, stdout=output, stderr=output)
    try:
        yield api
    finally:
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
