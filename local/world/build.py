"""Builds the product: the function for deployment, the function for the demo, and the programs that the tests use."""

import json
import os
import platform
import subprocess
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from samtranslator.yaml_helper import yaml_parse
from world import command, paths

# The development profile without debug information and symbols, built by this machine's compiler, in a third of the time.
QUICK = {
    "SAM_BUILD_MODE": "debug",
    "CARGO_LAMBDA_COMPILER": "cargo",
    "CARGO_PROFILE_DEV_DEBUG": "false",
    "CARGO_PROFILE_DEV_STRIP": "symbols",
}
PROGRAMS = ("--package", "login-etl", "--package", "etlctl", "--bins", "--locked")
# A clean build is faster without incremental compilation, and a CI machine never builds twice.
ONCE = {"CARGO_INCREMENTAL": "0"} if "CI" in os.environ else {}


def architecture() -> str:
    return "arm64" if platform.machine().lower() in ("aarch64", "arm64") else "x86_64"


def environment() -> dict[str, str]:
    """For cargo builds that stay on this machine: uses the system's OpenSSL if its headers are installed."""
    return os.environ | ({"OPENSSL_NO_VENDOR": "1"} if "SYSTEM_OPENSSL" in os.environ else {}) | ONCE


def release_environment() -> dict[str, str]:
    """For builds that are deployed: always with their own OpenSSL, which records when it was compiled. With a fixed time, equal sources give equal builds."""
    return {name: value for name, value in os.environ.items() if name != "OPENSSL_NO_VENDOR"} | {"SOURCE_DATE_EPOCH": "0"}


def function(quick: bool = False, quiet: bool = False) -> Path:
    """Builds the function with `sam build`, and returns the directory to deploy.

    The build is production's; with `quick`, the same source without optimisation and with this machine's libraries.
    """
    name = "demo" if quick else "function"
    directory, target = paths.SAM_DEMO if quick else paths.SAM_BUILD, paths.ROOT / "target" / name
    command.run(
        *("sam", "build", "--template-file", paths.ROOT / "template.yaml", "--build-dir", directory),
        *("--parameter-overrides", f"Architecture={architecture()}"),
        what="Building the function" + ("" if target.exists() else " (some minutes the first time)"),
        log=paths.LOGS / f"build-{name}.log",
        environment=(environment() | QUICK if quick else release_environment()) | {"CARGO_TARGET_DIR": str(target)},
        progress=partial(crates_of, target, crates()),
        quiet=quiet,
    )
    # `sam deploy` parses this file six times. JSON is YAML, too, and is parsed in no time.
    template = directory / "template.yaml"
    template.write_text(json.dumps(yaml_parse(template.read_text()), indent=2))
    return directory


def etlctl(quiet: bool = False, nice: int = 0) -> Path:
    """Builds etlctl, and returns its path."""
    words = ("cargo", "build", *PROGRAMS)
    what = "Building etlctl" + ("" if (paths.ROOT / "target" / "debug").exists() else " (some minutes the first time)")
    command.run(*words, what=what, log=paths.LOGS / "build-etlctl.log", environment=environment(), quiet=quiet, nice=nice)
    return paths.ROOT / "target" / "debug" / "etlctl"


class TestProgram(NamedTuple):
    """A test program, and its package's directory, in which it runs."""

    name: str
    program: Path
    directory: Path


@cache
def tests(quiet: bool = False, nice: int = 0) -> list[TestProgram]:
    """Builds the tests, and returns them. Together with etlctl, because another set of features would compile the AWS SDK again."""
    words = ("cargo", "build", *PROGRAMS, "--package", "login-etl-scan", "--tests")
    settings = environment()
    command.run(*words, what="Building the tests", log=paths.LOGS / "build-tests.log", environment=settings, quiet=quiet, nice=nice)
    # Run again with nothing left to build, cargo prints the programs' paths.
    words += ("--message-format", "json")
    output = command.run(*words, what="Finding the tests", log=paths.LOGS / "built-tests.log", environment=settings, quiet=True)
    messages = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [
        TestProgram(f"{message['target']['name']}-{message['target']['kind'][0]}", Path(message["executable"]), Path(message["manifest_path"]).parent)
        for message in messages
        if message.get("executable") and message["profile"]["test"]
    ]


def crates() -> int:
    """The number of the function's crates, including itself."""
    words = ("cargo", "tree", "--locked", "--edges", "normal,build", "--prefix", "none", "--no-dedupe", "--format", "{p}")
    tree = subprocess.run(words, cwd=paths.ROOT, capture_output=True, text=True, check=False)
    return len(set(tree.stdout.splitlines()))


def crates_of(target: Path, total: int) -> str:
    """A build's progress. sam holds back cargo's output until the end, but cargo leaves a file for each crate that it begins."""
    begun = {trace.parent.name.rsplit("-", 1)[0] for depth in ("*", "*/*") for trace in target.glob(f"{depth}/.fingerprint/*/invoked.timestamp")}
    return f"{min(len(begun), total)} of {total} crates" if begun and total else ""
