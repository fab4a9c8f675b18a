"""Counts the instructions of the function's own work with callgrind, and compares them with benches/instructions/ceilings.json."""

import json
import re
import sys

from world import command, paths

CEILINGS = paths.ROOT / "benches" / "instructions" / "ceilings.json"
PACKAGE = "login-etl-instructions"
MESSAGES = 1000
NICE = 15
# Counts of the same program are equal. The headroom allows for other versions of Rust.
HEADROOM = 1.03


class TooMany(Exception):
    """A stage takes more instructions than its ceiling; the text explains what to do."""


def check() -> None:
    """Counts each stage's instructions; raises `TooMany` if one takes more than its ceiling."""
    ceilings = json.loads(CEILINGS.read_text())
    counts = count(list(ceilings))
    over = []
    for stage, ceiling in ceilings.items():
        if counts[stage] > ceiling:
            over.append(f"{stage} by {counts[stage] / ceiling - 1:.1%}")
    if over:
        raise TooMany(
            f"Over the ceiling: {', '.join(over)}. Handling a message has become more costly.\n"
            "If `git stash` lowers the count, your change is the cause: measure its cost (`./local/bench --quick`,\n"
            "`cargo bench -p login-etl-benches`), and make it cheaper, or accept the cost. Otherwise the cause is another version of\n"
            "Rust or of a library. If you accept the cost or the version, raise the ceilings, and put counts and reason in the commit:\n"
            "  PYTHONPATH=local target/local/venv/bin/python -m world.instructions --record"
        )


def record() -> None:
    """Sets the ceilings from the current counts."""
    counts = count(list(json.loads(CEILINGS.read_text())))
    CEILINGS.write_text(json.dumps({stage: round(taken * HEADROOM) for stage, taken in counts.items()}, indent=2) + "\n")
    print(f"{CEILINGS.relative_to(paths.ROOT)}: {CEILINGS.read_text()}")


def count(stages: list[str]) -> dict[str, int]:
    """Instructions per message of each stage of a batch."""
    # Without dependencies' debug information, which takes valgrind minutes to read.
    build = ["cargo", "build", "--release", "--locked", "--message-format", "json-render-diagnostics", "--package", PACKAGE]
    output = command.run(*build, what="Building what callgrind counts", log=paths.LOGS / "instructions.log", quiet=True, nice=NICE)
    [program] = filter(None, (json.loads(line).get("executable") for line in output.splitlines() if line.startswith("{")))
    return {stage: instructions(program, stage) // MESSAGES for stage in stages}


def instructions(program: str, stage: str) -> int:
    profile = paths.LOCAL / f"callgrind.{stage}"
    words = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={profile}", "--toggle-collect=*counted*", program, stage]
    said = command.run(*words, what=f"Counting {stage}", log=paths.LOGS / f"instructions-{stage}.log", quiet=True, nice=NICE)
    found = re.search(r"^(?:totals|summary): (\d+)", profile.read_text(), re.M)
    if not found or not int(found[1]):
        raise RuntimeError(f"callgrind counted nothing:\n{said}")
    return int(found[1])


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit("usage: python -m world.instructions --record")
    record()
