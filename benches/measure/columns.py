"""Measures what a column costs: the function with mappings of more and more columns, a quarter of them masked."""

import json
import random
import statistics
from contextlib import ExitStack

from measure.batches import Wrong
from measure.bench import Bench
from measure.events import Events
from measure.report import number, spread, table

NAME = "columns"
TITLE = "Columns"

COLUMNS = (4, 8, 20, 40)
MASKED = 4  # every fourth column
BATCHES = (100, 1000)
EVENTS, QUICK_EVENTS = {100: 60, 1000: 15}, {100: 10, 1000: 4}
ROUNDS, QUICK_ROUNDS = 7, 2
BODIES = 10_000
TABLE = "wide"


def mapping(columns: int) -> str:
    """A mapping whose plain columns are texts of at most 64 characters."""
    lines = [f'table = "{TABLE}"']
    for column in range(columns):
        keep = 'keep = "masked"' if column % MASKED == 0 else 'keep = "plain"\ntype = "text"\nmax_length = 64'
        lines.append(f'[[column]]\nname = "c{column}"\nfrom = "f{column}"\n{keep}')
    return "\n".join(lines) + "\n"


class WideEvents(Events):
    """Events whose bodies have one field per column, each a text of 12 characters."""

    def __init__(self, seed: int, columns: int):
        chance = random.Random(seed)
        bodies = [json.dumps({f"f{column}": f"{chance.getrandbits(48):012x}" for column in range(columns)}) for _ in range(BODIES)]
        super().__init__(seed, bodies)


def measure(bench: Bench) -> dict:
    turns: dict[str, dict[str, list[dict]]] = {str(batch): {str(columns): [] for columns in COLUMNS} for batch in BATCHES}
    chance, file = random.Random(bench.seed), bench.directory / "events"
    with ExitStack() as cleanup:
        contenders, databases, events = {}, {}, {}
        for columns in COLUMNS:
            name = bench.database(f"bench_columns_{columns}")
            cleanup.callback(bench.drop, name)
            databases[columns] = cleanup.enter_context(bench.servers.postgres.connect(name, autocommit=True))
            kinds = ", ".join(f"c{column} varchar({256 if column % MASKED == 0 else 64})" for column in range(columns))
            databases[columns].execute(f"create table {TABLE} ({kinds}); grant insert on {TABLE} to login_etl")
            mapping_file = bench.directory / f"{columns}.toml"
            mapping_file.write_text(mapping(columns))
            environment = bench.environment(name, tls=False) | {"MAPPING_FILE": str(mapping_file)}
            contenders[columns] = cleanup.enter_context(bench.contender("ours", environment))
            events[columns] = WideEvents(bench.seed, columns)
        for batch in BATCHES:
            count = (QUICK_EVENTS if bench.quick else EVENTS)[batch]
            for _ in range(QUICK_ROUNDS if bench.quick else ROUNDS):
                for columns in chance.sample(COLUMNS, len(COLUMNS)):
                    databases[columns].execute(f"truncate {TABLE}, etl_ledger")
                    events[columns].write(file, batch, count, batch)
                    bench.checkpoint()
                    answer = contenders[columns].run(file)
                    rows = databases[columns].execute(f"select count(*) from {TABLE}").fetchone()[0]
                    if rows != (1 + count) * batch:
                        raise Wrong(f"{columns} columns: {rows} rows of {(1 + count) * batch} messages")
                    turns[str(batch)][str(columns)].append({"ns": statistics.median(answer["ns"][1:]) / batch, "cpu_ns": answer["cpu_ns"] / rows})
    return turns


def text(result: dict, _: dict) -> str:
    def microseconds(figure: str) -> list[list[str]]:
        return [
            [f"batches of {int(batch):,}", *(spread([turn[figure] / 1000 for turn in turns[str(columns)]]) for columns in COLUMNS)]
            for batch, turns in result.items()
        ]

    def each(figure: str, batch: str) -> str:
        """The mean cost of one more column, between the fewest columns and the most."""
        least, most = (statistics.median(turn[figure] for turn in result[batch][str(columns)]) for columns in (COLUMNS[0], COLUMNS[-1]))
        return number((most - least) / (COLUMNS[-1] - COLUMNS[0]))

    header = ("columns", *map(str, COLUMNS))
    batch = str(BATCHES[-1])
    return f"""Other mappings, with more and more columns. Each column is a text of 12 characters in its own field; every fourth is masked.

Microseconds a message, from the event's bytes to after the commit:

{table(header, microseconds("ns"))}

The part of this that is CPU time in the function:

{table(header, microseconds("cpu_ns"))}

In batches of {int(batch):,} one more column costs {each("ns", batch)} ns a message, {each("cpu_ns", batch)} ns of them in the function.
"""
