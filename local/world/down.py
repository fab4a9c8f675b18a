"""Stops what a kept world runs and deletes its data; the logs stay. Nothing happens if nothing is there."""

import contextlib
import sys

from world import paths
from world.localstack import LocalStack
from world.postgres import Postgres, PostgresError


def main() -> None:
    # It says so if none runs.
    with contextlib.suppress(RuntimeError):
        if localstack := LocalStack.attach(paths.LOCALSTACK):
            localstack.stop()
            print("LocalStack is stopped")
    postgres = Postgres(paths.POSTGRES)
    was_running = postgres.running
    # Its data also after a crash, and wherever they are.
    postgres.remove()
    if was_running:
        print("PostgreSQL is stopped")
    paths.ENV.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        main()
    except PermissionError as error:
        sys.exit(f"{error.filename} belongs to another user, who has to run this ({error.strerror})")
    except PostgresError as error:
        sys.exit(str(error))
