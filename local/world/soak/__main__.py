"""Sends messages through the whole local world while everything in it breaks, and then accounts for every one of them.

The network, PostgreSQL, and the function with its queues each break on their own schedule, so that any two may break at once. Ends with status 0
only if no message was lost, doubled or misplaced, no mask is wrong, and no personal value, key or password is in any log.
"""

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from world import down, paths, stack
from world.postgres import PostgresError
from world.servers import Servers, alone
from world.soak import checker, faults, load, rehearsal
from world.soak.checker import Evidence
from world.soak.faults import Attack
from world.soak.proxy import Proxy
from world.soak.run import WORLD, Run

REPORT = WORLD / "report.json"
QUICK = {"messages": 2000, "faults": 27, "minutes": 0.6}


def main() -> int:
    options = parse_arguments()
    print(f"Seed {options.seed}: {options.messages} messages, {options.faults} faults")
    with alone(WORLD):
        down.stop(WORLD)
        if options.build:
            paths.SAM_BUILD = options.build.resolve()
        else:
            stack.build()
        with Servers(WORLD) as servers:
            return run(servers, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./local/soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=at_least(500), default=20_000, metavar="N", help="send N messages (default: 20000)")
    parser.add_argument("--faults", type=at_least(1), default=210, metavar="N", help="inject N faults (default: 210)")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000), metavar="S", help="replay this seed's messages and schedule")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="let the attack last M minutes (default: 5), the run about two more")
    parser.add_argument("--quick", action="store_const", const=QUICK, default={}, help="a small attack, of about a minute and a half in all")
    parser.add_argument("--build", type=Path, metavar="DIR", help="deploy what `sam build` put there, instead of building")
    options = parser.parse_args()
    vars(options).update(options.quick)
    return options


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"a number from {least} up is wanted")
        return int(text)

    return number


def run(servers: Servers, options: argparse.Namespace) -> int:
    """The attack and the account of it; the status to end with."""
    began, started = datetime.now(UTC), time.monotonic()
    with ExitStack() as cleanup:
        proxy = cleanup.enter_context(Proxy(servers.postgres.port))
        aws_proxy = cleanup.enter_context(Proxy(servers.localstack.port))
        soak = cleanup.enter_context(Run(servers, proxy, aws_proxy, load.make(options.messages, options.seed), options.seed))
        print("Sending, and breaking things ...")
        with Attack(soak.world, faults.plan(options.faults, options.seed), options.minutes * 60) as attack:
            soak.send_during(attack)
        attacked = time.monotonic()
        overtaking, left = soak.settle()
        settled = time.monotonic()
        evidence = soak.evidence(overtaking, left, began)
    with servers.postgres.connect(autocommit=True) as database:
        findings = checker.check(evidence, database)
        rows = database.execute("select count(*) from user_logins").fetchone()[0]
        clean = not any(finding.count for finding in findings)
        blind = rehearsal.blind_spots(evidence, database) if clean else []

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
    """What the function's logs and our environments tell of it."""
    log = b"\n".join(evidence.logs.values())
    statuses = Counter(status.decode() for status in re.findall(rb'"type":"platform\.report".*?"status":"(\w+)"', log))
    deduplicated = sum(int(count) for count in re.findall(rb'"message":"batch loaded".*?"deduplicated":(\d+)', log))
    return {
        "invocations": statuses.total() + tally["invocations"],
        "by the emulator, by status": dict(statuses),
        "by the pollers, and how they failed": {name: count for name, count in sorted(tally.items()) if name != "starts"},
        "statements tried again": log.count(b'"message":"trying the insert again"'),
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
    table("What must not be", figures["found"])
    for name, examples in figures["examples"].items():
        print(f"\n{name}, for instance:\n  " + "\n  ".join(examples))
    for name in figures["damage that the checker does not see"]:
        print(f"\nThe checker does not see: {name}")
    print(f"\nSeed {figures['seed']}, {figures['seconds']['all']} s; {REPORT.relative_to(paths.ROOT)} has it all.")
    clean = not figures["damage that the checker does not see"] and not any(figures["found"].values())
    print("Nothing lost, nothing twice, nothing leaked." if clean else "It does not hold.")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (PostgresError, stack.CommandFailed) as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; everything is stopped.")
