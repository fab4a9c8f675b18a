"""What a million messages cost, from AWS's prices, measured durations, and the bytes that the function logs."""

import json
import math
import statistics
from pathlib import Path

from world import messages
from world.bench.bench import Bench
from world.bench.events import MOST
from world.bench.report import COLOURS, number, table
from world.bench.runtime import Runtime
from world.bench.scaling import MEMORY, ONE_CORE_MB, RECEIVED_AT_ONCE, STARTS_AT, Durations

NAME = "cost"
TITLE = "The cost of a million messages"

BATCHES = (1, 10, 100, 1000, MOST)
MEMORY_SIZES = (128, 256, 512, 1024, ONE_CORE_MB)
ARCHITECTURES = ("arm64", "x86_64")
MILLION = 10**6
# Of each batch; the first one prunes the ledger.
EVENTS = 4
SHOWN_BATCH = 1000

# US East (N. Virginia), in dollars, without free tiers and without discounts for large volumes. Looked up on PRICED, in copies of the
# pages that are some months old.
PRICED = "2026-11-23"
# https://aws.amazon.com/lambda/pricing/
LAMBDA_MILLION_REQUESTS = 0.20
LAMBDA_GB_SECOND = {"arm64": 0.0000133334, "x86_64": 0.0000166667}
# https://aws.amazon.com/sqs/pricing/, of a standard queue; a request has up to ten messages, or 64 KB.
SQS_MILLION_REQUESTS = 0.40
# https://aws.amazon.com/cloudwatch/pricing/
LOG_GB = 0.50
METRIC_MONTH = 0.30

# Lambda's own two lines of an invocation, by https://docs.aws.amazon.com/lambda/latest/dg/telemetry-schema-reference.html
REQUEST_ID = "6f7f0961-f834-4211-b5aa-453c3379a9c6"
PLATFORM = (
    {"time": "2026-11-23T00:00:00.000Z", "type": "platform.start", "record": {"requestId": REQUEST_ID, "version": "1"}},
    {
        "time": "2026-11-23T00:00:00.000Z",
        "type": "platform.report",
        "record": {
            "requestId": REQUEST_ID,
            "metrics": {"durationMs": 15.534, "billedDurationMs": 16, "memorySizeMB": 256, "maxMemoryUsedMB": 15},
            "status": "success",
        },
    },
)
# What Lambda appends to a trace's root, which the function logs.
TRACE = ";Parent=53995c3f42cd8ad8;Sampled=0"

LONG_POLL_SECONDS = 20
MONTH_SECONDS = 730 * 3600


def measure(bench: Bench) -> dict:
    """The bytes of the function's lines: of a batch, by its size, and of a message that fails; and how many metrics there are."""
    if not (bench.binaries / "login-etl").exists():
        return {"skipped": f"no login-etl in {bench.binaries.name}"}
    log = bench.directory / "cost.log"
    environment = bench.environment(bench.database("bench_cost"))
    written: dict[str, dict[str, list[int]]] = {}
    with Runtime(bench.command("login-etl"), environment, log) as runtime:
        runtime.ready()
        for batch in BATCHES:
            before = log.stat().st_size
            for _ in range(EVENTS):
                runtime.invoke(bench.events.event(batch))
            found = lines(log, before)
            written[str(batch)] = {
                "metrics": [length for length, line in found if "_aws" in line],
                "loaded": [length + len(TRACE) for length, line in found if line.get("message") == "batch loaded"],
                "other": [length for length, line in found if "_aws" not in line and line.get("message") != "batch loaded"],
            }
        declared = next(line["_aws"]["CloudWatchMetrics"][0]["Metrics"] for _, line in found if "_aws" in line)
        before = log.stat().st_size
        event = json.loads(bench.events.event(10))
        for record, body in zip(event["Records"], (messages.WRONG_TYPE, *messages.NOT_JSON), strict=False):
            record["body"] = body
        runtime.invoke(json.dumps(event).encode())
        failed = [length + len(TRACE) for length, line in lines(log, before) if line.get("message") == "message failed"]
    return {"bytes": written, "failed": failed, "metrics": len(declared)}


def lines(log: Path, offset: int) -> list[tuple[int, dict]]:
    """A log's lines from there on, with their lengths in bytes; CloudWatch takes them without the line break."""
    with log.open("rb") as file:
        file.seek(offset)
        return [(len(line), json.loads(line)) for line in file.read().splitlines()]


def platform_bytes() -> int:
    return sum(len(json.dumps(line, separators=(",", ":"))) for line in PLATFORM)


# The arithmetic, each for a million messages.


def invocations(batch: int) -> float:
    return MILLION / batch


def requests_dollars(batch: int) -> float:
    return invocations(batch) / MILLION * LAMBDA_MILLION_REQUESTS


def billed_ms(durations: Durations, batch: int, memory: int) -> float:
    """An invocation's, on average: each is rounded up to a whole millisecond."""
    return statistics.mean(math.ceil(ms) for ms in durations.ms(batch, memory))


def gb_seconds(durations: Durations, batch: int, memory: int) -> float:
    return invocations(batch) * billed_ms(durations, batch, memory) / 1000 * memory / 1024


def time_dollars(durations: Durations, batch: int, memory: int, architecture: str) -> float:
    return gb_seconds(durations, batch, memory) * LAMBDA_GB_SECOND[architecture]


def sqs_requests(batch: int) -> tuple[float, float, float]:
    """Sends, receives and deletes: senders send in tens, and the mapping receives and deletes as many at once as a batch and SQS allow."""
    handled = invocations(batch) * math.ceil(batch / RECEIVED_AT_ONCE)
    return MILLION / RECEIVED_AT_ONCE, handled, handled


def sqs_dollars(batch: int) -> float:
    return sum(sqs_requests(batch)) / MILLION * SQS_MILLION_REQUESTS


def log_bytes(result: dict, batch: int) -> float:
    """Of an invocation, Lambda's two lines included."""
    own = result["bytes"][str(batch)]
    return statistics.mean(own["metrics"]) + statistics.mean(own["loaded"]) + sum(own["other"]) / EVENTS + platform_bytes()


def log_dollars(result: dict, batch: int) -> float:
    return invocations(batch) * log_bytes(result, batch) / 1e9 * LOG_GB


def dollars(result: dict, durations: Durations, batch: int, memory: int, architecture: str) -> float:
    return requests_dollars(batch) + time_dollars(durations, batch, memory, architecture) + sqs_dollars(batch) + log_dollars(result, batch)


# The page.


def text(result: dict, all_results: dict) -> str:
    if "skipped" in result:
        return f"Not measured: {result['skipped']}."
    durations = Durations(all_results)
    parts = [
        (
            f"{batch:,}",
            *(
                f"{part:.4f}"
                for part in (
                    requests_dollars(batch),
                    time_dollars(durations, batch, MEMORY, "arm64"),
                    time_dollars(durations, batch, MEMORY, "x86_64"),
                    sqs_dollars(batch),
                    log_dollars(result, batch),
                    dollars(result, durations, batch, MEMORY, "arm64"),
                    dollars(result, durations, batch, MEMORY, "x86_64"),
                )
            ),
        )
        for batch in BATCHES
    ]
    sums = [
        (
            f"{batch:,}",
            architecture,
            *(
                f"{dollars(result, durations, batch, memory, architecture):.4f} ({number(billed_ms(durations, batch, memory))} ms)"
                for memory in MEMORY_SIZES
            ),
        )
        for batch in BATCHES
        for architecture in ARCHITECTURES
    ]
    known = sorted({durations.known(batch, memory) for batch in BATCHES for memory in MEMORY_SIZES})
    header = ("batch", "Lambda's requests", "its time, arm64", "its time, x86_64", "SQS", "log", "sum, arm64", "sum, x86_64")
    failed = statistics.mean(result["failed"])
    idle = STARTS_AT * MONTH_SECONDS / LONG_POLL_SECONDS
    millisecond = invocations(1) * 0.001 * MEMORY / 1024 * LAMBDA_GB_SECOND["arm64"]
    return f"""\
Dollars in US East (N. Virginia), without free tiers, at prices looked up on {PRICED} in copies of the pages some months old:
[Lambda](https://aws.amazon.com/lambda/pricing/) ${LAMBDA_MILLION_REQUESTS:.2f} a million requests,
${LAMBDA_GB_SECOND["arm64"]:.10f} a GB-s on arm64 and ${LAMBDA_GB_SECOND["x86_64"]:.10f} on x86_64;
[SQS](https://aws.amazon.com/sqs/pricing/) ${SQS_MILLION_REQUESTS:.2f} a million requests;
[CloudWatch](https://aws.amazon.com/cloudwatch/pricing/) ${LOG_GB:.2f} a GB of log. The database is left out, as it is paid for by the
hour; so are the two secrets, alarms and the network. [deploy.md](deploy.md#what-it-costs) has those, by the month.

At {MEMORY} MB, by messages in a batch:

{table(header, parts)}

![What a million messages cost, by batch and by memory](images/performance-cost.svg)

### Step by step

{step_by_step(result, durations)}

### By memory

The sum, and how long an invocation is billed on average. Durations are {"; or ".join(known)}.
They are of this machine's architecture, and taken for both.

{table(("batch", "architecture", *(f"{memory:,} MB" for memory in MEMORY_SIZES)), sums)}

{by_memory(result, durations)}

### What is in it

- A batch of {SHOWN_BATCH:,} logs {number(log_bytes(result, SHOWN_BATCH))} bytes: {number(mean(result, "metrics"))} of metrics and
  {number(mean(result, "loaded"))} of `batch loaded`, both measured, and {platform_bytes()} of Lambda's own two lines, by
  [their form](https://docs.aws.amazon.com/lambda/latest/dg/telemetry-schema-reference.html).
- A message that fails logs {number(failed)} bytes more each time that it is received; a million of them cost
  ${MILLION * failed / 1e9 * LOG_GB:.2f} each time.
- Messages are sent, received and deleted in tens, but received and deleted one by one in batches of one. Receives that are not full cost
  more: with one message in each, ${SQS_MILLION_REQUESTS:.2f} a million messages, not ${SQS_MILLION_REQUESTS / RECEIVED_AT_ONCE:.2f}.
  A quiet queue costs ${idle / MILLION * SQS_MILLION_REQUESTS:.2f} a month, as {STARTS_AT} readers ask every {LONG_POLL_SECONDS} s.
- Not in the sums: the {result["metrics"]} metrics, {result["metrics"]} × ${METRIC_MONTH:.2f} = ${result["metrics"] * METRIC_MONTH:.2f}
  a month however many messages come; and cold starts, one an environment.
- The database is on this machine. Each millisecond that a farther one adds to an invocation costs ${millisecond:.4f} a million messages
  at {MEMORY} MB on arm64 in batches of one, and a thousandth of that in batches of a thousand."""


def mean(result: dict, what: str) -> float:
    return statistics.mean(result["bytes"][str(SHOWN_BATCH)][what])


def step_by_step(result: dict, durations: Durations) -> str:
    """One cell of the table, in full."""
    batch, architecture = SHOWN_BATCH, "arm64"
    count, ms, size = invocations(batch), billed_ms(durations, batch, MEMORY), log_bytes(result, batch)
    sends, receives, deletes = sqs_requests(batch)
    steps = [
        ("invocations", f"{MILLION:,} / {batch:,} = {count:,.0f}"),
        ("Lambda's requests", f"{count:,.0f} × ${LAMBDA_MILLION_REQUESTS:.2f} / {MILLION:,} = ${requests_dollars(batch):.6f}"),
        (
            "Lambda's time",
            f"{count:,.0f} × {ms / 1000:.5f} s × {MEMORY} / 1,024 GB = {gb_seconds(durations, batch, MEMORY):.4f} GB-s, "
            f"× ${LAMBDA_GB_SECOND[architecture]:.10f} = ${time_dollars(durations, batch, MEMORY, architecture):.6f}",
        ),
        (
            "SQS",
            f"{sends:,.0f} sends + {receives:,.0f} receives + {deletes:,.0f} deletes = {sends + receives + deletes:,.0f}, "
            f"× ${SQS_MILLION_REQUESTS:.2f} / {MILLION:,} = ${sqs_dollars(batch):.6f}",
        ),
        ("log", f"{count:,.0f} × {size:,.0f} bytes = {count * size / 1e9:.6f} GB, × ${LOG_GB:.2f} = ${log_dollars(result, batch):.6f}"),
        ("sum", f"${dollars(result, durations, batch, MEMORY, architecture):.6f}"),
    ]
    width = max(len(name) for name, _ in steps)
    arithmetic = "\n".join(f"{name.ljust(width)}  {how}" for name, how in steps)
    return f"A million messages in batches of {batch:,}, at {MEMORY} MB on {architecture}:\n\n```text\n{arithmetic}\n```"


def by_memory(result: dict, durations: Durations) -> str:
    """How much of the sum memory decides, and how much the batch."""
    rows = []
    for batch in BATCHES:
        sums = {memory: dollars(result, durations, batch, memory, "arm64") for memory in MEMORY_SIZES}
        cheapest, dearest = min(sums, key=sums.get), max(sums, key=sums.get)
        rows.append((f"{batch:,}", f"{cheapest:,} MB", f"{dearest:,} MB", f"{100 * (sums[dearest] / sums[cheapest] - 1):.1f} % more"))
    first, last = (dollars(result, durations, batch, MEMORY, "arm64") for batch in (BATCHES[0], SHOWN_BATCH))
    return f"""\
{table(("batch", "cheapest on arm64", "dearest", "by"), rows)}

The batch decides more: one by one, a million messages cost {first / last:.0f} times as much as in batches of {SHOWN_BATCH:,}."""


def plots(result: dict, all_results: dict, directory: Path) -> None:
    if "skipped" in result:
        return
    import matplotlib.pyplot as plt

    durations = Durations(all_results)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = [f"{batch:,}" for batch in BATCHES]
    parts = {
        "SQS": ([sqs_dollars(batch) for batch in BATCHES], "limit"),
        "log": ([log_dollars(result, batch) for batch in BATCHES], "best"),
        "Lambda's requests": ([requests_dollars(batch) for batch in BATCHES], "hello"),
        "Lambda's time": ([time_dollars(durations, batch, MEMORY, "arm64") for batch in BATCHES], "ours"),
    }
    bottom = [0.0] * len(BATCHES)
    for name, (heights, colour) in parts.items():
        left.bar(names, heights, bottom=bottom, color=COLOURS[colour], label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    left.set(xlabel="messages in a batch", title=f"dollars a million messages, {MEMORY} MB, arm64")
    left.grid(axis="x", visible=False)
    left.legend()
    for batch, colour in zip(BATCHES, ("limit", "original", "powertools", "best", "ours"), strict=True):
        right.plot(
            MEMORY_SIZES,
            [time_dollars(durations, batch, memory, "arm64") for memory in MEMORY_SIZES],
            marker="o",
            markersize=4,
            color=COLOURS[colour],
            label=f"{batch:,}",
        )
    right.set(xscale="log", yscale="log", xlabel="memory, MB", title="Lambda's time, dollars a million messages, arm64")
    right.set_xticks(MEMORY_SIZES, [f"{memory:,}" for memory in MEMORY_SIZES])
    right.minorticks_off()
    right.legend(title="batch", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(directory / "performance-cost.svg", metadata={"Date": None})
