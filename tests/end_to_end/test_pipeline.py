"""The deployed stack: messages through a real queue, LocalStack's event source mapping, the function's binary and a real PostgreSQL."""

import json
import random
import time

import pytest
from world import delivery, messages, paths
from world.stack import PARAMETERS

RECEIVES = PARAMETERS["MaxReceiveCount"]
BAD = {
    messages.WRONG_TYPE: "user_id is missing",
    "not JSON": "body is not JSON",
    '["a", "list"]': "body is not a JSON object",
    json.dumps(messages.login(random.Random(0), app_version="99.999.999.999")): "app_version does not fit an integer",
    json.dumps(messages.login(random.Random(0), device_id="a\0b")): "device_id contains a NUL character",
    json.dumps(messages.login(random.Random(0), ip=12)): "ip is not a string",
}


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)
    return result


def empty(stack):
    return sum(stack.depth(stack.queue_url)) == 0


def invoke(stack, event):
    answer = stack.localstack.client("lambda").invoke(FunctionName=stack.function_name, Payload=event)
    return answer.get("FunctionError"), json.load(answer["Payload"])


@pytest.fixture(scope="module")
def run(servers, stack):
    """A hundred messages, poison among them and one delivered twice, all the way through."""
    chance = random.Random(7)
    logins = [messages.login(chance) for _ in range(100 - len(BAD))]
    bodies = [json.dumps(login) for login in logins] + list(BAD)
    chance.shuffle(bodies)
    with servers.postgres.connect() as database:
        database.execute("truncate user_logins, user_logins_ledger")
    sent = delivery.send(stack, bodies)
    until(lambda: empty(stack))
    dead = {message["MessageId"]: message["Body"] for message in delivery.receive_all(stack, stack.dead_letter_queue_url)}
    until(lambda: dead.keys() <= {line.get("message_id") for line in stack.log()})
    return {"logins": logins, "sent": sent, "dead": dead, "log": stack.log()}


def test_every_valid_message_becomes_one_row_and_every_other_goes_to_the_dead_letter_queue(servers, run):
    with servers.postgres.connect() as database:
        rows = database.execute("select user_id, device_type, locale from user_logins").fetchall()
    assert sorted(rows, key=str) == sorted(((row["user_id"], row["device_type"], row["locale"]) for row in run["logins"]), key=str)
    assert sorted(run["dead"].values()) == sorted(BAD)


def test_each_bad_message_is_received_max_receive_count_times_for_its_own_reason(run):
    failures = [line for line in run["log"] if line.get("message") == "message failed"]
    for message_id, body in run["dead"].items():
        assert [line["reason"] for line in failures if line["message_id"] == message_id] == [BAD[body]] * RECEIVES


def test_the_metrics_account_for_every_message(run):
    events = [line for line in run["log"] if "_aws" in line]
    total = {name: sum(event[name] for event in events) for name in ("Messages", "Inserted", "Deduplicated", "Failed", "BatchesFailed")}
    assert total["Inserted"] == len(run["logins"])
    assert total["Failed"] == len(BAD) * RECEIVES
    assert total["Messages"] == total["Inserted"] + total["Deduplicated"] + total["Failed"]
    assert {event["Outcome"] for event in events} == {"Ok"}
    assert {event["FunctionName"] for event in events} == {"login-etl"}


def test_log_lines_carry_level_and_request_id(run):
    lines = [line for line in run["log"] if line.get("message") == "batch loaded"]
    assert lines
    for line in lines:
        assert line["level"] == "INFO"
        assert line["span"]["requestId"]


def test_no_personal_value_key_or_password_is_in_any_log(servers, stack, run):
    secrets = {stack.key().hex(), servers.postgres.admin_password}
    for login in run["logins"]:
        secrets |= {login["ip"], login["device_id"], login["user_id"]}
    logs = [path for path in stack.localstack.function_logs.iterdir() if path.name.startswith(f"{stack.function_name}-")]
    text = "".join(path.read_text() for path in logs)
    assert text.count('"message":"batch loaded"') > 0
    assert [secret for secret in secrets if secret in text] == []


def test_sample_events_are_answered_as_lambda_wants_it(stack):
    for name, failed in {"valid": [], "mixed": [1, 2, 4, 5], "duplicates": [], "fifo": [2, 3], "empty": []}.items():
        event = (paths.ROOT / "events" / f"{name}.json").read_text()
        ids = [record["messageId"] for record in json.loads(event)["Records"]]
        for _ in range(2):
            assert invoke(stack, event) == (None, {"batchItemFailures": [{"itemIdentifier": ids[place]} for place in failed]})


def test_an_event_that_is_not_from_sqs_is_an_error_that_quotes_nothing(stack):
    error, answer = invoke(stack, '{"Records": [{"messageId": "1", "body": {"ip": "canary"}}]}')
    assert error
    assert answer["errorType"] == "InvalidEvent"
    assert "canary" not in json.dumps(answer)
    assert "canary" not in json.dumps(stack.log())


def test_an_environment_with_a_wrong_setting_does_not_start_and_says_why(stack):
    functions = stack.localstack.client("lambda")

    def configure(variables):
        functions.update_function_configuration(FunctionName=stack.function_name, Environment={"Variables": variables})
        until(lambda: functions.get_function_configuration(FunctionName=stack.function_name)["LastUpdateStatus"] == "Successful")

    right = functions.get_function_configuration(FunctionName=stack.function_name)["Environment"]["Variables"]
    try:
        for wrong, message in [
            ({"DATABASE_TLS": "prefer"}, "set DATABASE_TLS to verify-full or disable: its value is not one of these"),
            ({"MASKING_SECRET_ID": "gone"}, 'cannot read the secret "gone" (ResourceNotFoundException)'),
            ({"DATABASE_CA_FILE": "/gone.pem"}, 'cannot use DATABASE_CA_FILE "/gone.pem": entity not found'),
        ]:
            configure(right | wrong)
            error, answer = invoke(stack, '{"Records": []}')
            assert (bool(error), answer["errorType"]) == (True, "Init")
            assert answer["errorMessage"].startswith(message)
    finally:
        configure(right)
    assert invoke(stack, '{"Records": []}') == (None, {"batchItemFailures": []})
