"""Where the function's own CPU time goes in a batch: a profile, drawn as a flame graph."""

import html
import re
from collections import defaultdict
from pathlib import Path

from world.bench.bench import Bench, Contender
from world.bench.report import table

NAME = "profile"
TITLE = "Where the time goes"

BATCHES = (1000, 7400)
# Of CPU time, for thousands of samples.
MESSAGES = 600_000
QUICK_MESSAGES = 60_000

# The parts of the work: a frame that tells a part, the nearest to the leaf first, and why the part is still there.
PARTS = {
    "read the event": (
        r"Event::from_json|RawValue",
        "Every byte of the event is looked at twice: once to find its end, so that the runtime neither quotes it in an error nor keeps account of the path "
        "to each value, and once to take out six fields a message. The rest is skipped, which is as fast as the quotes and backslashes in it can be found.",
    ),
    "parse the bodies": (
        r"Login::parse",
        "A body is JSON in a JSON string, so it is parsed for itself, after its escapes are undone. Each field is checked, as it may be anything.",
    ),
    "mask": (r"Keyring::mask|mask::mask|Cipher", "AES in hardware, two values a message; what remains is a call a value through the cipher's interface, padding and Base64."),
    "make rows": (r"Login::mask|Row::push", "A row is written once, in the form in which it is sent; one allocation each."),
    "ledger's keys": (r"LedgerKey::new|uuid::|parse_u?i?d|hash_one|HashMap|hashbrown", "The message id becomes a UUID, and a table of the batch's ids finds the second copy of a message."),
    "sort": (r"sort|quicksort", "Keys are inserted in one order everywhere, so that two functions that hold the same messages cannot deadlock."),
    "encode": (r"to_sql|Columns|Batch::copied|Row::copy|query::encode|postgres_protocol", "Rows become the columns of the statement, or one piece for `COPY`: a copy of every byte, and the only one."),
    "send and receive": (
        r"poll_write|poll_flush|poll_read|sendto|writev|SSL_|Connection.*poll|recv|epoll|mio|syscall",
        "The kernel's part: it takes the bytes to the database.",
    ),
    "allocate": (r"malloc|free|realloc|alloc|memmove|memcpy|drop_in_place", "Buffers of a batch, and what is moved between them."),
    "report": (r"metrique|metrics|tracing|emit|_print", "One line of metrics and one of log a batch."),
    "other": (r"", "What belongs to none of these."),
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
            stacks[str(batch)] = dict(stack.rsplit(" ", 1) for stack in folded.read_text().splitlines())
            with bench.servers.postgres.connect(name) as connection:
                connection.execute("truncate user_logins, user_logins_ledger")
    finally:
        bench.drop(name)
        file.unlink(missing_ok=True)
    return {"stacks": stacks}


def text(result: dict, all_results: dict) -> str:
    shares = {batch: parts(stacks) for batch, stacks in result["stacks"].items()}
    widest = sorted(PARTS, key=lambda part: -max(share.get(part, 0) for share in shares.values()))
    widest = [part for part in widest if part != "other"][:5]
    rows = [[part, *(f"{share.get(part, 0):.0%}" for share in shares.values())] for part in [*widest, "all others"]]
    rows[-1][1:] = [f"{1 - sum(share.get(part, 0) for part in widest):.0%}" for share in shares.values()]
    pictures = "\n\n".join(f"![Flame graph of a batch of {batch}](images/performance-profile-{batch}.svg)" for batch in shares)
    reasons = "\n".join(f"- **{part[0].upper()}{part[1:]}.** {PARTS[part][1]}" for part in widest)
    return f"""\
The function's own CPU time in batches of {" and ".join(f"{int(batch):,}" for batch in shares)}, from samples of its stack; what it waits for is not in it. Width is time, callers are below.

{table(["part", *(f"{int(batch):,}" for batch in shares)], rows)}

The five widest parts, and why they are still there:

{reasons}

{pictures}"""


def plots(result: dict, all_results: dict, directory: Path) -> None:
    for batch, stacks in result["stacks"].items():
        (directory / f"performance-profile-{batch}.svg").write_text(flame_graph(stacks))


def parts(stacks: dict[str, str]) -> dict[str, float]:
    """The share of each part in all samples."""
    counts: dict[str, int] = defaultdict(int)
    for stack, count in stacks.items():
        counts[part_of(stack.split(";"))] += int(count)
    total = sum(counts.values())
    return {part: count / total for part, count in counts.items()}


def part_of(frames: list[str]) -> str:
    """The part of the frame nearest to the leaf that tells one."""
    generic = {"allocate", "other"}
    for frame in reversed(frames):
        for part, (pattern, _) in PARTS.items():
            if part not in generic and re.search(pattern, frame):
                return part
    return next((part for part in ("allocate",) if any(re.search(PARTS[part][0], frame) for frame in frames)), "other")


def flame_graph(stacks: dict[str, str]) -> str:
    """An SVG in which each frame is as wide as its share, above its caller."""
    root: dict = {"count": 0, "children": {}}
    for stack, count in stacks.items():
        node = root
        node["count"] += int(count)
        for frame in shortened(stack.split(";")):
            node = node["children"].setdefault(frame, {"count": 0, "children": {}})
            node["count"] += int(count)
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
        shown = name if len(name) * 6.2 < width else name[: int(width / 6.2) - 1] + "…" if width > 40 else ""
        lines.append(
            f'<g><title>{html.escape(name)} {width / WIDTH:.1%}</title>'
            f'<rect x="{left:.1f}" y="{top}" width="{max(width - 0.5, 0.3):.1f}" height="{ROW - 1}" fill="{colour}"/>'
            + (f'<text x="{left + 3:.1f}" y="{top + 12}">{html.escape(shown)}</text>' if shown else "")
            + "</g>"
        )
    return "\n".join([*lines, "</svg>", ""])


def shortened(frames: list[str]) -> list[str]:
    """From the handler on, without type parameters and hashes; what polls is left out."""
    frames = [re.sub(r"::h[0-9a-f]{16}$", "", frame) for frame in frames]
    for _ in range(8):
        frames = [re.sub(r"<[^<>]*>", "", frame) for frame in frames]
    frames = [frame.replace("::{{closure}}", "").replace("{closure#0}", "").strip(":") for frame in frames]
    inner = [frame for frame in frames if frame and not re.match(r"(core|std|alloc|tokio::runtime|__libc|_start|main$|clone)", frame)]
    return [frame for index, frame in enumerate(inner) if index == 0 or frame != inner[index - 1]]
