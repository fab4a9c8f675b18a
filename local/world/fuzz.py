"""Fuzzes the parsers of foreign input, guided by coverage."""

import os
import re
import sys
from pathlib import Path

from world import arguments, command, paths
from world.command import CommandFailed

TARGETS = ("body", "event", "fields", "keyring", "mapping")
FUZZ = paths.ROOT / "target" / "fuzz"
# Longer inputs find nothing more in parsers without length fields, and are slower.
LONGEST_BYTES = 4096
# Fuzzing has no deadline, but tests that run beside it have.
NICE = 15
# The compiler flags of `cargo fuzz build --sanitizer none`, on x86_64 and arm64: https://github.com/rust-fuzz/cargo-fuzz. Our code has no `unsafe`,
# so sanitizers, which need a nightly compiler, would only check dependencies.
COVERAGE = (
    *("--cfg", "fuzzing", "-Cpasses=sancov-module", "-Cllvm-args=-sanitizer-coverage-level=4", "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters"),
    *("-Cllvm-args=-sanitizer-coverage-pc-table", "-Cllvm-args=-sanitizer-coverage-trace-compares", "-Ccodegen-units=1"),
)


def main() -> int:
    options = arguments.parse("fuzz")
    command.end_in_order()
    profile = build(quick=options.quick, quiet=False)
    for target in TARGETS:
        print(f"{target}: {run(profile, target, options.seconds, quiet=False)} inputs", flush=True)
    return 0


def check(seconds: int) -> None:
    """Fuzzes each target for a while; raises `CommandFailed` if one breaks."""
    profile = build(quick=True, quiet=True)
    for target in TARGETS:
        run(profile, target, seconds, quiet=True)


def build(quick: bool, quiet: bool) -> Path:
    """Builds the targets, and returns their directory."""
    words = ("cargo", "build", "--manifest-path", paths.ROOT / "fuzz" / "Cargo.toml", "--locked", "--bins", *(() if quick else ("--release",)))
    # With --target, build scripts and macros are built without coverage.
    words += ("--target", host(), "--target-dir", FUZZ)
    environment = os.environ | {"CARGO_ENCODED_RUSTFLAGS": "\x1f".join(COVERAGE), "CARGO_PROFILE_DEV_OPT_LEVEL": "1"}
    log = paths.LOGS / "fuzz-build.log"
    command.run(*words, what="Building the fuzz targets", log=log, environment=environment, quiet=quiet, nice=NICE)
    return FUZZ / host() / ("debug" if quick else "release")


def host() -> str:
    """This machine's target triple."""
    version = command.run("rustc", "-vV", what="rustc", log=paths.LOGS / "fuzz-rustc.log", quiet=True)
    return re.search(r"^host: (.+)$", version, re.M)[1]


def run(profile: Path, target: str, seconds: int, quiet: bool) -> str:
    """Fuzzes one target, and returns the number of inputs."""
    corpus, artifacts = FUZZ / "corpus" / target, FUZZ / "artifacts" / target
    corpus.mkdir(parents=True, exist_ok=True)
    artifacts.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={seconds}", f"-max_len={LONGEST_BYTES}", f"-artifact_prefix={artifacts}/", "-print_final_stats=1"]
    words = (profile / target, corpus, paths.ROOT / "fuzz" / "corpus" / target, *limits)
    log = paths.LOGS / f"fuzz-{target}.log"
    output = command.run(*words, what=f"Fuzzing {target} for {seconds} s", log=log, quiet=quiet, nice=NICE)
    return re.search(r"stat::number_of_executed_units:\s*(\d+)", output)[1]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CommandFailed as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; everything is stopped.")
