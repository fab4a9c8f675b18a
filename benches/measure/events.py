"""SQS events as Lambda delivers them, as bytes; no message is ever in two of them."""

import base64
import hashlib
import json
import random
import struct
import time
from pathlib import Path

from world import messages
from world.localstack import REGION

# About as many as Lambda's limit of 6 MB lets an event have.
MOST = 7400
# Bodies are taken from so many, which is cheaper than to make up each.
BODIES = 50_000
# Characters; SQS's own are longer. With these a record has about 805 bytes, and so many fit.
RECEIPT_HANDLE = 184
# A queue that is sent ten thousand a second.
MESSAGES_A_MILLISECOND = 10
# Of the oldest message's sending. Far enough for its run of events to stay in the past.
HOURS_AGO = 2

RECORD = (
    '{"messageId":"%s","receiptHandle":"AQEB%s","body":%s,"attributes":{"ApproximateReceiveCount":"1","SentTimestamp":"%d",'
    '"SenderId":"AROAEXAMPLEEXAMPLE:sender","ApproximateFirstReceiveTimestamp":"%d"},"messageAttributes":{},"md5OfBody":"%s",'
    f'"eventSource":"aws:sqs","eventSourceARN":"arn:aws:sqs:{REGION}:123456789012:login-etl","awsRegion":"{REGION}"}}'
)


class Events:
    """Makes events of valid logins, or of other bodies; message ids are new, and times of sending rise, from each to the next."""

    def __init__(self, seed: int, bodies: list[str] | None = None):
        self._chance = random.Random(seed)
        bodies = bodies or [json.dumps(messages.login(self._chance), separators=(", ", ": ")) for _ in range(BODIES)]
        self._bodies = [(json.dumps(body), hashlib.md5(body.encode()).hexdigest()) for body in bodies]
        # Handles are cut from it.
        self._handles = base64.b64encode(self._chance.randbytes(1 << 16)).decode()
        self._began = int(time.time() * 1000) - HOURS_AGO * 3_600_000
        self._made = 0

    def event(self, count: int) -> bytes:
        """An event of so many messages."""
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
        """Writes a file of so many events of `count` messages, each after its length, and returns its size in bytes.

        With `first`, another event comes before them, of so many messages.
        """
        with path.open("wb") as file:
            for size in [*([first] if first else []), *[count] * events]:
                event = self.event(size)
                file.write(struct.pack("<Q", len(event)) + event)
            return file.tell()
