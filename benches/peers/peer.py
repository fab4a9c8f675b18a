"""What the Python contenders share: their settings, a login's validation, and the benchmark's protocol.

`best.py` has a validation of its own, with the same outcome. Addresses are masked as they are spelt, unlike the function's, which has one
spelling for each; IPv4 has no other.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from functools import cache

import boto3

# Lambda sets both; boto3 heeds only this one.
os.environ.setdefault("AWS_DEFAULT_REGION", os.environ["AWS_REGION"])

# Most characters of each field that must be there, the widths of the columns; a mask's own length is checked once it is made.
REQUIRED = {"user_id": 128, "app_version": 256, "device_type": 32, "ip": 256, "device_id": 256}
LOCALE_MAX = 32
MASKED_MAX = 256
INTEGER_MAX = 2**31 - 1
VERSION = re.compile(r"[0-9]+(\.[0-9]+)*")


# The settings, which are the function's.


@cache
def secrets():
    return boto3.client("secretsmanager")


def secret(name: str) -> dict:
    """The secret that the variable `name` names."""
    return json.loads(secrets().get_secret_value(SecretId=os.environ[name])["SecretString"])


def key_and_iv(keyring: dict) -> tuple[bytes, bytes]:
    """Of a keyring with the original's one key."""
    return bytes.fromhex(keyring["key"]), bytes.fromhex(keyring["iv"])


def database(credentials: dict) -> dict[str, str]:
    """Where the database is, in libpq's words."""
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
    """The login in a message's body, its `app_version` an integer; raises `ValueError` if it is none, which is the message's fault."""
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
    # PostgreSQL's text has no half of a surrogate pair, which JSON's escapes can make; encoding it raises a `ValueError`.
    value.encode()


def response(failures: list[str]) -> dict:
    """What Lambda is told of the messages that failed, by their ids."""
    return {"batchItemFailures": [{"itemIdentifier": message_id} for message_id in failures]}


# The protocol.


def serve(handle: Callable[[bytes], bytes]) -> None:
    """Handles the events of each file that a line of standard input names, and answers with the time that each took, until the input ends.

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
    """Handles the events of one file: each is its length (64 bits, little-endian), and then so many bytes."""
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
