"""How long a backlog takes: the event source mapping by its published rules, and a real drain that the arithmetic is checked against."""

import io
import json
import math
import random
import statistics
import time
import uuid
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import psutil
from world import stack
from world.bench.bench import Bench
from world.bench.events import MOST
from world.bench.report import COLOURS, number, spread, table
from world.localstack import ACCOUNT, REGION

NAME = "scaling"
TITLE = "A backlog"

# What AWS publishes of a mapping from a standard queue: https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-scaling.html
STARTS_AT, ADDED_A_MINUTE, MOST_INVOCATIONS = 5, 300, 1250
# Of one provisioned poller, and of all of them; same page.
POLLER_INVOCATIONS, POLLER_POLLS_A_SECOND, POLLER_BYTES_A_SECOND = 10, 10, 1_000_000
PROVISIONED_ADDED_A_MINUTE = 1000
# What one receive brings: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_ReceiveMessage.html
RECEIVED_AT_ONCE = 10
# Of a standard queue: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-queues.html
IN_FLIGHT = 120_000
# By default, of all of an account's functions in a region: https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html
ACCOUNT_INVOCATIONS = 1000
# As the function gets it, in the event.
MESSAGE_BYTES = 805
# A function has a core of its own from here on: https://docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html
ONE_CORE_MB = 1769

# The template's defaults.
MEMORY, WINDOW = 256, 5

BACKLOGS = (10**6, 10**8, 10**9)
BATCHES = (10, 100, 1000, MOST)
MAXIMUM_CONCURRENCY = (2, 10, 100, 1000)
# Minimum and maximum.
POLLERS = ((2, 20), (2, 200), (200, 200), (200, 2000))
POLLERS_BATCH = 1000
STEP_SECONDS = 1.0

# The limits, as the page calls them.
GROWTH, CONCURRENCY, POLLS, FLIGHT, DATABASE = "growth", "concurrency", "polls", "in flight", "database"

OWN_LIMIT = "messages a second that the mapping's own limits allow"

# The drain on this machine.
DRAIN_BATCH = 100
DRAIN_CONCURRENCY = (1, 2, 4)
# Seconds that PostgreSQL is made to take longer over an insert: the messages to drain then, and on a small scale. Their batches come out
# even for as many mappings as there are.
DRAIN_SLOWED = {0.0: (12_000, 3_200), 0.5: (2_400, 1_600)}
CALIBRATION = 800
EMULATOR = "LocalStack"
DRAIN_PATIENCE_SECONDS = 900


# The simulation.


@dataclass(frozen=True)
class Mapping:
    """An event source mapping with a backlog before it, from the moment it begins to read."""

    # Messages in a batch: batches are full as long as messages wait.
    batch: float
    # Invocations at once that its pollers are ready for: at first, at most, and how many are added a second.
    starts: float
    most: float
    added: float
    # Messages a second that are read for each of these. Without provisioned pollers it is not published.
    reads: float = math.inf
    # Seconds that a message waits, on average, until its batch is full.
    collects: float = 0

    def readiness(self, seconds: float) -> float:
        return min(self.most, self.starts + self.added * seconds)

    def limits(self, seconds: float, service: float) -> dict[str, float]:
        """Messages a second that each limit of its own lets through, so long after the beginning; `service` is an invocation's seconds."""
        ready = self.readiness(seconds)
        return {
            CONCURRENCY: min(ready, ACCOUNT_INVOCATIONS) * self.batch / service,
            POLLS: ready * self.reads,
            FLIGHT: IN_FLIGHT / (service + self.collects),
        }


def bounded(batch: int, maximum_concurrency: int) -> Mapping:
    """As `MaximumConcurrency` bounds it."""
    most = min(maximum_concurrency, MOST_INVOCATIONS)
    return Mapping(min(batch, MOST), starts=STARTS_AT, most=most, added=ADDED_A_MINUTE / 60)


def provisioned(batch: int, minimum: int, maximum: int, window: float = WINDOW) -> Mapping:
    """With provisioned pollers, each of which collects one batch after the other: it has as much as it reads in the window, at most."""
    reads = min(POLLER_POLLS_A_SECOND * RECEIVED_AT_ONCE, POLLER_BYTES_A_SECOND / MESSAGE_BYTES)
    collected = max(1.0, min(batch, MOST, reads * window))
    return Mapping(
        collected,
        starts=POLLER_INVOCATIONS * minimum,
        most=POLLER_INVOCATIONS * maximum,
        added=PROVISIONED_ADDED_A_MINUTE / 60,
        reads=reads / POLLER_INVOCATIONS,
        collects=collected / reads / 2,
    )


@dataclass(frozen=True)
class Drain:
    """How long a backlog took, and for how many seconds each limit was the lowest, in the order in which they were."""

    seconds: float
    limits: dict[str, float]


def drain(messages: int, mapping: Mapping, service: float, shared: dict[str, float]) -> Drain:
    """Follows a backlog second by second while the mapping grows, and then in one step, as nothing changes any more.

    Messages flow as the lowest limit lets them: the mapping's own, and those of what all invocations share, in messages a second.
    """
    left, now, limits = float(messages), 0.0, defaultdict(float)
    while left > 0:
        grown = mapping.readiness(now) >= mapping.most
        # In the middle of a step is its mean, as growth is even.
        rates = mapping.limits(now if grown else now + STEP_SECONDS / 2, service) | shared
        lowest = min(rates, key=rates.get)
        needed = left / rates[lowest]
        seconds = needed if grown else min(STEP_SECONDS, needed)
        left -= left if seconds == needed else rates[lowest] * seconds
        now += seconds
        limits[GROWTH if lowest in (CONCURRENCY, POLLS) and not grown else lowest] += seconds
    return Drain(now, dict(limits))


# What the simulation goes by.


class Durations:
    """How long invocations take, from what other sections measured, or from what docs/scaling.md assumes."""

    def __init__(self, results: dict):
        self._throttled = results.get("footprint", {}).get("throttled", {})
        self._batches = results.get("batches", {}).get("situations", {}).get("tls", {})

    def known(self, batch: int, memory: int) -> str:
        """Where its figure is from, in words."""
        if self._throttled.get(str(memory), {}).get(str(batch)):
            return "measured at that share of a core ([Footprint](#footprint))"
        if self._batches.get(str(batch), {}).get("ours"):
            return f"measured on a whole core ([Batches](#batches)), with the CPU time taken × {ONE_CORE_MB:,} / memory"
        return "as [scaling.md](scaling.md#how-long-a-batch-takes) assumes"

    def ms(self, batch: int, memory: int) -> list[float]:
        """Samples of it."""
        if samples := self._throttled.get(str(memory), {}).get(str(batch)):
            return samples
        stretched = max(1.0, ONE_CORE_MB / memory)
        if turns := self._batches.get(str(batch), {}).get("ours"):
            return [(ns + turn["cpu_ns"] * batch * (stretched - 1)) / 1e6 for turn in turns for ns in turn["ns"]]
        return [10 + batch * (0.004 * stretched + 0.008)]

    def seconds(self, batch: int, memory: int) -> float:
        return statistics.mean(self.ms(batch, memory)) / 1000


class DatabaseLimit:
    """The rows a second beyond which more environments bring no more."""

    # Of docs/scaling.md, in case nothing was measured.
    ASSUMED = {10: 24_000.0, 1000: 131_000.0}

    def __init__(self, results: dict):
        runs = results.get("environments", {}).get("runs", [])
        by_case = defaultdict(list)
        for run in runs:
            by_case[run["batch"], run["environments"]].append(run["messages_s"])
        self.measured = {batch for batch, _ in by_case} >= set(self.ASSUMED)
        self.rates = self.ASSUMED
        if self.measured:
            medians = [(batch, statistics.median(samples)) for (batch, _), samples in by_case.items()]
            self.rates = {batch: max(rate for of, rate in medians if of == batch) for batch in self.ASSUMED}

    def rows_a_second(self, batch: float) -> float:
        """A batch takes the database a time of its own and one for each message; two measured batches tell both."""
        (small, large), (slow, fast) = zip(*sorted(self.rates.items()), strict=True)
        message = max(0.0, (large / fast - small / slow) / (large - small))
        alone = max(0.0, small / slow - small * message)
        return batch / (alone + batch * message)


# The drain on this machine.


def measure(bench: Bench) -> dict:
    if not (bench.binaries / "login-etl").exists():
        return {"skipped": f"no login-etl in {bench.binaries.name}"}
    drains = []
    with Copies(bench) as copies:
        for turn in range(1 if bench.quick else 2):
            for slowed, (usual, few) in DRAIN_SLOWED.items():
                messages = few if bench.quick else usual
                order = random.Random(f"{bench.seed} {turn}").sample(DRAIN_CONCURRENCY, len(DRAIN_CONCURRENCY))
                for at_once in order:
                    for count in (CALIBRATION, messages):
                        bench.say(f"{count:,} messages, {at_once} at once{f', the database {slowed} s slower' if slowed else ''}")
                        drains.append({"round": turn, "calibrates": count == CALIBRATION} | copies.drain(count, at_once, slowed))
    return {"cores": psutil.cpu_count(), "batch": DRAIN_BATCH, "drains": drains}


class Copies:
    """Copies of the function in LocalStack, each for one mapping, as a mapping there has one batch at a time; a context manager."""

    def __init__(self, bench: Bench):
        self._localstack = bench.servers.localstack
        self._functions, self._sqs = self._localstack.client("lambda"), self._localstack.client("sqs")
        self._postgres, self._database = bench.servers.postgres, bench.database("bench_scaling")
        self._names = [f"bench-scaling-{place}-{uuid.uuid4().hex[:8]}" for place in range(max(DRAIN_CONCURRENCY))]
        environment = bench.environment(self._database)
        self._settings = {name: value for name, value in environment.items() if name.startswith(("DATABASE_", "MASKING_"))}
        self._code = package(bench.binaries / "login-etl")
        self._bodies = [record["body"] for record in json.loads(bench.events.event(1000))["Records"]]

    def __enter__(self) -> "Copies":
        for name in self._names:
            self._functions.create_function(
                FunctionName=name,
                Runtime="provided.al2023",
                Handler="bootstrap",
                Role=f"arn:aws:iam::{ACCOUNT}:role/bench",
                Code={"ZipFile": self._code},
                Architectures=[stack.architecture()],
                Timeout=30,
                MemorySize=MEMORY,
                Environment={"Variables": self._settings},
                LoggingConfig={"LogFormat": "JSON", "ApplicationLogLevel": "INFO"},
            )
        for name in self._names:
            self._functions.get_waiter("function_active_v2").wait(FunctionName=name)
            # So that a drain has no cold start.
            self._functions.invoke(FunctionName=name, Payload=b'{"Records":[]}')
        return self

    def __exit__(self, *_) -> None:
        for name in self._names:
            self._functions.delete_function(FunctionName=name)

    def drain(self, messages: int, concurrency: int, slowed: float) -> dict:
        """Has so many mappings drain a queue of messages, and returns what the functions' logs tell of it, and LocalStack's CPU time."""
        self._empty(slowed)
        name = f"bench-scaling-{uuid.uuid4().hex[:8]}"
        url = self._sqs.create_queue(QueueName=name, Attributes={"VisibilityTimeout": str(DRAIN_PATIENCE_SECONDS)})["QueueUrl"]
        self._send(url, messages)
        offsets = {file: file.stat().st_size for file in self._logs()}
        emulator = psutil.Process(self._localstack.pid)
        before = emulator.cpu_times()
        mappings = [
            self._functions.create_event_source_mapping(
                EventSourceArn=f"arn:aws:sqs:{REGION}:{ACCOUNT}:{name}",
                FunctionName=function,
                BatchSize=DRAIN_BATCH,
                # LocalStack, like Lambda, wants a window for batches beyond ten; a full batch does not wait for it.
                MaximumBatchingWindowInSeconds=1,
                FunctionResponseTypes=["ReportBatchItemFailures"],
            )["UUID"]
            for function in self._names[:concurrency]
        ]
        self._wait_until_empty(url)
        after = emulator.cpu_times()
        for mapping in mappings:
            self._functions.delete_event_source_mapping(UUID=mapping)
        logs = [[json.loads(line) for line in since(file, offsets.get(file, 0)) if line.startswith(b"{")] for file in self._logs()]
        lines = [line for log in logs for line in log]
        loaded = [line["messages"] for line in lines if line.get("message") == "batch loaded"]
        with self._postgres.connect(self._database) as connection:
            rows = connection.execute("select count(*) from user_logins").fetchone()[0]
        if (rows, sum(loaded)) != (messages, messages):
            raise RuntimeError(f"{messages:,} messages became {rows:,} rows in batches of {sum(loaded):,}")
        reports = [line for line in lines if line.get("type") == "platform.report"]
        starts = [[instant(line) for line in log if line.get("type") == "platform.start"] for log in logs]
        return {
            "slowed": slowed,
            "concurrency": concurrency,
            "messages": messages,
            "batches": len(loaded),
            # From the first invocation's beginning to the last one's end.
            "seconds": max(map(instant, reports)) - min(map(min, filter(None, starts))),
            # Between the beginnings of a mapping's invocations, on average.
            "turn": statistics.mean(after - before for times in starts for before, after in pairwise(times)),
            "duration_ms": [report["record"]["metrics"]["durationMs"] for report in reports],
            "emulator_cpu": (after.user - before.user) + (after.system - before.system),
        }

    def _empty(self, slowed: float) -> None:
        """The tables; and has each statement that inserts take so many seconds longer, as a slower database's would."""
        with self._postgres.connect(self._database, autocommit=True) as connection:
            connection.execute("truncate user_logins, user_logins_ledger")
            connection.execute("drop trigger if exists slowed on user_logins")
            connection.execute(
                f"""create or replace function slowed() returns trigger language plpgsql as
                    $$ begin perform pg_sleep({float(slowed)}); return null; end $$"""
            )
            if slowed:
                connection.execute("create trigger slowed before insert on user_logins for each statement execute function slowed()")
            connection.execute("checkpoint")

    def _send(self, url: str, messages: int) -> None:
        def ten(start: int) -> None:
            bodies = [self._bodies[place % len(self._bodies)] for place in range(start, min(start + 10, messages))]
            entries = [{"Id": str(place), "MessageBody": body} for place, body in enumerate(bodies)]
            if refused := self._sqs.send_message_batch(QueueUrl=url, Entries=entries).get("Failed"):
                raise RuntimeError(f"SQS refused messages: {refused[0]['Message']}")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ten, range(0, messages, 10)))

    def _wait_until_empty(self, url: str) -> None:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        deadline = time.monotonic() + DRAIN_PATIENCE_SECONDS
        while any(int(count) for count in self._sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"].values()):
            if time.monotonic() > deadline:
                logs = self._localstack.function_logs
                raise RuntimeError(f"the queue is not empty after {DRAIN_PATIENCE_SECONDS} s; the logs are in {logs}")
            time.sleep(0.25)

    def _logs(self) -> list[Path]:
        return [file for name in self._names for file in self._localstack.function_logs.glob(f"{name}-*.log")]


def package(program: Path) -> bytes:
    """The program as Lambda wants it."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        entry = zipfile.ZipInfo("bootstrap")
        entry.external_attr, entry.compress_type = 0o755 << 16, zipfile.ZIP_DEFLATED
        file.writestr(entry, program.read_bytes())
    return archive.getvalue()


def since(file: Path, offset: int) -> list[bytes]:
    """A file's lines from there on."""
    with file.open("rb") as log:
        log.seek(offset)
        return log.read().splitlines()


def instant(line: dict) -> float:
    """When a line of the platform's was written."""
    return datetime.fromisoformat(line["time"]).timestamp()


def predicted(calibration: dict, real: dict) -> Drain:
    """What the simulation says of a drain, knowing from another one how long a turn of a mapping took.

    If that one had fewer at once, more of them share LocalStack. It is one Python process: a core's worth of the CPU that it took for a
    batch.
    """
    at_once = real["concurrency"]
    emulator = DRAIN_BATCH * calibration["batches"] / calibration["emulator_cpu"]
    shared = {EMULATOR: emulator} if at_once > calibration["concurrency"] else {}
    return drain(real["messages"], Mapping(DRAIN_BATCH, starts=at_once, most=at_once, added=0), calibration["turn"], shared)


# The page.


def text(result: dict, all_results: dict) -> str:
    durations, database = Durations(all_results), DatabaseLimit(all_results)
    return "\n\n".join(
        [rules(durations, database), bounded_text(durations, database), provisioned_text(durations, database), checked(result)]
    )


def rules(durations: Durations, database: DatabaseLimit) -> str:
    sources = defaultdict(list)
    for batch in BATCHES:
        sources[durations.known(batch, MEMORY)].append(f"{batch:,} messages {number(1000 * durations.seconds(batch, MEMORY))} ms")
    service = "; ".join(f"{', '.join(batches)}, {source}" for source, batches in sources.items())
    measured = "where [many environments](#many-environments-one-postgresql) bring no more, on this machine" if database.measured else (
        "as [scaling.md](scaling.md#how-long-a-batch-takes) has it"
    )
    rates = " and ".join(f"{number(rate)} rows a second in batches of {batch:,}" for batch, rate in database.rates.items())
    page = "https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-scaling.html"
    quotas = "https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-queues.html"
    account = "https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html"
    size = "https://docs.aws.amazon.com/lambda/latest/dg/invocation-eventsourcemapping.html#invocation-eventsourcemapping-batching"
    return f"""\
How long the event source mapping takes over messages that wait already. Nothing here ran on AWS: it is simulated, second by second, from
AWS's published rules and from times measured above.

- A mapping from a standard queue
  [starts with {STARTS_AT} invocations at once and adds up to {ADDED_A_MINUTE} a minute, to {MOST_INVOCATIONS:,} at most]({page}).
  `MaximumConcurrency` bounds it, and
  [{ACCOUNT_INVOCATIONS:,} in an account]({account})
  bound all its functions together.
- A provisioned poller takes
  [{POLLER_INVOCATIONS} invocations at once, {POLLER_POLLS_A_SECOND} polls a second, or 1 MB a second]({page}),
  whatever comes first; a poll brings {RECEIVED_AT_ONCE} messages. They grow by up to {PROVISIONED_ADDED_A_MINUTE:,} invocations a minute,
  which are {PROVISIONED_ADDED_A_MINUTE // POLLER_INVOCATIONS} pollers.
- Batches are full as long as messages wait, and [6 MB]({size})
  hold about {MOST:,}. A provisioned poller has no more in a batch than it reads in the window of {WINDOW} s.
- A queue has
  [about {IN_FLIGHT:,} messages in flight]({quotas})
  at most, those among them that wait for their batch to be full.
- An invocation at {MEMORY} MB takes: {service}.
- The database takes {rates}:
  {measured}. A batch is reckoned to take it a time of its own and one for each message.

Not published, and reckoned as nothing: what a mapping needs between two invocations, and how fast it reads without provisioned pollers. So
these are the shortest times that the rules allow, for a database as near as this one."""


def bounded_text(durations: Durations, database: DatabaseLimit) -> str:
    rows, binding = [], set()
    for batch in BATCHES:
        for maximum in MAXIMUM_CONCURRENCY:
            mapping, service = bounded(batch, maximum), durations.seconds(batch, MEMORY)
            shared = {DATABASE: database.rows_a_second(mapping.batch)}
            alone = mapping.limits(math.inf, service)
            drains = [drain(messages, mapping, service, shared) for messages in BACKLOGS]
            binding.add(longest(drains[-1]))
            rows.append((f"{batch:,}", f"{maximum:,}", f"{rounded(min(alone.values()))}", *cells(drains)))
    header = ("batch", "`MaximumConcurrency`", OWN_LIMIT, *(f"{big(messages)} messages" for messages in BACKLOGS))
    of_each = ", ".join(f"{sum(limit_of(row) == limit for row in rows)} by {limit}" for limit in sorted(binding))
    return f"""\
### Bounded by `MaximumConcurrency`

{table(header, rows)}

After each time is what limits it for longest: *{GROWTH}* is the mapping's, *{CONCURRENCY}* is `MaximumConcurrency` or the account's,
*{FLIGHT}* is the queue's quota, and *{DATABASE}* is how many rows it takes. Of {len(rows)} cases of {big(BACKLOGS[-1])} messages,
{of_each}. Where it is the database, more concurrency only makes invocations wait inside it, and be paid for waiting; what helps is a larger
batch, as far as the database gains by it, and then a larger database.

![Time to drain {big(BACKLOGS[1])} messages, and the drain on this machine](images/performance-scaling.svg)"""


def provisioned_text(durations: Durations, database: DatabaseLimit) -> str:
    rows = []
    for minimum, maximum in POLLERS:
        mapping, service = provisioned(POLLERS_BATCH, minimum, maximum), durations.seconds(POLLERS_BATCH, MEMORY)
        drains = [drain(messages, mapping, service, {DATABASE: database.rows_a_second(mapping.batch)}) for messages in BACKLOGS]
        rows.append((f"{minimum:,}", f"{maximum:,}", rounded(min(mapping.limits(math.inf, service).values())), *cells(drains)))
    header = ("minimum", "maximum", OWN_LIMIT, *(f"{big(messages)} messages" for messages in BACKLOGS))
    collected = provisioned(POLLERS_BATCH, *POLLERS[0]).batch
    return f"""\
### With provisioned pollers

`BatchSize` is {POLLERS_BATCH:,}, of which a poller collects {collected:,.0f} in its window; an invocation is reckoned as long as one of
{POLLERS_BATCH:,}. *{POLLS}* is how fast pollers read, {POLLER_POLLS_A_SECOND * RECEIVED_AT_ONCE} messages a second each.

{table(header, rows)}"""


def checked(result: dict) -> str:
    heading = "### The arithmetic, checked"
    if "skipped" in result:
        return f"{heading}\n\nNot checked: {result['skipped']}."
    rows, errors = [], defaultdict(list)
    for (slowed, concurrency), drains in sorted(compared(result).items()):
        limits = {longest(one.from_one) for one in drains}
        from_one = [100 * (one.from_one.seconds / one.real["seconds"] - 1) for one in drains]
        from_as_many = [100 * (one.from_as_many.seconds / one.real["seconds"] - 1) for one in drains]
        errors["LocalStack is the limit" if EMULATOR in limits else "invocations are the limit"].append(abs(statistics.median(from_one)))
        errors["as many"].append(abs(statistics.median(from_as_many)))
        rows.append(
            (
                f"{slowed:g} s slower" if slowed else "as it is",
                str(concurrency),
                spread([one.real["seconds"] for one in drains]),
                spread([one.from_one.seconds for one in drains]),
                spread(from_one, "{:+.0f}"),
                " or ".join(sorted(limits)),
                spread([one.from_as_many.seconds for one in drains]),
                spread(from_as_many, "{:+.0f}"),
                spread([100 * one.real["emulator_cpu"] / one.real["seconds"] for one in drains], "{:.0f}"),
                spread([statistics.mean(one.real["duration_ms"]) for one in drains]),
            )
        )
    header = (
        *("database", "at once", "real, s", "simulated from one at once, s", "off by, %", "limit"),
        *("simulated from as many at once, s", "off by, %", "LocalStack, % of a core", "`Duration`, ms"),
    )
    as_many = max(errors.pop("as many"))
    off = "; ".join(f"where {limit}, by {max(found):.0f} % at most" for limit, found in sorted(errors.items()))
    return f"""\
{heading}

The same simulation of a queue in LocalStack, beside a real drain of it: messages wait, LocalStack's own mappings hand them to the function
in batches of {result["batch"]}, and it loads them into PostgreSQL. There a mapping has one invocation at once and does not grow, so for
more at once there are copies of the function, each with a mapping of its own to the one queue. What the simulation knows is from a smaller
drain of {CALIBRATION:,} messages: how long a mapping's turn takes, with the function, the receives and deletes, and the pause between two
batches. From a drain with one at once it has to foretell what more of them do to each other: it is told how much CPU LocalStack, one Python
process, took for a batch, and takes a core's worth of that for what all share. From a drain with as many at once it only has to go on.

{table(header, rows)}

By the medians, the simulation from one at once is off {off}.
From as many at once it is off by {as_many:.0f} % at most. With the function as it is, LocalStack works longer over a batch than the
function does, so what is measured there is how several mappings wait for each other in LocalStack, on {result["cores"]} cores that it
shares with the function and PostgreSQL. In the other cases PostgreSQL is made slower, by a trigger that sleeps, so that invocations are
what takes the time. What this checks is the arithmetic of invocations at once, their durations, and a limit that they share. How AWS's
mappings grow, and how fast SQS is, it cannot tell."""


@dataclass(frozen=True)
class Compared:
    """A real drain, and what the simulation says of it from the two smaller ones of its round."""

    real: dict
    from_one: Drain
    from_as_many: Drain


def compared(result: dict) -> dict[tuple[float, int], list[Compared]]:
    """The real drains, by how much the database is slowed, and how many are at once."""
    found = defaultdict(list)
    calibrations = {(one["round"], one["slowed"], one["concurrency"]): one for one in result["drains"] if one["calibrates"]}
    for real in result["drains"]:
        if not real["calibrates"]:
            one, as_many = (calibrations[real["round"], real["slowed"], at_once] for at_once in (1, real["concurrency"]))
            found[real["slowed"], real["concurrency"]].append(Compared(real, predicted(one, real), predicted(as_many, real)))
    return found


def cells(drains: list[Drain]) -> list[str]:
    return [f"{lasting(one.seconds)}, {longest(one)}" for one in drains]


def longest(drained: Drain) -> str:
    """The limit that was the lowest for longest."""
    return max(drained.limits, key=drained.limits.get)


def limit_of(row: tuple[str, ...]) -> str:
    return row[-1].partition(", ")[2]


def rounded(rate: float) -> str:
    return f"{float(f'{rate:.2g}'):,.0f}"


def big(count: int) -> str:
    return f"10{''.join('⁰¹²³⁴⁵⁶⁷⁸⁹'[int(digit)] for digit in str(round(math.log10(count))))}"


def lasting(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds)} s"


def plots(result: dict, all_results: dict, directory: Path) -> None:
    import matplotlib.pyplot as plt

    durations, database = Durations(all_results), DatabaseLimit(all_results)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    concurrency = [2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000]
    for batch, colour in zip(BATCHES, ("original", "powertools", "best", "ours"), strict=True):
        service, shared = durations.seconds(batch, MEMORY), {DATABASE: database.rows_a_second(batch)}
        for limits, line in ((shared, "-"), ({}, ":")):
            minutes = [drain(BACKLOGS[1], bounded(batch, most), service, limits).seconds / 60 for most in concurrency]
            left.plot(concurrency, minutes, line, color=COLOURS[colour], label=f"{batch:,}" if limits else None)
    left.set(xscale="log", yscale="log", xlabel="MaximumConcurrency", title=f"minutes to drain {big(BACKLOGS[1])} messages, simulated")
    left.set_xticks(MAXIMUM_CONCURRENCY, [f"{most:,}" for most in MAXIMUM_CONCURRENCY])
    left.yaxis.set_major_formatter("{x:,g}")
    left.legend(title="batch (dotted:\nno database)", loc="upper left", bbox_to_anchor=(1, 1))
    if "skipped" not in result:
        drains = compared(result)
        for slowed, colour in zip(DRAIN_SLOWED, ("ours", "original"), strict=True):
            name = f"database {slowed:g} s slower" if slowed else "as it is"
            cases = [drains[slowed, at_once] for at_once in DRAIN_CONCURRENCY]
            points = [(one.real["concurrency"], one.real["messages"] / one.real["seconds"]) for case in cases for one in case]
            right.plot(*zip(*points, strict=True), "o", color=COLOURS[colour], markersize=4, label=f"{name}: real")
            rates = [statistics.median(one.real["messages"] / one.from_one.seconds for one in case) for case in cases]
            right.plot(DRAIN_CONCURRENCY, rates, "-", color=COLOURS[colour], label="simulated from one at once")
        right.set(xlabel="invocations at once", title="messages a second of a drain on this machine", ylim=(0, None))
        right.set_xticks(DRAIN_CONCURRENCY, DRAIN_CONCURRENCY)
        right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    for axes in (left, right):
        axes.minorticks_off()
    figure.savefig(directory / "performance-scaling.svg", metadata={"Date": None})
