"""Lets users sign in to a local PostgreSQL with IAM tokens, as RDS does.

PostgreSQL passes each password to our LDAP server. It uses botocore to check whether the password is a token signed by a known identity.
"""

import contextlib
import datetime
import functools
import json
import socketserver
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, urlsplit

import botocore.session
from botocore.compat import HAS_CRT
from psycopg import sql
from world.localstack import CREDENTIALS, REGION
from world.postgres import Postgres

# RDS lets this role's members sign in with tokens only.
ROLE = "rds_iam"
LIFE_SECONDS = 900
# The template's parameters for a function that signs in with tokens.
PARAMETERS = {"DatabaseAuth": "iam", "DatabaseResourceId": "db-LOCAL", "DatabaseSecretArn": ""}
# https://www.rfc-editor.org/rfc/rfc4511: resultCode
SUCCESS, INVALID_CREDENTIALS = 0, 49
# Patching botocore's clock affects the whole process, so only one thread may do it at a time.
CLOCK = threading.Lock()


@dataclass(frozen=True)
class Identity:
    access_key: str
    secret_key: str
    session_token: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The verdict on one token; `reason` is empty if it was accepted."""

    user: str
    token: str
    reason: str


class Tokens:
    """Owns the LDAP server, as a context manager, and has PostgreSQL use it for the members of `ROLE`."""

    def __init__(self, postgres: Postgres, identities: Path | None = None, clock: Callable[[], float] = time.time):
        """Knows this world's own identity, and those that the executor wrote to `identities`."""
        self.verdicts: list[Verdict] = []
        self.clock = clock
        self._postgres, self._identities = postgres, identities
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler(self), bind_and_activate=True)
        self._server.daemon_threads = True

    def __enter__(self) -> "Tokens":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        with self._postgres.connect(autocommit=True) as admin:
            admin.execute(f"create role {ROLE}")
        port = self._server.server_address[1]
        self._postgres.ask_first(f'hostssl all +{ROLE} 127.0.0.1/32 ldap ldapserver=127.0.0.1 ldapport={port} ldapprefix="" ldapsuffix=""')
        return self

    def __exit__(self, *_) -> None:
        if self._postgres.running:
            self._postgres.ask_first(None)
            with self._postgres.connect(autocommit=True) as admin:
                admin.execute(f"drop role {ROLE}")
        self._server.shutdown()
        self._server.server_close()

    def admit(self, user: str, admitted: bool = True) -> None:
        with self._postgres.connect(autocommit=True) as admin:
            words = "grant {} to {}" if admitted else "revoke {} from {}"
            admin.execute(sql.SQL(words).format(sql.Identifier(ROLE), sql.Identifier(user)))

    def judge(self, user: str, token: str) -> bool:
        reason = self._objection(user, token)
        self.verdicts.append(Verdict(user, token, reason))
        return not reason

    def _objection(self, user: str, token: str) -> str:
        query = parameters(token)
        host, _, port = urlsplit(f"https://{token}").netloc.partition(":")
        try:
            signed = datetime.datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC)
            identity = self._identity(query["X-Amz-Credential"].split("/")[0])
        except (KeyError, FileNotFoundError) as missing:
            return f"it is not a token of a known identity: {missing}"
        if (query["DBUser"], host, int(port)) != (user, self._postgres.host, self._postgres.port):
            return "it is for another user, host or port"
        if parameters(made(identity, host, int(port), user, signed)) != query:
            return "its signature is wrong"
        age = self.clock() - signed.timestamp()
        return "" if -300 <= age <= LIFE_SECONDS else f"it is {age:.0f} s old"

    def _identity(self, access_key: str) -> Identity:
        if access_key == CREDENTIALS["AWS_ACCESS_KEY_ID"]:
            return Identity(access_key, CREDENTIALS["AWS_SECRET_ACCESS_KEY"])
        if not self._identities or not access_key.isalnum():
            raise KeyError(access_key)
        return Identity(access_key, *json.loads((self._identities / access_key).read_text()))


def parameters(token: str) -> dict[str, str]:
    return {name: value for name, [value] in parse_qs(urlsplit(f"https://{token}").query).items()}


def made(identity: Identity, host: str, port: int, user: str, signed: datetime.datetime) -> str:
    """The token that botocore makes at the time `signed`."""
    with CLOCK, contextlib.ExitStack() as stack:
        # botocore uses the second module if awscrt is installed.
        for module in ("botocore.auth", "botocore.crt.auth") if HAS_CRT else ("botocore.auth",):
            stack.enter_context(mock.patch(f"{module}.get_current_datetime", lambda **_: signed))
        return client(identity).generate_db_auth_token(host, port, user)


@functools.cache
def client(identity: Identity):
    return botocore.session.Session().create_client(
        "rds",
        region_name=REGION,
        aws_access_key_id=identity.access_key,
        aws_secret_access_key=identity.secret_key,
        aws_session_token=identity.session_token,
    )


def handler(tokens: Tokens) -> type:
    class Handler(socketserver.StreamRequestHandler):
        """Serves one LDAP client's bind requests, which check a name and a password: https://www.rfc-editor.org/rfc/rfc4511#section-4.2."""

        def handle(self) -> None:
            while message := self.rfile.read(1):
                content = self.rfile.read(self._length())
                number, operation = split(content)
                tag, fields = operation[0], split(value(operation))
                if tag != 0x60:  # not a BindRequest: ends the connection
                    return
                _, name, password = fields
                code = SUCCESS if tokens.judge(value(name).decode(), value(password).decode()) else INVALID_CREDENTIALS
                answer = number + bytes([0x61, 7, 0x0A, 1, code, 4, 0, 4, 0])
                self.wfile.write(bytes([message[0], len(answer)]) + answer)

        def _length(self) -> int:
            first = self.rfile.read(1)[0]
            return first if first < 0x80 else int.from_bytes(self.rfile.read(first & 0x7F))

    return Handler


def split(content: bytes) -> list[bytes]:
    """Splits BER into its elements, each with its tag and length."""
    elements = []
    while content:
        header, length = header_and_length(content)
        elements.append(content[: header + length])
        content = content[header + length :]
    return elements


def value(element: bytes) -> bytes:
    return element[header_and_length(element)[0] :]


def header_and_length(element: bytes) -> tuple[int, int]:
    if element[1] < 0x80:
        return 2, element[1]
    size = element[1] & 0x7F
    return 2 + size, int.from_bytes(element[2 : 2 + size])
