"""One run of a function's ``bootstrap``: the process, and the Lambda Runtime API (2018-06-01) that serves it."""

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from werkzeug import Request, Response
from werkzeug.exceptions import BadRequest, Gone
from werkzeug.routing import Map, Rule
from werkzeug.serving import WSGIRequestHandler, make_server

URLS = Map(
    [
        Rule("/2018-06-01/runtime/invocation/next", endpoint="next", methods=["GET"]),
        Rule("/2018-06-01/runtime/invocation/<request_id>/response", endpoint="response", methods=["POST"]),
        Rule("/2018-06-01/runtime/invocation/<request_id>/error", endpoint="error", methods=["POST"]),
        Rule("/2018-06-01/runtime/init/error", endpoint="init/error", methods=["POST"]),
    ]
)

# A guard in the bootstrap's own process group waits on a pipe that only LocalStack holds open. However LocalStack ends, the pipe closes
# and the whole group dies with it. (Linux's parent-death signal follows the forking thread, and LocalStack's threads come and go.)
GUARDED = 'exec 3<&0; (read -r _ <&3; kill -KILL 0) & exec "$0" 3<&- </dev/null'


class Call(NamedTuple):
    """An action of the process: ``next``, ``response``, ``error``, ``init/error``, or ``exit`` (the body is then its status)."""

    kind: str
    body: bytes | int = b""


class Handler(WSGIRequestHandler):
    # Headers and body are two writes; Nagle's algorithm would delay the second until a delayed acknowledgement.
    disable_nagle_algorithm = True

    def log_request(self, *args):
        pass


class Runtime:
    """Owns a process group and a server on loopback, from construction to :meth:`kill`.

    One thread at a time invokes; any thread may kill.
    """

    def __init__(self, code: Path, environment: dict[str, str], log: Path) -> None:
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Response | None] = queue.SimpleQueue()
        self._request_id: str | None = None
        self._killed = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._api, threaded=True, request_handler=Handler)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", GUARDED, str(code / "bootstrap")],
                cwd=code,
                env=environment | {"AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{self._server.server_port}"},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        threading.Thread(target=lambda: self._calls.put(Call("exit", self._process.wait())), daemon=True).start()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def next_call(self, deadline: float) -> Call | None:
        """Waits for the process's next call; ``None`` when ``deadline`` (``time.monotonic``, seconds) passes first."""
        with contextlib.suppress(queue.Empty):
            return self._calls.get(timeout=max(0.0, deadline - time.monotonic()))
        return None

    def hand_over(self, request_id: str, event: str, headers: dict[str, str]) -> None:
        """Answers the process's waiting ``next``."""
        self._request_id = request_id
        headers = {"Lambda-Runtime-Aws-Request-Id": request_id} | headers
        self._events.put(Response(event, headers=headers, content_type="application/json"))

    def peak_memory_mb(self) -> int:
        """The process's peak memory in MB; 0 once it has ended, its present size on a system without procfs."""
        with contextlib.suppress(OSError, IndexError):  # a zombie's status has no such line
            return int(Path(f"/proc/{self._process.pid}/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self._process.pid).memory_info().rss // 2**20
        return 0

    def kill(self) -> None:
        """Kills and reaps the process group, and closes the server."""
        # Only once: the guard has kept the group's id from being reused until now, but no longer.
        if not self._killed.acquire(blocking=False):
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._events.put(None)
        self._server.shutdown()

    @Request.application
    def _api(self, request: Request) -> Response:
        kind, arguments = URLS.bind_to_environ(request.environ).match()
        if kind == "next":
            self._calls.put(Call("next"))
            if (event := self._events.get()) is None:
                raise Gone
            return event
        if kind != "init/error":
            if arguments["request_id"] != self._request_id:
                raise BadRequest("InvalidRequestID")
            self._request_id = None
        self._calls.put(Call(kind, request.get_data()))
        return Response('{"status":"OK"}', status=202, content_type="application/json")
