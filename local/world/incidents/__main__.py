"""Runs ./local/incidents."""

import os
import subprocess
import sys
import time
from pathlib import Path

from world import arguments, build, down, paths
from world.incidents import page
from world.incidents.page import Page
from world.incidents.plays import HEALTHY, INCIDENTS
from world.incidents.scene import Play, Scene, WentWrong
from world.command import CommandFailed
from world.localstack import LocalStackError
from world.postgres import PostgresError
from world.servers import Servers, alone

WORLD = paths.INCIDENTS_WORLD


def main() -> int:
    options = arguments.parse("incidents")
    plays = [play for play in [*INCIDENTS, HEALTHY] if play.name in options.only] if options.only else list(INCIDENTS)
    if options.write and not options.only:
        plays.append(HEALTHY)
    started = time.monotonic()
    with alone(WORLD):
        down.stop(WORLD)
        if options.build:
            paths.SAM_BUILD = options.build.resolve()
        else:
            build.function()
        if not options.etlctl:
            build.etlctl()
        etlctl = (options.etlctl or paths.ROOT / "target" / "debug" / "etlctl").resolve()
        with Servers(WORLD) as servers:
            # Records the applied schema.
            environment = {"PATH": os.environ["PATH"], **servers.environment()}
            subprocess.run([etlctl, "migrate"], env=environment, cwd=WORLD, check=True, capture_output=True)
            went_well = [run(servers, etlctl, play, options.write) for play in plays]
    print(f"\n{sum(went_well)} of {len(plays)} incidents went as in the runbook, in {time.monotonic() - started:.0f} s")
    return 0 if all(went_well) else 1


def run(servers: Servers, etlctl: Path, play: Play, write: bool) -> bool:
    """Plays an incident; returns whether it went as in the runbook."""
    print(f"\n--- {play.name}")
    started = time.monotonic()
    try:
        with Scene(servers, etlctl, play) as scene:
            play.act(scene)
            played = Page(play, scene, scene.account())
    except WentWrong as failure:
        print(f"It went wrong: {failure}")
        return False
    if play in INCIDENTS:
        print(f"\n{played.text()}")
    (WORLD / f"{play.name}.svg").write_text(played.picture())
    if write:
        page.write(played, play.name)
    print(f"{play.name}: {time.monotonic() - started:.0f} s; {WORLD.relative_to(paths.ROOT)}/{play.name}.svg is its dashboard")
    return True


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (PostgresError, LocalStackError, CommandFailed, subprocess.CalledProcessError) as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; everything is stopped.")
