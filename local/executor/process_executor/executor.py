"""One execution environment of a function, driven by LocalStack."""

import json
import math
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Self

from localstack import config
from localstack.services.lambda_.invocation.lambda_models import FunctionVersion, InvocationResult
from localstack.services.lambda_.invocation.runtime_executor import LambdaRuntimeException, RuntimeExecutor

from process_executor.log import Log
from process_executor.runtime import Call, Runtime

INIT_SECONDS = 10  # Lambda's own limit for the init phase
RUNTIMES = ("provided.al2023", "provided.al2")
ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "arm64", "arm64": "arm64"}

# LocalStack sets these for its container images; Lambda does not set them for an OS-only runtime.
NOT_LAMBDAS = ("LOCALSTACK_", "EDGE_PORT", "AWS_LAMBDA_FUNCTION_TIMEOUT", "AWS_EXECUTION_ENV", "LAMBDA_RUNTIME_DIR")


class FunctionError(Exception):
    """A failed invocation: the JSON for its caller, the status for the report, and whether the process must be replaced."""

    def __init__(self, payload: bytes, *, status: str = "error", fatal: bool) -> None:
        self.payload = payload
        self.status = status
        self.fatal = fatal

    @classmethod
    def of_platform(cls, error_type: str, request_id: str, message: str, status: str = "error") -> Self:
        error = {"errorType": error_type, "errorMessage": f"RequestId: {request_id} Error: {message}"}
        return cls(json.dumps(error).encode(), status=status, fatal=True)

    @classmethod
    def exited(cls, request_id: str, status: int) -> Self:
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return cls.of_platform("Runtime.ExitError", request_id, f"Runtime exited with error: {how}")

    @classmethod
    def timed_out(cls, request_id: str, what: str, seconds: float) -> Self:
        return cls.of_platform("Sandbox.Timedout", request_id, f"{what} timed out after {seconds:.2f} seconds", "timeout")


class ProcessExecutor(RuntimeExecutor):
    """Owns one environment: at most one running ``bootstrap`` at a time, and the environment's log.

    The first invocation starts the process, and its log includes the init; later invocations reuse the process. After a timeout, an exit or
    a failed init the process group is killed, and the next invocation starts a fresh process.
    """

    def __init__(self, id: str, function_version: FunctionVersion) -> None:
        super().__init__(id, function_version)
        self._runtime: Runtime | None = None
        self._stopped = False
        directory = os.environ.get("LAMBDA_PROCESS_LOG_DIR") or f"{tempfile.gettempdir()}/lambda-logs"
        as_json = function_version.config.logging_config.get("LogFormat") == "JSON"
        self._log = Log(Path(directory, f"{function_version.id.function_name}-{id}.log"), as_json=as_json)

    @classmethod
    def prepare_version(cls, function_version: FunctionVersion) -> None:
        """Unpacks the code. Raises if this machine cannot run it, which fails the function's creation."""
        function = function_version.config
        if function.runtime not in RUNTIMES:
            raise LambdaRuntimeException(f"runtime {function.runtime} cannot run as a process; {' and '.join(RUNTIMES)} can")
        machine = platform.machine().lower()
        host = ARCHITECTURES.get(machine, machine)
        if function.architectures[0] != host:
            raise LambdaRuntimeException(f"the function is built for {function.architectures[0]}, this machine is {host}")
        function.code.prepare_for_execution()
        if not (function.code.get_unzipped_code_location() / "bootstrap").is_file():
            raise LambdaRuntimeException("the function's archive has no file named bootstrap at its top level")

    @classmethod
    def cleanup_version(cls, function_version: FunctionVersion) -> None:
        pass

    def start(self, env_vars: dict[str, str]) -> None:
        function = self.function_version.config
        self._code = function.code.get_unzipped_code_location()
        lambdas = {name: str(value) for name, value in env_vars.items() if not name.startswith(NOT_LAMBDAS)}
        if level := lambdas.get("AWS_LAMBDA_LOG_LEVEL"):
            lambdas["AWS_LAMBDA_LOG_LEVEL"] = level.upper()  # Lambda's spelling; LocalStack writes "Info"
        self._environment = {
            "PATH": os.environ["PATH"],
            "LANG": "en_US.UTF-8",
            **lambdas,
            **(function.environment or {}),
            "LAMBDA_TASK_ROOT": str(self._code),
        }
        if identities := os.environ.get("LAMBDA_PROCESS_IDENTITIES"):
            # LocalStack makes up each identity. To verify its signatures, `world.tokens` needs the secret key.
            key, *secret = (self._environment[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"))
            Path(identities, key).write_text(json.dumps(secret))

    def stop(self) -> None:
        self._stopped = True
        if self._runtime:
            self._runtime.kill()

    def invoke(self, payload: dict[str, str]) -> InvocationResult:
        request_id = payload["invoke-id"]
        version = self.function_version.id.qualifier
        self._log.platform("start", f"START RequestId: {request_id} Version: {version}", {"requestId": request_id, "version": version})
        started = time.monotonic()
        init_seconds = 0.0
        error = None
        try:
            if not (self._runtime and self._runtime.alive):
                self._initialise(request_id)
                init_seconds = time.monotonic() - started
            result = self._answer(payload)
        except FunctionError as failure:
            error, result = failure, failure.payload
        self._report(request_id, time.monotonic() - started - init_seconds, init_seconds, error)
        if error and error.fatal:
            self._runtime.kill()
        return InvocationResult(request_id, result, is_error=error is not None, logs=self._log.take())

    def _initialise(self, request_id: str) -> None:
        """Starts the process and waits until it asks for its first event."""
        if self._runtime:
            self._runtime.kill()
        runtime = self._runtime = Runtime(self._code, self._environment, self._log.path)
        if self._stopped:  # while the process was being started
            runtime.kill()
        match runtime.next_call(time.monotonic() + INIT_SECONDS):
            case Call("next"):
                return
            case Call("init/error", error):
                raise FunctionError(error, fatal=True)
            case Call("exit", status):
                raise FunctionError.exited(request_id, status)
            case None:
                raise FunctionError.timed_out(request_id, "Init", INIT_SECONDS)
            case Call(kind):
                raise FunctionError.of_platform("Runtime.Unknown", request_id, f"Runtime called {kind} before next")

    def _answer(self, payload: dict[str, str]) -> bytes:
        """Hands the event to the process and returns the function's response."""
        request_id = payload["invoke-id"]
        seconds = self.function_version.config.timeout
        deadline = time.monotonic() + seconds
        headers = {
            "Lambda-Runtime-Deadline-Ms": str(int((time.time() + seconds) * 1000)),
            "Lambda-Runtime-Invoked-Function-Arn": payload["invoked-function-arn"],
            "Lambda-Runtime-Trace-Id": payload["trace-id"],
        }
        self._runtime.hand_over(request_id, payload["payload"], headers)
        answer = self._runtime.next_call(deadline)
        match answer:
            case Call("response" | "error"):
                pass
            case Call("exit", status):
                raise FunctionError.exited(request_id, status)
            case None:
                raise FunctionError.timed_out(request_id, "Task", seconds)
            case Call(kind):
                raise FunctionError.of_platform("Runtime.Unknown", request_id, f"Runtime called {kind} instead of answering")
        # The invocation lasts until the process asks for the next event, so its output until then belongs to this invocation.
        if self._runtime.next_call(deadline) != Call("next"):
            self._runtime.kill()
        if answer.kind == "error":
            raise FunctionError(answer.body, fatal=False)
        return answer.body

    def _report(self, request_id: str, seconds: float, init_seconds: float, error: FunctionError | None) -> None:
        metrics = {
            "durationMs": round(seconds * 1000, 3),
            "billedDurationMs": math.ceil((init_seconds + seconds) * 1000),
            "memorySizeMB": self.function_version.config.memory_size,
            "maxMemoryUsedMB": self._runtime.peak_memory_mb(),
        }
        if init_seconds:
            metrics["initDurationMs"] = round(init_seconds * 1000, 3)
        status = error.status if error else "success"
        self._log.platform(
            "report",
            f"END RequestId: {request_id}\nREPORT RequestId: {request_id}\tDuration: {metrics['durationMs']:.2f} ms\t"
            f"Billed Duration: {metrics['billedDurationMs']} ms\tMemory Size: {metrics['memorySizeMB']} MB\t"
            f"Max Memory Used: {metrics['maxMemoryUsedMB']} MB"
            + (f"\tInit Duration: {metrics['initDurationMs']:.2f} ms" if init_seconds else "")
            + (f"\tStatus: {status}" if error else ""),
            {"requestId": request_id, "metrics": metrics, "status": status},
        )

    def get_logs(self) -> str:
        return self._log.read()

    def get_address(self) -> str:
        return "127.0.0.1"

    def get_endpoint_from_executor(self) -> str:
        return "127.0.0.1"

    def get_runtime_endpoint(self) -> str:
        return f"http://127.0.0.1:{config.GATEWAY_LISTEN[0].port}"
