"""Tests several invocations at once in one environment, as in Lambda Managed Instances: the binary with our own Runtime API."""

import random

import pytest
from runtime_api import environment, event


@pytest.fixture
def runtime_api(servers, stack, tmp_path):
    """The Runtime API of one environment that takes four invocations at once."""
    settings = servers.environment() | stack.environment() | {"AWS_LAMBDA_MAX_CONCURRENCY": "4"}
    with environment(settings, tmp_path / "log") as api:
        yield api


def test_invocations_run_at_once_each_within_its_own_deadline(servers, runtime_api):
    chance = random.Random(5)
    with servers.postgres.connect(autocommit=True) as admin:
        before = admin.execute("select count(*) from user_logins").fetchone()[0]
        with admin.transaction():
            admin.execute("lock table user_logins")
            long = [runtime_api.invoke(event(chance, 10), seconds=30) for _ in range(2)]
            # Answered while the others are still running.
            short = runtime_api.invoke(event(chance, 10), seconds=2)
            kind, answer = runtime_api.answer(short, seconds=10)
            assert (kind, answer["errorType"]) == ("error", "Deadline")
            assert not runtime_api.answers.keys() & set(long)
        for request_id in long:
            assert runtime_api.answer(request_id) == ("response", {"batchItemFailures": []})
        assert admin.execute("select count(*) from user_logins").fetchone()[0] == before + 20
