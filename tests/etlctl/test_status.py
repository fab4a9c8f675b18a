"""`etlctl status`: once, repeatedly, and with parts that cannot be read."""

import json
import random
import re
import signal
from datetime import UTC, datetime
from pathlib import Path

import pytest
from driver import Terminal
from queues import Queues, Wiretap
from world import delivery, messages

CLEAR = "\x1b[2J\x1b[H"


@pytest.fixture(scope="module")
def ran(servers, pipeline):
    """A pipeline after 12 messages loaded, one loaded and delivered again, three failed and still hidden, one failed batch, and two dead."""
    chance = random.Random(3)
    logins = [json.dumps(messages.login(chance)) for _ in range(13)]
    delivery.send(pipeline, [*logins[1:], messages.NOT_JSON[0], messages.WRONG_TYPE, messages.WRONG_TYPE])
    others = Queues(servers)
    delivery.send(others, logins[:1])
    once = delivery.receive_all(others, others.queue_url)
    others.delete()
    assert [pipeline.invoke(once), pipeline.invoke(once)] == [set(), set()]
    pipeline.until(lambda: len(pipeline.logged("message failed")) == 3)
    with pipeline.connect() as database:
        pipeline.until(lambda: database.execute("select count(*) from user_logins").fetchone() == (13,))
    with pipeline.without("etl_ledger"), pytest.raises(KeyError):
        pipeline.invoke(once)
    pipeline.logged("batch failed")
    for body in messages.NOT_JSON:
        pipeline.queues.sqs.send_message(QueueUrl=pipeline.queues.dead_letter_queue_url, MessageBody=body)
    return pipeline


def test_it_counts_messages_rows_and_the_last_hours_results(ran):
    status = ran.json("status")
    now = datetime.now(UTC)
    assert abs((datetime.fromisoformat(status.pop("at")) - now).total_seconds()) < 10
    assert status.pop("queue") == {"waiting": 0, "in_flight": 3, "delayed": 0, "oldest_seconds": None}
    assert status.pop("dead_letters") == {"waiting": 2, "in_flight": 0, "delayed": 0, "oldest_seconds": None}
    assert status.pop("last_hour") == {
        "batches": len(ran.logged("batch loaded")),
        "messages": 17,
        "inserted": 13,
        "deduplicated": 1,
        "failed": 3,
        "failed_by_reason": {"body is not JSON": 1, "user_id is missing": 2},
        "batches_failed": {"Table": 1},
        "not_started": [],
        "complete": True,
    }
    rows = status.pop("rows")
    assert rows["bytes"] > 8192
    assert rows["ledger"].pop("bytes") > 8192
    assert rows | {"bytes": 0} == {"today": 13, "estimate": 13, "bytes": 0, "ledger": {"estimate": 13, "oldest": f"{now:%Y-%m-%d}"}}
    assert status.pop("keys") == [{"id": "", "cipher": "aes-cbc", "active": True, "one_way": False}]
    assert status == {}


@pytest.mark.parametrize(
    "part, environment, why",
    [
        ("queue", {"QUEUE_URL": "http://127.0.0.1:1/000000000000/none-of-ours"}, "NonExistentQueue"),
        ("dead_letters", {"DLQ_URL": None}, "DLQ_URL is not set"),
        ("last_hour", {"FUNCTION_NAME": "none-of-ours"}, "none-of-ours"),
        ("rows", {"ETLCTL_DATABASE_SECRET_ID": None}, "set ETLCTL_DATABASE_SECRET_ID"),
        ("rows", {"DATABASE_NAME": "none_of_ours"}, "3D000"),
        ("keys", {"MASKING_SECRET_ID": "none-of-ours"}, "ResourceNotFoundException"),
    ],
)
def test_a_part_that_cannot_be_read_says_why_and_leaves_the_others(ran, part, environment, why):
    whole, status = ran.json("status"), ran.json("status", environment=environment)
    assert list(status[part]) == ["unknown"]
    assert why in status[part]["unknown"]
    assert {name: status[name] for name in status if name not in (part, "at")} == {name: whole[name] for name in whole if name not in (part, "at")}
    text = ran.run("status", environment=environment)
    assert text.returncode == 0
    assert re.search(rf"^{part.replace('_', ' ')} +unknown: .*{why}", text.stdout, re.MULTILINE)


@pytest.fixture
def queues(servers):
    queues = Queues(servers)
    yield queues
    queues.delete()


def put_age(queues, url, seconds):
    """Writes the metric that CloudWatch has within a minute or two. LocalStack does not write it."""
    metric = {"MetricName": "ApproximateAgeOfOldestMessage", "Dimensions": [{"Name": "QueueName", "Value": url.rpartition("/")[2]}]}
    data = metric | {"Value": seconds, "Timestamp": datetime.now(UTC)}
    queues.localstack.client("cloudwatch").put_metric_data(Namespace="AWS/SQS", MetricData=[data])


def test_the_age_of_the_oldest_message_is_shown(pipeline, queues):
    delivery.send(queues, ["waits"])
    put_age(queues, queues.queue_url, 4000)
    pipeline.until(lambda: pipeline.json("status", environment=queues.environment)["queue"]["oldest_seconds"] == 4000)
    assert "1 h 6 min" in pipeline.run("status", environment=queues.environment).stdout


def test_an_empty_queue_has_no_oldest_message(pipeline, queues):
    """CloudWatch keeps the age of the last message for a while."""
    delivery.send(queues, ["waits"])
    put_age(queues, queues.queue_url, 4000)
    pipeline.until(lambda: pipeline.json("status", environment=queues.environment)["queue"]["oldest_seconds"] == 4000)
    queues.sqs.purge_queue(QueueUrl=queues.queue_url)
    assert re.search("^queue +0 waiting, 0 in flight$", pipeline.run("status", environment=queues.environment).stdout, re.MULTILINE)


def test_a_stacks_name_and_a_database_user_are_enough(stack, pipeline):
    names = {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "PATH", "ETLCTL_DATABASE_SECRET_ID"}
    status = pipeline.run("status", "--stack", stack.name, environment={name: None for name in pipeline.environment if name not in names})
    assert status.returncode == 0
    assert status.stdout.startswith(f"{stack.function_name}  ")
    assert "not known" not in status.stdout


def shown(screen, pipeline):
    """A screen with placeholders for what differs from run to run."""
    screen = screen.replace(pipeline.name, "FUNCTION").replace(f"{datetime.now(UTC):%Y-%m-%d}", "TODAY").replace("\x1b", "ESC")
    for volatile, name in ((r"\d\d:\d\d:\d\d", "TIME"), (r"\d+ batches", "N batches"), (r"[\d.]+ kB", "SIZE")):
        screen = re.sub(volatile, name, screen)
    return screen


def test_on_a_terminal_it_refreshes_the_screen_until_ctrl_c(ran):
    with Terminal(ran, "status", "--watch", "1") as terminal:
        terminal.until(CLEAR)
        first = terminal.until(CLEAR).removesuffix(CLEAR)
        second = terminal.until("aes-cbc, active\n")
        terminal.type("\x03")
        assert terminal.end() == 0
    times = [re.search(r"\d\d:\d\d:\d\d", screen).group() for screen in (first, second)]
    assert times[0] < times[1]
    assert shown(first, ran) == (Path(__file__).parent / "golden" / "status.txt").read_text()


@pytest.mark.parametrize("screens", [0, 1])
def test_ctrl_c_ends_it_cleanly_also_while_it_reads(ran, screens):
    with Wiretap(ran.localstack) as wire, Terminal(ran, "status", "--watch", "1", environment=wire.environment) as terminal:
        for _ in range(screens):
            terminal.until(CLEAR)
        wire.hold = "GetQueueAttributes"
        assert wire.held.wait(30)
        terminal.type("\x03")
        assert terminal.end(5) == 0


def read_until(process, done):
    said = ""
    while not done(said):
        line = process.stdout.readline()
        assert line, said
        said += line
    return said


def test_a_pipe_gets_the_same_text_without_clearing_or_colours(ran):
    with ran.start("status", "--watch", "1") as process:
        said = read_until(process, lambda said: said.count("aes-cbc, active\n") == 2)
        process.send_signal(signal.SIGINT)
        assert (process.wait(10), process.stderr.read()) == (0, "")
    assert "\x1b" not in said
    assert said.count("dead letters  2") == 2


def documents(text):
    text, decoder, found = text.strip(), json.JSONDecoder(), []
    while text:
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:].lstrip()
    return found


def test_as_json_it_is_a_stream_of_documents(ran):
    with ran.start("status", "--watch", "1", "--json") as process:
        said = read_until(process, lambda said: said.count("\n}\n") == 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    first, second = documents(said)
    assert datetime.fromisoformat(first["at"]) < datetime.fromisoformat(second["at"])
    assert {**first, "at": None} == {**second, "at": None}


def test_it_ends_when_the_pipe_is_closed(ran):
    with ran.start("status", "--watch", "1") as process:
        read_until(process, lambda said: "aes-cbc" in said)
        process.stdout.close()
        assert process.wait(10) == 0


def test_it_says_why_the_function_does_not_start(pipeline):
    right = {name: pipeline.environment[name] for name in pipeline.VARIABLES}

    def set_variables(variables):
        pipeline.functions.update_function_configuration(FunctionName=pipeline.name, Environment={"Variables": variables})
        pipeline.functions.get_waiter("function_updated_v2").wait(FunctionName=pipeline.name, WaiterConfig={"Delay": 0.1})

    set_variables(right | {"DATABASE_TLS": "prefer"})
    try:
        with pytest.raises(KeyError):
            pipeline.invoke([])
        pipeline.logged("initialisation failed")
        [why] = pipeline.json("status")["last_hour"]["not_started"]
        assert why.startswith("set DATABASE_TLS to verify-full or disable")
        assert f"the function did not start: {why}\n" in pipeline.run("status").stdout
    finally:
        set_variables(right)
        pipeline.forget_log()
