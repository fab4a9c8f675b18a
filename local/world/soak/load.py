"""Makes the messages from a seed: logins of every valid shape, visits for a second mapping, and a share of bad messages."""

import ipaddress
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from world import messages
from world.soak import visits

FIFO_SHARE = 0.2
VISITS_SHARE = 0.15
BAD_SHARE = 0.03
# The share of logins that repeat another's body: two messages, so two rows.
COPY_SHARE = 0.02
FLOWING_GROUPS = 20
# In each group with a bad message: logins before it, and logins that it holds back.
BEFORE_BAD, BEHIND_BAD = 3, 4
BLOCKED_GROUP_EVERY = 250

# This pattern finds every personal value, so that a single one in a log is noticed. 198.18.0.0/15 and 2001:db8::/32 belong to nobody.
CANARY = "canary"
CANARIES = rb"(?i)canary|198\.1[89]\.\d|2001:0?db8"
# The run adds a constraint that refuses these users, as a table of another owner may have. PostgreSQL's log quotes a refused row, so the name is no
# canary.
REFUSED_USER = "refused"


@dataclass(frozen=True)
class Message:
    """One message, and the row it must become, or None if it must end in the dead-letter queue."""

    body: str
    # A login's user_id, device_type, ip, device_id, locale, app_version as an integer; a visit's columns by name.
    row: tuple | dict | None
    # Whether it is for the second mapping.
    visit: bool = False
    group: str | None = None
    # Index in the group, and whether the group has a bad message before this one.
    index: int = 0
    held_back: bool = False

    @property
    def good(self) -> bool:
        return self.row is not None


def make(count: int, seed: int, bad_share: float = BAD_SHARE) -> list[Message]:
    """`count` messages in sending order; those with a group go to the FIFO queue."""
    chance = random.Random(seed)
    fifo = int(count * FIFO_SHARE)
    second = [Message(body, row, visit=True) for body, row in visits.make(chance, int(count * VISITS_SHARE), CANARY, bad_share)]
    logins = count - fifo - len(second)
    standard = [bad(chance, number) for number in range(int(logins * bad_share))]
    goods = [good(chance, f"{CANARY}-{number:07}") for number in range(logins - len(standard))]
    for _ in range(int(len(goods) * COPY_SHARE)):
        goods[chance.randrange(len(goods))] = chance.choice(goods)
    standard += goods + second
    chance.shuffle(standard)
    ordered = list(grouped(chance, fifo))
    # Spreads the FIFO queue's messages over the whole run, in their order.
    indexes = set(chance.sample(range(count), len(ordered)))
    streams = iter(standard), iter(ordered)
    return [next(streams[index in indexes]) for index in range(count)]


def grouped(chance: random.Random, count: int) -> Iterator[Message]:
    """Messages of groups: most groups flow, and every so often a group has a bad message that blocks it."""
    heights: dict[str, int] = {}

    def message(name: str, **fields) -> Message:
        index = heights[name] = heights.get(name, -1) + 1
        return good(chance, f"{CANARY}-{name}-{index:06}", group=f"{CANARY}-{name}", index=index, **fields)

    left = count
    blocked = 0
    span = BEFORE_BAD + 1 + BEHIND_BAD
    while left:
        if left >= span and (count - left) // BLOCKED_GROUP_EVERY >= blocked:
            name = f"blocked{blocked:03}"
            blocked += 1
            yield from [message(name) for _ in range(BEFORE_BAD)]
            heights[name] += 1
            yield bad(chance, blocked * 2 + blocked % 2, group=f"{CANARY}-{name}", index=heights[name])
            yield from [message(name, held_back=True) for _ in range(BEHIND_BAD)]
            left -= span
        else:
            yield message(f"flowing{chance.randrange(FLOWING_GROUPS):02}")
            left -= 1


def login(chance: random.Random, user: str) -> dict:
    """A login whose personal values are canaries, from so few addresses and devices that many are shared."""
    ip = f"198.{chance.choice((18, 19))}.{chance.randrange(8)}.{chance.randrange(256)}"
    device = f"{CANARY}-{chance.randrange(1000):03}-{chance.randrange(100):02}"
    return messages.login(chance, user_id=user, ip=ip, device_id=device)


def good(chance: random.Random, user: str, **grouping) -> Message:
    fields = login(chance, user)
    match chance.randrange(20):
        case 0:
            fields["ip"] = f"2001:DB8:0:0::{chance.randrange(1, 200):x}"
        case 1:
            fields["ip"] = f"behind 198.18.0.{chance.randrange(256)}"
        case 2:
            fields["device_id"] += " – Gerät №\u00a07 \u202e\U0001f4f1"
        case 3:
            fields["device_id"] = fields["device_id"].ljust(150, "x")
        case 4:
            del fields["locale"]
        case 5:
            fields["extra"] = {CANARY: json.loads("[" * 200 + "]" * 200)}
        case 6:
            fields["user_id"] = fields["user_id"].ljust(128, "é")
        case 7:
            fields["user_id"] += "'); drop table user_logins; --"
    try:
        ip = str(ipaddress.ip_address(fields["ip"]))
    except ValueError:
        ip = fields["ip"]
    version = int(fields["app_version"].replace(".", ""))
    row = (fields["user_id"], fields["device_type"], ip, fields["device_id"], fields.get("locale"), version)
    return Message(json.dumps(fields, ensure_ascii=chance.random() < 0.5), row, **grouping)


def bad(chance: random.Random, kind: int, **grouping) -> Message:
    """A message that must not become a row, of kind number `kind`; each contains canaries."""
    fields = login(chance, f"{CANARY}-bad")
    text = json.dumps(fields)
    without_device = {name: value for name, value in fields.items() if name != "device_id"}
    kinds = [
        json.dumps(fields | {"user_id": f"{REFUSED_USER}-{kind}"}),
        f"not JSON: {CANARY} {fields['ip']}",
        text[:-1],
        json.dumps(["a", "list", CANARY]),
        json.dumps(CANARY),
        messages.WRONG_TYPE[:-1] + f', "ip": "{fields["ip"]}"}}',
        json.dumps(without_device),
        json.dumps(fields | {"device_id": None}),
        json.dumps(fields | {"ip": ""}),
        json.dumps(fields | {"ip": {CANARY: CANARY}}),
        json.dumps(fields | {"device_id": [CANARY]}),
        json.dumps(fields | {"device_id": f"{CANARY}\0"}),
        json.dumps(fields | {"device_id": CANARY * 60}),
        json.dumps(fields | {"user_id": CANARY * 30}),
        json.dumps(fields | {"ip": f"{CANARY}\ud800"}),
        json.dumps(fields | {"app_version": "99.999.999.999"}),
        json.dumps(fields | {"app_version": f"1.{CANARY}"}),
        json.dumps(fields | {"app_version": 2.3}),
        "[" * 200 + "]" * 200,
    ]
    return Message(kinds[kind % len(kinds)], None, **grouping)
