"""Coverage-guided fuzzing of what takes in foreign text, from the kept corpus on; ends with status 0 if nothing was found.

What is new goes to target/fuzz/corpus; an input that breaks a target goes to target/fuzz/artifacts.
"""

import argparse
import os
import subprocess
import sys

from world import paths

TARGETS = ("body", "event", "keyring")
# cargo builds it, as PyPI has none; without optimisation in a third of the time.
CARGO_FUZZ = "cargo-fuzz@0.13.2"
FUZZ = paths.ROOT / "target" / "fuzz"
# Longer inputs find nothing more in parsers without length fields, and cost speed.
LONGEST_BYTES = 4096


def main() -> int:
    parser = argparse.ArgumentParser(prog="./local/fuzz", description=__doc__)
    parser.add_argument("seconds", nargs="?", type=int, default=600, help="for each target; 600 if not given")
    parser.add_argument("--quick", action="store_true", help="build without optimisation, which is sooner ready and runs slower")
    options = parser.parse_args()
    tool = paths.LOCAL / "cargo" / "bin" / "cargo-fuzz"
    if not tool.exists():
        print(f"Building {CARGO_FUZZ} (once) ...")
        subprocess.run(["cargo", "install", CARGO_FUZZ, "--locked", "--debug", "--quiet", "--root", paths.LOCAL / "cargo"], check=True)
    for target in TARGETS:
        print(f"Fuzzing {target} for {options.seconds} s, after building it ...")
        status = fuzz(tool, target, options.seconds, options.quick)
        if status != 0:
            print(f"{target}: failed (status {status}); see above, and target/fuzz/artifacts/{target}")
            return 1
    return 0


def fuzz(tool: os.PathLike, target: str, seconds: int, quick: bool) -> int:
    corpus, artifacts = FUZZ / "corpus" / target, FUZZ / "artifacts" / target
    corpus.mkdir(parents=True, exist_ok=True)
    artifacts.mkdir(parents=True, exist_ok=True)
    # Our code has no `unsafe`, so sanitizers, which need a nightly compiler, would watch others' only.
    build = ["--sanitizer", "none", "--target-dir", FUZZ, *(["--dev"] if quick else [])]
    limits = [f"-max_total_time={seconds}", f"-max_len={LONGEST_BYTES}", f"-artifact_prefix={artifacts}/", "-print_final_stats=1"]
    command = [tool, "fuzz", "run", *build, target, corpus, paths.ROOT / "fuzz" / "corpus" / target, "--", *limits]
    process = subprocess.run(command, cwd=paths.ROOT / "fuzz", stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    lines = process.stderr.splitlines()
    shown = lines if process.returncode else [line for line in lines if line.startswith("stat::number_of_executed_units")]
    print("\n".join(shown[-40:]))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
