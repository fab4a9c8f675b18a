"""Tests the deployed stack's schedule: its event deletes expired data, and no other event does. LocalStack stores schedules, but runs none."""

import json

import pytest

EXPIRED = "etl_ledger where sent_at > 'epoch' and sent_at < now() - interval '35 days'"


@pytest.fixture
def schedule(stack):
    return stack.localstack.client("scheduler").get_schedule(Name=f"{stack.name}-maintenance")


@pytest.fixture
def expired(servers):
    """Inserts a thousand expired ledger keys; yields a function that returns how many are left."""
    with servers.postgres.connect(autocommit=True) as database:
        database.execute("insert into etl_ledger select now() - interval '36 days' - n * interval '1 s', md5(n::text)::uuid from generate_series(1, 1000) n")
        yield lambda: database.execute(f"select count(*) from {EXPIRED}").fetchone()[0]
        database.execute(f"delete from {EXPIRED}")
        database.execute("delete from etl_maintenance")


def invoke(stack, event):
    answer = stack.localstack.client("lambda").invoke(FunctionName=stack.function_name, Payload=event)
    return answer.get("FunctionError"), json.load(answer["Payload"])


def test_the_schedules_event_deletes_expired_data(servers, stack, schedule, expired):
    assert schedule["State"] == "ENABLED" and schedule["Target"]["Arn"].split(":")[-1] == stack.function_name
    assert json.loads(schedule["Target"]["Input"]) == {"maintenance": schedule["Arn"]}
    assert invoke(stack, schedule["Target"]["Input"]) == (None, {"batchItemFailures": []})
    assert expired() == 0
    # Each environment has its own log.
    done = max((line for line in stack.log() if line.get("message") == "maintenance done"), key=lambda line: line["timestamp"])
    assert (done["keys"], done["rows"], done["more"]) == (1000, 0, False)
    metric = max((line for line in stack.log() if "Maintained" in line), key=lambda line: line["_aws"]["Timestamp"])
    assert metric["Maintained"] == 1
    with servers.postgres.connect() as database:
        assert database.execute("select now() - done_at < interval '1 minute' from etl_maintenance").fetchone() == (True,)


@pytest.mark.parametrize(
    "event",
    [
        {"maintenance": "arn:aws:scheduler:us-east-1:000000000000:schedule/default/a-stranger-s"},
        {"maintenance": ""},
        {"maintenance": True},
        {"maintenance": {"schedule": "login-etl-maintenance"}},
        {"source": "aws.events", "detail-type": "Scheduled Event", "detail": {}},
        ["maintenance"],
    ],
    ids=str,
)
def test_no_other_event_deletes_anything(stack, expired, event):
    error, answer = invoke(stack, json.dumps(event))
    assert error and answer["errorType"] == "InvalidEvent"
    assert expired() == 1000


def test_an_event_with_records_and_the_schedules_arn_is_a_batch(servers, stack, schedule):
    event = {"Records": [], "maintenance": schedule["Arn"]}
    assert invoke(stack, json.dumps(event)) == (None, {"batchItemFailures": []})
    with servers.postgres.connect() as database:
        assert database.execute("select count(*) from etl_maintenance").fetchone() == (0,)
