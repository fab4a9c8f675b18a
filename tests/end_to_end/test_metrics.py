"""Tests the deployed function's metrics of batches, and of failures outside of them."""

import json
import secrets
import time
import uuid
from contextlib import contextmanager

import pytest
from psycopg import sql
from waiting import until
from world import messages
from world.servers import DATABASE_SECRET, DATABASE_USER


def record(body, sent_seconds_ago=0, receives=1):
    return {
        "messageId": str(uuid.uuid4()),
        "receiptHandle": "handle",
        "body": body,
        "attributes": {"SentTimestamp": str(int((time.time() - sent_seconds_ago) * 1000)), "ApproximateReceiveCount": str(receives)},
        "eventSourceARN": "arn:aws:sqs:us-east-1:000000000000:logins",
    }


@pytest.fixture
def metrics_of(stack):
    """Invokes the function with the given records; returns the invocation's metrics."""

    def invoke(*records):
        before = all_metrics()
        event = json.dumps({"Records": records})
        answer = stack.localstack.client("lambda").invoke(FunctionName=stack.function_name, Payload=event)
        assert "FunctionError" not in answer, answer["Payload"].read()
        after = all_metrics()
        [request] = after.keys() - before.keys()
        return after[request]

    def all_metrics():
        return {line["RequestId"]: line for line in stack.log() if "_aws" in line}

    return invoke


@pytest.fixture
def login():
    return messages.make(1)[0]


@contextmanager
def secret_value(stack, secret_id, value):
    """Sets a secret to a value, and restores the former value in the end."""
    client = stack.localstack.client("secretsmanager")
    former = client.get_secret_value(SecretId=secret_id)["SecretString"]
    client.put_secret_value(SecretId=secret_id, SecretString=value)
    try:
        yield
    finally:
        client.put_secret_value(SecretId=secret_id, SecretString=former)


def restart(stack):
    """Makes the next invocation start a new environment."""
    functions = stack.localstack.client("lambda")
    functions.update_function_configuration(FunctionName=stack.function_name, Description=str(uuid.uuid4()))
    until(lambda: functions.get_function_configuration(FunctionName=stack.function_name)["LastUpdateStatus"] == "Successful")


def test_a_batch_has_the_age_of_its_oldest_good_message_and_the_highest_receive_count(metrics_of, login):
    metrics = metrics_of(record(login, 100, receives=2), record(login, 20), record("not JSON", 500, receives=7))
    assert 100 <= metrics["AgeOfOldestMessage"] < 110
    assert metrics["HighestReceiveCount"] == 7
    assert (metrics["Inserted"], metrics["Failed"]) == (2, 1)


def test_an_empty_batch_has_no_age_and_no_receives(metrics_of):
    assert {"AgeOfOldestMessage", "HighestReceiveCount"}.isdisjoint(metrics_of())


def test_credentials_that_are_refused_and_read_again_are_counted_once(servers, stack, metrics_of, login):
    assert metrics_of(record(login))["CredentialRefreshes"] == 0
    rotated = {"username": DATABASE_USER, "password": secrets.token_urlsafe(24)}
    with servers.postgres.connect(autocommit=True) as database:

        def password(value):
            database.execute(sql.SQL("alter role {} password {}").format(sql.Identifier(DATABASE_USER), value))
            database.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [DATABASE_USER])

        client = stack.localstack.client("secretsmanager")
        former = json.loads(client.get_secret_value(SecretId=DATABASE_SECRET)["SecretString"])["password"]
        with secret_value(stack, DATABASE_SECRET, json.dumps(rotated)):
            password(rotated["password"])
            try:
                assert metrics_of(record(login))["CredentialRefreshes"] == 1
                assert metrics_of(record(login))["CredentialRefreshes"] == 0
            finally:
                password(former)


def test_a_keyring_that_cannot_be_read_again_is_counted(stack, metrics_of, login):
    assert metrics_of(record(login))["KeyringFailures"] == 0
    with secret_value(stack, stack.masking_secret_arn, "no keyring"):
        # The stack's SecretsTtl is two seconds.
        assert until(lambda: metrics_of(record(login))["KeyringFailures"], 10) == 1
    restart(stack)


def test_a_ledger_that_cannot_be_pruned_is_counted(servers, stack, metrics_of, login):
    with servers.postgres.connect(autocommit=True) as database:
        database.execute(f"revoke delete on etl_ledger from {DATABASE_USER}")
        # If the schedule has run recently, batches leave pruning to it.
        database.execute("delete from etl_maintenance")
        try:
            restart(stack)
            assert metrics_of(record(login))["PruneFailures"] == 1
        finally:
            database.execute(f"grant delete on etl_ledger to {DATABASE_USER}")
    restart(stack)
    assert metrics_of(record(login))["PruneFailures"] == 0
