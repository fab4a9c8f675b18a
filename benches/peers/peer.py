"""What the Python contenders share: their settings, a login's validation, and the benchmark's protocol.

`best.py` has a validation of its own, with the same outcome. Addresses are masked as they are spelt. The function normalises them first,
which makes no difference for IPv4.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from functools import cache

import boto3

# Lambda sets both; boto3 reads only this one.
os.environ.setdefault("AWS_DEFAULT_REGION", os.environ["AWS_REGION"])

# Most characters of each required field: the width of its column. A mask's own length is checked after masking.
REQUIRED = {"user_id": 128, "app_version": 256, "device_type": 32, "ip": 256, "device_id": 256}
LOCALE_MAX = 32
MASKED_MAX = 256
INTEGER_MAX = 2**31 - 1
VERSION = re.compile(r"[0-9]+(\.[0-9]+)*")


# The settings, the same as the function's.


@cache
def secrets():
    return boto3.client("secretsmanager")


def secret(name: str) -> dict:
    """Reads the secret that the variable `name` names."""
    return json.loads(secrets().get_secret_value(SecretId=os.environ[name])["SecretString"])


def key_and_iv(keyring: dict) -> tuple[bytes, bytes]:
    """The key and IV of a keyring with the original's one key."""
    return bytes.fromhex(keyring["key"]), bytes.fromhex(keyring["iv"])


def database(credentials: dict) -> dict[str, str]:
    """The connection's parameters, for libpq."""
    where = {
        "host": os.environ["DATABASE_HOST"],
        "port": os.environ["DATABASE_PORT"],
        "dbname": os.environ["DATABASE_NAME"],
        "user": credentials["username"],
        "password": credentials["password"],
        "connect_timeout": "5",
    }
    if os.environ["DATABASE_TLS"] == "disable":
        return where | {"sslmode": "disable"}
    return where | {"sslmode": "verify-full", "sslrootcert": os.environ["DATABASE_CA"]}


# A message.


def login(body: str) -> dict:
    """The login in a message's body, with `app_version` as an integer. Raises `ValueError` if the body is not a login."""
    login = json.loads(body)
    if not isinstance(login, dict):
        raise ValueError("body is not a JSON object")
    for field, longest in REQUIRED.items():
        check(field, login.get(field), longest)
    if login.get("locale") is None:
        login["locale"] = None
    else:
        check("locale", login["locale"], LOCALE_MAX, shortest=0)
    if not VERSION.fullmatch(login["app_version"]):
        raise ValueError("app_version is not digits and dots")
    login["app_version"] = int(login["app_version"].replace(".", ""))
    if login["app_version"] > INTEGER_MAX:
        raise ValueError("app_version does not fit an integer")
    return login


def check(field: str, value: object, longest: int, shortest: int = 1) -> None:
    if not isinstance(value, str) or not shortest <= len(value) <= longest or "\0" in value:
        raise ValueError(f"{field} is missing, or no text that fits its column")
    # JSON's escapes can make half of a surrogate pair, which PostgreSQL's text cannot hold; encoding it raises a `ValueError`.
    value.encode()


def response(failures: list[str]) -> dict:
    """The response that reports these message ids as failed."""
    return {"batchItemFailures": [{"itemIdentifier": message_id} for message_id in failures]}


# The protocol.


def serve(handle: Callable[[bytes], bytes]) -> None:
    """Reads paths of event files, a line each, until standard input ends. Handles each file's events and reports their times.

    `handle` takes an event as Lambda's runtime delivers it, and returns the response, both JSON.
    """
    with open(os.environ["BENCH_ANSWERS"], "w") as answers:

        def answer(text: str) -> None:
            answers.write(f"{text}\n")
            answers.flush()

        answer("ready")
        for line in sys.stdin:
            answer(json.dumps(run(handle, line.rstrip("\n"))))


def run(handle: Callable[[bytes], bytes], path: str) -> dict:
    """Handles the events of one file. Each event follows its length in bytes (64 bits, little-endian)."""
    with open(path, "rb") as file:
        content = file.read()
    times, cpu, failures, start = [], 0, 0, 0
    while start < len(content):
        end = start + 8 + int.from_bytes(content[start : start + 8], "little")
        event, start = content[start + 8 : end], end
        cpu_before, before = time.process_time_ns(), time.monotonic_ns()
        answer = handle(event)
        after, cpu_after = time.monotonic_ns(), time.process_time_ns()
        times.append(after - before)
        cpu += cpu_after - cpu_before
        failures += len(json.loads(answer)["batchItemFailures"])
    return {"ns": times, "cpu_ns": cpu, "failures": failures}
