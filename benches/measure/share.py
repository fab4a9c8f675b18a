"""Limits a process to a Lambda memory size and its share of a core, with Linux control groups."""

import contextlib
import os
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
# With this memory a function has one core: https://docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html
ONE_CORE_MB = 1769
# Lambda's own period is not published. It changes single durations, but hardly their mean.
PERIOD_US = 20_000


class NoShare(Exception):
    """A process cannot be limited to a share here; the text has the reason."""


class Share:
    """Owns the control groups of one process. The memory limit holds from its start, the CPU limit from `throttle` on."""

    def __init__(self, memory_mb: int):
        """Raises `NoShare` if control groups cannot be made, for example without root's rights."""
        self._memory_mb = memory_mb
        name = f"login-etl-bench-{os.getpid()}"
        try:
            self._one = not (MOUNT / "cgroup.controllers").exists()
            # Version 1: within our own groups, whose limits still hold. Version 2: at the top, because a group with processes cannot have limited
            # children.
            self._cpu, self._memory = (own("cpu") / name, own("memory") / name) if self._one else (MOUNT / name, MOUNT / name)
            self._groups = {self._cpu, self._memory}
        except OSError as error:
            raise NoShare(f"no control groups: {error.strerror}") from None
        try:
            for group in self._groups:
                group.mkdir()
            limit = str(memory_mb * 2**20)
            (self._memory / ("memory.limit_in_bytes" if self._one else "memory.max")).write_text(limit)
            with contextlib.suppress(OSError):  # a kernel without swap
                (self._memory / ("memory.memsw.limit_in_bytes" if self._one else "memory.swap.max")).write_text(limit if self._one else "0")
            self._set(PERIOD_US)
        except OSError as error:
            self.__exit__()
            raise NoShare(f"control groups cannot be made here: {error.strerror}") from None

    def __enter__(self) -> "Share":
        return self

    def __exit__(self, *_) -> None:
        for group in self._groups:
            with contextlib.suppress(OSError):
                group.rmdir()

    def command(self, program: str) -> list[str]:
        """A command that joins the groups and then becomes the program."""
        joining = "; ".join(f'echo $$ > "{group}/cgroup.procs"' for group in self._groups)
        return ["/bin/sh", "-c", f'set -e; {joining}; exec "$0"', program]

    def throttle(self) -> None:
        """Limits the process to its share of a core from now on."""
        self._set(PERIOD_US * self._memory_mb // ONE_CORE_MB)

    def killed(self) -> int:
        """The number of processes killed because they ran out of memory."""
        file = self._memory / ("memory.oom_control" if self._one else "memory.events")
        return int(dict(line.split() for line in file.read_text().splitlines())["oom_kill"])

    def _set(self, quota_us: int) -> None:
        if self._one:
            (self._cpu / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self._cpu / "cpu.cfs_quota_us").write_text(str(quota_us))
        else:
            (self._cpu / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")


def own(controller: str) -> Path:
    """This process's own group of a controller, in version 1."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            inside = MOUNT / controller / path.lstrip("/")
            # A container's groups can have other names inside it.
            return inside if inside.exists() else MOUNT / controller
    raise FileNotFoundError(2, f"no controller {controller}")
