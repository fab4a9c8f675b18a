"""Runs other programs: writes their output to a log, shows progress on the terminal, leaves no process behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from world import paths

LOG_TICK_SECONDS = 60
TERMINAL_TICK_SECONDS = 0.5
TAIL_LINES = 30
# cargo's progress on a terminal, `Building [===> ] 12/345: crate`, and similar output of other programs.
COUNTED = re.compile(r"(\d+)/(\d+)")
ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# Makes cargo print its progress to a log, too.
COUNT_ALOUD = {"CARGO_TERM_PROGRESS_WHEN": "always", "CARGO_TERM_PROGRESS_WIDTH": "100", "CARGO_TERM_COLOR": "never"}


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RUNNING: set[subprocess.Popen] = set()
STOPPING = threading.Event()
LOCK = threading.Lock()


class CommandFailed(Exception):
    """A program failed; the text has the command, the end of its output and the log's path."""


class Interrupted(Exception):
    """`stop_all` was called."""


def run(
    *words: str | Path,
    what: str,
    log: Path,
    environment: dict[str, str] | None = None,
    progress: Callable[[], str] | None = None,
    quiet: bool = False,
    nice: int = 0,
    directory: Path = paths.ROOT,
) -> str:
    """Runs a program in `directory` and returns its output, which is also in `log`. Raises `CommandFailed`.

    Shows `what` and the progress, from `progress` or from the program's output; with `quiet`, shows nothing. `nice` lowers its priority. An
    exception ends the program and all programs that it started. `stop_all` does the same in every thread, and `Interrupted` is raised there.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("wb") as output, shown(what, quiet) as say:
        process = start(
            words,
            output,
            (os.environ if environment is None else environment) | COUNT_ALOUD,
            nice,
            directory,
        )
        try:
            while (status := wait(process, TERMINAL_TICK_SECONDS)) is None:
                say(lambda: (f"{time.monotonic() - started:.0f} s", progress() if progress else counted(log)))
        except BaseException:
            kill(process)
            raise
        finally:
            RUNNING.discard(process)
    if STOPPING.is_set():
        raise Interrupted
    text = without_progress(log.read_text(errors="replace"))
    if status != 0:
        tail = "\n  ".join(text.splitlines()[-TAIL_LINES:])
        command, *_ = " ".join(map(str, words)).splitlines()
        raise CommandFailed(f"  {tail}\n`{command[:200]}` failed (status {status}); its whole output is in {shorten(log)}")
    if not quiet:
        print(f"{what}: {time.monotonic() - started:.0f} s", flush=True)
    return text


@contextlib.contextmanager
def shown(what: str, quiet: bool):
    """Yields a callable that shows progress: on one line of a terminal, or on one line a minute in a log."""
    if quiet:
        yield lambda _: None
    elif sys.stdout.isatty():
        with Console().status(f"{what} ...") as status:
            yield lambda tell: status.update(f"{what} ...  {'  '.join(filter(None, tell()))}")
    else:
        print(f"{what} ...", flush=True)
        last = time.monotonic()

        def say(tell: Callable[[], tuple[str, str]]) -> None:
            nonlocal last
            if time.monotonic() - last >= LOG_TICK_SECONDS:
                last = time.monotonic()
                print(f"  ... {'  '.join(filter(None, tell()))}", flush=True)

        yield say


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def start(words: tuple[str | Path, ...], output, environment: dict[str, str], nice: int, directory: Path) -> subprocess.Popen:
    """Starts a program in its own session, so that Ctrl-C in the terminal reaches only us, and we end it in order."""
    with LOCK:
        if STOPPING.is_set():
            raise Interrupted
        process = subprocess.Popen(
            [*(["nice", f"-n{nice}"] if nice else []), *map(str, words)],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        RUNNING.add(process)
        if nice:
            give_way(process.pid, nice)
        return process


def give_way(pid: int, nice: int) -> None:
    """Lowers the priority of a whole session: if Linux groups tasks by session, `nice` only counts within a session (sched(7))."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def end_in_order() -> None:
    """Makes SIGINT, SIGTERM and SIGHUP end this process with an exception, so that its programs are ended, too."""
    for number in ENDING:
        signal.signal(number, end)


def end(number: int, _: object) -> None:
    ignore_signals()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def ignore_signals() -> None:
    """Once this process is ending, another signal would leave programs running. Only the main thread may call this."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def stop_all() -> None:
    """Ends the programs that other threads run, and prevents new ones. Call it from the main thread."""
    ignore_signals()
    with LOCK:
        STOPPING.set()
    running = list(RUNNING)
    # All at once, as each may need a while.
    for process in running:
        signal_session(process, signal.SIGTERM)
    for process in running:
        await_end(process)


def kill(process: subprocess.Popen) -> None:
    """Ends a program and its session, because a build's children outlive it. SIGTERM first, so that a program with servers can stop them."""
    signal_session(process, signal.SIGTERM)
    await_end(process)


def await_end(process: subprocess.Popen) -> None:
    """Waits until a program has ended that was told to, and kills what is left of its session."""
    if wait(process, 30) is None:
        signal_session(process, signal.SIGKILL)
        wait(process, 10)
    signal_session(process, signal.SIGKILL)


def signal_session(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def counted(log: Path) -> str:
    """The last count in a program's output: 12 of 345."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        found = COUNTED.findall(file.read().decode(errors="replace"))
    return "{} of {}".format(*found[-1]) if found else ""


def without_progress(text: str) -> str:
    """The text as a terminal finally shows it: a carriage return overwrites the line."""
    lines = ESCAPE.sub("", text).replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines)


def shorten(path: Path) -> str:
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)
