"""Builds the product: the function as it is deployed, the function for a quick look, and the programs that the tests use."""

import json
import os
import platform
import subprocess
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from world import command, paths

# The development profile without debug information and symbols, built by this machine's compiler: ready in a third of the time.
QUICK = {
    "SAM_BUILD_MODE": "debug",
    "CARGO_LAMBDA_COMPILER": "cargo",
    "CARGO_PROFILE_DEV_DEBUG": "false",
    "CARGO_PROFILE_DEV_STRIP": "symbols",
}


def architecture() -> str:
    return "arm64" if platform.machine().lower() in ("aarch64", "arm64") else "x86_64"


def environment() -> dict[str, str]:
    """For cargo, where it builds what stays on this machine: OpenSSL is the system's, if that is there."""
    return os.environ | ({"OPENSSL_NO_VENDOR": "1"} if "SYSTEM_OPENSSL" in os.environ else {})


def release_environment() -> dict[str, str]:
    """For what is deployed: it brings its own OpenSSL, whatever is set here."""
    return {name: value for name, value in os.environ.items() if name != "OPENSSL_NO_VENDOR"}


def function(quick: bool = False, quiet: bool = False) -> Path:
    """Builds the function by `sam build`, and gives the directory that can be deployed.

    It is what production gets; or, if that is `quick`, the same source without optimisation and with this machine's libraries.
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
    return directory


def etlctl(quiet: bool = False) -> Path:
    """Builds etlctl, and gives its program."""
    words = ("cargo", "build", "--package", "login-etl", "--package", "etlctl", "--bins", "--locked")
    what = "Building etlctl" + ("" if (paths.ROOT / "target" / "debug").exists() else " (some minutes the first time)")
    command.run(*words, what=what, log=paths.LOGS / "build-etlctl.log", environment=environment(), quiet=quiet)
    return paths.ROOT / "target" / "debug" / "etlctl"


class TestProgram(NamedTuple):
    """A program of tests, and the directory of its package, which is where it runs."""

    name: str
    program: Path
    directory: Path


@cache
def programs(quiet: bool = False, nice: int = 0) -> list[TestProgram]:
    """Builds etlctl and all tests of the product with one set of features, as another one would compile the AWS SDK again; gives the tests."""
    words = ("cargo", "build", "--package", "login-etl", "--package", "etlctl", "--bins", "--tests", "--locked")
    # A build from nothing is sooner done without what makes the next one quicker; on a fresh machine of CI there is no next one.
    settings = environment() | ({"CARGO_INCREMENTAL": "0"} if "CI" in os.environ else {})
    command.run(*words, what="Building etlctl and the tests", log=paths.LOGS / "build-programs.log", environment=settings, quiet=quiet, nice=nice)
    # Asked again, with nothing left to build, cargo says where the programs are.
    words += ("--message-format", "json")
    output = command.run(*words, what="Finding the tests", log=paths.LOGS / "built-programs.log", environment=settings, quiet=True)
    messages = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [
        TestProgram(f"{message['target']['name']}-{message['target']['kind'][0]}", Path(message["executable"]), Path(message["manifest_path"]).parent)
        for message in messages
        if message.get("executable") and message["profile"]["test"]
    ]


def crates() -> int:
    """How many crates the function is made of, itself among them."""
    words = ("cargo", "tree", "--locked", "--edges", "normal,build", "--prefix", "none", "--no-dedupe", "--format", "{p}")
    tree = subprocess.run(words, cwd=paths.ROOT, capture_output=True, text=True, check=False)
    return len(set(tree.stdout.splitlines()))


def crates_of(target: Path, total: int) -> str:
    """How far a build is: sam keeps cargo's output to itself until the end, but cargo leaves a trace of each crate that it begins."""
    begun = {trace.parent.name.rsplit("-", 1)[0] for depth in ("*", "*/*") for trace in target.glob(f"{depth}/.fingerprint/*/invoked.timestamp")}
    return f"{min(len(begun), total)} of {total} crates" if begun and total else ""
