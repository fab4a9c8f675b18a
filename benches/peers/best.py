"""The best Python that we could write for this: whatever can be done once for a batch is not done for each message.

- msgspec decodes only the needed fields of events and bodies, checks their types and lengths, and skips the rest.
- All masks are made at once: with one IV for all, CBC of a value that fits one block equals ECB of that value xored with the IV.
- libpq is called directly, as psycopg's cursors take a fifth of a small batch's time.
- A single statement is a transaction. A few rows are one prepared INSERT, in one round trip; more rows are a COPY, in two. COPY's binary
  format is no faster than its text format, and more to write.

A redelivered message becomes another row: nothing prevents it.
"""

from binascii import b2a_base64
from datetime import UTC, datetime
from functools import lru_cache
from itertools import repeat
from typing import Annotated

import peer
import psycopg
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7
from msgspec import Meta, Struct, json
from psycopg.pq import ExecStatus, PGresult

BLOCK = 16
# The padding that PKCS #7 appends to a value, by the value's length.
PADDING = [chr(BLOCK - length) * (BLOCK - length) for length in range(BLOCK)]
# Most bytes of a value whose mask fits its column.
MASKABLE = 191
# From this many rows on, a COPY is faster. On loopback it is as fast from 20 rows on, over a network from more.
MANY = 50

COLUMNS = ("user_id", "device_type", "masked_ip", "masked_device_id", "locale", "app_version", "create_date")
INSERT = b"insert into user_logins select * from json_populate_recordset(null::user_logins, $1)"
COPY = f"copy user_logins ({', '.join(COLUMNS)}) from stdin".encode()
COPY_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


# `gc=False`: these hold no reference cycles, so the garbage collector need not track them.
class Record(Struct, gc=False):
    messageId: str
    body: str


class Event(Struct, gc=False):
    Records: list[Record]


class Login(Struct, gc=False):
    user_id: Annotated[str, Meta(min_length=1, max_length=128)]
    app_version: str
    device_type: Annotated[str, Meta(min_length=1, max_length=32)]
    ip: Annotated[str, Meta(min_length=1, max_length=MASKABLE)]
    device_id: Annotated[str, Meta(min_length=1, max_length=MASKABLE)]
    locale: Annotated[str, Meta(max_length=32)] | None = None


decode_event = json.Decoder(Event).decode
decode_login = json.Decoder(Login).decode
encode = json.Encoder().encode

key, iv = peer.key_and_iv(peer.secret("MASKING_SECRET_ID"))
encrypt_blocks = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update
cbc = Cipher(algorithms.AES(key), modes.CBC(iv))
connection = psycopg.connect(**peer.database(peer.secret("DATABASE_SECRET_ID")), autocommit=True)
libpq = connection.pgconn


def expect(status: ExecStatus, result: PGresult) -> None:
    if result.status != status:
        raise psycopg.DatabaseError(result.get_error_message())


expect(ExecStatus.COMMAND_OK, libpq.prepare(b"insert", INSERT))


def handle(event: bytes) -> bytes:
    logins, failures = [], []
    for record in decode_event(event).Records:
        try:
            logins.append(parse(record.body))
        except Exception:  # only the message is read here, so any error is its fault
            failures.append(record.messageId)
    if logins:
        load(logins)
    return encode(peer.response(failures))


def parse(body: str) -> Login:
    login = decode_login(body)
    login.app_version = digits(login.app_version)
    if "\\u" in body or not body.isascii():
        check(login)
    return login


@lru_cache(maxsize=1024)
def digits(version: str) -> str:
    """The integer that is written for an `app_version`. Few are in use at a time."""
    number = version.replace(".", "")
    if not peer.VERSION.fullmatch(version) or int(number) > peer.INTEGER_MAX:
        raise ValueError("app_version is not digits and dots, or does not fit an integer")
    return number


def check(login: Login) -> None:
    """Checks the rules that only non-ASCII and escaped characters can break."""
    if "\0" in "".join((login.user_id, login.device_type, login.ip, login.device_id, login.locale or "")):
        raise ValueError("a field contains a NUL character")
    if max(len(login.ip.encode()), len(login.device_id.encode())) > MASKABLE:
        raise ValueError("a mask does not fit its column")


def load(logins: list[Login]) -> None:
    """Writes the logins' rows, in one transaction."""
    masked = masks([login.ip for login in logins] + [login.device_id for login in logins])
    users = [login.user_id for login in logins]
    devices = [login.device_type for login in logins]
    locales = [login.locale for login in logins]
    versions = [login.app_version for login in logins]
    ips, device_ids, days = masked[: len(logins)], masked[len(logins) :], repeat(datetime.now(UTC).date().isoformat())
    if len(logins) < MANY:
        rows = [dict(zip(COLUMNS, row)) for row in zip(users, devices, ips, device_ids, locales, versions, days)]
        expect(ExecStatus.COMMAND_OK, libpq.exec_prepared(b"insert", [encode(rows)]))
    else:
        rows = map("\t".join, zip(texts(users), texts(devices), ips, device_ids, texts(locales), versions, days))
        expect(ExecStatus.COPY_IN, libpq.exec_(COPY))
        libpq.put_copy_data("\n".join(rows).encode())
        libpq.put_copy_end()
        while result := libpq.get_result():
            expect(ExecStatus.COMMAND_OK, result)


def masks(values: list[str]) -> list[str]:
    try:
        blocks = "".join([value + PADDING[len(value)] for value in values]).encode("ascii")
    except (IndexError, UnicodeEncodeError):
        long = {value: mask(value) for value in values if len(value) >= BLOCK or not value.isascii()}
        short = iter(masks([value for value in values if value not in long]))
        return [long.get(value) or next(short) for value in values]
    size = len(blocks)
    xored = int.from_bytes(blocks, "little") ^ int.from_bytes(iv * (size // BLOCK), "little")
    encrypted = encrypt_blocks(xored.to_bytes(size, "little"))
    return [b2a_base64(encrypted[start : start + BLOCK], newline=False).decode() for start in range(0, size, BLOCK)]


def mask(value: str) -> str:
    """The mask of a value of any length."""
    padder, encryptor = PKCS7(8 * BLOCK).padder(), cbc.encryptor()
    return b2a_base64(encryptor.update(padder.update(value.encode()) + padder.finalize()), newline=False).decode()


def texts(column: list[str | None]) -> list[str]:
    """A column's values in COPY's text format."""
    joined = "".join(filter(None, column))
    if any(escaped in joined for escaped in "\\\t\n\r"):
        column = [value and value.translate(COPY_ESCAPES) for value in column]
    return [r"\N" if value is None else value for value in column]


if __name__ == "__main__":
    peer.serve(handle)
