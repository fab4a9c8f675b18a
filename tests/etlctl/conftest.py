"""`etlctl` as a process, against a real PostgreSQL and LocalStack; `./local/test` starts both and deploys the stack."""

import json
import os
import subprocess
import uuid
from pathlib import Path

import psycopg
import pytest
from world import paths
from world.localstack import CREDENTIALS
from world.servers import DATABASE_SECRET, OPERATOR_SECRET, Servers
from world.stack import Stack

ETLCTL = paths.ROOT / "target" / "debug" / "etlctl"
# NIST SP 800-38A's AES-256 key, in the one-key form of the original script.
ONE_KEY = {"key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4", "iv": "000102030405060708090a0b0c0d0e0f"}


@pytest.fixture(scope="session")
def servers():
    directory = os.environ.get("LOGIN_ETL_WORLD")
    assert directory, "LOGIN_ETL_WORLD is not set: run ./local/test"
    return Servers.attach(Path(directory))


@pytest.fixture(scope="session")
def stack(servers):
    return Stack(servers)


class World:
    """A database and a keyring of one test's own, and `etlctl` pointed at them."""

    def __init__(self, servers: Servers):
        self.servers = servers
        self.name = f"etlctl_{uuid.uuid4().hex[:12]}"
        self.masking_secret = f"{self.name}/masking"
        self.secrets = servers.localstack.client("secretsmanager")
        self.secrets.create_secret(Name=self.masking_secret, SecretString=json.dumps(ONE_KEY))
        with servers.postgres.connect(autocommit=True) as database:
            database.execute(f"create database {self.name}")
        self.environment = {
            "PATH": os.environ["PATH"],
            "AWS_ENDPOINT_URL": servers.localstack.endpoint,
            **CREDENTIALS,
            **servers.database_settings(),
            "DATABASE_NAME": self.name,
            "DATABASE_SECRET_ID": DATABASE_SECRET,
            "ETLCTL_DATABASE_SECRET_ID": OPERATOR_SECRET,
            "MASKING_SECRET_ID": self.masking_secret,
        }

    def run(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """Runs `etlctl` to its end, with pipes where a person would have a terminal. `environment` overrides variables; None unsets one."""
        environment = self.environment | options.pop("environment", {})
        environment = {name: value for name, value in environment.items() if value is not None}
        options = {"stdin": subprocess.DEVNULL} | options if "input" not in options else options
        return subprocess.run(
            [ETLCTL, *arguments], env=environment, capture_output=True, text=True, timeout=120, cwd=self.servers.localstack.directory, **options
        )

    def json(self, *arguments: str, status: int = 0, **options):
        """What `etlctl --json` answers."""
        result = self.run("--json", *arguments, **options)
        assert result.returncode == status, result.stderr
        return json.loads(result.stdout)

    def connect(self) -> psycopg.Connection:
        """A session of the database's owner, each statement committed by itself."""
        return self.servers.postgres.connect(self.name, autocommit=True)

    def keyring(self) -> dict:
        return json.loads(self.secrets.get_secret_value(SecretId=self.masking_secret)["SecretString"])

    def put_keyring(self, keyring: dict) -> None:
        self.secrets.put_secret_value(SecretId=self.masking_secret, SecretString=json.dumps(keyring))


@pytest.fixture
def empty_world(servers):
    """Without the schema."""
    world = World(servers)
    yield world
    with servers.postgres.connect(autocommit=True) as database:
        database.execute(f"drop database {world.name} with (force)")


@pytest.fixture
def world(empty_world):
    result = empty_world.run("migrate")
    assert result.returncode == 0, result.stderr
    return empty_world
