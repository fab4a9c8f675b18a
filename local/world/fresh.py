"""Sees that the local world needs nothing of this machine, and leaves nothing on it, but what is in the checkout.

It runs in a mount namespace of its own: the home directory, /tmp, /var/tmp and /var/lib are empty there, the last one and all else outside of the
checkout cannot be written. In it, the stack is deployed, one message is sent, and its row is looked for.
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
CANNOT = "this machine does not let its users make a mount namespace (unshare)"


def check() -> str | None:
    """Why the check could not be made, if it could not. Raises `CommandFailed` if the world does not work there, or left a file outside."""
    unshare = usable_unshare()
    if not unshare:
        return CANNOT
    log = paths.LOGS / "fresh.log"
    command.run(*unshare, "sh", "-euc", script(hidden(), kept()), what="Starting the world on an empty machine", log=log, quiet=True)
    return None


def usable_unshare() -> list[str] | None:
    """The words that begin a command in a mount namespace of its own; None where that is not allowed."""
    words = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-current-user", "--keep-caps", "--mount"]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run([*words, "mount", "-t", "tmpfs", "none", "/tmp"], capture_output=True, cwd="/").returncode == 0:
            return words
    return None


def hidden() -> list[Path]:
    home = Path.home()
    # Some containers run under a number that has no name, nor a home.
    with contextlib.suppress(KeyError):
        home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    places = [path for path in (home.resolve(), Path("/tmp"), Path("/var/tmp"), Path("/var/lib")) if path != Path("/") and path.is_dir()]
    # What is in another one is hidden with it.
    return [place for place in places if not any(place != other and place.is_relative_to(other) for other in places)]


def kept() -> list[Path]:
    """What is needed although it may lie in a hidden place: the checkout, and the Python that it runs on."""
    return [paths.ROOT, Path(sys.base_prefix).resolve()]


def script(hidden: list[Path], kept: list[Path]) -> str:
    """What prepares the namespace, starts the world in it, and looks for what it left."""
    lines = []
    # What is hidden soon is held by open directories, numbered from 5 on.
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
    lines.append(f"cd {root}")
    world = f"{shlex.quote(sys.executable)} -m world.fresh"
    if os.geteuid() != 0:
        world = f"setpriv --inh-caps=-all --ambient-caps=-all {world}"
    lines.append(world)
    # Directories are what leads to the kept places.
    places = " ".join(shlex.quote(str(place)) for place in hidden)
    lines.append(f"left=$(find {places} -xdev ! -type d)")
    lines.append('[ -z "$left" ] || { echo "Files were left outside of the checkout:"; echo "$left"; exit 1; }')
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
                    raise CommandFailed(f"the message's row is not there after {PATIENCE_SECONDS} s; the function's log:\n{deployed.log_text()[-3000:]}")
                time.sleep(0.1)
    print("One message, one row.")


if __name__ == "__main__":
    inside()
