"""Tests of `etlctl` against a real PostgreSQL, LocalStack, and the function deployed there."""

import pytest
from driver import Etlctl, World
from queues import Pipeline


@pytest.fixture
def etlctl(tmp_path):
    """Without any setting."""
    return Etlctl({}, tmp_path)


@pytest.fixture
def empty_world(servers):
    """Without the schema."""
    world = World(servers)
    yield world
    with servers.postgres.connect(autocommit=True) as database:
        database.execute(f"drop database {world.name} with (force)")
        database.execute(f"drop role if exists {world.name}_user")


@pytest.fixture
def world(empty_world):
    result = empty_world.run("migrate")
    assert result.returncode == 0, result.stderr
    return empty_world


@pytest.fixture(scope="module")
def pipeline(servers, stack):
    pipeline = Pipeline(servers, stack)
    result = pipeline.run("migrate")
    assert result.returncode == 0, result.stderr
    # Creates the log.
    assert pipeline.invoke([]) == set()
    yield pipeline
    pipeline.delete()
