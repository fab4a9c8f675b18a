"""Writes docs/performance.md and its plots from the results, and formats the figures."""

import json
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import psutil
from world import paths
from measure.bench import Bench
from measure.events import MOST, RECEIPT_HANDLE

PAGE = paths.ROOT / "docs" / "performance.md"
# Explains what was tried for missed bars.
REMARKS = "develop.md#what-was-tried-for-speed"
PACKAGES = ("msgspec", "cryptography", "pycryptodome", "psycopg", "psycopg2-binary", "aws-lambda-powertools", "boto3")
REACHED, MISSED = "reached", f"[**missed**]({REMARKS})"
# The plots' style: small files that change only with the figures, and are readable on dark pages, too.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "login-etl",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": ["sans-serif"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
# A contender has the same colour in every plot; colour-blind readers can tell them apart.
COLOURS = {"ours": "#0072b2", "limit": "#555555", "best": "#009e73", "original": "#d55e00", "powertools": "#cc79a7", "hello": "#e69f00"}

HEAD = """\
<!-- Written by `./local/bench`: edit benches/measure, not this page. -->

# Performance

See how fast the function is and what it needs, compared with other ways of doing the same work.

{in_short}

![Messages a second and the client's CPU time a message, by batch](images/performance-batches.svg)

`./local/bench` measures everything on any machine, and writes this page; `--quick` does the same on a small scale in a few minutes.

## How it is measured

**Where.** {machine}
The contender, PostgreSQL {postgres} and, for secrets, LocalStack share it, on loopback. PostgreSQL has its default settings: with `fsync`,
`synchronous_commit` and `full_page_writes` on, each commit waits for the disk. {rustc}; Python {python} with
{packages}.

**What.** A contender is a long-lived process, like an execution environment. It reads its secrets, connects, and then handles one
event after the other. The clock runs from the event's bytes, as Lambda's runtime hands them over, through the commit to the answer's
bytes; the runtime's client is not included.

**Events** have the shape of SQS events. A receipt handle has {receipt_handle} characters, so that a message has about 805 bytes and
{most:,} messages fill the 6 MB that Lambda delivers at most. SQS's receipt handles are longer, at most
[1,024 characters](https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-queue-message-identifiers.html): every
contender has to read past each further character. No message is ever sent twice, and their times of sending rise.

**Rounds.** The contenders of a table take turns, one at a time, in an order that is shuffled in each round, so a machine that becomes slower
or faster affects all of them. Before each turn the tables are emptied and a checkpoint is made, and a turn's first event does not
count. After the turn the rows are counted; one row too few or too many ends the run.

**Figures.** A turn's figure is the median of its events. A ratio compares two turns of the same round. The tables show the median over the
rounds and, in brackets, the first and third quartile. Absolute figures hold for this machine only; ratios carry over better.

{measured}
"""


# The page.


def write(sections: Sequence[ModuleType], measured: dict[str, dict], page: Path) -> str:
    """Writes the page and, in `images` beside it, its plots; returns the summary of the bars."""
    import matplotlib.pyplot

    matplotlib.use("svg")
    matplotlib.rcParams.update(STYLE)
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    sections = [section for section in sections if section.NAME in measured]
    results = {name: one["result"] for name, one in measured.items()}
    chapters = {}
    for section in sections:
        chapter = section.text(results[section.NAME], results).strip()
        chapters[section.TITLE] = chapter if chapter.startswith("## ") else f"## {section.TITLE}\n\n{chapter}"
        if hasattr(section, "plots"):
            section.plots(results[section.NAME], results, images)
            matplotlib.pyplot.close("all")
    newest = max((measured[section.NAME] for section in sections), key=lambda one: one["at"])
    head = HEAD.format(
        in_short=in_short(results),
        measured=when([(section, measured[section.NAME]) for section in sections]),
        receipt_handle=RECEIPT_HANDLE,
        most=MOST,
        **newest["machine"],
    )
    summary = summarise(chapters)
    page.write_text("\n\n".join([head.strip(), *chapters.values(), f"## The bars, summed up\n\n{summary}"]) + "\n")
    return summary


def in_short(results: dict[str, dict]) -> str:
    """A table of the five main figures, as far as they were measured."""
    rows = [(title, figures) for title, of in IN_SHORT.items() if (figures := of(results))]
    return table(("in short", ""), rows)


def throughput(results: dict[str, dict]) -> str | None:
    if not (turns := results.get("batches", {}).get("situations", {}).get("base", {}).get("1000")):
        return None
    seconds = {name: [statistics.median(turn["ns"]) / 1e9 for turn in turns[name]] for name in ("ours", "original", "best")}
    times = {name: statistics.median(other / ours for other, ours in zip(seconds[name], seconds["ours"])) for name in ("original", "best")}
    rate = number(1 / statistics.median(seconds["ours"]))
    return f"{rate} thousand messages a second over one connection, in batches of 1,000: {times['original']:.1f} × the original's design, {times['best']:.2f} × the best Python"


def of_limit(results: dict[str, dict]) -> str | None:
    if not (base := results.get("batches", {}).get("situations", {}).get("base")):
        return None
    shares = {
        batch: statistics.median(statistics.median(limit["ns"]) / statistics.median(ours["ns"]) for limit, ours in zip(base[batch]["limit"], base[batch]["ours"]))
        for batch in ("1", "10", "100", "1000", "7400")
    }
    return ", ".join(f"{share:.2f} in batches of {int(batch):,}" for batch, share in shares.items())


def cold_start(results: dict[str, dict]) -> str | None:
    if not (times := results.get("cold", {}).get("times")):
        return None
    ours, hello, python = (times[name]["ns"] for name in ("login-etl", "hello", "python"))
    # Of each round, as in the section.
    to_hello, of_python = (statistics.median(one / other for one, other in zip(*pair)) for pair in ((ours, hello), (python, ours)))
    ms = statistics.median(ours) / 1e6
    return f"{ms:.0f} ms with two secrets and TLS to PostgreSQL: {to_hello:.1f} × hello world in Rust, 1/{of_python:.0f} of Python with the same duties"


def memory(results: dict[str, dict]) -> str | None:
    if not (held := results.get("footprint", {}).get("memory")):
        return None
    before, _, after, _ = (statistics.median(figures[moment] for figures in held["login-etl"]) / 1e6 for moment in range(4))
    return f"{before:.0f} MB before the first event, {after:.0f} MB after ten events of 6 MB"


def cost(_: dict[str, dict]) -> str:
    return "$0.09 at 100 messages a second, $0.08 at 10,000, without the database ([the bill](deploy.md#what-it-costs))"


IN_SHORT = {
    "throughput": throughput,
    "share of the limit, which is PostgreSQL and the disk alone": of_limit,
    "cold start": cold_start,
    "memory": memory,
    "a million messages cost": cost,
}


def summarise(chapters: dict[str, str]) -> str:
    """Counts the reached bars of each chapter, and lists the missed ones."""
    counts, misses = [], []
    for title, chapter in chapters.items():
        if rows := rows_of_bars(chapter):
            missed = [row for row in rows if row[3] == MISSED]
            counts.append((f"[{title}](#{anchor(title)})", f"{len(rows) - len(missed)} of {len(rows)}"))
            misses += [(title, *row[:3]) for row in missed]
    reached = table(("section", "bars reached"), counts)
    if not misses:
        return f"{reached}\n\nAll bars are reached."
    why = f"Not reached ([what was tried]({REMARKS})):"
    return f"{reached}\n\n{why}\n\n{table(('section', 'what', 'bar', 'measured'), misses)}"


def when(sections: list[tuple[ModuleType, dict]]) -> str:
    """A table of each section's time, commit and command; with the machine, if there was more than one."""
    machines = {one["machine"]["machine"] for _, one in sections}
    header = ("section", "measured", "commit", "seconds", "by", *(["on"] if len(machines) > 1 else []))
    rows = []
    for section, one in sections:
        row = [section.TITLE, one["at"][:16].replace("T", " "), f"`{one['commit']}`", f"{one['seconds']:.0f}", f"`{one['command']}`"]
        rows.append([*row, *([one["machine"]["machine"]] if len(machines) > 1 else [])])
    return table(header, rows)


def anchor(title: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


# The forms.


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table. Columns align right if all their cells begin with a digit, except the first."""
    cells = [[str(cell) for cell in row] for row in rows]
    numbers = [bool(rows) and all(re.match(r"[\d.–<≥≤]", row[column]) for row in cells) for column in range(len(header))]
    rule = ["---:" if number and column else "---" for column, number in enumerate(numbers)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(header), rule, *cells])


def bars(rows: Sequence[tuple[str, str, str, bool]]) -> str:
    """A table of bars: the figure's name, the bar, the measured value, and whether it is reached."""
    return table(("what", "bar", "measured", ""), [(*row[:3], REACHED if row[3] else MISSED) for row in rows])


def rows_of_bars(chapter: str) -> list[tuple[str, ...]]:
    """The rows of a chapter's tables of bars."""
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in chapter.splitlines() if line.startswith("|")]
    return [row for row in rows if len(row) == 4 and row[3] in (REACHED, MISSED)]


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; all equal for a single sample."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, statistics.median(samples), third


def number(value: float) -> str:
    """Formats with three significant digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2}f}"


def spread(samples: Sequence[float], form: str | None = None) -> str:
    """The median and, in brackets, the quartiles, if there is more than one sample."""
    if len(samples) == 1:
        return form.format(samples[0]) if form else number(samples[0])
    first, median, third = (form.format(value) if form else number(value) for value in quartiles(samples))
    return f"{median} ({first}–{third})"


# The machine and the versions.


def machine(bench: Bench) -> dict[str, str]:
    """The machine and all versions, worded for the page."""
    with bench.servers.postgres.connect() as connection:
        postgres = connection.execute("show server_version").fetchone()[0].split()[0]
    versions = "import importlib.metadata, json, sys; print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))"
    packages = json.loads(said(str(bench.peers_python), "-c", versions, *PACKAGES))
    cores, memory = psutil.cpu_count(), psutil.virtual_memory().total / 2**30
    return {
        "machine": f"{processor()}, {cores} core{'s' if cores != 1 else ''}, {memory:.0f} GiB, {platform.system()} {platform.release()}.",
        "postgres": postgres,
        "rustc": said("rustc", "--version").split(" (")[0].replace("rustc", "Rust"),
        "python": said(str(bench.peers_python), "-c", "import platform; print(platform.python_version())"),
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }


def processor() -> str:
    """The processor's name on Linux and macOS, otherwise its architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists() and (name := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M)):
        return name[1]
    return said("sysctl", "-n", "machdep.cpu.brand_string") if platform.system() == "Darwin" else platform.machine()


def commit() -> str:
    return said("git", "-C", str(paths.ROOT), "describe", "--always", "--dirty")


def said(*command: str) -> str:
    """A program's output, or a dash if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=paths.ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "–"
