"""Execution environments beside LocalStack's, under Lambda's contract with SQS."""

import json
import time
import uuid
from collections import Counter
from pathlib import Path

from process_executor.executor import INIT_SECONDS
from process_executor.runtime import Call, Runtime

from world.localstack import ACCOUNT, CREDENTIALS, REGION
from world.stack import Stack


class Failed(Exception):
    """An invocation failed, so its whole batch stays in the queue; the text is the error's type."""


class Environment:
    """Owns one environment of the deployed function: at most one process at a time, and its log."""

    def __init__(self, stack: Stack, code: Path, log: Path, tally: Counter, answers: list[bytes], **variables: str):
        """`variables` override the deployed function's settings."""
        function = stack.localstack.client("lambda").get_function_configuration(FunctionName=stack.function_name)
        self._code, self._log, self._tally, self._answers = code, log, tally, answers
        self._arn = function["FunctionArn"]
        self._seconds = function["Timeout"]
        self._runtime: Runtime | None = None
        self._variables = {
            "PATH": "/usr/bin:/bin",
            **CREDENTIALS,
            "AWS_LAMBDA_FUNCTION_NAME": stack.function_name,
            "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(function["MemorySize"]),
            "AWS_LAMBDA_LOG_GROUP_NAME": f"/aws/lambda/{stack.function_name}",
            "AWS_LAMBDA_LOG_STREAM_NAME": log.stem,
            "AWS_LAMBDA_LOG_FORMAT": "JSON",
            "AWS_LAMBDA_LOG_LEVEL": function["LoggingConfig"]["ApplicationLogLevel"].upper(),
            **function["Environment"]["Variables"],
            **variables,
        }

    def invoke(self, event: dict) -> set[str]:
        """Invokes the function with an event, and returns the ids of the messages to delete. Raises `Failed`."""
        self._tally["invocations"] += 1
        try:
            return acknowledged({record["messageId"] for record in event["Records"]}, self._answer(json.dumps(event)))
        except Failed as failure:
            self._tally[f"failed: {failure}"] += 1
            raise

    def stop(self) -> None:
        if self._runtime:
            self._runtime.kill()

    def _answer(self, event: str) -> bytes:
        if not (self._runtime and self._runtime.alive):
            self._start()
        runtime = self._runtime
        deadline = time.monotonic() + self._seconds
        headers = {
            "Lambda-Runtime-Deadline-Ms": str(int((time.time() + self._seconds) * 1000)),
            "Lambda-Runtime-Invoked-Function-Arn": self._arn,
            "Lambda-Runtime-Trace-Id": f"Root=1-{int(time.time()):x}-{uuid.uuid4().hex[:24]}",
        }
        runtime.hand_over(str(uuid.uuid4()), event, headers)
        match runtime.next_call(deadline):
            case Call("response" | "error" as kind, body):
                self._answers.append(body)
            case None:
                runtime.kill()
                raise Failed("timeout")
            case Call(kind):
                runtime.kill()
                raise Failed(kind)
        # The invocation lasts until the process asks for the next event.
        if runtime.next_call(deadline) != Call("next"):
            runtime.kill()
        if kind == "error":
            raise Failed(json.loads(body)["errorType"])
        return body

    def _start(self) -> None:
        if self._runtime:
            self._runtime.kill()
        self._tally["starts"] += 1
        runtime = self._runtime = Runtime(self._code, self._variables, self._log)
        match runtime.next_call(time.monotonic() + INIT_SECONDS):
            case Call("next"):
                return
            case Call("init/error", body):
                self._answers.append(body)
                runtime.kill()
                raise Failed("init error")
            case _:
                runtime.kill()
                raise Failed("no init")


def acknowledged(ids: set[str], answer: bytes) -> set[str]:
    """The ids of the messages that Lambda deletes for an answer. Raises `Failed` if Lambda treats the whole batch as failed."""
    try:
        failures = (json.loads(answer) or {}).get("batchItemFailures") or []
        failed = [failure["itemIdentifier"] for failure in failures]
    except (ValueError, AttributeError, KeyError, TypeError):
        raise Failed("malformed answer") from None
    if not ids.issuperset(failed):
        raise Failed("malformed answer")
    return ids - set(failed)


def queue_arn(queue_url: str) -> str:
    return f"arn:aws:sqs:{REGION}:{ACCOUNT}:{queue_url.rpartition('/')[2]}"
