"""Profiles the function's own CPU time in a batch, and draws flame graphs."""

import html
import re
import textwrap
from collections import defaultdict
from pathlib import Path

from measure.bench import Bench, Contender
from measure.report import table

NAME = "profile"
TITLE = "Where the time goes"

BATCHES = (1000, 7400)
# Enough CPU time for thousands of samples.
MESSAGES = 600_000
QUICK_MESSAGES = 60_000

# The parts of the work: a pattern of their frames, and why the part remains. The matching frame nearest to a stack's leaf counts, so that
# copying memory counts for its caller. Much is inlined: reading an event into the measured program, and making entries into `load`.
PARTS = {
    "sort": (
        r"slice::sort",
        "Keys are inserted in one order everywhere, so that two functions that hold the same messages cannot deadlock.",
    ),
    "mask": (
        r"\b(keyring|aes|cbc|base64)::|push_masked",
        "AES, in hardware if the processor has it, for two values a message. Each value is masked separately: a call through the cipher's "
        "interface, padding, and Base64 at the end of the row.",
    ),
    "encode": (
        r"login_etl::store::(batch|Session)|row::Row::cells|to_sql|query::encode|message::frontend|PostgresCodec",
        "Fields are in PostgreSQL's binary format already. Each is copied into the statement's arrays, or with its row into one buffer for "
        "`COPY`, and then once more into the driver's buffer.",
    ),
    "allocate": (
        r"malloc|calloc|realloc|(^|_)c?free$|_int_free|unlink_chunk|m(un)?map|brk$|morecore|systrim|finish_grow|drop_in_place",
        "Buffers of a batch, which are freed after the commit. Rows share the memory that they are made in.",
    ),
    "send and receive": (
        r"AsyncRead|AsyncWrite|(send|recv)(to|from|msg)?$|epoll|SSL_|tokio_postgres|postgres_protocol",
        "The kernel, which sends the bytes to the database, and the driver.",
    ),
    "bodies into rows": (
        r"login_etl::mapping",
        "A body is JSON in a JSON string. It is scanned in place, with a backslash before each of its quotes. Each field is checked, because "
        "it may be anything, and copied once, into its row.",
    ),
    "keys": (
        r"Handler::load|LedgerKey|uuid::|\bhash",
        "A message's id becomes a UUID, its time of sending and its receive count become numbers. A hash table of the batch's ids finds the "
        "second copy of a message. Before that, every message is read for the metrics, and checked for its id.",
    ),
    "report": (r"metrique|metrics|tracing|_print$", "One line of metrics and one of the log a batch."),
    "other": (r"std::fs::|pprof|demangle|login_etl_benches", "The benchmark itself, and everything that belongs to no other part."),
    "read the event": (
        r"login_etl::event|Handler::invoke|ours::main::\{\{closure\}\}",
        "The event is checked to be UTF-8, and then scanned once by our own scanner. It looks for quotes and backslashes sixteen bytes at a "
        "time, remembers the places of the few fields that are needed, and skips the rest. The runtime passes the bytes on unread.",
    ),
}

WIDTH, ROW, LEAST = 1200, 17, 0.4
PALETTE = ("#f2c14e", "#f78154", "#e4a853", "#ef9b6c", "#f5b971", "#e88d67")


def measure(bench: Bench) -> dict:
    stacks = {}
    name = bench.database("bench_profile")
    file, folded = bench.directory / "events", bench.directory / "folded"
    try:
        for batch in BATCHES:
            events = (QUICK_MESSAGES if bench.quick else MESSAGES) // batch
            command = [str(bench.binaries / "ours"), "--profile", str(folded)]
            with Contender(command, bench.environment(name, tls=False), bench.directory / "profile.log") as contender:
                # In pieces, so that the file stays small.
                for _ in range(10):
                    bench.events.write(file, batch, max(1, events // 10))
                    contender.run(file)
            stacks[str(batch)] = counted(folded.read_text())
            with bench.servers.postgres.connect(name) as connection:
                connection.execute("truncate user_logins, etl_ledger")
    finally:
        bench.drop(name)
        file.unlink(missing_ok=True)
    return {"stacks": stacks}


def counted(folded: str) -> dict[str, int]:
    """The samples of each stack. The same stack can be in `folded` twice, if functions differ only in their types."""
    samples: dict[str, int] = defaultdict(int)
    for line in folded.splitlines():
        stack, count = line.rsplit(" ", 1)
        samples[stack] += int(count)
    return dict(samples)


def text(result: dict, all_results: dict) -> str:
    shares = {int(batch): parts(stacks) for batch, stacks in result["stacks"].items()}
    widest = sorted(PARTS, key=lambda part: -max(share.get(part, 0) for share in shares.values()))
    widest = [part for part in widest if part != "other"][:5]
    rows = [[part, *(f"{share.get(part, 0):.0%}" for share in shares.values())] for part in widest]
    rows.append(["all others", *(f"{1 - sum(share.get(part, 0) for part in widest):.0%}" for share in shares.values())])
    pictures = "\n\n".join(f"![Flame graph of batches of {batch:,}](images/performance-profile-{batch}.svg)" for batch in shares)
    reasons = (f"- **{part[0].upper()}{part[1:]}.** {PARTS[part][1]}" for part in widest)
    reasons = "\n".join(textwrap.fill(reason, 130, subsequent_indent="  ") for reason in reasons)
    return f"""\
The function's own CPU time in batches of {" and ".join(f"{batch:,}" for batch in shares)}, from samples of its stack, without
the time that it waits.

{table(["part", *(f"{batch:,}" for batch in shares)], rows)}

The five largest parts, and why they remain:

{reasons}

Width is time, and callers are below. Inlined functions count as their caller: reading the event, for example, as `ours::main`, the
program that is measured.

{pictures}"""


def plots(result: dict, all_results: dict, directory: Path) -> None:
    for batch, stacks in result["stacks"].items():
        (directory / f"performance-profile-{batch}.svg").write_text(flame_graph(stacks))


def frames(stack: str) -> list[str]:
    """A stack's functions, the outermost first. Array types contain semicolons, too, followed by a space."""
    return re.split(r";(?! )", stack)


def parts(stacks: dict[str, int]) -> dict[str, float]:
    """Each part's share of all samples."""
    counts: dict[str, int] = defaultdict(int)
    for stack, count in stacks.items():
        counts[part_of(frames(stack))] += count
    total = sum(counts.values())
    return {part: count / total for part, count in counts.items()}


def part_of(stack: list[str]) -> str:
    told = (part for frame in reversed(stack) for part, (pattern, _) in PARTS.items() if re.search(pattern, frame))
    return next(told, "other")


def flame_graph(stacks: dict[str, int]) -> str:
    """An SVG in which each frame is as wide as its share, above its caller."""
    root: dict = {"count": 0, "children": {}}
    for stack, count in stacks.items():
        node = root
        node["count"] += count
        for frame in shown(frames(stack)):
            node = node["children"].setdefault(frame, {"count": 0, "children": {}})
            node["count"] += count
    boxes: list[tuple[int, float, float, str]] = []

    def place(node: dict, name: str, depth: int, left: float) -> None:
        width = node["count"] / root["count"] * WIDTH
        if width < LEAST:
            return
        boxes.append((depth, left, width, name))
        for child, below in sorted(node["children"].items()):
            place(below, child, depth + 1, left)
            left += below["count"] / root["count"] * WIDTH

    place(root, "all", 0, 0.0)
    height = (max(depth for depth, *_ in boxes) + 1) * ROW
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for depth, left, width, name in boxes:
        top = height - (depth + 1) * ROW
        colour = PALETTE[sum(name.encode()) % len(PALETTE)]
        label = name if len(name) * 6.2 < width else name[: int(width / 6.2) - 1] + "…" if width > 40 else ""
        lines.append(
            f"<g><title>{html.escape(name)} {width / WIDTH:.1%}</title>"
            f'<rect x="{left:.1f}" y="{top}" width="{max(width - 0.5, 0.3):.1f}" height="{ROW - 1}" fill="{colour}"/>'
            + (f'<text x="{left + 3:.1f}" y="{top + 12}">{html.escape(label)}</text>' if label else "")
            + "</g>"
        )
    return "\n".join([*lines, "</svg>", ""])


def shown(stack: list[str]) -> list[str]:
    """The functions as named in the graph, without startup and polling frames, and with recursion shown once."""
    names = [named(frame) for frame in stack if not re.match(r"_start$|__libc_start|main$|std::sys::backtrace|tokio::runtime", frame)]
    return [name for index, name in enumerate(names) if index == 0 or name != names[index - 1]]


def named(frame: str) -> str:
    """A function's name without hashes, type parameters, and closures, which may contain a path on this machine."""
    name = re.sub(r"::h[0-9a-f]{16}$|(::)?\{\{?closure[^}]*\}?\}", "", frame)
    while (simpler := re.sub(r"(?<=\w)(::)?<[^<>]*>|<([^<>]*?)( as [^<>]*)?>", r"\2", name)) != name:
        name = simpler
    return name.strip(": ") or "closure"
