"""Pollers like Lambda's: receive messages, invoke the function, delete exactly the acknowledged messages. Sometimes SQS delivers twice."""

import contextlib
import json
import queue
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from world import delivery
from world.soak.environment import Environment, Failed, queue_arn

RECEIVE_MOST = 10  # SQS's own limit for one call
# Between two polls of an empty queue.
IDLE_SECONDS = 0.1


class Redeliveries:
    """Faults of SQS's delivery, which a poller applies to its next batch."""

    KINDS = ("redelivered early", "delivered to two at once", "answer lost")

    def __init__(self):
        self._wanted: queue.SimpleQueue[tuple[str, threading.Event]] = queue.SimpleQueue()

    def cause(self, kind: str, patience: float) -> bool:
        """Requests a fault; returns whether a poller applied it in time."""
        done = threading.Event()
        self._wanted.put((kind, done))
        return done.wait(patience)

    def next(self) -> str | None:
        with contextlib.suppress(queue.Empty):
            kind, done = self._wanted.get_nowait()
            done.set()
            return kind
        return None


class Order:
    """Tracks a FIFO queue's deleted messages, to check that SQS would deliver such a batch.

    LocalStack makes a batch's messages visible one after the other, and may deliver a later message while an earlier one is still being handled.
    """

    def __init__(self):
        self._deleted: dict[str, set[int]] = {}
        self._lock = threading.Lock()
        # By group, the indexes of bad messages, once they may leave for the dead-letter queue.
        self.excused: dict[str, set[int]] = {}

    def deleted(self, messages: list[dict]) -> None:
        with self._lock:
            for group, index in map(index_of, messages):
                self._deleted.setdefault(group, set()).add(index)

    def allows(self, messages: list[dict]) -> bool:
        """Whether each message's predecessors are gone or come before it in the batch."""
        with self._lock:
            ahead: dict[str, set[int]] = {}
            for group, index in map(index_of, messages):
                here = ahead.setdefault(group, self._deleted.get(group, set()) | self.excused.get(group, set()))
                if not here.issuperset(range(index)):
                    return False
                here.add(index)
        return True


def index_of(message: dict) -> tuple[str, int]:
    """The group and the index of a FIFO queue's message, from its deduplication id: see `deduplication_id`."""
    group, _, index = message["Attributes"]["MessageDeduplicationId"].rpartition(".")
    return group, int(index)


def deduplication_id(group: str, index: int) -> str:
    return f"{group}.{index}"


class Pool:
    """Environments, and the pollers of one queue that share them, each poller in a thread; a context manager."""

    def __init__(self, environments: list[Environment], pollers: list["Poller"]):
        self.pollers = pollers
        self._environments = environments
        self._idle: queue.Queue[Environment] = queue.Queue()
        for environment in environments:
            self._idle.put(environment)

    def __enter__(self) -> "Pool":
        for poller in self.pollers:
            poller.start(self._idle)
        return self

    def __exit__(self, *_) -> None:
        for poller in self.pollers:
            poller.stop()
        for environment in self._environments:
            environment.stop()

    def check(self) -> None:
        """Raises the error that ended a poller, if any."""
        for poller in self.pollers:
            if poller.error:
                raise poller.error


class Poller:
    """Owns a thread that receives batches from one queue and hands them to an idle environment."""

    def __init__(
        self,
        sqs,
        queue_url: str,
        batch_size: int,
        chance: random.Random,
        redeliveries: Redeliveries,
        tally: Counter,
        order: Order | None = None,
    ):
        self.batch_size = batch_size
        # Whether to make failed messages visible again at once.
        self.hurried = False
        # The last receive of each message that was not deleted.
        self._receipts: dict[str, dict] = {}
        # The highest count of receives seen.
        self.most_received = 0
        self.error: BaseException | None = None
        self._sqs, self._queue_url, self._chance = sqs, queue_url, chance
        self._redeliveries, self._tally, self._order = redeliveries, tally, order
        self._arn = queue_arn(queue_url)
        self._stopping = threading.Event()
        self._helpers = ThreadPoolExecutor(1)

    def start(self, idle: "queue.Queue[Environment]") -> None:
        self._idle = idle
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._helpers.shutdown()

    def reveal(self) -> None:
        """Makes messages visible that the function has hidden for a while."""
        self._show_again(list(self._receipts.values()))

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                if batch := self._receive():
                    self._handle(batch)
                else:
                    self._stopping.wait(IDLE_SECONDS)
        except BaseException as error:
            self.error = error

    def _receive(self) -> list[dict]:
        """Receives a random number of messages, up to the batch size, because SQS returns only those that the asked servers have."""
        batch: dict[str, dict] = {}
        wanted = self._chance.randint(1, self.batch_size)
        while len(batch) < wanted:
            most = min(RECEIVE_MOST, wanted - len(batch))
            answer = self._sqs.receive_message(QueueUrl=self._queue_url, MaxNumberOfMessages=most, MessageSystemAttributeNames=["All"])
            if not answer.get("Messages"):
                break
            batch |= {message["MessageId"]: message for message in answer["Messages"]}
        messages = list(batch.values())
        self._receipts |= batch
        if messages:
            self.most_received = max(self.most_received, *(int(message["Attributes"]["ApproximateReceiveCount"]) for message in messages))
        if self._order and not self._order.allows(messages):
            self._tally["batches that the emulator delivered out of order, put back"] += 1
            self._show_again(messages)
            return []
        return messages

    def _handle(self, batch: list[dict]) -> None:
        match self._redeliveries.next():
            case "redelivered early":
                early = self._helpers.submit(self._show_again_soon, batch, self._chance.uniform(0, 0.02))
                self._invoke_and_delete(batch)
                early.result()
            case "delivered to two at once":
                # The second delivery is in reverse order, except from a FIFO queue, which keeps its order.
                other = self._helpers.submit(self._invoke_and_delete, batch if self._order else batch[::-1])
                self._invoke_and_delete(batch)
                other.result()
            case "answer lost":
                self._invoke(batch)
                self._show_again(batch)
            case None:
                acknowledged = self._invoke_and_delete(batch)
                if self.hurried:
                    self._show_again([message for message in batch if message["MessageId"] not in acknowledged])

    def _invoke(self, batch: list[dict]) -> set[str]:
        event = {"Records": [delivery.record(message) | {"eventSourceARN": self._arn} for message in batch]}
        environment = self._idle.get()
        try:
            return environment.invoke(event)
        except Failed:
            return set()
        finally:
            self._idle.put(environment)

    def _invoke_and_delete(self, batch: list[dict]) -> set[str]:
        acknowledged = self._invoke(batch)
        messages = [message for message in batch if message["MessageId"] in acknowledged]
        for start in range(0, len(messages), RECEIVE_MOST):
            ten = messages[start : start + RECEIVE_MOST]
            entries = [{"Id": str(number), "ReceiptHandle": message["ReceiptHandle"]} for number, message in enumerate(ten)]
            answer = self._sqs.delete_message_batch(QueueUrl=self._queue_url, Entries=entries)
            # A FIFO queue rejects an expired receipt handle.
            deleted = [ten[int(entry["Id"])] for entry in answer.get("Successful", [])]
            for message in deleted:
                self._receipts.pop(message["MessageId"], None)
            if self._order:
                self._order.deleted(deleted)
        return acknowledged

    def _show_again_soon(self, batch: list[dict], seconds: float) -> None:
        time.sleep(seconds)
        self._show_again(batch)

    def _show_again(self, batch: list[dict]) -> None:
        for start in range(0, len(batch), RECEIVE_MOST):
            entries = [
                {"Id": str(number), "ReceiptHandle": message["ReceiptHandle"], "VisibilityTimeout": 0}
                for number, message in enumerate(batch[start : start + RECEIVE_MOST])
            ]
            self._sqs.change_message_visibility_batch(QueueUrl=self._queue_url, Entries=entries)


def redrive_policy(dead_letter_queue_url: str, most: int) -> dict[str, str]:
    return {"RedrivePolicy": json.dumps({"deadLetterTargetArn": queue_arn(dead_letter_queue_url), "maxReceiveCount": most})}
