"""Checks that the local world works without the machine's own files, and leaves no file outside of the checkout.

Runs in its own mount namespace: the home directory, /tmp, /var/tmp and /var/lib are empty there; /var/lib and everything else outside of the
checkout is read-only. The check deploys the stack, sends one message, and waits for its row.
"""

import contextlib
import os
import pwd
import shlex
import subprocess
import sys
import time
from pathlib import Path

from world import command, delivery, messages, paths, stack
from world.command import CommandFailed
from world.servers import Servers

PATIENCE_SECONDS = 60
CANNOT = "this user may not make a mount namespace on this machine (unshare)"


def check() -> str | None:
    """Returns why the check cannot run here, or None. Raises `CommandFailed` if the world does not work there, or left a file outside."""
    unshare = usable_unshare()
    if not unshare:
        return CANNOT
    log = paths.LOGS / "fresh.log"
    command.run(*unshare, "sh", "-euc", script(hidden(), kept()), what="Starting the world on an empty machine", log=log, quiet=True)
    return None


def usable_unshare() -> list[str] | None:
    """The command prefix that runs a command in its own mount namespace; None if that is not allowed."""
    words = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-current-user", "--keep-caps", "--mount"]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run([*words, "mount", "-t", "tmpfs", "none", "/tmp"], capture_output=True, cwd="/").returncode == 0:
            return words
    return None


def hidden() -> list[Path]:
    home = Path.home()
    # In some containers the user id has no name and no home.
    with contextlib.suppress(KeyError):
        home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    places = [path for path in (home.resolve(), Path("/tmp"), Path("/var/tmp"), Path("/var/lib")) if path != Path("/") and path.is_dir()]
    # A directory inside another one is hidden with it.
    return [place for place in places if not any(place != other and place.is_relative_to(other) for other in places)]


def kept() -> list[Path]:
    """Directories that stay visible even inside a hidden one: the checkout, and the Python installation."""
    return [paths.ROOT, Path(sys.base_prefix).resolve()]


def script(hidden: list[Path], kept: list[Path]) -> str:
    """A shell script that prepares the namespace, starts the world in it, and looks for files that it left."""
    lines = []
    # Open file descriptors, from 5 on, keep directories reachable after they are hidden.
    held = [path for path in kept if any(path.is_relative_to(place) for place in hidden)]
    for number, path in enumerate(held, 5):
        lines.append(f"exec {number}<{shlex.quote(str(path))}")
    for place in hidden:
        lines.append(f"mount -t tmpfs -o mode=1777 fresh {shlex.quote(str(place))}")
    for number, path in enumerate(held, 5):
        lines.append(f"mkdir -p {shlex.quote(str(path))}")
        lines.append(f"mount --no-canonicalize --bind /proc/self/fd/{number} {shlex.quote(str(path))}")
    root = shlex.quote(str(paths.ROOT))
    if paths.ROOT not in held:
        lines.append(f"mount --bind {root} {root}")
    lines.append("mount -o remount,bind,ro /")
    if Path("/var/lib") in hidden:
        lines.append("mount -o remount,ro /var/lib")
    places = " ".join(shlex.quote(str(place)) for place in hidden)
    lines.append(f"there() {{ find {places} -xdev; }}")
    lines.append("before=$(there)")
    lines.append(f"cd {root}")
    world = f"{shlex.quote(sys.executable)} -m world.fresh"
    if os.geteuid() != 0:
        world = f"setpriv --inh-caps=-all --ambient-caps=-all {world}"
    lines.append(world)
    lines.append("after=$(there)")
    lines.append('if echo "$after" | grep -vxF "$before"; then echo "These files were left outside of the checkout."; exit 1; fi')
    return "\n".join(lines)


def inside() -> None:
    """Deploys the stack, sends a message, and waits for its row."""
    with Servers(paths.FRESH_WORLD) as servers:
        deployed = stack.deploy(servers, name="fresh", quiet=True)
        [body] = messages.make(1)
        delivery.send(deployed, [body])
        deadline = time.monotonic() + PATIENCE_SECONDS
        with servers.postgres.connect(autocommit=True) as database:
            while database.execute("select count(*) from user_logins").fetchone()[0] != 1:
                if time.monotonic() > deadline:
                    raise CommandFailed(f"no row for the message within {PATIENCE_SECONDS} s; the function's log:\n{deployed.log_text()[-3000:]}")
                time.sleep(0.1)
    print("One message, one row.")


if __name__ == "__main__":
    inside()
