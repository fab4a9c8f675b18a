"""The metrics that CloudWatch would get: samples from the function's log and from the queues.

All are real, except for two things. CloudWatch's minute is `MINUTE_SECONDS` long here. And LocalStack has no `ApproximateAgeOfOldestMessage`:
it is computed from the messages in the queue, without those that were received three times, as SQS does.
https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-available-cloudwatch-metrics.html
"""

import json
import time
import urllib.request
from collections import defaultdict
from datetime import datetime
from typing import NamedTuple
from urllib.parse import urlencode

from world.incidents.ticker import Ticker
from world.localstack import DIRECTLY
from world.stack import NAME, Stack

MINUTE_SECONDS = 2.0
POLL_SECONDS = 0.4
# SQS ignores messages that were received this often.
LEFT_OUT_FROM = 3
# The dimensions' values in the resolved template.
FUNCTION, QUEUE, DEAD_LETTERS = NAME, "LoginQueue.QueueName", "DeadLetterQueue.QueueName"


class Metric(NamedTuple):
    """A metric of a function or a queue, by the values of its dimensions."""

    namespace: str
    name: str
    of: str


class Samples:
    """Samples by metric. Times are minutes since the start, with a fraction."""

    def __init__(self) -> None:
        self._samples: dict[Metric, list[tuple[float, float]]] = defaultdict(list)

    def add(self, metric: Metric, at: float, value: float) -> None:
        self._samples[metric].append((at, value))

    def copy(self) -> "Samples":
        copied = Samples()
        for metric, samples in list(self._samples.items()):
            copied._samples[metric] = list(samples)
        return copied

    def datapoint(self, metric: Metric, statistic: str, end: int, minutes: int = 1) -> float | None:
        """A statistic of the samples of the minutes before `end`; None if there are none."""
        values = [value for at, value in self._samples[metric] if end - minutes <= at < end]
        if not values:
            return None
        match statistic:
            case "Sum":
                return sum(values)
            case "Maximum":
                return max(values)
            case "Average":
                return sum(values) / len(values)
        if not statistic.startswith("p"):
            raise ValueError(f"unknown statistic: {statistic}")
        # Interpolates between the two nearest samples.
        place = (len(values) - 1) * float(statistic[1:]) / 100
        values.sort()
        below, above = values[int(place)], values[min(int(place) + 1, len(values) - 1)]
        return below + (above - below) * (place % 1)


class Clock:
    """Played time: minutes since the start."""

    def __init__(self) -> None:
        self.started = time.time()

    def minute(self, at: float | None = None) -> float:
        return ((time.time() if at is None else at) - self.started) / MINUTE_SECONDS

    def at(self, minute: float) -> float:
        """The beginning of a minute, in seconds of the real clock."""
        return self.started + minute * MINUTE_SECONDS

    def of(self, line: dict) -> float | None:
        """The minute at which a line of the function's log was written."""
        if "_aws" in line:
            return self.minute(line["_aws"]["Timestamp"] / 1000)
        written = line.get("timestamp") or line.get("time")
        return self.minute(datetime.fromisoformat(written).timestamp()) if written else None


class Watch(Ticker):
    """Polls the queues of a stack into samples."""

    def __init__(self, stack: Stack, clock: Clock, samples: Samples):
        super().__init__(POLL_SECONDS, self._poll)
        self._stack, self._clock, self._samples = stack, clock, samples
        self._minute = -1

    def _poll(self) -> None:
        for name, url in ((QUEUE, self._stack.queue_url), (DEAD_LETTERS, self._stack.dead_letter_queue_url)):
            visible, not_visible = self._stack.depth(url)
            at = self._clock.minute()
            self._samples.add(Metric("AWS/SQS", "ApproximateNumberOfMessagesVisible", name), at, visible)
            self._samples.add(Metric("AWS/SQS", "ApproximateNumberOfMessagesNotVisible", name), at, not_visible)
        # Only once a minute, because it lists all messages.
        if int(self._clock.minute()) != self._minute:
            self._minute = int(self._clock.minute())
            oldest = oldest_message(messages_in(self._stack, self._stack.queue_url), time.time())
            self._samples.add(Metric("AWS/SQS", "ApproximateAgeOfOldestMessage", QUEUE), self._clock.minute(), oldest)


def messages_in(stack: Stack, queue_url: str) -> list[dict]:
    """All messages in a queue, including those in flight. Uses LocalStack's own API, so that it does not count as a receive."""
    query = urlencode({"QueueUrl": queue_url, "ShowInvisible": "true", "ShowDelayed": "true"})
    request = urllib.request.Request(f"{stack.localstack.endpoint}/_aws/sqs/messages?{query}", headers={"Accept": "application/json"})
    with DIRECTLY.open(request, timeout=10) as answer:
        result = json.load(answer)["ReceiveMessageResponse"]["ReceiveMessageResult"] or {}
    messages = result.get("Message") or []
    messages = messages if isinstance(messages, list) else [messages]
    return [message | {"Attribute": {one["Name"]: one["Value"] for one in message["Attribute"]}} for message in messages]


def oldest_message(messages: list[dict], now: float) -> float:
    """The age of the oldest message in seconds, computed as by SQS; 0 if there is none."""
    counted = [message["Attribute"] for message in messages if int(message["Attribute"].get("ApproximateReceiveCount", 0)) < LEFT_OUT_FROM]
    return max((now - int(attributes["SentTimestamp"]) / 1000 for attributes in counted), default=0.0)


def read_log(log: list[dict], clock: Clock, samples: Samples) -> None:
    """Adds the metrics in the function's log: the function's own, and Lambda's from each invocation's report."""
    invocations = []
    for line in log:
        if "_aws" in line:
            for directive in line["_aws"]["CloudWatchMetrics"]:
                for metric in directive["Metrics"]:
                    if isinstance(value := line.get(metric["Name"]), int | float):
                        samples.add(Metric(directive["Namespace"], metric["Name"], FUNCTION), clock.of(line), value)
        elif line.get("type") == "platform.report":
            record = line["record"]
            duration, init = record["metrics"]["durationMs"], record["metrics"].get("initDurationMs", 0)
            ended = clock.of(line)
            # Lambda's metrics have the time of the invocation's start.
            started = ended - (duration + init) / 1000 / MINUTE_SECONDS
            invocations.append((started, ended))
            failed = record["status"] != "success"
            for name, value in (("Invocations", 1), ("Errors", int(failed)), ("Throttles", 0), ("Duration", duration)):
                samples.add(Metric("AWS/Lambda", name, FUNCTION), started, value)
    for started, _ in invocations:
        at_once = sum(other_started <= started < other_ended for other_started, other_ended in invocations)
        samples.add(Metric("AWS/Lambda", "ConcurrentExecutions", FUNCTION), started, at_once)
