"""The arguments of the programs in local/.

Needs only Python itself, so that `--help` and wrong arguments are answered before anything is installed. Run as a program with a name from
PROGRAMS and arguments, it exits with FIT if they are right.
"""

from __future__ import annotations

import argparse
import inspect
import random
import sys
from pathlib import Path

FIT = 3

CHECKS = ("fresh", "format", "prose", "workflows", "template", "executor", "lints", "function", "deployed", "deployments", "etlctl", "keys", "remask", "soak", "incidents", "instructions", "fuzz", "dependencies")
INCIDENTS = ("database-down", "poison-flood", "keyring-broken", "bad-credentials", "backlog")
HEALTHY = "dashboard"
SECTIONS = ("batches", "columns", "ledger", "profile", "cold", "footprint", "environments")


def demo(parser: argparse.ArgumentParser) -> None:
    """Loads login messages from a queue into PostgreSQL as masked rows, on this machine.

    Builds the function, deploys the stack into LocalStack, sends login messages, delivers some of them twice, waits until the queue is empty and
    shows the result. Exits with status 0 only if every message is accounted for.
    """
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--messages", type=at_least(1), default=100, metavar="N", help="send N made-up messages (default: 100)")
    source.add_argument("--input", type=Path, metavar="FILE", help="send the lines of FILE instead, one message body a line")
    parser.add_argument("--mapping", type=Path, metavar="FILE", help="load the lines of --input with this mapping, into its table")
    ending = parser.add_mutually_exclusive_group()
    ending.add_argument("--keep", action="store_true", help="leave everything running until ./local/down or the next demo, and print how to reach it")
    ending.add_argument("--iam", action="store_true", help="sign in to PostgreSQL with IAM tokens instead of a password")


def test(parser: argparse.ArgumentParser) -> None:
    """Runs every check and test; exits with status 0 only if all pass."""
    parser.add_argument("check", nargs="*", choices=[*CHECKS, []], metavar="CHECK", help=f"run only these checks, of {', '.join(CHECKS)}")


def down(_: argparse.ArgumentParser) -> None:
    """Stops the servers of a kept demo or a killed run, and deletes their data; the logs stay. Does nothing if there are none."""


def clean(_: argparse.ArgumentParser) -> None:
    """Stops everything and deletes target/, with everything installed and built there."""


def bench(parser: argparse.ArgumentParser) -> None:
    """Compares the function with other ways of doing its work, measures the resources it needs, and writes docs/performance.md with its plots.

    The results go to target/local/bench/results.json, each section with its time and commit; the page is made from this file.
    """
    parser.add_argument("--quick", action="store_true", help="measure less, in a few minutes; the page goes to target/local/bench/quick")
    parser.add_argument("--only", action="append", choices=SECTIONS, metavar="NAME", help=f"measure this section, of {', '.join(SECTIONS)}")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="seed of the made-up messages and the order of turns (default: 1)")
    parser.add_argument("--report", action="store_true", help="measure nothing, and write the page from the last results")
    parser.add_argument("--binaries", type=Path, metavar="DIR", help="measure the programs in DIR instead of building them")


def fuzz(parser: argparse.ArgumentParser) -> None:
    """Coverage-guided fuzzing of the parsers, starting from the corpus in the tree; exits with status 0 if it finds nothing.

    New inputs go to target/fuzz/corpus; an input that breaks a target goes to target/fuzz/artifacts.
    """
    parser.add_argument("seconds", nargs="?", type=at_least(1), default=600, help="seconds for each target (default: 600)")
    parser.add_argument("--quick", action="store_true", help="build without optimisation: builds faster, runs slower")


def incidents(parser: argparse.ArgumentParser) -> None:
    """Plays five incidents on the local world, shows what an engineer would see, and follows the runbook.

    A CloudWatch minute is played in two seconds. Exits with status 0 only if every message of every incident is accounted for.
    """
    names = (*INCIDENTS, HEALTHY)
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=f"play this incident, of {', '.join(names)}")
    parser.add_argument("--write", action="store_true", help="write the results into docs/runbook.md and docs/images")
    parser.add_argument("--build", type=Path, metavar="DIR", help="deploy the output of `sam build` in DIR instead of building")
    parser.add_argument("--etlctl", type=Path, metavar="PATH", help="use this etlctl instead of building it")


def rotation(parser: argparse.ArgumentParser) -> None:
    """Measures how fast `etlctl keys remask` rewrites a table of many rows, and how much that slows the function's inserts.

    Exits with status 0 only if afterwards every row is under the active key and masks the same values, and no row is lost or doubled.
    """
    parser.add_argument("--rows", type=at_least(1), default=2_000_000, metavar="N", help="fill the table with N rows (default: 2000000)")
    parser.add_argument("--rate", type=at_least(1), default=5000, metavar="N", help="limit the last remask to N rows a second (default: 5000)")
    parser.add_argument("--seconds", type=float, default=30, metavar="S", help="insert for S seconds, alone and during each remask (default: 30)")
    parser.add_argument("--etlctl", type=Path, metavar="PATH", help="measure this etlctl instead of building it")


def soak(parser: argparse.ArgumentParser) -> None:
    """Sends messages through the local world while everything in it breaks, and then accounts for every message.

    The network, PostgreSQL, and the function with its queues each break on their own schedule, so that any two may break at once. Exits with
    status 0 only if no message was lost, doubled or misplaced, no mask is wrong, and no personal value, key or password is in any log.
    """
    parser.add_argument("--messages", type=at_least(500), default=20_000, metavar="N", help="send N messages (default: 20000)")
    parser.add_argument("--faults", type=at_least(1), default=210, metavar="N", help="inject N faults (default: 210)")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000), metavar="S", help="replay this seed's messages and schedule")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="inject faults for M minutes (default: 5); the run takes about two more")
    parser.add_argument("--quick", action="store_true", help="a small run, of about a minute and a half")
    parser.add_argument("--storm", action="store_true", help="a million messages and a thousand faults in half an hour, with queues in memory")
    parser.add_argument("--build", type=Path, metavar="DIR", help="deploy the output of `sam build` in DIR instead of building")


def at_least(least: int):
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"not a number of at least {least}")
        return int(text)

    return number


def roots(_: argparse.ArgumentParser) -> None:
    """Updates the AWS root certificates that are built into the function, from an npm package, and writes docs/roots.md."""


def release(parser: argparse.ArgumentParser) -> None:
    """Builds the files that people deploy without a compiler, for this machine's processor, in target/release-archive.

    An archive with the function, its template and the schema; etlctl; their checksums; and a bill of materials (SBOM, CycloneDX), if
    cargo-cyclonedx is installed. The same commit makes the same files.
    """
    parser.add_argument("--function", type=Path, metavar="FILE", help="pack this program instead of building it")
    parser.add_argument("--without-etlctl", action="store_true", help="do not build etlctl")


PROGRAMS = {program.__name__: program for program in (demo, test, down, clean, bench, fuzz, incidents, release, roots, rotation, soak)}


def parse(name: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the arguments of the program local/NAME, by default this process's. Ends the process if they are wrong."""
    declare = PROGRAMS[name]
    parser = argparse.ArgumentParser(prog=f"./local/{name}", description=inspect.getdoc(declare), formatter_class=argparse.RawDescriptionHelpFormatter)
    declare(parser)
    options = parser.parse_args(arguments)
    if name == "demo" and options.mapping and not options.input:
        parser.error("--mapping needs --input: made-up messages fit the built-in mapping only")
    return options


if __name__ == "__main__":
    parse(sys.argv[1], sys.argv[2:])
    sys.exit(FIT)
