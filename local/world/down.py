"""Runs ./local/down: stops the servers of every local world and deletes their data."""

import contextlib
import sys
from pathlib import Path

from world import arguments, paths
from world.localstack import LocalStack
from world.postgres import Postgres, PostgresError
from world.servers import alone


def main() -> None:
    arguments.parse("down")
    for world in paths.WORLDS:
        if world.exists():
            with alone(world):
                stop(world)


def stop(world: Path) -> None:
    """Stops the servers of one world."""
    # `attach` raises if none runs.
    with contextlib.suppress(RuntimeError):
        LocalStack.attach(world / "localstack").stop()
        print("LocalStack is stopped")
    postgres = Postgres(world / "postgres")
    was_running = postgres.running
    # Removes the data even if the server is not running.
    postgres.remove()
    if was_running:
        print("PostgreSQL is stopped")
    if world == paths.WORLD:
        paths.ENV.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        main()
    except PermissionError as error:
        sys.exit(f"{error.filename} belongs to another user: run this as that user ({error.strerror})")
    except PostgresError as error:
        sys.exit(str(error))
