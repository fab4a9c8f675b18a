"""The arguments of the programs in local/.

Needs nothing but Python itself, so that `--help` and wrong arguments are answered before anything is installed. Run as a program with a name from
PROGRAMS and arguments, it ends with FIT if they are right.
"""

from __future__ import annotations

import argparse
import inspect
import random
import sys
from pathlib import Path

FIT = 3

CHECKS = ("fresh", "format", "prose", "workflows", "template", "executor", "clippy", "docs", "function", "deployed", "deployments", "etlctl", "soak", "incidents", "instructions", "fuzz", "dependencies")
INCIDENTS = ("database-down", "poison-flood", "keyring-broken", "bad-credentials", "backlog")
HEALTHY = "dashboard"
SECTIONS = ("batches", "columns", "ledger", "profile", "cold", "footprint", "environments")


def demo(parser: argparse.ArgumentParser) -> None:
    """From login events in a queue to masked rows in PostgreSQL, on this machine.

    Builds the function, deploys the stack into LocalStack, sends login messages, delivers some of them twice, waits until the queue is empty and
    shows what became of each. Ends with status 0 only if all of it adds up.
    """
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--messages", type=at_least(1), default=100, metavar="N", help="send N made-up messages (default: 100)")
    source.add_argument("--input", type=Path, metavar="FILE", help="send the lines of FILE, each one message's body, instead")
    parser.add_argument("--mapping", type=Path, metavar="FILE", help="load the lines of --input as this mapping says, into its table")
    ending = parser.add_mutually_exclusive_group()
    ending.add_argument("--keep", action="store_true", help="leave everything running and say how to reach it, until ./local/down or the next demo")
    ending.add_argument("--iam", action="store_true", help="sign in to PostgreSQL with tokens of IAM's, and no password")


def test(parser: argparse.ArgumentParser) -> None:
    """Every check and test there is; ends with status 0 only if all pass."""
    parser.add_argument("check", nargs="*", choices=[*CHECKS, []], metavar="CHECK", help=f"run these only; of {', '.join(CHECKS)}")


def down(_: argparse.ArgumentParser) -> None:
    """Stops what a kept demo runs, or what a killed run left, and deletes its data; the logs stay. Nothing happens if nothing is there."""


def clean(_: argparse.ArgumentParser) -> None:
    """Stops what runs and deletes target/, with all that was installed and built there."""


def bench(parser: argparse.ArgumentParser) -> None:
    """Measures the function beside other ways of doing its work, and what it needs, and writes docs/performance.md with its plots.

    What is measured goes to target/local/bench/results.json, each section with its time and commit; the page is made from that.
    """
    parser.add_argument("--quick", action="store_true", help="measure less, in a few minutes; the page goes to target/local/bench/quick")
    parser.add_argument("--only", action="append", choices=SECTIONS, metavar="NAME", help=f"measure this section, of {', '.join(SECTIONS)}")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="make up other messages, and other turns (default: 1)")
    parser.add_argument("--report", action="store_true", help="measure nothing, and write the page from what was measured")
    parser.add_argument("--binaries", type=Path, metavar="DIR", help="measure the programs there, instead of building them")


def fuzz(parser: argparse.ArgumentParser) -> None:
    """Coverage-guided fuzzing of what takes in foreign text, from the kept corpus on; ends with status 0 if nothing was found.

    What is new goes to target/fuzz/corpus; an input that breaks a target goes to target/fuzz/artifacts.
    """
    parser.add_argument("seconds", nargs="?", type=at_least(1), default=600, help="for each target; 600 if not given")
    parser.add_argument("--quick", action="store_true", help="build without optimisation, which is sooner ready and runs slower")


def incidents(parser: argparse.ArgumentParser) -> None:
    """Plays five incidents on the real local world, shows what an engineer would see, and does what the runbook says.

    A minute of CloudWatch's is played in two seconds. Ends with status 0 only if every message of every incident is accounted for in the end.
    """
    names = (*INCIDENTS, HEALTHY)
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"play this one, of {', '.join(names)}")
    parser.add_argument("--write", action="store_true", help="put what is seen into docs/runbook.md and docs/images")
    parser.add_argument("--build", type=Path, metavar="DIR", help="deploy what `sam build` put there, instead of building")
    parser.add_argument("--etlctl", type=Path, metavar="PATH", help="ask this one, instead of building it")


def rotation(parser: argparse.ArgumentParser) -> None:
    """Measures how fast `etlctl keys remask` rewrites a table of many rows, and what that does to the function's inserts meanwhile.

    Ends with status 0 only if every row is under the active key then, masks what it masked, and none is lost or doubled.
    """
    parser.add_argument("--rows", type=at_least(1), default=2_000_000, metavar="N", help="fill the table with N rows (default: 2000000)")
    parser.add_argument("--rate", type=at_least(1), default=5000, metavar="N", help="the last remask's rows a second (default: 5000)")
    parser.add_argument("--seconds", type=float, default=30, metavar="S", help="insert for S seconds, alone and beside each remask (default: 30)")
    parser.add_argument("--etlctl", type=Path, metavar="PATH", help="measure this one, instead of building it")


def soak(parser: argparse.ArgumentParser) -> None:
    """Sends messages through the whole local world while everything in it breaks, and then accounts for every one of them.

    The network, PostgreSQL, and the function with its queues each break on their own schedule, so that any two may break at once. Ends with status 0
    only if no message was lost, doubled or misplaced, no mask is wrong, and no personal value, key or password is in any log.
    """
    parser.add_argument("--messages", type=at_least(500), default=20_000, metavar="N", help="send N messages (default: 20000)")
    parser.add_argument("--faults", type=at_least(1), default=210, metavar="N", help="inject N faults (default: 210)")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000), metavar="S", help="replay this seed's messages and schedule")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="let the attack last M minutes (default: 5), the run about two more")
    parser.add_argument("--quick", action="store_true", help="a small attack, of about a minute and a half in all")
    parser.add_argument("--storm", action="store_true", help="a million messages and a thousand faults in half an hour, by queues in memory")
    parser.add_argument("--build", type=Path, metavar="DIR", help="deploy what `sam build` put there, instead of building")


def at_least(least: int):
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"a number from {least} up is wanted")
        return int(text)

    return number


def roots(_: argparse.ArgumentParser) -> None:
    """Takes the roots of AWS that are built into the function from the npm package that keeps them, and writes docs/roots.md."""


def release(parser: argparse.ArgumentParser) -> None:
    """Makes what people deploy without a compiler, for this machine's processor, in target/release-archive.

    An archive with the function, its template and the schema; etlctl; their checksums; and what the function is made of (SBOM, CycloneDX), where
    cargo-cyclonedx is installed. The same commit makes the same files.
    """
    parser.add_argument("--function", type=Path, metavar="FILE", help="pack this program, instead of building it")
    parser.add_argument("--without-etlctl", action="store_true", help="make the archive alone")


PROGRAMS = {program.__name__: program for program in (demo, test, down, clean, bench, fuzz, incidents, release, roots, rotation, soak)}


def parse(name: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments of the program local/NAME; those of this process if none are given. Ends the process if they are wrong."""
    declare = PROGRAMS[name]
    parser = argparse.ArgumentParser(prog=f"./local/{name}", description=inspect.getdoc(declare), formatter_class=argparse.RawDescriptionHelpFormatter)
    declare(parser)
    options = parser.parse_args(arguments)
    if name == "demo" and options.mapping and not options.input:
        parser.error("--mapping needs --input: messages are made up for the mapping that ships alone")
    return options


if __name__ == "__main__":
    parse(sys.argv[1], sys.argv[2:])
    sys.exit(FIT)
