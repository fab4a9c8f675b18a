"""A second mapping beside the logins': nested fields, a column of each type, and two masked columns, one of them one-way."""

import ipaddress
import json
import random
import uuid
from datetime import UTC, datetime

TABLE = "app.visits"
MAPPING = f"""
table = "{TABLE}"
[[column]]
name = "id"
from = "visit.id"
keep = "plain"
type = "uuid"
[[column]]
name = "masked_ip"
from = "visitor.ip"
keep = "masked"
normalize = "ip"
[[column]]
name = "masked_phone"
from = "visitor.phone"
keep = "one-way"
normalize = "trim"
[[column]]
name = "seen"
from = "visit.seen"
keep = "plain"
type = "timestamptz"
[[column]]
name = "day"
from = "visit.day"
keep = "plain"
type = "date"
[[column]]
name = "pages"
from = "visit.pages"
keep = "plain"
type = "integer"
[[column]]
name = "bytes"
from = "visit.bytes"
keep = "plain"
type = "bigint"
convert = "from-text"
[[column]]
name = "ratio"
from = "visit.ratio"
keep = "plain"
type = "double precision"
[[column]]
name = "bot"
from = "bot"
keep = "plain"
type = "boolean"
[[column]]
name = "tags"
from = "tags"
keep = "plain"
type = "jsonb"
optional = true
[[column]]
name = "agent"
from = "visitor.agent"
keep = "plain"
type = "text"
max_length = 32
optional = true
[[column]]
name = "sent"
value = "sent-time"
type = "timestamptz"
[[column]]
name = "message_id"
value = "message-id"
type = "uuid"
"""
SCHEMA = f"""
create schema app;
create table {TABLE} (
    id uuid, masked_ip varchar(256), masked_phone varchar(256), seen timestamptz, day date, pages integer, bytes bigint, ratio double precision,
    bot boolean, tags jsonb, agent varchar(32), sent timestamptz, message_id uuid
) partition by range (day);
create table {TABLE}_all partition of {TABLE} default;
grant usage on schema app to login_etl;
grant insert on {TABLE} to login_etl
"""


def make(chance: random.Random, count: int, canary: str, bad_share: float) -> list[tuple[str, dict | None]]:
    """Bodies, each with its expected row: the columns as PostgreSQL's `to_jsonb` formats them, and the unmasked `ip` and `phone`."""
    return [body(chance, canary, chance.random() < bad_share) for _ in range(count)]


def body(chance: random.Random, canary: str, bad: bool) -> tuple[str, dict | None]:
    seen = datetime.fromtimestamp(1_700_000_000 + chance.randrange(90_000_000), UTC)
    ip = f"198.18.{chance.randrange(8)}.{chance.randrange(256)}" if chance.random() < 0.8 else f"2001:DB8:0:0::{chance.randrange(1, 200):x}"
    phone = f"{canary} {chance.randrange(500):03}"
    visit = {
        "id": str(uuid.UUID(int=chance.getrandbits(128), version=4)),
        "seen": seen.isoformat(),
        "day": seen.date().isoformat(),
        "pages": chance.randrange(-(2**31), 2**31),
        "bytes": str(chance.randrange(2**63)),
        "ratio": chance.random(),
    }
    message = {"visit": visit, "visitor": {"ip": ip, "phone": chance.choice(("", " ")) + phone}, "bot": chance.random() < 0.5}
    tags = chance.choice((None, {"a": [1, {"b": "é"}]}, ["x"], 3))
    if tags is not None:
        message["tags"] = tags
    if chance.random() < 0.5:
        message["visitor"]["agent"] = "Gerät №\u00a07"
    if bad:
        spoil(chance, message, canary)
        return json.dumps(message), None
    row = {**visit, "bytes": int(visit["bytes"]), "bot": message["bot"], "tags": tags, "agent": message["visitor"].get("agent")}
    return json.dumps(message), row | {"ip": str(ipaddress.ip_address(ip)), "phone": phone}


def spoil(chance: random.Random, message: dict, canary: str) -> None:
    """Makes one field invalid, so that the message must not become a row."""
    parent, field, value = chance.choice(
        (
            ("visit", "id", canary),
            ("visit", "seen", "2026-11-28T09:30:00"),
            ("visit", "day", "2026-02-30"),
            ("visit", "pages", 1.5),
            ("visit", "bytes", "9" * 20),
            ("visit", "ratio", canary),
            ("visitor", "ip", None),
            ("visitor", "phone", canary * 50),
            ("visitor", "agent", "x" * 33),
        )
    )
    message[parent][field] = value
