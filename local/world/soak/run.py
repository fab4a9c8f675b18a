"""One soak run on running servers: deploys the stack behind the proxy, sends the load, and waits until the queues are empty."""

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime

from world import paths, stack
from world.servers import DATABASE_SECRET, DATABASE_USER, Servers
from world.soak import load, visits
from world.soak.checker import Evidence
from world.soak.environment import Environment
from world.soak.faults import Attack, Targets
from world.soak.load import Message
from world.soak.memory import MemorySqs
from world.soak.pollers import Order, Poller, Pool, Redeliveries, deduplication_id, redrive_policy
from world.soak.proxy import Proxy

WORLD = paths.SOAK_WORLD

TIMEOUT_SECONDS = 3
# Shorter than the stack's, so that a bad message is redelivered many times.
VISIBILITY_SECONDS = 6
# High enough that no fault dead-letters a good message during the attack; afterwards low enough that a bad one is dead-lettered at once.
MOST_RECEIVES, MOST_RECEIVES_AT_LAST = 1000, 3
EMULATOR_BATCH, POLLER_BATCH, FIFO_BATCH = 200, 60, 10
STORM_BATCH, STORM_VISIBILITY_SECONDS = 1000, 60
# For each queue; one environment more than pollers, for a batch that is delivered to two at once.
ENVIRONMENTS, POLLERS = 3, 2
SECRETS_TTL = 2
# The function's setting, in seconds; the delay doubles with each receive.
OUTAGE_DELAY = 1
# If the queues do not change for this long, nothing more will happen.
QUIET_SECONDS = 40
TICK_SECONDS = 10


class Run:
    """Owns the deployed stack, the further queues, the pollers (as a context manager), and the record of the sent messages."""

    def __init__(self, servers: Servers, proxy: Proxy, aws_proxy: Proxy, messages: list[Message], seed: int, storm: bool = False):
        """In a storm the queues are in memory, and batches are larger."""
        self.messages = messages
        self._servers, self._chance = servers, random.Random(seed)
        self.sent: dict[str, Message] = {}
        self.tally: Counter[str] = Counter()
        self.answers: list[bytes] = []
        self._order = Order()
        prepare_database(servers)
        self.stack = stack.deploy(
            servers,
            DatabasePort=proxy.port,
            LogLevel="INFO" if storm else "TRACE",
            FunctionTimeout=TIMEOUT_SECONDS,
            MaxReceiveCount=MOST_RECEIVES,
            OutageDelay=0,
            BatchSize=EMULATOR_BATCH,
            BatchWindow=1,
            SecretsTtl=SECRETS_TTL,
        )
        visibility = STORM_VISIBILITY_SECONDS if storm else VISIBILITY_SECONDS
        if storm:
            self.stack.enable_mapping(False)
            self._sqs = MemorySqs()
            self._url, self._dead_url = create_queue(self._sqs, "standard", visibility)
        else:
            self._sqs = self.stack.localstack.client("sqs")
            self._url, self._dead_url = self.stack.queue_url, self.stack.dead_letter_queue_url
            self._sqs.set_queue_attributes(QueueUrl=self._url, Attributes={"VisibilityTimeout": str(visibility)})
        self._fifo_url, self._fifo_dead_url = create_queue(self._sqs, "logins", visibility, fifo=True)
        self._visits_url, self._visits_dead_url = create_queue(self._sqs, "visits", visibility)
        urls = [self._url, self._fifo_url, self._visits_url]
        self.targets = Targets(servers, self.stack, self._sqs, proxy, aws_proxy, Redeliveries(), urls, visibility)
        client = self.stack.localstack.client("secretsmanager")
        self.targets.passwords.append(json.loads(client.get_secret_value(SecretId=DATABASE_SECRET)["SecretString"])["password"])
        first = json.loads(client.get_secret_value(SecretId=self.stack.masking_secret_arn)["SecretString"])
        one_way = {"cipher": "hmac-sha256", "key": random.Random(seed).randbytes(32).hex()}
        self.targets.ring = {"active": "", "one_way": "one-way", "keys": {"": first, "one-way": one_way}}
        client.put_secret_value(SecretId=self.stack.masking_secret_arn, SecretString=json.dumps(self.targets.ring))
        mapping = WORLD / "visits.toml"
        mapping.write_text(visits.MAPPING)
        logs = WORLD / "environments"
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir()
        aws_endpoint = f"http://127.0.0.1:{aws_proxy.port}"

        def pool(url: str, size: int, outage_delay: int, order: Order | None = None, settings: dict[str, str] | None = None) -> Pool:
            def environment(number: int) -> Environment:
                log = logs / f"{url.rpartition('/')[2]}-{number}.log"
                variables = {"AWS_ENDPOINT_URL": aws_endpoint, "OUTAGE_DELAY": str(outage_delay)} | (settings or {})
                # The deployed function never gets batches large enough for `COPY`; half of these environments do.
                variables["COPY_THRESHOLD"] = "5" if number % 2 else "2000"
                return Environment(self.stack, paths.SAM_BUILD / "LoginFunction", log, self.tally, self.answers, **variables)

            def poller() -> Poller:
                client = self._sqs if storm else self.stack.localstack.client("sqs")
                return Poller(client, url, size, random.Random(self._chance.random()), self.targets.redeliveries, self.tally, order)

            return Pool([environment(number) for number in range(ENVIRONMENTS)], [poller() for _ in range(POLLERS)])

        # The function cannot hide messages of a queue in memory.
        outage_delay, batch = (0, STORM_BATCH) if storm else (OUTAGE_DELAY, POLLER_BATCH)
        self._pool = pool(self._url, batch, outage_delay)
        # In LocalStack's FIFO queues, a hidden message also blocks the redelivery of other groups.
        self._fifo_pool = pool(self._fifo_url, FIFO_BATCH, 0, self._order)
        self._visits_pool = pool(self._visits_url, batch, outage_delay, settings={"MAPPING_FILE": str(mapping)})
        self._pools = self._pool, self._fifo_pool, self._visits_pool

    def __enter__(self) -> "Run":
        for pool in self._pools:
            pool.__enter__()
        return self

    def __exit__(self, *_) -> None:
        for pool in self._pools:
            pool.__exit__()

    def send_during(self, attack: Attack) -> None:
        """Sends all messages, evenly over the attack."""
        shown = time.monotonic()
        sent = 0
        while sent < len(self.messages) or not attack.over:
            attack.check()
            self._check()
            until = int(attack.progress * len(self.messages))
            self._send(self.messages[sent:until])
            sent = max(sent, until)
            if time.monotonic() - shown >= TICK_SECONDS:
                shown = time.monotonic()
                print(f"  ... {len(self.sent)} messages sent, {attack.done.total()} faults, {self._remaining()} messages in the queues")
            time.sleep(0.1)
        attack.check()

    def _send(self, messages: list[Message]) -> None:
        for url, some in (
            (self._url, [message for message in messages if not (message.group or message.visit)]),
            (self._visits_url, [message for message in messages if message.visit]),
            (self._fifo_url, [message for message in messages if message.group]),
        ):
            for start in range(0, len(some), 10):
                ten = some[start : start + 10]
                answer = self._sqs.send_message_batch(QueueUrl=url, Entries=[entry(number, message) for number, message in enumerate(ten)])
                if answer.get("Failed"):
                    raise RuntimeError(f"SQS refused messages: {answer['Failed'][0]['Message']}")
                self.sent |= {sent["MessageId"]: ten[int(sent["Id"])] for sent in answer["Successful"]}

    def settle(self) -> tuple[list[str], int]:
        """Waits until every good message is loaded, and then until the bad ones are in the dead-letter queues.

        Returns the logins that overtook a bad message of their group, and the number of messages still in the queues.
        """
        stuck = sum(not message.good or message.held_back for message in self.messages)
        print("No more faults; waiting for the remaining messages ...")
        self._reveal()
        self._wait_until(lambda: self._remaining() <= stuck)
        held_back = [message.row[0] for message in self.messages if message.held_back]
        with self.targets.admin() as database:
            overtaking = database.execute("select user_id from user_logins where user_id = any (%s)", [held_back]).fetchall()

        self._set(self._url, redrive_policy(self._dead_url, MOST_RECEIVES_AT_LAST))
        self._set(self._visits_url, redrive_policy(self._visits_dead_url, MOST_RECEIVES_AT_LAST))
        # In a FIFO queue, the messages behind a bad message are received as often as it, and would be dead-lettered with it. With a batch size
        # of one, the bad message at the head of its group is received more often than all others, and is dead-lettered alone.
        for poller in self._fifo_pool.pollers:
            poller.batch_size, poller.hurried = 1, True
        time.sleep(TIMEOUT_SECONDS)
        for message in self.messages:
            if message.group and not message.good:
                self._order.excused.setdefault(message.group, set()).add(message.index)
        most = max(poller.most_received for poller in self._fifo_pool.pollers) + 3
        self._set(self._fifo_url, redrive_policy(self._fifo_dead_url, most))
        self._wait_until(lambda: self._remaining() == 0)
        return [user for (user,) in overtaking], self._remaining()

    def _check(self) -> None:
        """Raises the error that ended a poller, if any."""
        for pool in self._pools:
            pool.check()

    def _set(self, queue_url: str, attributes: dict[str, str]) -> None:
        self._sqs.set_queue_attributes(QueueUrl=queue_url, Attributes=attributes)

    def _remaining(self) -> int:
        return sum(self._depth(url) for url in self.targets.queue_urls)

    def _depth(self, url: str) -> int:
        return self._sqs.depth(url) if isinstance(self._sqs, MemorySqs) else sum(self.stack.depth(url))

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Gives up if nothing changes for a while; the checker then reports the missing messages."""
        before, since, shown = None, time.monotonic(), time.monotonic()
        while not condition() and time.monotonic() - since < QUIET_SECONDS:
            self._check()
            if (now := self._remaining()) != before:
                before, since = now, time.monotonic()
            if time.monotonic() - shown >= TICK_SECONDS:
                shown = time.monotonic()
                print(f"  ... {now} messages in the queues")
                # Invocations that began during faults may have hidden messages since.
                self._reveal()
            time.sleep(0.25)

    def _reveal(self) -> None:
        """Makes messages visible that the function has hidden for a while."""
        for poller in (*self._pool.pollers, *self._visits_pool.pollers):
            poller.reveal()

    def evidence(self, overtaking: list[str], left: int, began: datetime) -> Evidence:
        targets = self.targets
        files = [*self.stack.localstack.function_logs.glob("*.log"), *(WORLD / "environments").glob("*.log"), self._servers.postgres.log_file]
        keys = [text for key in targets.ring["keys"].values() for text in (key["key"], key.get("iv")) if text]
        return Evidence(
            sent=self.sent,
            dead=[message for url in (self._dead_url, self._fifo_dead_url, self._visits_dead_url) for message in take_all(self._sqs, url)],
            left=left,
            overtaking=overtaking,
            malformed=self.tally["failed: malformed answer"],
            logs={file.name: file.read_bytes() for file in files} | {"answers": b"\n".join(self.answers)},
            secrets=[*targets.passwords, self._servers.postgres.admin_password, *keys],
            ring=targets.ring,
            rotations=targets.rotations,
            secrets_ttl=SECRETS_TTL,
            days={began.date(), datetime.now(UTC).date()},
        )


def prepare_database(servers: Servers) -> None:
    """Enables commit timestamps, adds a constraint that refuses one kind of user, and limits the function's statements to its timeout."""
    with servers.postgres.connect(autocommit=True) as admin:
        admin.execute("alter system set track_commit_timestamp = on")
        # Otherwise PostgreSQL's log quotes every row that it refuses because of a fault.
        admin.execute("alter system set log_error_verbosity = terse")
        admin.execute(f"alter table user_logins add constraint refused check (user_id not like '{load.REFUSED_USER}%')")
        admin.execute(visits.SCHEMA)
        admin.execute(f"alter role {DATABASE_USER} set statement_timeout = '{TIMEOUT_SECONDS}s'")
    servers.postgres.restart()


def create_queue(sqs, name: str, visibility: float, fifo: bool = False) -> tuple[str, str]:
    """Creates a queue beside the stack's, and its dead-letter queue; returns both URLs."""
    attributes = {"VisibilityTimeout": str(visibility)} | ({"FifoQueue": "true"} if fifo else {})
    end = ".fifo" if fifo else ""
    dead = sqs.create_queue(QueueName=f"{name}-dead{end}", Attributes=attributes)["QueueUrl"]
    queue = sqs.create_queue(QueueName=f"{name}{end}", Attributes=attributes | redrive_policy(dead, MOST_RECEIVES))["QueueUrl"]
    return queue, dead


def entry(number: int, message: Message) -> dict:
    group = {"MessageGroupId": message.group, "MessageDeduplicationId": deduplication_id(message.group, message.index)} if message.group else {}
    return {"Id": str(number), "MessageBody": message.body, **group}


def take_all(sqs, queue_url: str) -> list[str]:
    """Empties a queue, and returns its message ids."""
    ids = []
    while messages := sqs.receive_message(QueueUrl=queue_url, MaxNumberOfMessages=10).get("Messages"):
        ids += [message["MessageId"] for message in messages]
        entries = [{"Id": str(number), "ReceiptHandle": message["ReceiptHandle"]} for number, message in enumerate(messages)]
        sqs.delete_message_batch(QueueUrl=queue_url, Entries=entries)
    return ids
