"""The world that `./local/test` started: a PostgreSQL, a LocalStack, and the stack deployed into it, logging at TRACE."""

import os
from pathlib import Path

import pytest
from world.servers import Servers
from world.stack import Stack


@pytest.fixture(scope="session")
def servers():
    directory = os.environ.get("LOGIN_ETL_WORLD")
    assert directory, "LOGIN_ETL_WORLD is not set: run ./local/test"
    return Servers.attach(Path(directory))


@pytest.fixture(scope="session")
def stack(servers):
    return Stack(servers)
