"""Measures what a long ledger costs the function, and what pruning by the schedule costs."""

import json
import random
import statistics
from contextlib import ExitStack

from measure.batches import BATCHES, Runner, Wrong, ratios, take_turns, thousands
from measure.bench import LEDGER_DAYS, Bench, Contender
from measure.report import bars, spread, table

NAME = "ledger"
TITLE = "The ledger"

EMPTY, LONG, LIMIT = "ours, empty", "ours, long", "limit, long"
LABELS = {EMPTY: "the function, empty ledger", LONG: "the function, long ledger", LIMIT: "the limit, long ledger"}
OF_EMPTY = 0.9
# Many, because the cost of a long ledger is smaller than the difference between two turns.
ROUNDS, QUICK_ROUNDS = 17, 2
# Bytes of WAL a message, by batch; a batch of 7,400 is written with COPY.
WAL = {100: 400, 1000: 400, 7400: 260}

# For pruning: counted events of a turn, by batch.
PRUNING_EVENTS = {100: 1000, 1000: 100}
# Keys that the schedule deletes per inserted row.
EXPIRED = {"nothing": 0, "steadily": 1, "catching up": 2}
EXPIRED_DAYS = 60
OF_UNPRUNED = 0.95


def measure(bench: Bench) -> dict:
    with ExitStack() as cleanup:
        runners = {}
        for database, contenders in (("bench_empty", {EMPTY: "ours"}), ("bench_long", {LONG: "ours", LIMIT: "limit"})):
            long = database == "bench_long"
            bench.database(database, ledger=long)
            cleanup.callback(bench.drop, database)
            connection = cleanup.enter_context(bench.servers.postgres.connect(database, autocommit=True))
            for label, name in contenders.items():
                contender = cleanup.enter_context(bench.contender(name, bench.environment(database, tls=False)))
                runners[label] = Runner(name, contender, connection, keeps_ledger=long)
        bench.say(f"  a ledger of {bench.ledger_keys:,} keys beside an empty one")
        rounds = QUICK_ROUNDS if bench.quick else ROUNDS
        turns = {str(batch): take_turns(bench, runners, batch, rounds) for batch in BATCHES}
    bench.say("  pruning")
    return {"keys": bench.ledger_keys, "turns": turns, "pruning": prune(bench)}


def prune(bench: Bench) -> dict[str, dict[str, list[dict]]]:
    """By batch, the turns for each entry of `EXPIRED`, in a long ledger. Another environment handles the schedule's event."""
    with ExitStack() as cleanup:
        database = bench.database("bench_pruning", ledger=True)
        cleanup.callback(bench.drop, database)
        connection = cleanup.enter_context(bench.servers.postgres.connect(database, autocommit=True))
        # As if the schedule had just run, so that batches leave pruning to it.
        connection.execute("insert into etl_maintenance (done_at) values (now())")
        loader, pruner = (cleanup.enter_context(bench.contender("ours", bench.environment(database, tls=False))) for _ in range(2))
        runner = Runner("ours", loader, connection, keeps_ledger=True)
        chance = random.Random(bench.seed)
        turns: dict[str, dict[str, list[dict]]] = {}
        for batch, events in PRUNING_EVENTS.items():
            turns[str(batch)] = {label: [] for label in EXPIRED}
            for _ in range(1 if bench.quick else 9):
                for label in chance.sample(list(EXPIRED), len(EXPIRED)):
                    turns[str(batch)][label].append(pruning_turn(bench, runner, pruner, batch, events, EXPIRED[label]))
    return turns


def pruning_turn(bench: Bench, runner: Runner, pruner: Contender, batch: int, events: int, expired_a_row: int) -> dict:
    """Has the function handle events while another environment prunes; returns the `ns` of each event and the `pruning_ns`."""
    rows = (1 + events) * batch
    expired = expired_a_row * rows
    file, schedule = bench.directory / "events", bench.directory / "schedule"
    bench.events.write(file, batch, 1 + events)
    event = json.dumps({"maintenance": "schedule"}).encode()
    schedule.write_bytes(len(event).to_bytes(8, "little") + event)
    runner.empty()
    runner.database.execute(
        """insert into etl_ledger
           select now() - %s * interval '1 day' + number * interval '1 millisecond', md5(random()::text || number)::uuid
           from generate_series(1, %s) as number""",
        [EXPIRED_DAYS, expired],
    )
    runner.database.execute("vacuum etl_ledger")
    bench.checkpoint()
    pruner.start(schedule)
    loaded = runner.contender.run(file)
    pruned = pruner.result()
    file.unlink()
    left = runner.count(f"etl_ledger where sent_at < now() - interval '{EXPIRED_DAYS - 1} days'")
    if runner.count("user_logins") != rows or left:
        raise Wrong(f"{runner.count('user_logins')} rows of {rows} messages; {left} of {expired} keys not pruned")
    if sum(pruned["ns"]) > sum(loaded["ns"]):
        raise Wrong("pruning took longer than loading, so part of it ran alone")
    return {"ns": loaded["ns"][1:], "pruning_ns": pruned["ns"]}


# The figures.


def mean_rate(turn: dict, batch: int) -> float:
    """Messages a second over all events of a turn."""
    return batch * len(turn["ns"]) * 1e9 / sum(turn["ns"])


def unpruned_ratios(turns: dict[str, list[dict]], label: str) -> list[float]:
    """The throughput while pruning, as a share of the throughput without, for each round."""
    return [sum(other["ns"]) / sum(turn["ns"]) for turn, other in zip(turns[label], turns["nothing"])]


def text(result: dict, all_results: dict) -> str:
    header = ("", *(f"{batch:,}" for batch in BATCHES))
    turns = {batch: result["turns"][str(batch)] for batch in BATCHES}
    keys = f"{result['keys']:,}"
    lengths = [
        ["empty", *(thousands(turns[batch][EMPTY], batch) for batch in BATCHES)],
        [f"{keys} keys", *(thousands(turns[batch][LONG], batch) for batch in BATCHES)],
        [f"the limit, {keys} keys", *(thousands(turns[batch][LIMIT], batch) for batch in BATCHES)],
    ]
    shares = [
        ["of the empty ledger's", *(spread(ratios(turns[batch][LONG], turns[batch][EMPTY])) for batch in BATCHES)],
        ["of the limit's", *(spread(ratios(turns[batch][LONG], turns[batch][LIMIT])) for batch in BATCHES)],
    ]
    wal = [[title, *(spread([turn["wal"] for turn in turns[batch][label]]) for batch in BATCHES)] for label, title in LABELS.items()]
    pruning = [
        [
            f"{int(batch):,}, {label}",
            spread([mean_rate(turn, int(batch)) / 1000 for turn in of_label]),
            spread(unpruned_ratios(by_label, label)),
            spread([max(turn["ns"]) / 1e6 for turn in of_label]),
        ]
        for batch, by_label in result["pruning"].items()
        for label, of_label in by_label.items()
    ]
    return f"""## {TITLE}

The ledger has a key for each message of the last 35 days, in an index. Its keys begin with the time of sending, so that new keys go to
the end of the index instead of to pages all over it.

### A long ledger

Thousand messages a second with an empty ledger, and with {keys} keys of the last {LEDGER_DAYS} days; no TLS, no network.

{table(header, lengths)}

Throughput with the long ledger, as a share:

{table(header, shares)}

### Write-ahead log

Bytes of WAL a message, right after a checkpoint, when PostgreSQL logs whole pages. A replica receives them, and a backup keeps them.

{table(header, wal)}

### Pruning

On the schedule's event, an environment deletes expired keys, 10,000 a statement. Below, one environment loads batches and
another deletes, in a ledger of {keys} keys. Either no key expires; or as many keys as rows are inserted, as under steady traffic; or twice as
many, as after a stop. The table has thousand messages a second, their share of the first case's, and the slowest batch in milliseconds.

{table(("batch, pruning", "throughput", "share", "slowest"), pruning)}

### The bars of this section

{bars(rows_of_bars(result))}
"""


def rows_of_bars(result: dict) -> list[tuple[str, str, str, bool]]:
    rows = []
    for batch in BATCHES:
        turns = result["turns"][str(batch)]
        measured = ratios(turns[LONG], turns[EMPTY])
        what = f"throughput with {result['keys']:,} keys in the ledger ÷ with none, batch of {batch:,}"
        rows.append((what, f"≥ {OF_EMPTY}", spread(measured), statistics.median(measured) >= OF_EMPTY))
    for batch, most in WAL.items():
        measured = [turn["wal"] for turn in result["turns"][str(batch)][LONG]]
        what = f"WAL a message with {result['keys']:,} keys in the ledger, batch of {batch:,}"
        rows.append((what, f"≤ {most} B", spread(measured), statistics.median(measured) <= most))
    for batch, turns in result["pruning"].items():
        for label, expired in EXPIRED.items():
            if expired:
                measured = unpruned_ratios(turns, label)
                what = f"throughput pruning {label} ÷ pruning nothing, batch of {int(batch):,}"
                rows.append((what, f"≥ {OF_UNPRUNED}", spread(measured), statistics.median(measured) >= OF_UNPRUNED))
    return rows
