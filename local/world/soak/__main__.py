"""Runs ./local/soak."""

import argparse
import json
import re
import sys
import time
from collections import Counter
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from world import arguments, build, down, paths
from world.command import CommandFailed
from world.localstack import LocalStackError
from world.postgres import PostgresError
from world.servers import Servers, alone
from world.soak import checker, faults, load, rehearsal, visits
from world.soak.checker import Evidence
from world.soak.faults import Attack
from world.soak.proxy import Proxy
from world.soak.run import WORLD, Run

REPORT = WORLD / "report.json"
STORM = {"messages": 1_000_000, "faults": 1000, "minutes": 25}
# In a storm, bad messages are redelivered all the time.
STORM_BAD_SHARE = 0.003
QUICK = {"messages": 2000, "faults": 36, "minutes": 0.7}


def main() -> int:
    options = arguments.parse("soak")
    if options.quick:
        vars(options).update(QUICK)
    if options.storm:
        vars(options).update(STORM)
    print(f"Seed {options.seed}: {options.messages} messages, {options.faults} faults")
    with alone(WORLD):
        down.stop(WORLD)
        if options.build:
            paths.SAM_BUILD = options.build.resolve()
        else:
            build.function()
        with Servers(WORLD) as servers:
            return run(servers, options)


def run(servers: Servers, options: argparse.Namespace) -> int:
    """Runs the attack and accounts for every message; returns the exit status."""
    began, started = datetime.now(UTC), time.monotonic()
    messages = load.make(options.messages, options.seed, STORM_BAD_SHARE if options.storm else load.BAD_SHARE)
    with ExitStack() as cleanup:
        proxy = cleanup.enter_context(Proxy(servers.postgres.port))
        aws_proxy = cleanup.enter_context(Proxy(servers.localstack.port))
        soak = cleanup.enter_context(Run(servers, proxy, aws_proxy, messages, options.seed, options.storm))
        print("Sending messages and injecting faults ...")
        with Attack(soak.targets, faults.plan(options.faults, options.seed), options.minutes * 60) as attack:
            soak.send_during(attack)
        attacked = time.monotonic()
        overtaking, left = soak.settle()
        settled = time.monotonic()
        evidence = soak.evidence(overtaking, left, began)
    with servers.postgres.connect(autocommit=True) as database:
        findings = checker.check(evidence, database)
        rows = database.execute(f"select (select count(*) from user_logins) + (select count(*) from {visits.TABLE})").fetchone()[0]
        clean = not any(finding.count for finding in findings)
        # With a million messages this would take hours.
        blind = rehearsal.blind_spots(evidence, database) if clean and not options.storm else []

    seconds = {"attack": attacked - attack.started, "settling": settled - attacked, "all": time.monotonic() - started}
    figures = {
        "seed": options.seed,
        "messages": len(soak.sent),
        "bad messages": sum(not message.good for message in soak.messages),
        "rows": rows,
        "rows a second": round(rows / (settled - attack.started)),
        "seconds": {name: round(value) for name, value in seconds.items()},
        "function": function_figures(evidence, soak.tally),
        "faults": dict(attack.done),
        "faults that found nothing to break": dict(attack.missed),
        "found": {finding.name: finding.count for finding in findings},
        "examples": {finding.name: finding.examples for finding in findings if finding.count},
        "damage that the checker does not see": blind,
    }
    REPORT.write_text(json.dumps(figures, indent=2) + "\n")
    show(figures)
    return 0 if clean and not blind else 1


def function_figures(evidence: Evidence, tally: Counter) -> dict[str, object]:
    """Figures from the function's logs and our environments."""
    log = b"\n".join(evidence.logs.values())
    statuses = Counter(status.decode() for status in re.findall(rb'"type":"platform\.report".*?"status":"(\w+)"', log))
    deduplicated = sum(int(count) for count in re.findall(rb'"message":"batch loaded".*?"deduplicated":(\d+)', log))
    return {
        "invocations": statuses.total() + tally["invocations"],
        "by the emulator, by status": dict(statuses),
        "by the pollers, and how they failed": {name: count for name, count in sorted(tally.items()) if name != "starts"},
        "statements tried again": log.count(b'"message":"insert failed; retrying"'),
        "messages deduplicated": deduplicated,
        "environments started": tally["starts"] + log.count(b'"initDurationMs"'),
    }


def show(figures: dict) -> None:
    def table(title: str, lines: dict[str, object]) -> None:
        print(f"\n{title}")
        for name, value in lines.items():
            if isinstance(value, dict):
                name, value = f"{name}: {', '.join(f'{count} {what}' for what, count in value.items())}", ""
            print(f"  {value:7} {name}")

    missed = figures["faults that found nothing to break"]
    table(f"Faults: {sum(figures['faults'].values())} of {len(figures['faults'])} kinds", figures["faults"])
    if missed:
        table("Faults that found nothing to break", missed)
    table("The load", {name: figures[name] for name in ("messages", "bad messages", "rows", "rows a second")})
    table("The function", figures["function"])
    table("Violations", figures["found"])
    for name, examples in figures["examples"].items():
        print(f"\n{name}, for example:\n  " + "\n  ".join(examples))
    for name in figures["damage that the checker does not see"]:
        print(f"\nThe checker does not find: {name}")
    print(f"\nSeed {figures['seed']}, {figures['seconds']['all']} s; all figures are in {REPORT.relative_to(paths.ROOT)}.")
    clean = not figures["damage that the checker does not see"] and not any(figures["found"].values())
    print("Passed: nothing lost, doubled or leaked." if clean else "FAILED.")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (PostgresError, LocalStackError, CommandFailed) as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; everything is stopped.")
