"""Measures the function's memory, package size, need of CPU, and the cost of its metrics and logs."""

import json
import platform
import random
import statistics
import zipfile
from pathlib import Path

from world import paths
from measure.bench import Bench, Contender, ContenderFailed
from measure.events import MOST
from measure.report import bars, number, spread, table
from measure.runtime import Runtime
from measure.share import ONE_CORE_MB, NoShare, Share

NAME = "footprint"
TITLE = "Footprint"
# `e_machine` of an ELF file.
MACHINES = {0x3E: "x86_64", 0xB7: "arm64"}
MEMORY_SIZES = (128, 256, 512, 1024, ONE_CORE_MB)
# Batch: events at each memory size. The first event does not count: it makes the kernel load the program's pages.
THROTTLED = {1: 51, 10: 51, 100: 21, 1000: 11, MOST: 6}
SMALLEST, BAR_BATCH = MEMORY_SIZES[0], 10
# Events of 6 MB, for one process.
EVENTS = 10
OBSERVED_BATCH, OBSERVED_EVENTS = 100, 21


def measure(bench: Bench) -> dict:
    if missing := [name for name in ("hello", "login-etl") if not bench.program(name).exists()]:
        return {"skipped": f"no {' and no '.join(missing)} in {bench.binaries.name}"}
    return {
        "memory": memory(bench),
        **throttled(bench),
        "packages": packages(bench),
        "observed": observed(bench),
    }


def memory(bench: Bench) -> dict | None:
    """The peak bytes of processes before their first event, after one event of 6 MB, and after `EVENTS`; and their bytes of files."""
    if platform.system() != "Linux":
        return None
    environment = bench.environment(bench.database("bench_footprint"))
    held = {"event": [], "hello": [], "login-etl": [], "python": []}
    for turn in range(3 if bench.quick else 7):
        bench.say(f"memory, process {turn + 1}")
        for name in ("hello", "login-etl"):
            with Runtime(bench.command(name), environment, bench.directory / f"memory-{name}.log") as runtime:
                runtime.ready()
                figures = [runtime.memory().most]
                for count in range(EVENTS):
                    event = bench.events.event(MOST)
                    runtime.invoke(event)
                    if count in (0, EVENTS - 1):
                        figures.append(runtime.memory().most)
                held[name].append([*figures, runtime.memory().files])
        held["event"].append(len(event))
        python = [str(bench.peers_python), str(paths.ROOT / "benches" / "peers" / "cold.py")]
        with Runtime(python, environment, bench.directory / "memory-python.log") as runtime:
            runtime.ready()
            held["python"].append(runtime.memory().most)
    return held


def throttled(bench: Bench) -> dict:
    """Milliseconds of events handled without a pause, by memory size and batch."""
    environment = bench.environment(bench.database("bench_footprint"))
    times: dict[str, dict[str, list[float]]] = {}
    most, killed, failures = 0, 0, 0
    for size in MEMORY_SIZES:
        bench.say(f"{size} MB of memory, and its share of a core")
        try:
            with Share(size) as share:
                with Runtime(
                    share.command(bench.command("login-etl")[0]),
                    environment | {"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(size)},
                    bench.directory / "throttled.log",
                ) as runtime:
                    runtime.ready()
                    share.throttle()
                    times[str(size)] = {}
                    for batch, events in THROTTLED.items():
                        ms = []
                        for _ in range(events if not bench.quick else (events + 1) // 2):
                            done = runtime.invoke(bench.events.event(batch))
                            failures += len(json.loads(done.answer)["batchItemFailures"])
                            ms.append(done.ns / 1e6)
                        times[str(size)][str(batch)] = ms[1:]
                    if size == SMALLEST:
                        most = runtime.memory().most
                killed += share.killed()
        except NoShare as error:
            return {"throttled": {}, "why_not": f"{error}; run it on Linux as root, which may make control groups"}
        except ContenderFailed as error:
            # That it did not fit is a result, too.
            return {"throttled": times, "why_not": f"at {size} MB: {str(error).splitlines()[0]}"}
    return {"throttled": times, "most": most, "killed": killed, "failures": failures}


def packages(bench: Bench) -> dict:
    """Bytes of the program and of its package, by architecture."""
    program, package = bench.program("login-etl"), bench.directory / "bootstrap.zip"
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.write(program, "bootstrap")
    machine = int.from_bytes(program.open("rb").read(20)[18:], "little")
    sizes = [program.stat().st_size, package.stat().st_size]
    package.unlink()
    return {MACHINES.get(machine, platform.machine()): sizes}


def observed(bench: Bench) -> dict | None:
    """Nanoseconds of a batch, and of its metrics and logs alone, for each turn."""
    if not (bench.binaries / "ours").exists():
        return None
    database = bench.database("bench_footprint")
    environment = bench.environment(database, tls=False)
    whole = bench.command("ours")
    commands = {"batch": whole, "observing": [*whole, "--observe"]}
    turns: dict[str, list[float]] = {name: [] for name in commands}
    contenders: dict[str, Contender] = {}
    order, chance = list(commands), random.Random(bench.seed)
    file = bench.directory / "observed.events"
    try:
        for name, command in commands.items():
            contenders[name] = Contender(command, environment, bench.directory / f"{name}.log")
        for _ in range(10 if bench.quick else 50):
            bench.events.write(file, OBSERVED_BATCH, OBSERVED_EVENTS)
            chance.shuffle(order)
            for name in order:
                turns[name].append(statistics.median(contenders[name].run(file)["ns"][1:]))
    finally:
        for contender in contenders.values():
            contender.kill()
        file.unlink(missing_ok=True)
    return turns


def text(result: dict, all_results: dict) -> str:
    if "skipped" in result:
        return f"Not measured: {result['skipped']}."
    parts = (memory_text(result["memory"]), share_text(result), packages_text(result["packages"]), observed_text(result["observed"]))
    return "\n\n".join(parts)


def memory_text(held: dict | None) -> str:
    if held is None:
        return "### Memory\n\nNot measured: the kernel's account of a process's memory is Linux's."
    event = statistics.median(held["event"])
    rows = [
        (name, *(spread([figures[moment] / 1e6 for figures in held[key]], "{:.1f}") for moment in range(4)))
        for key, name in (("hello", "hello world, Rust"), ("login-etl", "login-etl"))
    ]
    rows.append(("Python with the same duties", spread([most / 1e6 for most in held["python"]], "{:.1f}"), "–", "–", "–"))
    of_event = [figures[2] / size for figures, size in zip(held["login-etl"], held["event"], strict=True)]
    return f"""\
### Memory

An event of {MOST:,} messages, {event / 1e6:.1f} MB, is about the largest that Lambda delivers. The table has a process's peak memory, in
MB, as the kernel counts it, with the pages of its program's file:

{table(("", "before its first event", "after one event", f"after {EVENTS} events", "of it, pages of files"), rows)}

{bars([(f"memory after {EVENTS} events of 6 MB, × the event", "≤ 4.5", spread(of_event), max(of_event) <= 4.5)])}"""


def share_text(result: dict) -> str:
    times = result["throttled"]
    heading = "### A small share of a core"
    if not times:
        return f"{heading}\n\nNot measured: {result['why_not']}."
    rows = [
        (f"{int(size):,}", *(f"{number(statistics.mean(batches[str(batch)]))} ({number(max(batches[str(batch)]))})" for batch in THROTTLED))
        for size, batches in times.items()
        if len(batches) == len(THROTTLED)
    ]
    bar = times.get(str(SMALLEST), {}).get(str(BAR_BATCH), [])
    fits = "why_not" not in result and result["killed"] == 0 and result["failures"] == 0 and result["most"] < SMALLEST * 2**20
    found = f"did not run: {result['why_not']}" if "why_not" in result else (
        f"{number(statistics.median(bar))} ms, p99 {number(percentile(bar, 99))} ms, {result['most'] / 2**20:.0f} MiB"
    )
    small, whole = times.get(str(SMALLEST), {}), times.get(str(ONE_CORE_MB), {})
    growth = "\n".join(
        f"a batch of {batch:,} takes {statistics.mean(small[str(batch)]) / statistics.mean(whole[str(batch)]):.1f} times as long,"
        for batch in (BAR_BATCH, 1000, MOST)
        if str(batch) in small and str(batch) in whole
    )
    return f"""\
{heading}

Lambda gives a function [a whole core](https://docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html) with {ONE_CORE_MB:,} MB of
memory, and a smaller share with less: at {SMALLEST} MB a fourteenth. Here control groups limit the function to a memory size and its share. Its
initialisation has a whole core, as
[in Lambda](https://serverlessland.com/content/service/lambda/guides/effectively-running-java-on-serverless/init-heavy-lifting). Then events
come one right after the other, so that no share is saved up between them. Milliseconds until the function asks for the next event, as
Lambda bills them: mean, and longest in brackets, by batch.

{table(("memory, MB", *(f"{batch:,}" for batch in THROTTLED)), rows)}

{bars([(f"a batch of {BAR_BATCH} at {SMALLEST} MB: median, p99, most memory after batches up to 6 MB", "fits", found, fits)])}

With a fourteenth of a core instead of a whole one
{growth}
because only the function's own work takes longer, not its wait for the database. Single durations jump: work that fits into the rest of a
period's share runs at full speed, and other work waits for the next period."""


def packages_text(sizes: dict) -> str:
    rows = [
        (machine, *((f"{size / 1e6:.1f}" for size in sizes[machine]) if machine in sizes else ("not built here", "the workflow builds it")))
        for machine in MACHINES.values()
    ]
    return f"""\
### The package

{table(("architecture", "program, MB", "zip, MB"), rows)}

{bars([(f"zip, {machine}", "≤ 5.5 MB", f"{package / 1e6:.2f} MB", package <= 5.5e6) for machine, (_, package) in sizes.items()])}"""


def observed_text(turns: dict | None) -> str:
    if turns is None:
        return "### Metrics and logs\n\nNot measured: the program `ours` is not built."
    cost = [100 * observing / batch for observing, batch in zip(turns["observing"], turns["batch"], strict=True)]
    return f"""\
### Metrics and logs

A batch of {OBSERVED_BATCH} takes {spread([ns / 1e6 for ns in turns["batch"]])} ms, from the event's bytes through the commit to the
answer's. Its metrics and log, one line each, take {spread([ns / 1e3 for ns in turns["observing"]])} µs,
written to a file.

{bars([(f"metrics and logs, share of a batch of {OBSERVED_BATCH}", "< 3 %", spread(cost, "{:.1f}") + " %", statistics.median(cost) < 3)])}"""


def percentile(samples: list[float], percent: int) -> float:
    return statistics.quantiles(samples, n=100, method="inclusive")[percent - 1]
