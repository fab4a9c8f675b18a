"""Every check and test there is, one after the other; ends with status 0 only if all pass."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from world import instructions, paths, stack, template
from world.postgres import PostgresError
from world.servers import Servers, alone

WORLD = paths.TEST_WORLD
TICK_SECONDS = 20
# Where a tool is not on PyPI, cargo builds it; without optimisation in a third of the time.
CARGO_DENY = "cargo-deny@0.20.2"


class Failed(Exception):
    """A check did not pass; its output has been shown."""


def main() -> int:
    options = parse_arguments()
    started = time.monotonic()
    with alone(WORLD):
        results = {name: run(name, check) for name, check in CHECKS.items() if not options.check or name in options.check}
    print("\n" + "\n".join(f"  {'passed' if passed else 'FAILED'}  {name}" for name, passed in results.items()))
    print(f"\nchecks: {sum(results.values())} passed, {len(results) - sum(results.values())} failed")
    print(f"in {time.monotonic() - started:.0f} s")
    return 0 if all(results.values()) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./local/test", description=__doc__)
    parser.add_argument("check", nargs="*", choices=[*CHECKS, []], metavar="CHECK", help=f"run these only; of {', '.join(CHECKS)}")
    return parser.parse_args()


def run(name: str, check: Callable[[], None]) -> bool:
    print(f"\n--- {name}")
    started = time.monotonic()
    try:
        check()
    except (Failed, PostgresError, RuntimeError, instructions.TooMany, stack.CommandFailed) as error:
        print(error)
        return False
    print(f"passed in {time.monotonic() - started:.0f} s")
    return True


def command(*words: str | Path, show: bool = False, **environment: str) -> None:
    """Runs a command of a check; shows its output as it comes, or only if it fails."""
    process = subprocess.Popen(
        words,
        cwd=paths.ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=None if show else subprocess.PIPE,
        stderr=None if show else subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    started = time.monotonic()
    while True:
        try:
            output, _ = process.communicate(timeout=TICK_SECONDS)
            break
        except subprocess.TimeoutExpired:
            if not show:
                print(f"  ... {time.monotonic() - started:.0f} s")
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise Failed(f"{output or ''}`{' '.join(map(str, words))}` failed (status {process.returncode})")


def check_format() -> None:
    command("cargo", "fmt", "--all", "--check")


def check_clippy() -> None:
    command("cargo", "clippy", "--workspace", "--all-targets", "--locked", "--quiet", "--", "--deny", "warnings")


def check_docs() -> None:
    flags = "--deny warnings"
    command("cargo", "doc", "--workspace", "--no-deps", "--document-private-items", "--locked", "--quiet", RUSTDOCFLAGS=flags)


def check_dependencies() -> None:
    """Licences, bans and sources; known vulnerabilities where their database can be reached."""
    tool = paths.LOCAL / "cargo" / "bin" / "cargo-deny"
    if not tool.exists():
        print(f"  building {CARGO_DENY} (once)")
        command("cargo", "install", CARGO_DENY, "--locked", "--debug", "--quiet", "--root", paths.LOCAL / "cargo")
    command(tool, "--locked", "check", "licenses", "bans", "sources")
    try:
        command(tool, "--locked", "check", "advisories")
    except Failed as failure:
        if "failed to fetch advisory database" not in str(failure):
            raise
        print("  the advisory database cannot be reached: known vulnerabilities were not looked up")


def check_template() -> None:
    """SAM's linter, which sees what is SAM's, and two that read what SAM makes of the template: each misses what others find."""
    command("sam", "validate", "--lint", "--region", "us-east-1")
    key = "arn:aws:kms:us-east-1:123456789012:key/1"
    for name, parameters in {
        "standard": {},
        "fifo": {"QueueType": "fifo", "KmsKeyArn": key, "LogKmsKeyArn": key, "SecretsKmsKeyArn": key},
        "gradual": {"GradualDeployment": "true", "MaximumPollers": "2"},
    }.items():
        expanded = paths.LOCAL / f"template.{name}.json"
        expanded.write_text(json.dumps(template.expand(parameters), indent=2))
        # SAM has used up the parameter with which no condition is made.
        command("cfn-lint", "--ignore-checks", "W2001", "--", expanded)
        checkov = paths.CHECKOV / "bin" / "checkov"
        command(checkov, "--skip-download", "--framework", "cloudformation", "--compact", "--quiet", "--file", expanded)
    pytest("tests/template")


def check_workflows() -> None:
    """actionlint on whether they would run, zizmor on what an attacker could do with them, shellcheck on what they and the user run."""
    workflows = sorted((paths.ROOT / ".github" / "workflows").glob("*.yml"))
    command("actionlint", "-shellcheck", "shellcheck", "-pyflakes", "", *workflows)
    command("zizmor", "--offline", "--quiet", "--strict-collection", ".github")
    if shutil.which("shellcheck"):
        scripts = [file for file in (paths.ROOT / "local").iterdir() if file.is_file() and file.read_bytes().startswith((b"#!/usr/bin/env bash", b"# shellcheck"))]
        command("shellcheck", "--external-sources", "--source-path", "SCRIPTDIR", *scripts)


def check_function() -> None:
    """The library's tests, the deployed stack's, etlctl's and the schema's, on servers of their own."""
    with Servers(WORLD) as servers:
        command("cargo", "test", "--workspace", "--locked", "--no-run")
        command("cargo", "build", "--package", "etlctl", "--locked")
        environment = {"PYTHON": sys.executable, **servers.environment()}
        command("cargo", "test", "--workspace", "--locked", show=True, **environment)
        # Once more with every batch written by `COPY`, and as behind a pooler.
        for statements in ("true", "false"):
            print(f"  by COPY, PREPARED_STATEMENTS={statements}")
            ways = {"COPY_THRESHOLD": "1", "PREPARED_STATEMENTS": statements}
            command("cargo", "test", "--test", "it", "--locked", show=True, **environment, **ways)
        stack.build()
        # Longer than the demo's, so that no pause of the machine's adds a receipt to those that the tests count.
        stack.deploy(servers, LogLevel="TRACE", FunctionTimeout=3, SecretsTtl=2)
        # What needs no servers has been checked with the template.
        pytest("tests", "--ignore=tests/template", LOGIN_ETL_WORLD=str(WORLD))


def check_instructions() -> None:
    """The instructions that the function's own work takes, which do not wobble as times do, against recorded ceilings."""
    instructions.check()


def check_fuzz() -> None:
    command(sys.executable, "-m", "world.fuzz", "--quick", "10", show=True)


def check_soak() -> None:
    """The same schedule each time; `./local/soak` takes a new one."""
    command(sys.executable, "-m", "world.soak", "--quick", "--seed", "1", show=True)


def check_incidents() -> None:
    """Two of the five, one of the database's and one of the secrets'; `./local/incidents` plays all."""
    command(sys.executable, "-m", "world.incidents", "--only", "database-down", "--only", "keyring-broken", show=True)


def check_executor() -> None:
    pytest("local/executor/tests")


def pytest(*arguments: str, **environment: str) -> None:
    command(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments, show=True, **environment)


CHECKS = {
    "format": check_format,
    "clippy": check_clippy,
    "docs": check_docs,
    "dependencies": check_dependencies,
    "template": check_template,
    "workflows": check_workflows,
    "executor": check_executor,
    "function": check_function,
    "instructions": check_instructions,
    "incidents": check_incidents,
    "soak": check_soak,
    "fuzz": check_fuzz,
}

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; everything is stopped.")
