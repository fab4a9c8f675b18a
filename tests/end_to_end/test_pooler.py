"""Tests the function behind PgBouncer in transaction mode, which gives each transaction another session."""

import contextlib
import json
import random
import uuid

import psycopg
import pytest
from runtime_api import environment, event
from waiting import until
from world import delivery, messages, pgbouncer
from world.pgbouncer import PgBouncer
from world.servers import DATABASE_SECRET, DATABASE_USER

# `./local/test` reports that it was left out.
pytestmark = pytest.mark.skipif(pgbouncer.program() is None, reason=pgbouncer.MISSING)

WARNING = "pooler detected; prepared statements disabled"


def open_sessions(pooler, credentials, number):
    """Has the pooler open `number` sessions, with as many transactions at once. Each later transaction then gets the longest idle session."""
    user, password = credentials["username"], credentials["password"]
    with contextlib.ExitStack() as transactions:
        for _ in range(number):
            database = transactions.enter_context(
                psycopg.connect(host="127.0.0.1", port=pooler.port, dbname="postgres", user=user, password=password, prepare_threshold=None)
            )
            database.execute("select 1")


@pytest.mark.parametrize("copy_threshold", ["10001", "2"])
def test_every_message_is_a_row_once(servers, stack, copy_threshold):
    functions = stack.localstack.client("lambda")
    variables = functions.get_function_configuration(FunctionName=stack.function_name)["Environment"]["Variables"]
    credentials = json.loads(stack.localstack.client("secretsmanager").get_secret_value(SecretId=DATABASE_SECRET)["SecretString"])

    def configure(**changed):
        functions.update_function_configuration(FunctionName=stack.function_name, Environment={"Variables": variables | changed})
        until(lambda: functions.get_function_configuration(FunctionName=stack.function_name)["LastUpdateStatus"] == "Successful")

    logins = [messages.login(random.Random(f"pooler {copy_threshold} {number}")) for number in range(300)]
    users = [login["user_id"] for login in logins]
    warnings = stack.log_text().count(WARNING)
    with PgBouncer(pgbouncer.program(), servers.postgres, credentials["username"], credentials["password"], sessions=2) as pooler:
        open_sessions(pooler, credentials, 2)
        configure(DATABASE_PORT=str(pooler.port), COPY_THRESHOLD=copy_threshold)
        try:
            delivery.send(stack, [json.dumps(login) for login in logins])
            with servers.postgres.connect(autocommit=True) as database:
                count = "select count(*) from user_logins where user_id = any(%s)"
                until(lambda: database.execute(count, [users]).fetchone()[0] >= len(users))
                until(lambda: sum(stack.depth(stack.queue_url)) == 0)
                assert database.execute(count, [users]).fetchone()[0] == len(users)
        finally:
            configure()
    assert stack.log_text().count(WARNING) > warnings


def test_a_rotated_password_is_read_again_behind_the_pooler(servers, stack, tmp_path):
    """PgBouncer's SQLSTATE for a wrong password differs from PostgreSQL's."""
    secrets, user, secret = stack.localstack.client("secretsmanager"), "rotated_behind_the_pooler", "test/rotated-behind-the-pooler"
    program = pgbouncer.program()
    with servers.postgres.connect(autocommit=True) as database:
        database.execute(f"create role {user} login password 'before' in role {DATABASE_USER}")
        secrets.create_secret(Name=secret, SecretString=json.dumps({"username": user, "password": "before"}))
        try:
            with PgBouncer(program, servers.postgres, user, "before", sessions=2) as pooler:
                settings = servers.environment() | stack.environment() | {"DATABASE_SECRET_ID": secret, "DATABASE_PORT": str(pooler.port)}
                with environment(settings, tmp_path / "log") as api:
                    assert load(api) == ("response", {"batchItemFailures": []})
                    pooler.__exit__()
                    database.execute(f"alter role {user} password 'after'")
                    secrets.put_secret_value(SecretId=secret, SecretString=json.dumps({"username": user, "password": "after"}))
                    with PgBouncer(program, servers.postgres, user, "after", sessions=2, port=pooler.port):
                        assert load(api) == ("response", {"batchItemFailures": []})
        finally:
            database.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [user])
            database.execute(f"drop role {user}")


@pytest.mark.parametrize(
    "changed, secret, error_type, advice",
    [
        ({"DATABASE_NAME": "nowhere"}, {}, "Database", "no such database; set DATABASE_NAME"),
        ({}, {"username": "nobody_at_all"}, "DatabaseCredentials", "check username and password in the database secret"),
        ({"DATABASE_TLS": "disable"}, {}, "Database", "the pooler requires TLS; remove DATABASE_TLS=disable"),
    ],
)
def test_what_the_pooler_refuses_is_named(servers, stack, tmp_path, changed, secret, error_type, advice):
    secrets, name = stack.localstack.client("secretsmanager"), f"test/behind-the-pooler-{uuid.uuid4()}"
    credentials = json.loads(secrets.get_secret_value(SecretId=DATABASE_SECRET)["SecretString"])
    secrets.create_secret(Name=name, SecretString=json.dumps(credentials | secret))
    with PgBouncer(pgbouncer.program(), servers.postgres, credentials["username"], credentials["password"], sessions=2) as pooler:
        settings = servers.environment() | stack.environment() | {"DATABASE_SECRET_ID": name, "DATABASE_PORT": str(pooler.port)}
        with environment(settings | changed, tmp_path / "log") as api:
            kind, answer = load(api)
    assert (kind, answer["errorType"]) == ("error", error_type)
    assert advice in answer["errorMessage"]
    # The runtime's own ERROR line would have come second.
    assert (tmp_path / "log").read_text().count("ERROR") == 1


def load(api):
    return api.answer(api.invoke(event(random.Random(), 10), seconds=20))
