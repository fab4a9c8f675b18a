"""The servers of a local world, and the settings for connecting to them."""

import fcntl
import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from psycopg import sql
from world import command, paths
from world.localstack import CREDENTIALS, REGION, LocalStack
from world.postgres import Postgres

DATABASE_SECRET = "login-etl/database"
# The function's user, which the schema creates.
DATABASE_USER = "login_etl"
# The credentials of the tables' owner, with which etlctl works.
OPERATOR_SECRET = "login-etl/operator"


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Locks `directory` against other runs, and makes signals end this process in order."""
    command.end_in_order()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        opened = (directory / "lock").open("w")
    except PermissionError as error:
        sys.exit(f"{error.filename} cannot be written; if it belongs to another user, run this as that user ({error.strerror})")
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit("another run is using this checkout; wait for it, or stop it")
        yield


class Servers:
    """A PostgreSQL with the schema applied, and a LocalStack with the secret of the function's credentials."""

    def __init__(self, directory: Path):
        self.name = directory.name
        self.postgres = Postgres(directory / "postgres")
        self.localstack = LocalStack(directory / "localstack", Path(sys.executable))

    @classmethod
    def attach(cls, directory: Path) -> "Servers":
        """The servers that another process started in `directory`; raises `RuntimeError` if one of them does not run."""
        servers = cls(directory)
        servers.localstack = LocalStack.attach(directory / "localstack")
        if not (postgres := Postgres.attach(directory / "postgres")):
            raise RuntimeError(f"no PostgreSQL runs in {directory}")
        servers.postgres = postgres
        return servers

    def __enter__(self) -> "Servers":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        # A killed run may have left one.
        with suppress(RuntimeError):
            LocalStack.attach(self.localstack.directory).stop()
        self.postgres.start()
        self.localstack.start()
        self.apply_schema("postgres")
        secret = {"username": DATABASE_USER, "password": secrets.token_urlsafe(24)}
        with self.postgres.connect() as connection:
            connection.execute(sql.SQL("alter role {} password {}").format(sql.Identifier(DATABASE_USER), secret["password"]))
        self.localstack.client("secretsmanager").create_secret(Name=DATABASE_SECRET, SecretString=json.dumps(secret))
        secret = {"username": "postgres", "password": self.postgres.admin_password}
        self.localstack.client("secretsmanager").create_secret(Name=OPERATOR_SECRET, SecretString=json.dumps(secret))

    def stop(self) -> None:
        """Stops both and deletes PostgreSQL's data; the logs stay."""
        self.localstack.stop()
        self.postgres.remove()

    def apply_schema(self, database: str) -> None:
        with self.postgres.connect(database) as connection:
            for file in sorted((paths.ROOT / "schema").glob("*.sql")):
                connection.execute(file.read_text())

    @property
    def database_secret_arn(self) -> str:
        return self.localstack.client("secretsmanager").describe_secret(SecretId=DATABASE_SECRET)["ARN"]

    def database_settings(self) -> dict[str, str]:
        """The function's settings for this PostgreSQL."""
        return {
            "DATABASE_HOST": self.postgres.host,
            "DATABASE_PORT": str(self.postgres.port),
            "DATABASE_NAME": "postgres",
            "DATABASE_CA": str(self.postgres.ca_file),
        }

    def trust(self) -> dict[str, str]:
        """Settings that make a program of ours trust LocalStack's authority for AWS, and read none of the system's roots, which would take longer
        than all else in a short command."""
        return {"SSL_CERT_FILE": "/dev/null", "AWS_CA_BUNDLE": str(self.localstack.ca_file)}

    def environment(self) -> dict[str, str]:
        """Settings with which an AWS SDK or CLI reaches this LocalStack, and the function or a test both servers."""
        return {
            "AWS_ENDPOINT_URL": self.localstack.endpoint,
            **CREDENTIALS,
            "DATABASE_SECRET_ID": DATABASE_SECRET,
            "DATABASE_ADMIN_PASSWORD": self.postgres.admin_password,
            "ETLCTL_DATABASE_SECRET_ID": OPERATOR_SECRET,
            **self.database_settings(),
        }
