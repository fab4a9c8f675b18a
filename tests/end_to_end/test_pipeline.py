"""Tests the deployed stack with a queue and an event source mapping in LocalStack, the function's binary and a real PostgreSQL."""

import json
import random
import socket
import time

import pytest
from waiting import until
from world import delivery, messages, paths
from world.servers import DATABASE_SECRET
from world.stack import PARAMETERS

RECEIVES = PARAMETERS["MaxReceiveCount"]
CANARY = "canary-8c1f"


def spoilt(**fields):
    """A login with a canary in every field except `fields`."""
    names = ("user_id", "device_type", "ip", "locale", "device_id")
    return json.dumps({name: f"{CANARY}-{name}" for name in names} | {"app_version": "1.0"} | fields)


BAD = {
    messages.WRONG_TYPE: "user_id is missing",
    f"not JSON: {CANARY}": "body is not JSON",
    spoilt()[:-1]: "body is not JSON",
    json.dumps(["a", "list", CANARY]): "body is not a JSON object: it is a list; send each element as its own message",
    spoilt(app_version="99.999.999.999"): "app_version does not fit an integer",
    spoilt(app_version=CANARY): "app_version is not digits and dots",
    spoilt(device_id=f"{CANARY}\0"): "device_id contains a NUL character",
    spoilt(ip={CANARY: CANARY}): "ip is not a string",
    spoilt(device_id=CANARY * 30): "device_id is too long",
    spoilt(): 'refused by the database: SQLSTATE 23514, constraint "no_canary", table public.user_logins',
}


def invoke(stack, event):
    answer = stack.localstack.client("lambda").invoke(FunctionName=stack.function_name, Payload=event)
    return answer.get("FunctionError"), json.load(answer["Payload"])


@pytest.fixture(scope="module")
def run(servers, stack):
    """Loads a hundred messages, some of them bad, and up to ten delivered twice."""
    chance = random.Random(7)
    logins = [messages.login(chance) for _ in range(100 - len(BAD))]
    bodies = [json.dumps(login) for login in logins] + list(BAD)
    chance.shuffle(bodies)
    with servers.postgres.connect() as database:
        database.execute("truncate user_logins, etl_ledger")
        database.execute(f"alter table user_logins add constraint no_canary check (user_id not like '{CANARY}%')")
    stack.enable_mapping(False)
    started = 1000 * time.time()
    sent = delivery.send(stack, bodies)
    twice = delivery.deliver_without_deleting(stack, lambda event: invoke(stack, json.dumps(event))[1])
    stack.enable_mapping(True)
    until(lambda: sum(stack.depth(stack.queue_url)) == 0)
    dead = {message["MessageId"]: message["Body"] for message in delivery.receive_all(stack, stack.dead_letter_queue_url)}
    # Other tests have invoked the function before.
    events = [line for line in stack.log() if "_aws" in line and line["_aws"]["Timestamp"] >= started]
    return {"logins": logins, "sent": sent, "twice": twice, "dead": dead, "log": stack.log(), "events": events}


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
    events = run["events"]
    total = {name: sum(event[name] for event in events) for name in ("Messages", "Inserted", "Deduplicated", "Failed", "BatchesFailed")}
    assert total["Inserted"] == len(run["logins"])
    assert total["Deduplicated"] == len(run["twice"]) > 0
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


def test_no_personal_value_mask_key_or_password_is_in_any_log(servers, stack, run):
    function = stack.localstack.client("lambda").get_function_configuration(FunctionName=stack.function_name)
    assert function["LoggingConfig"]["ApplicationLogLevel"] == "TRACE"
    password = stack.localstack.client("secretsmanager").get_secret_value(SecretId=DATABASE_SECRET)["SecretString"]
    secrets = {stack.key().hex(), json.loads(password)["password"], CANARY}
    for login in run["logins"]:
        secrets |= {login["ip"], login["device_id"], login["user_id"]}
    with servers.postgres.connect() as database:
        secrets |= {mask for row in database.execute("select masked_ip, masked_device_id from user_logins") for mask in row}
    text = stack.log_text()
    assert text.count('"message":"batch loaded"') > 0
    assert [secret for secret in secrets if secret in text] == []


def test_sample_events_get_valid_answers(stack):
    for name, failed in {"valid": [], "mixed": [1, 2, 4, 5], "duplicates": [], "fifo": [2, 3], "empty": []}.items():
        event = (paths.ROOT / "events" / f"{name}.json").read_text()
        ids = [record["messageId"] for record in json.loads(event)["Records"]]
        for _ in range(2):
            assert invoke(stack, event) == (None, {"batchItemFailures": [{"itemIdentifier": ids[place]} for place in failed]})


def test_an_event_that_is_not_from_sqs_is_an_error_that_quotes_nothing(stack):
    error, answer = invoke(stack, json.dumps({"Records": [{"messageId": "1", "attributes": {"SentTimestamp": {"ip": CANARY}}}]}))
    assert error
    assert answer["errorType"] == "InvalidEvent"
    assert CANARY not in json.dumps(answer)
    assert "InvalidEvent" in stack.log_text()
    assert CANARY not in stack.log_text()


def test_a_bad_message_is_dead_within_seconds_whatever_the_visibility_timeout(stack):
    sqs = stack.localstack.client("sqs")
    before = sqs.get_queue_attributes(QueueUrl=stack.queue_url, AttributeNames=["VisibilityTimeout"])["Attributes"]
    sqs.set_queue_attributes(QueueUrl=stack.queue_url, Attributes={"VisibilityTimeout": "600"})
    try:
        stack.enable_mapping(False)
        bad = f"not JSON: {CANARY} either"
        sent = delivery.send(stack, [*(json.dumps(messages.login(random.Random(seed))) for seed in range(8)), bad])
        [message_id] = [key for key, body in sent.items() if body == bad]
        stack.enable_mapping(True)
        # Each receive hides its messages from the next one.
        until(lambda: message_id in {message["MessageId"] for message in delivery.receive_all(stack, stack.dead_letter_queue_url)})
    finally:
        sqs.set_queue_attributes(QueueUrl=stack.queue_url, Attributes=before)


def test_an_environment_that_could_not_start_heals_when_its_secret_is_right_again(stack):
    functions, secrets = stack.localstack.client("lambda"), stack.localstack.client("secretsmanager")
    right = secrets.get_secret_value(SecretId=stack.masking_secret_arn)["SecretString"]
    variables = functions.get_function_configuration(FunctionName=stack.function_name)["Environment"]["Variables"]

    def renew(**changed):
        functions.update_function_configuration(FunctionName=stack.function_name, Environment={"Variables": variables | changed})
        until(lambda: functions.get_function_configuration(FunctionName=stack.function_name)["LastUpdateStatus"] == "Successful")

    secrets.put_secret_value(SecretId=stack.masking_secret_arn, SecretString="no keyring")
    try:
        renew(LEDGER_RETENTION_DAYS="36")
        assert invoke(stack, '{"Records": []}')[1]["errorType"] == "Init"
        secrets.put_secret_value(SecretId=stack.masking_secret_arn, SecretString=right)
        assert invoke(stack, '{"Records": []}') == (None, {"batchItemFailures": []})
    finally:
        secrets.put_secret_value(SecretId=stack.masking_secret_arn, SecretString=right)
        renew()


def test_an_environment_with_a_wrong_setting_says_why(stack):
    functions = stack.localstack.client("lambda")

    def configure(variables):
        functions.update_function_configuration(FunctionName=stack.function_name, Environment={"Variables": variables})
        until(lambda: functions.get_function_configuration(FunctionName=stack.function_name)["LastUpdateStatus"] == "Successful")

    right = functions.get_function_configuration(FunctionName=stack.function_name)["Environment"]["Variables"]
    # Accepts connections and never answers.
    silent = socket.create_server(("127.0.0.1", 0))
    try:
        for wrong, message in [
            ({"DATABASE_TLS": "prefer"}, "set DATABASE_TLS to verify-full or disable: its value is invalid"),
            ({"MASKING_SECRET_ID": "gone"}, 'cannot read the secret "gone" (ResourceNotFoundException)'),
            ({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}, f'cannot read the secret "{right["MASKING_SECRET_ID"]}" (TimeoutError)'),
            ({"AWS_CA_BUNDLE": "/gone.pem"}, 'cannot use AWS_CA_BUNDLE "/gone.pem": entity not found'),
            ({"DATABASE_CA": "/gone.pem"}, 'cannot use DATABASE_CA "/gone.pem": entity not found'),
        ]:
            configure(right | wrong)
            error, answer = invoke(stack, '{"Records": []}')
            assert (bool(error), answer["errorType"]) == (True, "Init")
            assert answer["errorMessage"].startswith(f"not started: {message}")
        # The secrets are read over TLS, if the certificate's authority is trusted.
        configure(right | {"AWS_ENDPOINT_URL": over_tls(stack)})
        assert "its certificate is not trusted" in invoke(stack, '{"Records": []}')[1]["errorMessage"]
        configure(right | {"AWS_ENDPOINT_URL": over_tls(stack), "AWS_CA_BUNDLE": str(stack.localstack.ca_file)})
        assert invoke(stack, '{"Records": []}') == (None, {"batchItemFailures": []})
    finally:
        silent.close()
        configure(right)
    assert invoke(stack, '{"Records": []}') == (None, {"batchItemFailures": []})


def over_tls(stack):
    return stack.localstack.endpoint.replace("http:", "https:")
