"""The original's design as a batch handler: one message after the other, PyCryptodome for each value, psycopg2's `execute_values`.

A redelivered message becomes another row: nothing prevents it.
"""

import base64
import json
from datetime import UTC, datetime

import peer
import psycopg2
from Crypto.Cipher import AES
from Crypto.Util.Padding import pad
from psycopg2.extras import execute_values

INSERT = """insert into user_logins (user_id, device_type, masked_ip, masked_device_id, locale, app_version, create_date) values %s"""

KEY, IV = peer.key_and_iv(peer.secret("MASKING_SECRET_ID"))
connection = psycopg2.connect(**peer.database(peer.secret("DATABASE_SECRET_ID")))


def mask(value: str) -> str:
    # A new cipher for each value: a CBC cipher continues from its last block.
    masked = base64.b64encode(AES.new(KEY, AES.MODE_CBC, IV).encrypt(pad(value.encode(), AES.block_size))).decode()
    if len(masked) > peer.MASKED_MAX:
        raise ValueError("the mask does not fit its column")
    return masked


def row(body: str) -> tuple:
    login = peer.login(body)
    return (
        login["user_id"],
        login["device_type"],
        mask(login["ip"]),
        mask(login["device_id"]),
        login["locale"],
        login["app_version"],
        datetime.now(UTC).date(),
    )


def handle(event: bytes) -> bytes:
    rows, failures = [], []
    for record in json.loads(event)["Records"]:
        try:
            rows.append(row(record["body"]))
        except Exception:  # only the message is read here, so any error is its fault
            failures.append(record["messageId"])
    if rows:
        # Commits at its end.
        with connection, connection.cursor() as cursor:
            execute_values(cursor, INSERT, rows)
    return json.dumps(peer.response(failures)).encode()


if __name__ == "__main__":
    peer.serve(handle)
