"""A separate database for each test, with the schema and the partitioning functions."""

import sys
from pathlib import Path

import pytest
from world import paths

sys.path.insert(0, str(Path(__file__).parents[1] / "etlctl"))
from driver import World


@pytest.fixture
def world(servers):
    world = World(servers)
    try:
        result = world.run("migrate")
        assert result.returncode == 0, result.stderr
        with world.connect() as database:
            for file in ("partitions", "turn"):
                database.execute((paths.ROOT / "schema" / "partitioning" / f"{file}.sql").read_text())
        yield world
    finally:
        with servers.postgres.connect(autocommit=True) as database:
            database.execute(f"drop database {world.name} with (force)")
            database.execute(f"drop role if exists {world.name}_user")
