"""Runs one incident: its stack, its traffic, its timeline, and the account of every message."""

import json
import os
import random
import secrets
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
from psycopg import sql
from world import messages, stack, template
from world.incidents.alarms import Alarms
from world.incidents.samples import QUEUE, Clock, Metric, Samples, Watch, messages_in, read_log
from world.incidents.ticker import Ticker
from world.servers import DATABASE_USER, Servers
from world.stack import Stack

# Overrides of the template's defaults, so that an incident of an hour takes two minutes.
SETTINGS = {
    "FunctionTimeout": 3,
    "BatchWindow": 1,
    "MaxReceiveCount": 10,
    "OutageDelay": 1,
    "SecretsTtl": 2,
}
# Only for the alarms as evaluated here, not for the deployment: LocalStack rejects the alarm, because it reads its threshold as a text.
WATCHED = {"FreshnessObjective": 10}
RATE = 6
SEND_SECONDS = 0.5
# An older message is late.
TURN_SECONDS = 4
# Real seconds; every recovery is faster.
PATIENCE_SECONDS = 120
ALARMS_PATIENCE_MINUTES = 10


class WentWrong(Exception):
    """An incident did not go as in the runbook."""


@dataclass(frozen=True)
class Sent:
    """A sent message, and whether it must become a row."""

    user_id: str
    good: bool


class Traffic(Ticker):
    """Sends `rate` logins a second to a queue; `bad_share` of them are invalid."""

    def __init__(self, stack: Stack, clock: Clock, samples: Samples):
        super().__init__(SEND_SECONDS, self._send_some)
        self._stack, self._clock, self._samples = stack, clock, samples
        self._sqs = stack.localstack.client("sqs")
        self._chance = random.Random(1)
        self.rate: float = RATE
        self.bad_share = 0.0
        self._sent: dict[str, Sent] = {}

    def sent(self) -> dict[str, Sent]:
        """The messages sent so far, by message id."""
        return dict(self._sent)

    def _send_some(self) -> None:
        self.send([self._chance.random() >= self.bad_share for _ in range(round(self.rate * SEND_SECONDS))])

    def send(self, kinds: list[bool]) -> None:
        """Sends a message for each kind: valid (true), or with a misnamed field (false)."""
        for start in range(0, len(kinds), 10):
            ten = []
            for good in kinds[start : start + 10]:
                login = messages.login(self._chance)
                user = login["user_id"]
                if not good:
                    login["userId"] = login.pop("user_id")
                ten.append((Sent(user, good), json.dumps(login)))
            entries = [{"Id": str(number), "MessageBody": body} for number, (_, body) in enumerate(ten)]
            answer = self._sqs.send_message_batch(QueueUrl=self._stack.queue_url, Entries=entries)
            sent = {one["MessageId"]: ten[int(one["Id"])][0] for one in answer["Successful"]}
            self._sent |= sent
            self._samples.add(Metric("AWS/SQS", "NumberOfMessagesSent", QUEUE), self._clock.minute(), len(sent))


@dataclass(frozen=True)
class Play:
    """An incident's name, its action, and its stack's settings."""

    name: str
    act: Callable[["Scene"], None]
    # The alarms that must be on when the picture is taken; others may be. If empty, no alarm may be on.
    rings: frozenset[str] = frozenset()
    # The beginning of the log message that tells most.
    telling: str = ""
    settings: dict[str, object] = field(default_factory=dict)
    pollers: int = 2


class Scene:
    """Owns an incident's deployed stack and everything that happens to it, as a context manager."""

    def __init__(self, servers: Servers, etlctl: Path, play: Play):
        self.servers, self.etlctl, self._play = servers, etlctl, play
        self.settings = SETTINGS | play.settings
        # The template's resources with these settings.
        self.resources = template.resolve(self.settings | WATCHED)
        self.name = f"{stack.NAME}-{play.name}"
        # The timeline, by played minute.
        self.story: list[tuple[int, str]] = []
        # The commands of `etlctl`, with their output.
        self.seen: list[tuple[str, str]] = []
        # The minute of the picture, and the function's log at that time.
        self.pictured = 0
        self.pictured_log: list[dict] = []
        self.remedies: list[str] = []
        self.remedied = 0.0
        # The ids of the expected dead letters, once they have arrived.
        self.dead: set[str] = set()
        self.ended = 0

    def __enter__(self) -> "Scene":
        with self.admin() as admin:
            admin.execute("truncate user_logins, etl_ledger")
            admin.execute(f"alter role {DATABASE_USER} set statement_timeout = '{self.settings['FunctionTimeout']}s'")
        self.stack = stack.deploy(self.servers, self.name, **self.settings)
        self._functions, self._secrets = self.stack.localstack.client("lambda"), self.stack.localstack.client("secretsmanager")
        self._mappings = self._functions.list_event_source_mappings(FunctionName=self.name)["EventSourceMappings"]
        self._add_mappings()
        self.samples = Samples()
        with ExitStack() as cleanup:
            self.clock = Clock()
            self.traffic = cleanup.enter_context(Traffic(self.stack, self.clock, self.samples))
            cleanup.enter_context(Watch(self.stack, self.clock, self.samples))
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._cleanup.close()
        for mapping in self._mappings:
            self._functions.delete_event_source_mapping(UUID=mapping["UUID"])

    def _add_mappings(self) -> None:
        """Adds event source mappings to aliases, because LocalStack's poller waits for each invocation and so has no concurrency."""
        first, = self._mappings
        for number in range(2, self._play.pollers + 1):
            alias = f"poller-{number}"
            self._functions.create_alias(FunctionName=self.name, Name=alias, FunctionVersion="1")
            mapping = self._functions.create_event_source_mapping(
                FunctionName=f"{self.name}:{alias}",
                EventSourceArn=first["EventSourceArn"],
                BatchSize=first["BatchSize"],
                MaximumBatchingWindowInSeconds=first["MaximumBatchingWindowInSeconds"],
                FunctionResponseTypes=first["FunctionResponseTypes"],
            )
            self._mappings.append(mapping)
        for mapping in self._mappings:
            enabled = partial(self._functions.get_event_source_mapping, UUID=mapping["UUID"])
            self._until(lambda: enabled()["State"] == "Enabled", "the mappings are enabled")

    def admin(self):
        """A connection of the database's owner."""
        return self.servers.postgres.connect(autocommit=True)

    # Actions on the world.

    def set_batch_size(self, size: int) -> None:
        for mapping in self._mappings:
            self._functions.update_event_source_mapping(UUID=mapping["UUID"], BatchSize=size)

    def put_secret(self, arn: str, text: str) -> str:
        """Overwrites a secret; returns the id of the new version."""
        return self._secrets.put_secret_value(SecretId=arn, SecretString=text)["VersionId"]

    def restore_secret(self, arn: str, bad: str) -> None:
        versions = self._secrets.list_secret_version_ids(SecretId=arn)["Versions"]
        previous = next(version["VersionId"] for version in versions if "AWSPREVIOUS" in version.get("VersionStages", []))
        stage = {"VersionStage": "AWSCURRENT", "MoveToVersionId": previous, "RemoveFromVersionId": bad}
        self._secrets.update_secret_version_stage(SecretId=arn, **stage)

    def rotate_password(self) -> None:
        """Rotates the password correctly: first in the database, and immediately afterwards in the secret."""
        password = secrets.token_urlsafe(24)
        with self.admin() as admin:
            admin.execute(sql.SQL("alter role {} password {}").format(sql.Identifier(DATABASE_USER), password))
        self.put_secret(self.servers.database_secret_arn, json.dumps({"username": DATABASE_USER, "password": password}))
        self.end_connections()

    def end_connections(self) -> None:
        """Ends the function's connections."""
        with self.admin() as admin:
            admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [DATABASE_USER])

    def bootstraps(self) -> list[psutil.Process]:
        """The function's processes, one for each environment."""
        processes = [process for process in psutil.Process().children(recursive=True) if process.name() == "bootstrap"]
        return [process for process in processes if process.environ().get("AWS_LAMBDA_FUNCTION_NAME") == self.name]

    # Steps of a play.

    def play(self, minutes: int) -> None:
        """Waits for the rest of the current minute, and then for `minutes` more."""
        until = int(self.clock.minute()) + 1 + minutes
        time.sleep(max(0.0, self.clock.at(until) - time.time()))

    def tell(self, what: str) -> None:
        self.story.append((int(self.clock.minute()), what))
        print(f"  {what}")

    def look(self, *commands: str) -> None:
        """Waits for the incident's alarms, takes the picture, and runs `etlctl`."""
        for _ in range(ALARMS_PATIENCE_MINUTES):
            self.pictured, self.pictured_log = int(self.clock.minute()), self.stack.log()
            _, alarms = self.watched(self.pictured_log)
            ringing = alarms.ringing(self.pictured)
            if ringing >= self._play.rings:
                break
            self.play(0)
        if not ringing >= self._play.rings or ringing and not self._play.rings:
            raise WentWrong(f"alarms that are on: {', '.join(sorted(ringing)) or 'none'}; expected: {', '.join(sorted(self._play.rings)) or 'none'}")
        if commands:
            self.tell("The picture is taken.")
        for command in commands:
            self.seen.append((f"etlctl --stack {stack.NAME} {command}", self.ask(command)))

    def ask(self, command: str) -> str:
        """The output of `etlctl`."""
        result = subprocess.run(
            [self.etlctl, "--stack", self.name, *command.split()],
            env={"PATH": os.environ["PATH"], **self.servers.environment()},
            cwd=self.servers.localstack.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if result.returncode > 1:
            raise WentWrong(f"etlctl {command} ended with status {result.returncode}: {result.stderr}")
        return result.stdout + result.stderr

    def remedy(self, what: str, act: Callable[[], object], *commands: str) -> None:
        """Applies the runbook's remedy; `act` has the same effect as its `commands`."""
        self.remedied = self.remedied or self.clock.minute()
        self.remedies += commands
        self.tell(f"Remedy: {what}")
        act()

    def recover(self) -> None:
        """Waits until no message is late, and then until no alarm is on."""
        self.catch_up()
        self.calm_down()

    def catch_up(self) -> None:
        self._until(lambda: self._oldest() < TURN_SECONDS, "the waiting messages become rows")
        if self.remedies:
            minutes = round(self.clock.minute() - self.remedied)
            self.tell(f"No message is late any more, {minutes} minute{'s' * (minutes != 1)} after the remedy.")

    def calm_down(self) -> None:
        for _ in range(ALARMS_PATIENCE_MINUTES):
            self.play(0)
            _, alarms = self.watched(self.stack.log())
            if not alarms.ringing(int(self.clock.minute())):
                break
        self.ended = int(self.clock.minute())

    def wait_for_dead(self) -> None:
        """Waits until every invalid message is in the dead-letter queue."""
        self.dead = {message_id for message_id, message in self.traffic.sent().items() if not message.good}
        self._until(lambda: self._dead_letters() >= self.dead, "the bad messages die")

    def _dead_letters(self) -> set[str]:
        return {message["MessageId"] for message in messages_in(self.stack, self.stack.dead_letter_queue_url)}

    def _oldest(self) -> float:
        sent = [int(message["Attribute"]["SentTimestamp"]) / 1000 for message in messages_in(self.stack, self.stack.queue_url)]
        return time.time() - min(sent, default=time.time())

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise WentWrong(f"not within {PATIENCE_SECONDS} s: {what}")
            time.sleep(0.2)

    # Results.

    def watched(self, log: list[dict]) -> tuple[Samples, Alarms]:
        """All samples, from the queues and a log, and the template's alarms over them."""
        samples = self.samples.copy()
        read_log(log, self.clock, samples)
        return samples, Alarms(self.resources, samples)

    def account(self) -> str:
        """Ends the traffic and accounts for every message; raises `WentWrong` if a message is lost, doubled or misplaced."""
        self.traffic.stop()
        self._until(lambda: not messages_in(self.stack, self.stack.queue_url), "the queue empties")
        sent = self.traffic.sent()
        good = [message.user_id for message in sent.values() if message.good]
        with self.admin() as admin:
            rows = [user for (user,) in admin.execute("select user_id from user_logins").fetchall()]
        bad = {message_id for message_id, message in sent.items() if not message.good}
        dead = self.dead | self._dead_letters()
        wrong = {
            "rows lost": len(set(good) - set(rows)),
            "rows doubled": len(rows) - len(set(rows)),
            "rows that nobody sent": len(set(rows) - set(good)),
            "dead letters lost or misplaced": len(bad ^ dead),
        }
        if any(wrong.values()):
            raise WentWrong(", ".join(f"{count} {what}" for what, count in wrong.items() if count))
        letters = f"{len(dead)} dead letters, none of them valid" if dead else "no dead letters"
        return f"{len(sent)} messages were sent: {len(rows)} rows, none lost, none doubled; {letters}."
