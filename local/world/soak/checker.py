"""Compares the sent messages with the tables, the dead-letter queues and the logs.

Independent of the function: it shares no code with it, has its own masking, and does not trust the function's output.
"""

import base64
import hmac
import itertools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import date

import psycopg
from Crypto.Cipher import AES
from Crypto.Util.Padding import pad

from world.soak import visits
from world.soak.load import CANARIES, REFUSED_USER, Message

# How long an old key may be used beyond the keyring's TTL: Secrets Manager has faults, too, and invocations take time.
SLACK_SECONDS = 20
EXAMPLES = 5
POSTGRES_LOG = "postgres.log"


@dataclass(frozen=True)
class Evidence:
    """All evidence of a run, except the tables."""

    # By message id.
    sent: dict[str, Message]
    # The message ids in the dead-letter queues, once for each copy.
    dead: list[str]
    # The number of messages still in the queues.
    left: int
    # Logins of a FIFO group that were written while a bad message before them was still in the queue.
    overtaking: list[str]
    # The number of answers that Lambda would reject.
    malformed: int
    # The logs of the function and of PostgreSQL, and the function's answers, by name.
    logs: dict[str, bytes]
    # Keys and passwords.
    secrets: list[str]
    ring: dict
    # Key id and time of each rotation, and the seconds within which a running function must use it.
    rotations: list[tuple[str, float]]
    secrets_ttl: float
    days: set[date]


@dataclass
class Finding:
    """One kind of violation: its count, and some examples."""

    name: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: object, count: int = 1) -> None:
        if count > 0:
            self.count += count
            if len(self.examples) < EXAMPLES:
                self.examples.append(str(example))


def check(evidence: Evidence, database: psycopg.Connection) -> list[Finding]:
    rows = read_rows(database)
    of_rows = check_rows(evidence, rows)
    check_visits(evidence, database, *of_rows)
    return [
        *of_rows,
        check_order(evidence, rows),
        check_stale_masks(evidence, rows),
        *check_ledger(evidence, database),
        *check_dead_letters(evidence),
        check_tables(database),
        *check_logs(evidence),
        Finding("malformed answers", evidence.malformed),
    ]


@dataclass(frozen=True)
class Row:
    user_id: str
    device_type: str
    masked_ip: str
    masked_device_id: str
    locale: str | None
    app_version: int
    create_date: date
    # Seconds since the epoch; infinity if not committed yet.
    committed: float


def read_rows(database: psycopg.Connection) -> list[Row]:
    """The rows with their commit times, which tell the order; the server keeps these while `track_commit_timestamp` is on."""
    committed = "coalesce(extract(epoch from pg_xact_commit_timestamp(xmin)), 'infinity')::float"
    columns = "user_id, device_type, masked_ip, masked_device_id, locale, app_version, create_date"
    return [Row(*values) for values in database.execute(f"select {columns}, {committed} from user_logins")]


def check_rows(evidence: Evidence, rows: list[Row]) -> list[Finding]:
    lost, doubled, foreign = Finding("rows lost"), Finding("rows doubled"), Finding("rows that nobody may have written")
    masks, columns = Finding("masks wrong"), Finding("other columns wrong")
    goods = [message.row for message in evidence.sent.values() if message.good and not message.visit]
    # A user logs in once, or several times with the same body.
    wanted, logins = Counter(row[0] for row in goods), {row[0]: row for row in goods}
    found = Counter(row.user_id for row in rows)
    for user in wanted | found:
        if user not in wanted:
            foreign.add(user, found[user])
        else:
            lost.add(user, wanted[user] - found[user])
            doubled.add(user, found[user] - wanted[user])
    for row in rows:
        if not (login := logins.get(row.user_id)):
            continue
        user, device_type, ip, device_id, locale, app_version = login
        for field_name, plain, masked in (("ip", ip, row.masked_ip), ("device_id", device_id, row.masked_device_id)):
            if masked != mask(evidence.ring, key_id_of(masked), field_name, plain):
                masks.add(f"{field_name} of {user}: {masked}")
        if (row.device_type, row.locale, row.app_version) != (device_type, locale, app_version) or row.create_date not in evidence.days:
            columns.add(user)
    return [lost, doubled, foreign, masks, columns]


def check_visits(
    evidence: Evidence, database: psycopg.Connection, lost: Finding, doubled: Finding, foreign: Finding, masks: Finding, columns: Finding
) -> None:
    """Checks the second mapping's table for missing, surplus and wrong rows."""
    wanted = {message_id: message.row for message_id, message in evidence.sent.items() if message.visit and message.good}
    query = f"select message_id::text, to_jsonb(t) - '{{message_id,masked_ip,masked_phone,sent}}'::text[], masked_ip, masked_phone from {visits.TABLE} t"
    database.execute("set timezone = 'UTC'")
    rows = database.execute(query).fetchall()
    found = Counter(message_id for message_id, *_ in rows)
    for message_id in wanted | found:
        if message_id not in wanted:
            foreign.add(f"visit {message_id}", found[message_id])
        else:
            lost.add(f"visit {message_id}", 1 - found[message_id])
            doubled.add(f"visit {message_id}", found[message_id] - 1)
    for message_id, plain, masked_ip, masked_phone in rows:
        if not (row := wanted.get(message_id)):
            continue
        if masked_ip != mask(evidence.ring, key_id_of(masked_ip), "visitor.ip", row["ip"]):
            masks.add(f"visitor.ip of {message_id}: {masked_ip}")
        if masked_phone != mask(evidence.ring, evidence.ring["one_way"], "visitor.phone", row["phone"]):
            masks.add(f"visitor.phone of {message_id}: {masked_phone}")
        if plain != {name: value for name, value in row.items() if name not in ("ip", "phone")}:
            columns.add(f"visit {message_id}: {plain}")


def check_order(evidence: Evidence, rows: list[Row]) -> Finding:
    """A group's later message must not be committed before an earlier one. Both together is fine, because a statement is atomic."""
    finding = Finding("order broken in a FIFO group")
    committed = {row.user_id: row.committed for row in rows}
    groups = defaultdict(list)
    for message in evidence.sent.values():
        if message.group and message.row and message.row[0] in committed:
            groups[message.group].append((message.index, committed[message.row[0]], message.row[0]))
    for members in groups.values():
        for (_, earlier, _), (_, later, user) in itertools.pairwise(sorted(members)):
            if later < earlier:
                finding.add(f"{user}: committed {earlier - later:.3f} s before its predecessor")
    for user in evidence.overtaking:
        finding.add(f"{user}: written past the bad message before it")
    return finding


def check_stale_masks(evidence: Evidence, rows: list[Row]) -> Finding:
    finding = Finding("masks under a key long retired")
    ids = [key_id for key_id, _ in evidence.rotations]
    # A key retires when the next one becomes active; the first key is the ring's oldest.
    oldest = next(key for key in evidence.ring["keys"] if key != evidence.ring["one_way"])
    retired = dict(zip([oldest, *ids], [at for _, at in evidence.rotations], strict=False))
    for row in rows:
        at = retired.get(key_id_of(row.masked_ip))
        if at is not None and row.committed > at + evidence.secrets_ttl + SLACK_SECONDS:
            finding.add(f"{row.user_id}: {row.committed - at:.0f} s after the rotation")
    return finding


def check_ledger(evidence: Evidence, database: psycopg.Connection) -> list[Finding]:
    missing, foreign = Finding("ledger entries lost"), Finding("ledger entries doubled or of messages that are no rows")
    entries = Counter(str(message_id) for (message_id,) in database.execute("select message_id from etl_ledger"))
    goods = {message_id for message_id, message in evidence.sent.items() if message.good}
    for message_id in goods - entries.keys():
        missing.add(message_id)
    for message_id, count in entries.items():
        foreign.add(message_id, count - (message_id in goods))
    return [missing, foreign]


def check_dead_letters(evidence: Evidence) -> list[Finding]:
    good, lost, doubled = Finding("good messages dead-lettered"), Finding("bad messages lost"), Finding("dead letters doubled or unknown")
    dead = Counter(evidence.dead)
    for message_id, message in evidence.sent.items():
        if message.good:
            good.add(message_id, dead[message_id])
        else:
            lost.add(f"{message_id}: {message.body[:80]}", 1 - dead[message_id])
    for message_id, count in dead.items():
        doubled.add(message_id, count - (message_id in evidence.sent))
    return [good, lost, doubled, Finding("messages left in a queue", evidence.left)]


def check_tables(database: psycopg.Connection) -> Finding:
    """Of all columns of all tables, only `user_logins.user_id` may contain a canary: users are not masked."""
    finding = Finding("personal values in a table")
    tables = database.execute("select schemaname, tablename from pg_tables where schemaname not in ('pg_catalog', 'information_schema')")
    for schema, table in tables.fetchall():
        shown = "to_jsonb(t) - 'user_id'" if table == "user_logins" else "to_jsonb(t)"
        query = psycopg.sql.SQL(f"select ({shown})::text from {{}} t").format(psycopg.sql.Identifier(schema, table))
        for (text,) in database.execute(query):
            if re.search(CANARIES, text.encode()):
                finding.add(f"{table}: {text[:200]}")
    return finding


def check_logs(evidence: Evidence) -> list[Finding]:
    personal, secret = Finding("personal values in a log"), Finding("keys or passwords in a log")
    panics = Finding("panics")
    hidden = re.compile(b"|".join(re.escape(text.encode()) for text in evidence.secrets))
    for name, log in evidence.logs.items():
        # PostgreSQL's own log quotes a row that it refuses; the function's must not.
        canaries = CANARIES if name == POSTGRES_LOG else CANARIES + b"|" + REFUSED_USER.encode() + b"-"
        for finding, pattern in ((personal, canaries), (secret, hidden), (panics, rb"panicked")):
            for match in re.finditer(pattern, log):
                start = log.rfind(b"\n", 0, match.start()) + 1
                finding.add(f"{name}: {log[start : match.end() + 20].decode(errors='replace')[-200:]}")
    return [personal, secret, panics]


# The masks: AES-CBC, AES-SIV or HMAC, in Base64, preceded by the key's id if it has one.


def key_id_of(masked: str) -> str:
    key_id, colon, _ = masked.rpartition(":")
    return key_id if colon else ""


def mask(ring: dict, key_id: str, field_name: str, plain: str) -> str | None:
    """The mask of a field's value; None if the key is not in the ring."""
    if not (entry := ring["keys"].get(key_id)):
        return None
    key = bytes.fromhex(entry["key"])
    if entry.get("cipher") == "hmac-sha256":
        sealed = hmac.digest(key, field_name.encode() + b"\0" + plain.encode(), "sha256")
    elif entry.get("cipher", "aes-cbc") == "aes-siv":
        cipher = AES.new(key, AES.MODE_SIV)
        cipher.update(field_name.encode())
        ciphertext, tag = cipher.encrypt_and_digest(plain.encode())
        sealed = tag + ciphertext
    else:
        iv = bytes.fromhex(entry["iv"]) if "iv" in entry else AES.new(key, AES.MODE_ECB).encrypt(b"login-etl/cbc-iv")
        sealed = AES.new(key, AES.MODE_CBC, iv).encrypt(pad(plain.encode(), AES.block_size))
    return (f"{key_id}:" if key_id else "") + base64.b64encode(sealed).decode()
