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


def pytest_collection_modifyitems(items):
    """What runs in one process: a module's tests, which share what it sets up, and all tests of the one stack, which read its log."""
    for item in items:
        folder, module = item.path.parent.name, item.path.stem
        shares_stack = folder == "end_to_end" and module != "test_deployment"
        item.add_marker(pytest.mark.xdist_group("stack" if shares_stack else f"{folder}/{module}"))
