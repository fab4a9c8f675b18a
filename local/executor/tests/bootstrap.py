"""A function for the executor's tests: it carries out the action that its event, or each SQS message's body, names."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

RUNTIME = f"http://{os.environ['AWS_LAMBDA_RUNTIME_API']}/2018-06-01/runtime"


def post(path, answer):
    urllib.request.urlopen(f"{RUNTIME}/{path}", json.dumps(answer).encode()).read()


def do(action):
    """Carries out an action; returns whether it succeeded."""
    if action == "raise":
        raise ValueError("no good")
    if action == "exit":
        os._exit(1)
    if action == "sleep":
        child = subprocess.Popen(["sleep", "60"])
        print("child", child.pid, flush=True)
        child.wait()
    return action != "refuse"


def handle(event, context):
    if "Records" not in event:
        do(event["do"])
        return {"context": context, "environment": dict(os.environ), "pid": os.getpid()}
    failures = []
    for record in event["Records"]:
        body, receipt = json.loads(record["body"]), record["attributes"]["ApproximateReceiveCount"]
        print("received", record["messageId"], receipt, flush=True)
        if not do(body["do"] if receipt in body["receipts"] else "succeed"):
            failures.append({"itemIdentifier": record["messageId"]})
    return {"batchItemFailures": failures}


# This file sets how the next init fails, once.
init = Path(os.environ.get("INIT_FILE", "/nonexistent"))
if init.exists():
    how = init.read_text()
    init.unlink()
    print("failing at init", flush=True)
    if how == "report":
        post("init/error", {"errorType": "BadSetting", "errorMessage": "QUEUE is not set"})
    sys.exit(3)

while True:
    with urllib.request.urlopen(f"{RUNTIME}/invocation/next") as answer:
        context, event = dict(answer.headers), json.load(answer)
    invocation = f"invocation/{context['Lambda-Runtime-Aws-Request-Id']}"
    try:
        response = handle(event, context)
    except ValueError as error:
        post(f"{invocation}/error", {"errorType": "ValueError", "errorMessage": str(error)})
    else:
        post(f"{invocation}/response", response)
