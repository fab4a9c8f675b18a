"""Runs ./local/bench."""

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from world import arguments, down, paths
from measure import batches, cold, columns, environments, footprint, ledger, profile, report
from measure.batches import Wrong
from measure.bench import Bench, ContenderFailed
from world.build import function, release_environment
from world.command import CommandFailed
from world.postgres import PostgresError
from world.servers import Servers, alone

WORLD = paths.BENCH_WORLD
# In the order of the page and of measuring. Later sections may use the results of earlier ones.
SECTIONS = (batches, columns, ledger, profile, cold, footprint, environments)


def main() -> int:
    options = arguments.parse("bench")
    results = WORLD / ("results-quick.json" if options.quick else "results.json")
    page = WORLD / "quick" / "performance.md" if options.quick else report.PAGE
    measured = json.loads(results.read_text()) if results.exists() else {}
    if not options.report:
        with alone(WORLD):
            down.stop(WORLD)
            if not options.binaries:
                build()
            with Servers(WORLD) as servers:
                measure(servers, options, measured, results)
    if not measured:
        sys.exit(f"Nothing is measured yet: {results.relative_to(paths.ROOT)} does not exist.")
    print(f"\n{report.write(SECTIONS, measured, page)}\n\n{page.relative_to(paths.ROOT)} is written.")
    return 0


def build() -> None:
    function()
    print("Building the benchmark (some minutes the first time) ...")
    packages = ("--package", "login-etl-benches", "--target-dir", paths.ROOT / "target")
    # With OpenSSL inside, as in the function.
    environment = release_environment()
    subprocess.run(["cargo", "build", "--release", "--locked", "--quiet", *packages], cwd=paths.ROOT, env=environment, check=True)


def measure(servers: Servers, options: argparse.Namespace, measured: dict[str, dict], results: Path) -> None:
    """Measures the requested sections, and saves each one's result at once."""
    bench = Bench(
        servers=servers,
        quick=options.quick,
        seed=options.seed,
        binaries=(options.binaries or paths.ROOT / "target" / "release").resolve(),
        function=(options.binaries / "login-etl" if options.binaries else paths.SAM_BUILD / "LoginFunction" / "bootstrap").resolve(),
        peers_python=paths.BENCH_VENV / "bin" / "python",
        directory=WORLD / "files",
        results={name: one["result"] for name, one in measured.items()},
    )
    about = {"commit": report.commit(), "machine": report.machine(bench)}
    for section in SECTIONS:
        if options.only and section.NAME not in options.only:
            continue
        bench.say(section.TITLE)
        at, began = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
        bench.results[section.NAME] = result = section.measure(bench)
        seconds = time.monotonic() - began
        measured[section.NAME] = {"at": at, "seconds": seconds, "command": command(options, section.NAME), **about, "result": result}
        results.write_text(json.dumps(measured) + "\n")


def command(options: argparse.Namespace, section: str) -> str:
    """The command that repeats this measurement of a section."""
    words = ["./local/bench", *(["--quick"] if options.quick else []), *([f"--seed {options.seed}"] if options.seed != 1 else [])]
    return " ".join([*words, *([f"--only {section}"] if options.only else [])])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CommandFailed, PostgresError, ContenderFailed, Wrong, subprocess.CalledProcessError) as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; everything is stopped.")
