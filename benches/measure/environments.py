"""Runs many environments against one PostgreSQL: from which number on throughput stops growing, and what sessions wait for there."""

import itertools
import random
import statistics
import struct
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from measure.bench import Bench, Contender
from measure.report import COLOURS, number, quartiles, spread, table

NAME = "environments"
TITLE = "Many environments, one PostgreSQL"
CONTENDER = "ours"
ENVIRONMENTS = (1, 2, 4, 8, 16, 32)
# Batch: number of events to share among the environments, some seconds of work.
BATCHES = {10: 12_000, 1000: 800}
# The least for each environment, so that all of them have work for most of the time.
LEAST = 20
ROUNDS = 3
# Events of each environment before the clock starts: the first one prunes the ledger.
WARMING = 3
SAMPLE_SECONDS = 0.05
# Throughput of at least this share of the maximum counts as the maximum.
SATURATED = 0.95
# With a smaller idle share of the CPU than this, CPU is the bottleneck.
BUSY = 0.1
RUNNING, CLIENT = "running", "Client:ClientRead"
# The expected ones of https://www.postgresql.org/docs/current/monitoring-stats.html#WAIT-EVENT-TABLE.
WAITS = {
    RUNNING: "at work, or waiting for a core",
    CLIENT: "waiting for the function",
    "IO:WALSync": "flushing the WAL to disk",
    "IO:WalSync": "flushing the WAL to disk",
    "IO:WALWrite": "writing the WAL",
    "IO:WalWrite": "writing the WAL",
    "LWLock:WALWrite": "waiting for another session's flush of the WAL",
    "LWLock:WALInsert": "waiting for room in the WAL's buffers",
    "LWLock:BufferContent": "waiting for a page that another session changes",
    "LWLock:LockManager": "waiting for the list of locks",
    "Lock:extend": "waiting for another session to extend the table",
    "Lock:transactionid": "waiting for another session's transaction",
}


def measure(bench: Bench) -> dict:
    if not bench.program(CONTENDER).exists():
        return {"skipped": f"no {CONTENDER} in {bench.binaries.name}"}
    chance, runs = random.Random(bench.seed), []
    for batch, count in BATCHES.items():
        # Every run may use the same events, because all tables, including the ledger, are emptied before each.
        count = count // 4 if bench.quick else count
        events = [bench.events.event(batch) for _ in range(max(count, LEAST * ENVIRONMENTS[-1]))]
        for turn in range(1 if bench.quick else ROUNDS):
            order = list(ENVIRONMENTS)
            chance.shuffle(order)
            for environments in order:
                bench.say(f"round {turn + 1}: {environments} environments, batches of {batch:,}")
                some = events[: max(count, LEAST * environments)]
                runs.append({"batch": batch, "environments": environments} | run(bench, batch, environments, some))
    return {"cores": psutil.cpu_count(), "runs": runs}


def run(bench: Bench, batch: int, environments: int, events: list[bytes]) -> dict:
    """Shares the events among the given number of environments, which all start at once."""
    database = bench.database("bench_environments")
    settings = bench.environment(database)
    directory = bench.directory / "environments"
    directory.mkdir(exist_ok=True)
    contenders: list[Contender] = []
    with ThreadPoolExecutor(environments) as pool, bench.servers.postgres.connect(autocommit=True) as connection:
        try:
            for place in range(environments):
                contenders.append(Contender(bench.command(CONTENDER), settings, directory / f"{place}.log"))
            files = [directory / f"{place}.events" for place in range(environments)]
            for file, contender in zip(files, contenders, strict=True):
                bench.events.write(file, batch, WARMING)
                contender.start(file)
            for contender in contenders:
                contender.result()
            with bench.servers.postgres.connect(database, autocommit=True) as emptying:
                emptying.execute("truncate user_logins, etl_ledger")
                emptying.execute("checkpoint")
            # Interleaved, so that times of sending rise equally in all environments, as in a queue.
            for place, file in enumerate(files):
                with file.open("wb") as output:
                    for event in events[place::environments]:
                        output.write(struct.pack("<Q", len(event)) + event)
            server = psutil.Process(connection.info.backend_pid).parent()
            began, cpu = time.monotonic(), (psutil.cpu_times(), taken(server))
            for file, contender in zip(files, contenders, strict=True):
                contender.start(file)
            answers = [pool.submit(finish, contender) for contender in contenders]
            waits: Counter[str] = Counter()
            while not all(answer.done() for answer in answers):
                waits.update(sampled(connection, database))
                time.sleep(SAMPLE_SECONDS)
            seconds, after = time.monotonic() - began, (psutil.cpu_times(), taken(server))
            done = [answer.result() for answer in answers]
        finally:
            for contender in contenders:
                contender.kill()
    for file in files:
        file.unlink()
    with bench.servers.postgres.connect(database) as counting:
        rows = counting.execute("select count(*) from user_logins").fetchone()[0]
    if rows != batch * len(events):
        raise RuntimeError(f"{rows:,} rows of {batch * len(events):,} messages")
    whole = seconds * psutil.cpu_count()
    clients = sum(answer["cpu_ns"] for answer, _ in done) / 1e9 / whole
    postgres = (after[1] - cpu[1]) / whole
    idle = sum(getattr(after[0], kind, 0) - getattr(cpu[0], kind, 0) for kind in ("idle", "iowait")) / whole
    return together(batch, done) | {
        # `others` are this program, the kernel, and everything else on the machine.
        "cpu": {"functions": clients, "postgres": postgres, "others": max(0.0, 1 - clients - postgres - idle), "idle": idle},
        "waits": dict(waits),
    }


def finish(contender: Contender) -> tuple[dict, int]:
    """A contender's answer, and its time of arrival."""
    return contender.result(), time.monotonic_ns()


def together(batch: int, done: list[tuple[dict, int]]) -> dict:
    """Messages a second, and the median and 99th percentile of a batch's ns, while all environments had work."""
    ends = [list(itertools.accumulate(reversed(answer["ns"]), lambda end, ns: end - ns, initial=end)) for answer, end in done]
    # Each list goes back from the last batch's end to the first batch's beginning.
    since, until = max(times[-1] for times in ends), min(times[0] for times in ends)
    within = [
        ns
        for (answer, _), times in zip(done, ends, strict=True)
        for ns, end in zip(reversed(answer["ns"]), times, strict=False)
        if since <= end - ns and end <= until
    ]
    if len(within) < 2:
        raise RuntimeError("the environments had no work at the same time: give them more")
    # The number of batches in this time; a batch that is partly in it counts in part.
    parts = sum(
        max(0, min(end, until) - max(end - ns, since)) / ns
        for (answer, _), times in zip(done, ends, strict=True)
        for ns, end in zip(reversed(answer["ns"]), times, strict=False)
    )
    percentiles = statistics.quantiles(within, n=100, method="inclusive")
    return {"messages_s": batch * parts * 1e9 / (until - since), "p50": percentiles[49], "p99": percentiles[98]}


def taken(server: psutil.Process) -> float:
    """CPU seconds of PostgreSQL's processes, including ended ones."""
    times = [process.cpu_times() for process in (server, *server.children())]
    return times[0].children_user + times[0].children_system + sum(each.user + each.system for each in times)


def sampled(connection, database: str) -> Counter[str]:
    """Counts the environments' sessions by their current wait event."""
    doing = connection.execute(
        """select coalesce(wait_event_type || ':' || wait_event, %s), count(*)
           from pg_stat_activity where datname = %s and backend_type = 'client backend' group by 1""",
        [RUNNING, database],
    )
    return Counter(dict(doing.fetchall()))


def text(result: dict, all_results: dict) -> str:
    if "skipped" in result:
        return f"Not measured: {result['skipped']}."
    chapters = [
        f"""\
Environments that all have work at once, each with its own connection over TLS, and one PostgreSQL, on {result["cores"]} cores in
all. The functions and the database share the cores, so read where the curve bends, not the number of messages a second.
Shares of CPU are of all cores; others are the measuring program, the kernel, and everything else on this machine. Waits for locks are a share
of the samples of all sessions.

![Messages a second and times of batches, by environments](images/performance-environments.svg)"""
    ]
    for batch in BATCHES:
        of_batch = by_environments(result, batch)
        chapters += [
            f"### Batches of {batch:,}",
            table(HEADER, [row(environments, runs) for environments, runs in of_batch.items()]),
            saturation(of_batch),
        ]
    return "\n\n".join(chapters)


def by_environments(result: dict, batch: int) -> dict[int, list[dict]]:
    runs = {environments: [] for environments in ENVIRONMENTS}
    for one in result["runs"]:
        if one["batch"] == batch:
            runs[one["environments"]].append(one)
    return runs


HEADER = (
    *("environments", "messages a second", "p50, ms", "p99, ms"),
    *("CPU: functions, %", "PostgreSQL, %", "others, %", "idle, %", "waits for locks, %"),
)


def row(environments: int, runs: list[dict]) -> tuple[str, ...]:
    return (
        str(environments),
        spread([one["messages_s"] for one in runs], "{:,.0f}"),
        *(spread([one[figure] / 1e6 for one in runs]) for figure in ("p50", "p99")),
        *(f"{100 * statistics.median(one['cpu'][part] for one in runs):.0f}" for part in ("functions", "postgres", "others", "idle")),
        f"{100 * sum(share for wait, share in shares(runs).items() if wait.startswith(('Lock:', 'LWLock:'))):.0f}",
    )


def shares(runs: list[dict]) -> dict[str, float]:
    """The sessions' wait events as shares of all samples, the most frequent first."""
    waits = sum((Counter(one["waits"]) for one in runs), Counter())
    return {wait: count / waits.total() for wait, count in waits.most_common()}


def saturation(of_batch: dict[int, list[dict]]) -> str:
    speeds = {n: quartiles([one["messages_s"] for one in runs])[1] for n, runs in of_batch.items()}
    enough = next(n for n in ENVIRONMENTS if speeds[n] >= SATURATED * max(speeds.values()))
    runs = of_batch[enough]
    idle = statistics.median(one["cpu"]["idle"] for one in runs)
    seen = [(wait, share) for wait, share in shares(runs).items() if share >= 0.05]
    doing = "\n".join(f"- {WAITS.get(wait, wait)} (`{wait}`) {100 * share:.0f} %" for wait, share in seen)
    waiting = [wait for wait, _ in seen if wait not in (RUNNING, CLIENT)]
    if idle < BUSY:
        short = "What is short is CPU"
    elif waiting:
        short = f"What is short is not CPU: sessions are {WAITS.get(waiting[0], waiting[0])}"
    else:
        short = "No one thing is short: the environments and the database wait for each other"
    one, many = speeds[ENVIRONMENTS[0]], speeds[enough]
    more = "no more were tried"
    if enough < ENVIRONMENTS[-1]:
        more = f"more of them bring less than {100 * (1 - SATURATED):.0f} % more, and their batches take longer"
    return f"""\
One environment handles {number(one)} messages a second, and {enough} handle {number(many)}, {many / one:.1f} times as many; {more}.
There {100 * idle:.0f} % of the CPU is idle. {short}. What the sessions were seen doing:

{doing}"""


def plots(result: dict, all_results: dict, directory: Path) -> None:
    if "skipped" in result:
        return
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for batch, colour in zip(BATCHES, (COLOURS["best"], COLOURS["ours"]), strict=True):
        for axes, key, unit in ((panels[0], "messages_s", 1e3), (panels[1], "p99", 1e6)):
            samples = [[one[key] / unit for one in runs] for runs in by_environments(result, batch).values()]
            low, middle, high = zip(*map(quartiles, samples), strict=True)
            axes.plot(ENVIRONMENTS, middle, marker="o", color=colour, label=f"batches of {batch:,}")
            axes.fill_between(ENVIRONMENTS, low, high, color=colour, alpha=0.2, linewidth=0)
    for axes, title in zip(panels, ("thousand messages a second", "99th percentile of a batch, ms"), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ENVIRONMENTS, ENVIRONMENTS)
        axes.minorticks_off()
        axes.set_xlabel("environments")
        axes.set_title(title, fontsize=10)
    panels[0].set_ylim(bottom=0)
    panels[1].set_yscale("log", base=2)
    panels[1].yaxis.set_major_formatter("{x:g}")
    panels[0].legend()
    figure.savefig(directory / "performance-environments.svg", metadata={"Date": None})
