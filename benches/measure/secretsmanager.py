"""A stand-in for Secrets Manager that answers at once, so that a cold start's time is the function's own."""

import contextlib
import json
import socket
import ssl
import threading
import time

READ = "secretsmanager.GetSecretValue"


class SecretsManager:
    """Owns a server on loopback that returns the given secrets, with TLS or without; one thread per connection."""

    def __init__(self, secrets: dict[str, str], tls: ssl.SSLContext | None):
        self._secrets, self._tls = secrets, tls
        # The ns from a request's last byte to the end of the answer.
        self.service_ns: list[int] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "SecretsManager":
        return self

    def __exit__(self, *_) -> None:
        # Wakes `accept` up; closing does not.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in tuple(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def endpoint(self) -> str:
        """The URL, with the only name in the certificate."""
        return f"{'https' if self._tls else 'http'}://localhost:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self._listener.accept()[0]
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
            self._connections.add(connection)
            with connection, connection.makefile("rb") as requests:
                while requests.readline():
                    headers = {}
                    while line := requests.readline().strip():
                        name, _, value = line.decode().partition(":")
                        headers[name.lower()] = value.strip()
                    body = requests.read(int(headers.get("content-length", 0)))
                    began = time.monotonic_ns()
                    status, answer = self._answer(headers.get("x-amz-target"), body)
                    head = f"HTTP/1.1 {status}\r\nContent-Type: application/x-amz-json-1.1\r\nContent-Length: {len(answer)}\r\n\r\n"
                    connection.sendall(head.encode() + answer)
                    self.service_ns.append(time.monotonic_ns() - began)
        self._connections.discard(connection)

    def _answer(self, target: str | None, body: bytes) -> tuple[str, bytes]:
        name = json.loads(body or b"{}").get("SecretId")
        if target != READ or name not in self._secrets:
            return "400 Bad Request", json.dumps({"__type": "ResourceNotFoundException", "Message": f"no secret {name!r} here"}).encode()
        return "200 OK", json.dumps(
            {
                "ARN": f"arn:aws:secretsmanager:us-east-1:123456789012:secret:{name}-AbCdEf",
                "CreatedDate": 1.7e9,
                "Name": name,
                "SecretString": self._secrets[name],
                "VersionId": "9d7a3bb1-53f1-4d3f-8b8e-0f6f2f3b6c11",
                "VersionStages": ["AWSCURRENT"],
            }
        ).encode()
