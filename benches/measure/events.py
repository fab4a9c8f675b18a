"""Makes SQS events as Lambda delivers them, as bytes; no message is in two events."""

import base64
import hashlib
import json
import random
import struct
import time
from pathlib import Path

from world import messages
from world.localstack import REGION

# About as many messages as fit into Lambda's limit of 6 MB for an event.
MOST = 7400
# Bodies are picked from this many, which is cheaper than making up each.
BODIES = 50_000
# Characters; SQS's own receipt handles are longer. With this length a record has about 805 bytes, so that `MOST` records fit.
RECEIPT_HANDLE = 184
# A queue that gets ten thousand messages a second.
MESSAGES_A_MILLISECOND = 10
# When the oldest message was sent. Long enough ago that all events of a run stay in the past.
HOURS_AGO = 2

RECORD = (
    '{"messageId":"%s","receiptHandle":"AQEB%s","body":%s,"attributes":{"ApproximateReceiveCount":"1","SentTimestamp":"%d",'
    '"SenderId":"AROAEXAMPLEEXAMPLE:sender","ApproximateFirstReceiveTimestamp":"%d"},"messageAttributes":{},"md5OfBody":"%s",'
    f'"eventSource":"aws:sqs","eventSourceARN":"arn:aws:sqs:{REGION}:123456789012:login-etl","awsRegion":"{REGION}"}}'
)


class Events:
    """Makes events of valid logins or of the given bodies. Every message id is new, and times of sending rise."""

    def __init__(self, seed: int, bodies: list[str] | None = None):
        self._chance = random.Random(seed)
        bodies = bodies or [json.dumps(messages.login(self._chance), separators=(", ", ": ")) for _ in range(BODIES)]
        self._bodies = [(json.dumps(body), hashlib.md5(body.encode()).hexdigest()) for body in bodies]
        # Receipt handles are slices of this text.
        self._handles = base64.b64encode(self._chance.randbytes(1 << 16)).decode()
        self._began = int(time.time() * 1000) - HOURS_AGO * 3_600_000
        self._made = 0

    def event(self, count: int) -> bytes:
        """An event of `count` messages."""
        records = []
        ids = self._chance.randbytes(16 * count).hex()
        length, last = RECEIPT_HANDLE - 4, len(self._handles) - RECEIPT_HANDLE
        for number, (body, digest) in enumerate(self._chance.choices(self._bodies, k=count)):
            some = ids[32 * number : 32 * number + 32]
            message_id = f"{some[:8]}-{some[8:12]}-4{some[13:16]}-a{some[17:20]}-{some[20:]}"
            start = int(some[:6], 16) % last
            sent = self._began + (self._made + number) // MESSAGES_A_MILLISECOND
            records.append(RECORD % (message_id, self._handles[start : start + length], body, sent, sent + 20, digest))
        self._made += count
        return f'{{"Records":[{",".join(records)}]}}'.encode()

    def write(self, path: Path, count: int, events: int, first: int = 0) -> int:
        """Writes a file of `events` events of `count` messages, each preceded by its length, and returns the file's size in bytes.

        With `first`, the file begins with one more event, of `first` messages.
        """
        with path.open("wb") as file:
            for size in [*([first] if first else []), *[count] * events]:
                event = self.event(size)
                file.write(struct.pack("<Q", len(event)) + event)
            return file.tell()
