"""Queues in memory, for more messages than LocalStack can handle: the part of SQS's client that the soak uses, with SQS's rules.

A received message is hidden for the queue's visibility timeout. It returns to the queue unless it is deleted, and goes to the dead-letter queue
if it was received too often. While a message of a FIFO group is hidden, no other message of the group is delivered; delivery is in order.
"""

import heapq
import itertools
import json
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass, field


@dataclass(eq=False)
class Held:
    """A message in a queue."""

    message_id: str
    body: str
    sent: int
    group: str | None = None
    deduplication_id: str = ""
    receives: int = 0
    hidden_until: float = 0.0
    receipt: int = 0


@dataclass
class Queue:
    visibility: float
    most_receives: int = 1_000_000
    dead_letter_url: str | None = None
    ready: deque = field(default_factory=deque)
    # By group, in order, including hidden messages.
    groups: dict[str, deque] = field(default_factory=dict)
    # A heap of the times at which messages become visible, and their ids. Entries that no longer match their message are ignored.
    hidden: list = field(default_factory=list)
    held: dict[str, Held] = field(default_factory=dict)


class MemorySqs:
    """Thread-safe, with the methods of boto3's client that the soak calls."""

    def __init__(self):
        self._queues: dict[str, Queue] = {}
        self._lock = threading.Lock()
        self._receipts = itertools.count(1)

    def create_queue(self, QueueName: str, Attributes: dict[str, str]) -> dict:
        url = f"http://memory/000000000000/{QueueName}"
        self._queues[url] = Queue(float(Attributes["VisibilityTimeout"]))
        self.set_queue_attributes(url, Attributes)
        return {"QueueUrl": url}

    def set_queue_attributes(self, QueueUrl: str, Attributes: dict[str, str]) -> None:
        queue = self._queues[QueueUrl]
        queue.visibility = float(Attributes.get("VisibilityTimeout", queue.visibility))
        if policy := Attributes.get("RedrivePolicy"):
            policy = json.loads(policy)
            queue.most_receives = int(policy["maxReceiveCount"])
            queue.dead_letter_url = f"http://memory/000000000000/{policy['deadLetterTargetArn'].rpartition(':')[2]}"

    def send_message_batch(self, QueueUrl: str, Entries: list[dict]) -> dict:
        sent = []
        with self._lock:
            for entry in Entries:
                held = Held(str(uuid.uuid4()), entry["MessageBody"], int(time.time() * 1000), entry.get("MessageGroupId"), entry.get("MessageDeduplicationId", ""))
                self._put(self._queues[QueueUrl], held)
                sent.append({"Id": entry["Id"], "MessageId": held.message_id})
        return {"Successful": sent}

    def receive_message(self, QueueUrl: str, MaxNumberOfMessages: int = 1, VisibilityTimeout: float | None = None, **_) -> dict:
        queue, now = self._queues[QueueUrl], time.monotonic()
        with self._lock:
            self._show_due(queue, now)
            given = []
            while len(given) < MaxNumberOfMessages and (held := self._next(queue, now, given)):
                held.receives += 1
                if held.receives > queue.most_receives:
                    self._bury(queue, held)
                    continue
                held.receipt = next(self._receipts)
                self._hide(queue, held, now + (queue.visibility if VisibilityTimeout is None else VisibilityTimeout))
                given.append(held)
        return {"Messages": [message(held) for held in given]} if given else {}

    def delete_message_batch(self, QueueUrl: str, Entries: list[dict]) -> dict:
        queue, deleted = self._queues[QueueUrl], []
        with self._lock:
            for entry in Entries:
                message_id, _, receipt = entry["ReceiptHandle"].partition("#")
                held = queue.held.get(message_id)
                # A FIFO queue rejects an expired receipt handle.
                if held and held.group and (held.receipt != int(receipt) or held.hidden_until <= time.monotonic()):
                    continue
                if held:
                    self._remove(queue, held)
                deleted.append({"Id": entry["Id"]})
        return {"Successful": deleted}

    def change_message_visibility_batch(self, QueueUrl: str, Entries: list[dict]) -> dict:
        queue, now = self._queues[QueueUrl], time.monotonic()
        with self._lock:
            for entry in Entries:
                message_id, _, receipt = entry["ReceiptHandle"].partition("#")
                held = queue.held.get(message_id)
                if held and held.receipt == int(receipt) and held.hidden_until > now:
                    self._hide(queue, held, now + entry["VisibilityTimeout"])
        return {"Successful": [], "Failed": []}

    def depth(self, url: str) -> int:
        return len(self._queues[url].held)

    # Call these with the lock held.

    def _put(self, queue: Queue, held: Held) -> None:
        queue.held[held.message_id] = held
        if held.group:
            queue.groups.setdefault(held.group, deque()).append(held)
            queue.ready.append(held.group)
        else:
            queue.ready.append(held)

    def _hide(self, queue: Queue, held: Held, until: float) -> None:
        held.hidden_until = until
        heapq.heappush(queue.hidden, (until, held.message_id))

    def _show_due(self, queue: Queue, now: float) -> None:
        while queue.hidden and queue.hidden[0][0] <= now:
            until, message_id = heapq.heappop(queue.hidden)
            held = queue.held.get(message_id)
            if held and held.hidden_until == until:
                queue.ready.append(held.group or held)

    def _next(self, queue: Queue, now: float, given: list[Held]) -> Held | None:
        """The next message to deliver, besides those that this request already has."""
        while queue.ready:
            head = queue.ready[0]
            if isinstance(head, Held):
                queue.ready.popleft()
                if head.message_id in queue.held and head.hidden_until <= now:
                    return head
                continue
            members = queue.groups.get(head)
            ours = {held.message_id for held in given}
            is_busy = members and any(held.hidden_until > now and held.message_id not in ours for held in itertools.islice(members, 10))
            waiting = next((held for held in members or () if held.message_id not in ours), None)
            if not members or is_busy or waiting is None:
                queue.ready.popleft()
                continue
            return waiting
        return None

    def _remove(self, queue: Queue, held: Held) -> None:
        del queue.held[held.message_id]
        if held.group:
            queue.groups[held.group].remove(held)
            queue.ready.append(held.group)

    def _bury(self, queue: Queue, held: Held) -> None:
        self._remove(queue, held)
        held.receives, held.hidden_until = 0, 0.0
        self._put(self._queues[queue.dead_letter_url], held)


def message(held: Held) -> dict:
    attributes = {"ApproximateReceiveCount": str(held.receives), "SentTimestamp": str(held.sent), "SenderId": "soak", "ApproximateFirstReceiveTimestamp": str(held.sent)}
    if held.group:
        attributes |= {"MessageGroupId": held.group, "MessageDeduplicationId": held.deduplication_id}
    return {"MessageId": held.message_id, "ReceiptHandle": f"{held.message_id}#{held.receipt}", "Body": held.body, "MD5OfBody": "", "Attributes": attributes}
