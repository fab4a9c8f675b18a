"""Made-up login messages, with the shape and the quirks of the original exercise's data."""

import json
import random
import uuid

WRONG_TYPE = json.dumps({"foo": "oops_wrong_msg_type", "bar": "123"})
NOT_JSON = ("login by user 1", '{"user_id": "cut off')
VERSIONS = ("2.3.0", "0.2.6", "0.26", "2.6", "6.02", "2.00", "1.4.11", "3.5")
LOCALES = ("RU", "US", "BR", "DE", "CN", None, None)


def login(chance: random.Random, **fields: object) -> dict:
    """A made-up login; `fields` replace its values."""
    made_up = {
        "user_id": str(uuid.UUID(int=chance.getrandbits(128), version=4)),
        "app_version": chance.choice(VERSIONS),
        "device_type": chance.choice(("android", "ios")),
        # From the whole range, including reserved blocks, as in the original.
        "ip": ".".join(str(chance.randrange(256)) for _ in range(4)),
        "locale": chance.choice(LOCALES),
        "device_id": f"{chance.randrange(1000):03}-{chance.randrange(100):02}-{chance.randrange(10000):04}",
    }
    return made_up | fields


def make(count: int, seed: int = 1) -> list[str]:
    """`count` message bodies: some logins share an address or a device, one message has a wrong type, a few are not JSON."""
    chance = random.Random(seed)
    bad = [WRONG_TYPE, *NOT_JSON][: max(0, count - 1)]
    logins = [login(chance) for _ in range(count - len(bad))]
    for shared in ("ip", "device_id"):
        for _ in range(len(logins) // 20):
            one, other = chance.sample(logins, 2)
            one[shared] = other[shared]
    bodies = [json.dumps(fields) for fields in logins] + bad
    chance.shuffle(bodies)
    return bodies
