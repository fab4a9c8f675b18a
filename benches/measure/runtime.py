"""Runs and times one process of a function, and serves it the Lambda Runtime API."""

import os
import selectors
import signal
import socket
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from measure.bench import ContenderFailed

NEXT = "GET /2018-06-01/runtime/invocation/next"
INVOCATION = "POST /2018-06-01/runtime/invocation/"
PATIENCE_SECONDS = 60
# Between two checks that the process is alive.
LOOK_SECONDS = 0.2
INVOCATION_SECONDS = 60
ARN = "arn:aws:lambda:us-east-1:123456789012:function:login-etl"


class Call(NamedTuple):
    """A request of the process, and when its last byte arrived (`time.monotonic_ns`)."""

    line: str
    body: bytes
    at: int


class Invocation(NamedTuple):
    """An event's ns until the answer arrived and until the process asked for the next event; and the answer."""

    answered: int
    ns: int
    answer: bytes


class Memory(NamedTuple):
    """A process's peak bytes, and its bytes of file pages, which are mostly its program's."""

    most: int
    files: int


class Runtime:
    """Owns a process from its spawn until `end`, and serves it in the caller's thread."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        self._log = log
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._unread: dict[socket.socket, bytearray] = {}
        self._waiting: socket.socket | None = None
        self._cpu_ns: int | None = None
        address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        files = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        environment = environment | {"AWS_LAMBDA_RUNTIME_API": address}
        self.spawned = time.monotonic_ns()
        # Python ignores SIGPIPE, and a child would inherit this.
        self.pid = os.posix_spawn(command[0], command, environment, file_actions=files, setpgroup=0, setsigdef=[signal.SIGPIPE])

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def ready(self) -> int:
        """Waits until the process asks for its first event, and returns the ns since its spawn. Raises `ContenderFailed`."""
        return self._next().at - self.spawned

    def invoke(self, event: bytes) -> Invocation:
        """Sends an event to the waiting process. Raises `ContenderFailed`, also if the answer is an error."""
        head = (
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            f"Lambda-Runtime-Aws-Request-Id: {uuid.uuid4()}\r\n"
            f"Lambda-Runtime-Deadline-Ms: {int(1000 * (time.time() + INVOCATION_SECONDS))}\r\n"
            f"Lambda-Runtime-Invoked-Function-Arn: {ARN}\r\n"
            f"Lambda-Runtime-Trace-Id: Root=1-{int(time.time()):x}-{os.urandom(12).hex()}\r\n"
            f"Content-Length: {len(event)}\r\n\r\n"
        )
        began = time.monotonic_ns()
        try:
            self._waiting.sendall(head.encode() + event)
        except OSError as error:
            raise self._failed(f"it does not accept the event: {error}") from None
        answer = self._call()
        if not (answer.line.startswith(INVOCATION) and answer.line.endswith("/response")):
            raise self._failed(f"{answer.line}: {answer.body.decode(errors='replace')}")
        return Invocation(answer.at - began, self._next().at - began, answer.body)

    def memory(self) -> Memory:
        """The process's peak memory so far, and its file pages now."""
        fields = dict(line.split(":") for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        return Memory(*(int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssFile")))

    def end(self) -> int:
        """Kills the process if it is alive, and returns its total CPU time, user and system, in ns."""
        if self._cpu_ns is None:
            os.kill(self.pid, signal.SIGKILL)
            self._reap(0)
        for connection in (*self._unread, self._listener):
            connection.close()
        self._selector.close()
        return self._cpu_ns

    def _reap(self, options: int) -> bool:
        """Whether the process has ended; saves its CPU time."""
        pid, _, usage = os.wait4(self.pid, options)
        if pid:
            self._cpu_ns = int(1e9 * (usage.ru_utime + usage.ru_stime))
        return bool(pid)

    def _next(self) -> Call:
        call = self._call()
        if not call.line.startswith(NEXT):
            raise self._failed(f"{call.line}: {call.body.decode(errors='replace')}")
        return call

    def _call(self) -> Call:
        """The next request. Answers all requests with 202, except requests for an event, which stay open."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            for key, _ in self._selector.select(LOOK_SECONDS):
                if key.fileobj is self._listener:
                    connection = self._listener.accept()[0]
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._selector.register(connection, selectors.EVENT_READ)
                    self._unread[connection] = bytearray()
                elif call := self._read(key.fileobj):
                    return call
            if self._reap(os.WNOHANG):
                raise self._failed("it ended")
        raise self._failed(f"no request for {PATIENCE_SECONDS} s")

    def _read(self, connection: socket.socket) -> Call | None:
        unread = self._unread[connection]
        try:
            some = connection.recv(1 << 18)
        except ConnectionResetError:
            some = b""
        at = time.monotonic_ns()
        if not some:
            self._selector.unregister(connection)
            del self._unread[connection]
            connection.close()
            return None
        unread += some
        head, ended, body = bytes(unread).partition(b"\r\n\r\n")
        if not ended:
            return None
        line, *fields = head.decode().split("\r\n")
        lengths = [value for name, _, value in (field.partition(":") for field in fields) if name.lower() == "content-length"]
        if len(body) < sum(map(int, lengths)):
            return None
        unread.clear()
        line = line.removesuffix(" HTTP/1.1")
        if line.startswith(NEXT):
            self._waiting = connection
        else:
            connection.sendall(b'HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n{"status":"OK"}')
        return Call(line, body, at)

    def _failed(self, what: str) -> ContenderFailed:
        tail = "\n  ".join(self._log.read_text(errors="replace").splitlines()[-20:])
        return ContenderFailed(f"{what}; the end of {self._log}:\n  {tail}")
