"""Compares the contenders, at batches of 1 to 7,400 messages and in several situations."""

import random
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psycopg
from measure.bench import Bench, Contender
from measure.events import MOST
from measure.network import Network
from measure.report import COLOURS, bars, number, spread, table

NAME = "batches"
TITLE = "Batches"

CONTENDERS = {
    "ours": "the function",
    "limit": "the limit",
    "original": "the original's design",
    "best": "the best Python",
    "powertools": "Powertools",
}
HAVE_LEDGER = ("ours", "limit")
BATCHES = (1, 10, 100, 1000, 7400)
# Counted events of a turn, by batch.
EVENTS = {1: 200, 10: 100, 100: 60, 1000: 15, 7400: 5}
QUICK_EVENTS = {1: 50, 10: 25, 100: 10, 1000: 4, 7400: 2}
# Powertools commits each record. It gets fewer events, a smaller first event, and fewer rounds of large batches.
SLOW = "powertools"
SLOW_EVENTS = {1: 100, 10: 20, 100: 6, 1000: 1, 7400: 1}
SLOW_FIRST = 100
SLOW_FROM, SLOW_ROUNDS = 1000, 3

BASE = "base"
SITUATIONS = {
    BASE: "no TLS, no network",
    "tls": "TLS",
    "delay": "0.5 ms of network",
    "indexes": "the analysts' indexes",
}
DELAY_MICROSECONDS = 250
# Long enough that an event's time shows the number of round trips.
LONG_MICROSECONDS = 25_000
# The largest batches that Powertools is given.
SLOW_MOST = {BASE: MOST, "tls": 100, "delay": 100}
SLOW_QUICK_MOST = {BASE: 100}
SLOW_ROUND_TRIPS = 10

# The bars, by batch: multiples of the original's throughput, shares of the limit's throughput, and, from CPU_FROM on, ratios of CPU time.
TIMES_ORIGINAL = {1: 2.4, 10: 3.2, 100: 6.5, 1000: 9.6, 7400: 13}
OF_LIMIT = {1: 0.85, 10: 0.85, 100: 0.75, 1000: 0.9, 7400: 0.65}
CPU_TIMES_LESS, CPU_FROM = 25, 100
ROUND_TRIPS = (1, 3)


class Wrong(Exception):
    """A contender did not do its work, so its figures are worthless."""


@dataclass(frozen=True)
class Runner:
    """A contender and its database, whose tables no other contender uses during a turn."""

    name: str
    contender: Contender
    database: psycopg.Connection
    # Whether to keep the ledger between turns.
    keeps_ledger: bool = False

    def turn(self, bench: Bench, batch: int) -> dict:
        """Has the contender handle one event that does not count, and then the events that do.

        Returns the `ns` of each counted event, and per message the client's `cpu_ns` and the bytes of `wal`. Raises `Wrong` if not all
        messages became rows.
        """
        slow = self.name == SLOW
        events = (SLOW_EVENTS if slow else QUICK_EVENTS if bench.quick else EVENTS)[batch]
        first = min(batch, SLOW_FIRST) if slow else batch
        messages = first + events * batch
        file = bench.directory / "events"
        bench.events.write(file, batch, events, first)
        self.empty()
        bench.checkpoint()
        before = self.database.execute("select pg_current_wal_insert_lsn()").fetchone()[0]
        answer = self.contender.run(file)
        wal = self.database.execute("select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), %s)::bigint", [before]).fetchone()[0]
        file.unlink()
        found = {"events": len(answer["ns"]), "failures": answer["failures"], "rows": self.count("user_logins")}
        wanted = {"events": 1 + events, "failures": 0, "rows": messages}
        if self.name in HAVE_LEDGER and not self.keeps_ledger:
            found["keys"], wanted["keys"] = self.count("etl_ledger"), messages
        if found != wanted:
            raise Wrong(f"{self.name}, {events} events of {batch} after one of {first}: {found} instead of {wanted}")
        return {"ns": answer["ns"][1:], "cpu_ns": answer["cpu_ns"] / messages, "wal": wal / messages}

    def empty(self) -> None:
        self.database.execute(f"truncate user_logins{'' if self.keeps_ledger else ', etl_ledger'}")

    def count(self, name: str) -> int:
        return self.database.execute(f"select count(*) from {name}").fetchone()[0]


def measure(bench: Bench) -> dict:
    result: dict = {"situations": {}}
    for situation, title in SITUATIONS.items():
        bench.say(f"  {title}")
        with ExitStack() as cleanup:
            port = None
            if situation == "delay":
                network = cleanup.enter_context(Network(bench, DELAY_MICROSECONDS))
                port, result["network"] = network.port, network.round_trips(300)
            runners = start_all(bench, cleanup, tls=situation == "tls", port=port, indexes=situation == "indexes")
            if situation == BASE:
                compare(bench, runners)
            if bench.quick:
                rounds = 2 if situation == BASE else 1
            else:
                rounds = 7 if situation == BASE else 5
            result["situations"][situation] = batches = {}
            for batch in BATCHES:
                most = (SLOW_QUICK_MOST if bench.quick else SLOW_MOST).get(situation, 0)
                taking_part = {name: runner for name, runner in runners.items() if name != SLOW or batch <= most}
                batches[str(batch)] = take_turns(bench, taking_part, batch, rounds)
    bench.say("  round trips")
    with ExitStack() as cleanup:
        network = cleanup.enter_context(Network(bench, LONG_MICROSECONDS))
        runners = start_all(bench, cleanup, port=network.port)
        result["long_network"] = network.round_trips(10)
        result["long_ns"] = {name: long_turns(bench, runner) for name, runner in runners.items()}
    return result


def start_all(bench: Bench, cleanup: ExitStack, tls: bool = False, port: int | None = None, indexes: bool = False) -> dict[str, Runner]:
    """Starts all contenders, on one database."""
    name = bench.database("bench_batches", indexes=indexes)
    cleanup.callback(bench.drop, name)
    database = cleanup.enter_context(bench.servers.postgres.connect(name, autocommit=True))
    environment = bench.environment(name, tls=tls, port=port)
    processes = {contender: cleanup.enter_context(bench.contender(contender, environment)) for contender in CONTENDERS}
    return {contender: Runner(contender, process, database) for contender, process in processes.items()}


def compare(bench: Bench, runners: dict[str, Runner]) -> None:
    """Raises `Wrong` unless all contenders make the same rows from the same event."""
    file = bench.directory / "events"
    bench.events.write(file, 1000, 1)
    rows = {}
    for name, runner in runners.items():
        runner.empty()
        runner.contender.run(file)
        ordered = "select md5(string_agg(row::text, chr(10) order by row::text)) from user_logins as row"
        rows[name] = runner.database.execute(ordered).fetchone()[0]
    if len(set(rows.values())) != 1:
        raise Wrong(f"the contenders make different rows of the same messages: {rows}")


def take_turns(bench: Bench, runners: dict[str, Runner], batch: int, rounds: int) -> dict[str, list[dict]]:
    """The turns of each runner, one per round."""
    chance = random.Random(f"{bench.seed} {batch}")
    turns: dict[str, list[dict]] = {name: [] for name in runners}
    for past in range(rounds):
        for name in chance.sample(list(runners), len(runners)):
            if runners[name].name != SLOW or batch < SLOW_FROM or past < SLOW_ROUNDS:
                turns[name].append(runners[name].turn(bench, batch))
    return turns


def long_turns(bench: Bench, runner: Runner) -> dict[str, list[int]]:
    """By batch, the nanoseconds of two events over the long network. At most one of them prunes the ledger, which takes one more round trip."""
    file, times = bench.directory / "events", {}
    for batch in BATCHES:
        if runner.name != SLOW or batch <= SLOW_ROUND_TRIPS:
            bench.events.write(file, batch, 3)
            times[str(batch)] = runner.contender.run(file)["ns"][1:]
    return times


# The figures.


def median_ns(turn: dict) -> float:
    """The median time of a turn's events."""
    return statistics.median(turn["ns"])


def rates(turns: list[dict], batch: int) -> list[float]:
    """Messages a second in each round."""
    return [batch * 1e9 / median_ns(turn) for turn in turns]


def thousands(turns: list[dict], batch: int) -> str:
    """Thousand messages a second, formatted for the page."""
    return spread([rate / 1000 for rate in rates(turns, batch)])


def ratios(turns: list[dict], others: list[dict]) -> list[float]:
    """How many times as fast as the other, for each round that has both."""
    return [median_ns(other) / median_ns(turn) for turn, other in zip(turns, others)]


def cpu_ratios(turns: list[dict], others: list[dict]) -> list[float]:
    """How many times less CPU time than the other, for each round that has both."""
    return [other["cpu_ns"] / turn["cpu_ns"] for turn, other in zip(turns, others)]


def added_ns(network: dict[str, list[int]]) -> float:
    """How much a network adds to a round trip."""
    return statistics.median(network["delayed"]) - statistics.median(network["direct"])


def round_trips(result: dict, name: str, batch: int) -> int | None:
    """The round trips of a batch: the time that the long network adds to it, divided by that network's round trip."""
    if not (times := result["long_ns"][name].get(str(batch))):
        return None
    usual = min(min(turn["ns"]) for turn in result["situations"][BASE][str(batch)][name])
    return round((min(times) - usual) / added_ns(result["long_network"]))


def text(result: dict, all_results: dict) -> str:
    base = result["situations"][BASE]
    header = ("", *(f"{batch:,}" for batch in BATCHES))

    def rows(names: list[str], cell: Callable[[dict, str, int], str]) -> list[list[str]]:
        def row(name: str) -> list[str]:
            return [cell(base[str(batch)], name, batch) if name in base[str(batch)] else "–" for batch in BATCHES]

        return [[CONTENDERS[name], *row(name)] for name in names]

    everyone, others = list(CONTENDERS), [name for name in CONTENDERS if name != "original"]
    throughput = rows(everyone, lambda turns, name, batch: thousands(turns[name], batch))
    times = rows(others, lambda turns, name, _: spread(ratios(turns[name], turns["original"])))
    cpu = rows(everyone, lambda turns, name, _: spread([turn["cpu_ns"] / 1000 for turn in turns[name]]))
    trips = rows(everyone, lambda _, name, batch: "–" if (count := round_trips(result, name, batch)) is None else str(count))

    def by_situation(other: str) -> list[list[str]]:
        return [
            [title, *(spread(ratios(turns["ours"], turns[other])) for turns in result["situations"][situation].values())]
            for situation, title in SITUATIONS.items()
        ]

    ours_by_situation = [
        [title, *(thousands(turns["ours"], int(batch)) for batch, turns in result["situations"][situation].items())]
        for situation, title in SITUATIONS.items()
    ]
    network_ms, long_ms = (added_ns(result[name]) / 1e6 for name in ("network", "long_network"))
    return f"""## {TITLE}

Five ways to load a batch, from the event's bytes to after the commit. The benchmark checks that all write the same rows with the same masks.

- **The function**, with its metrics and logs.
- **The limit**: the most that PostgreSQL and the disk allow. It only sends rows, masked and encoded before its clock starts,
  and the ledger's keys, by `COPY` in PostgreSQL's binary format, in one transaction.
- **The original's design**: Python with `json`, pycryptodome, and psycopg2's `execute_values`.
- **The best Python** that we can write: msgspec, AES over all of a batch's values at once, and libpq called directly: one prepared `INSERT`
  for fewer than 50 rows, otherwise `COPY` in its text format.
- **Powertools** for AWS Lambda (Python) as
  [its documentation](https://docs.aws.amazon.com/powertools/python/latest/utilities/batch/) shows it: a handler for one record, which
  inserts one row. Its idempotency utility, which needs DynamoDB, is left out.

### Throughput

Thousand messages a second, by messages in a batch; {SITUATIONS[BASE]}, and an empty ledger.

{table(header, throughput)}

The contenders do not all do the same work. The function and the limit enter each message in the ledger, which makes it exactly once. The
original's design, the best Python and Powertools have no ledger: with them a redelivered message becomes another row. Powertools
commits each record by itself, as in its documentation; the others commit a whole batch.

As multiples of the original's design:

{table(header, times)}

The time of a small batch is mostly its commit, which is disk time, and its round trips. The larger the batch, the more the costs of parsing,
masking and encoding a message show, and the number of statements.

### The client's CPU time

Microseconds of CPU time a message, in the client. At 128 MB Lambda gives a function about a fourteenth of a core, so you pay for this.

{table(header, cpu)}

### Round trips

How often a batch waits for PostgreSQL. A network with a round trip of {number(long_ms)} ms adds time to a batch; that time, divided by
the round trip, is the number. Many trips take a little longer each than a single one, so large numbers come out a few too high. Powertools
got at most {SLOW_ROUND_TRIPS} messages over this network.

{table(header, trips)}

### Situations

The function with one thing different each time: over TLS with the host name verified; through a proxy that adds {number(network_ms)} ms
to a round trip (measured with `select 1`); and with the table's two
indexes on its masks. Thousand messages a second:

{table(header, ours_by_situation)}

As multiples of the original's design in the same situation:

{table(header, by_situation("original"))}

As shares of the limit in the same situation:

{table(header, by_situation("limit"))}

### The bars of this section

{bars(rows_of_bars(result))}
"""


def rows_of_bars(result: dict) -> list[tuple[str, str, str, bool]]:
    base = result["situations"][BASE]
    rows = []
    for what, wanted, other in (("× the original's design", TIMES_ORIGINAL, "original"), ("÷ the limit", OF_LIMIT, "limit")):
        for batch, bar in wanted.items():
            measured = ratios(base[str(batch)]["ours"], base[str(batch)][other])
            rows.append((f"throughput {what}, batch of {batch:,}", f"≥ {bar}", spread(measured), statistics.median(measured) >= bar))
    for batch in BATCHES:
        if batch >= CPU_FROM:
            measured = cpu_ratios(base[str(batch)]["ours"], base[str(batch)]["original"])
            what = f"client's CPU time a message, the original's design ÷ the function, batch of {batch:,}"
            rows.append((what, f"≥ {CPU_TIMES_LESS}", spread(measured), statistics.median(measured) >= CPU_TIMES_LESS))
    for batch in BATCHES:
        trips = round_trips(result, "ours", batch)
        rows.append((f"round trips, batch of {batch:,}", "1, or 3 with COPY", str(trips), trips in ROUND_TRIPS))
    return rows


def plots(result: dict, all_results: dict, directory: Path) -> None:
    import matplotlib.pyplot as plt

    base = result["situations"][BASE]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, title in CONTENDERS.items():
        batches = [batch for batch in BATCHES if name in base[str(batch)]]
        throughput = [statistics.median(rates(base[str(batch)][name], batch)) for batch in batches]
        cpu = [statistics.median(turn["cpu_ns"] / 1000 for turn in base[str(batch)][name]) for batch in batches]
        left.plot(batches, throughput, marker="o", markersize=4, color=COLOURS[name], label=title)
        # The limit's clock starts after its rows are made, so its CPU time means little.
        if name != "limit":
            right.plot(batches, cpu, marker="o", markersize=4, color=COLOURS[name], label=title)
    for axes, title in ((left, "messages a second"), (right, "client's CPU time, µs a message")):
        axes.set(xscale="log", yscale="log", title=title, xlabel="messages in a batch")
        axes.set_xticks(BATCHES, [f"{batch:,}" for batch in BATCHES])
        axes.minorticks_off()
    left.yaxis.set_major_formatter("{x:,.0f}")
    right.yaxis.set_major_formatter("{x:g}")
    left.legend()
    figure.savefig(directory / "performance-batches.svg", metadata={"Date": None})
