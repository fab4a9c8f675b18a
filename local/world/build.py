"""Builds the product: the function as it is deployed, the function for a quick look, and the programs that the tests use."""

import os
import platform
import subprocess
from functools import partial
from pathlib import Path

from world import command, paths

# The development profile without debug information, built by this machine's compiler: ready in a third of the time.
QUICK = {
    "SAM_BUILD_MODE": "debug",
    "CARGO_LAMBDA_COMPILER": "cargo",
    "CARGO_PROFILE_DEV_DEBUG": "false",
    "CARGO_PROFILE_DEV_STRIP": "debuginfo",
}


def architecture() -> str:
    return "arm64" if platform.machine().lower() in ("aarch64", "arm64") else "x86_64"


def environment() -> dict[str, str]:
    """For cargo, where it builds what stays on this machine: OpenSSL is the system's, if that is there."""
    return os.environ | ({"OPENSSL_NO_VENDOR": "1"} if "SYSTEM_OPENSSL" in os.environ else {})


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
        environment=(environment() | QUICK if quick else dict(os.environ)) | {"CARGO_TARGET_DIR": str(target)},
        progress=partial(crates_of, target, crates()),
        quiet=quiet,
    )
    return directory


def programs(quiet: bool = False) -> None:
    """Builds all programs and tests of the workspace with one set of features: another one would compile the AWS SDK again."""
    command.run(
        *("cargo", "build", "--workspace", "--bins", "--tests", "--locked"),
        what="Building the tests and etlctl",
        log=paths.LOGS / "build-programs.log",
        environment=environment(),
        quiet=quiet,
    )


def crates() -> int:
    """How many crates the function is made of, itself among them."""
    words = ("cargo", "tree", "--locked", "--edges", "normal,build", "--prefix", "none", "--no-dedupe", "--format", "{p}")
    tree = subprocess.run(words, cwd=paths.ROOT, capture_output=True, text=True, check=False)
    return len(set(tree.stdout.splitlines()))


def crates_of(target: Path, total: int) -> str:
    """How far a build is: sam keeps cargo's output to itself until the end, but cargo leaves a trace of each crate that it begins."""
    begun = {trace.parent.name.rsplit("-", 1)[0] for depth in ("*", "*/*") for trace in target.glob(f"{depth}/.fingerprint/*/invoked.timestamp")}
    return f"{min(len(begun), total)} of {total} crates" if begun and total else ""
