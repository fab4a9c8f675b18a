"""`etlctl init`: a mapping and settings from sample messages, by flags, on a terminal, and from a queue."""

import json
import tomllib

import pytest
from driver import Terminal
from world import paths

LOGINS = [
    {"user_id": "zoe", "app_version": "2.3.0", "client": {"ip": "198.51.100.7"}, "device_id": "593-47-5928", "locale": "CN", "count": 1},
    {"user_id": "max", "app_version": "2.3.1", "client": {"ip": "198.51.100.8"}, "device_id": "593-47-5929", "locale": None, "count": 2},
]
ALL = ("--masked", "client.ip", "--one-way", "device_id", "--plain", "user_id", "--plain", "locale", "--plain", "count", "--skip", "app_version")


@pytest.fixture
def sample(tmp_path):
    file = tmp_path / "messages.jsonl"
    file.write_text("\n".join(json.dumps(login) for login in LOGINS))
    return file


def read(directory):
    return [tomllib.loads((directory / name).read_text()) for name in ("mapping.toml", "samconfig.toml")]


def test_flags_answer_everything(etlctl, sample, tmp_path):
    options = ("--subject", "user_id", "--table", "app.visits", "--stack-name", "visits", "--database-secret-arn", "arn:x", "--subnets", "subnet-1,subnet-2", "--database-host", "db.example")
    told = etlctl.run("init", "--sample", str(sample), *ALL, *options, "--directory", str(tmp_path / "mine"))
    assert (told.returncode, told.stderr) == (0, "")
    mapping, config = read(tmp_path / "mine")
    assert mapping["table"] == "app.visits"
    assert mapping["column"] == [
        {"name": "user_id", "from": "user_id", "keep": "plain", "type": "text", "subject": True},
        {"name": "masked_client_ip", "from": "client.ip", "keep": "masked", "normalize": "ip"},
        {"name": "masked_device_id", "from": "device_id", "keep": "one-way"},
        {"name": "locale", "from": "locale", "keep": "plain", "type": "text", "optional": True},
        {"name": "count", "from": "count", "keep": "plain", "type": "bigint"},
        {"name": "received_on", "value": "processing-date", "type": "date"},
    ]
    deploy = config["default"]["deploy"]["parameters"]
    assert deploy["stack_name"] == "visits"
    assert deploy["parameter_overrides"] == ["DatabaseSecretArn=arn:x", "DatabaseHost=db.example", "VpcSubnetIds=subnet-1,subnet-2"]
    # The command that it prints as the next step works, and makes rows of the samples.
    tried = etlctl.run("mapping", "try", str(sample), "--mapping", str(tmp_path / "mine" / "mapping.toml"))
    assert tried.returncode == 0 and "2 messages would be rows of app.visits, 0 refused" in tried.stdout
    assert f"etlctl mapping try {sample} --mapping {tmp_path}/mine/mapping.toml" in told.stdout


@pytest.mark.parametrize("name", ["mapping.toml", "samconfig.toml"])
def test_nothing_is_overwritten(etlctl, sample, tmp_path, name):
    (tmp_path / name).write_text("mine")
    told = etlctl.run("init", "--sample", str(sample), *ALL, "--directory", str(tmp_path))
    assert told.returncode == 2 and "is not overwritten" in told.stderr
    assert (tmp_path / name).read_text() == "mine"
    assert len(list(tmp_path.glob("*.toml"))) == 1


def test_without_a_terminal_every_field_needs_a_flag(etlctl, sample, tmp_path):
    told = etlctl.run("init", "--sample", str(sample), *ALL[:-2], "--directory", str(tmp_path))
    assert told.returncode == 2 and "Open: app_version" in told.stderr
    for wrong, says in ((("--masked", "count"), "only strings are masked"), (("--plain", "nobody"), "no sample has a field"), (("--subject", "app_version"), "is not a kept field")):
        told = etlctl.run("init", "--sample", str(sample), *ALL, *wrong, "--directory", str(tmp_path))
        assert told.returncode == 2 and says in told.stderr
    assert not list(tmp_path.glob("*.toml"))


def test_on_a_terminal_it_asks_and_an_empty_answer_takes_the_default(etlctl, sample, tmp_path):
    with Terminal(etlctl, "init", "--sample", str(sample), "--directory", str(tmp_path)) as terminal:
        for question, answer in (
            ("user_id (text)", ""),
            ("app_version (text)", "s"),
            ("client.ip (text)", ""),
            ("device_id (text)", ""),
            ("locale (text)", ""),
            ("count (bigint)", "masked"),
            ("count (bigint)", ""),
            ("the person a row is about", "user_id"),
            ("Which table?", ""),
            ("the stack called?", ""),
            ("credentials?", ""),
            ("host?", "db.example"),
            ("Subnets", ""),
            ("Security groups", ""),
        ):
            terminal.until(question)
            terminal.type(f"{answer}\n")
        terminal.until("Next:")
        assert terminal.end() == 0
    mapping, config = read(tmp_path)
    assert mapping["table"] == "messages"
    assert {column["name"]: column.get("keep") for column in mapping["column"]} == {
        "user_id": "plain",
        "masked_client_ip": "masked",
        "masked_device_id": "masked",
        "locale": "plain",
        "count": "plain",
        "received_on": None,
    }
    assert config["default"]["deploy"]["parameters"]["parameter_overrides"] == ["DatabaseHost=db.example"]


def test_samples_from_the_queue_stay_there_and_notifications_are_unwrapped(world, servers, tmp_path):
    sqs = servers.localstack.client("sqs")
    url = sqs.create_queue(QueueName=world.name)["QueueUrl"]
    for login in LOGINS:
        sqs.send_message(QueueUrl=url, MessageBody=json.dumps({"Type": "Notification", "Message": json.dumps(login)}))
    told = world.run("init", "--from-queue", *ALL, "--directory", str(tmp_path), environment={"QUEUE_URL": url})
    assert (told.returncode, told.stderr) == (0, "")
    mapping, _ = read(tmp_path)
    assert mapping["unwrap"] == "sns" and len(mapping["column"]) == 6
    received = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10)["Messages"]
    assert received
    sqs.delete_queue(QueueUrl=url)


@pytest.mark.parametrize("example", ["orders", "clicks"])
def test_the_examples_samples_make_a_mapping_that_accepts_them(etlctl, tmp_path, example):
    sample = paths.ROOT / "examples" / example / "messages.jsonl"
    asked = etlctl.run("init", "--sample", str(sample), "--directory", str(tmp_path))
    fields = asked.stderr.split("Open: ")[1].strip().split(", ")
    plain = [word for field in fields for word in ("--plain", field)]
    assert etlctl.run("init", "--sample", str(sample), *plain, "--directory", str(tmp_path)).returncode == 0
    tried = etlctl.run("mapping", "try", str(sample), "--mapping", str(tmp_path / "mapping.toml"))
    assert ", 0 refused" in tried.stdout
