"""Fixtures for the world that `./local/test` started: PostgreSQL, LocalStack, and the deployed stack, which logs at TRACE."""

import os
import signal
from pathlib import Path

import pytest
from world import command
from world.servers import Servers
from world.stack import Stack


def interrupt(*_):
    command.ignore_signals()
    raise KeyboardInterrupt


# As Ctrl-C does, so that the programs that a test has started end with it.
signal.signal(signal.SIGTERM, interrupt)


@pytest.fixture(scope="session")
def servers():
    directory = os.environ.get("LOGIN_ETL_WORLD")
    assert directory, "LOGIN_ETL_WORLD is not set: run ./local/test, or one test as docs/develop.md shows"
    return Servers.attach(Path(directory))


@pytest.fixture(scope="session")
def stack(servers):
    return Stack(servers)
