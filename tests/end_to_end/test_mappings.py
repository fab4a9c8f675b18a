"""Tests the examples of docs/mapping.md: messages of other shapes, through SNS and EventBridge, into tables with other columns."""

import json
import os
import shutil
import subprocess

from waiting import until
from world import paths, stack

EXAMPLES = paths.ROOT / "examples"


def etlctl(*words):
    """Runs etlctl without AWS or a database, and returns its output."""
    program = paths.ROOT / "target" / "debug" / "etlctl"
    return subprocess.run([program, *words], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False).stdout


def deploy(servers, name):
    """Creates an example's table, and deploys its mapping beside the function's program."""
    mapping = EXAMPLES / name / "mapping.toml"
    with servers.postgres.connect() as database:
        database.execute(etlctl("mapping", "ddl", "--mapping", mapping))
    build = paths.LOCAL / f"sam-{name}"
    shutil.copytree(paths.SAM_BUILD, build, dirs_exist_ok=True)
    shutil.copy(mapping, build / "LoginFunction")
    return stack.deploy(servers, name=name, build=build, quiet=True, FunctionTimeout=3)


def lines(name):
    return [json.loads(line) for line in (EXAMPLES / name / "messages.jsonl").read_text().splitlines()]


def tried(name):
    """The output of `etlctl mapping try` for an example's messages."""
    files = EXAMPLES / name
    return json.loads(etlctl("mapping", "try", files / "messages.jsonl", "--mapping", files / "mapping.toml", "--json"))


def rows_of(servers, table, count):
    with servers.postgres.connect(autocommit=True) as database:
        until(lambda: database.execute(f"select count(*) from {table}").fetchone()[0] == count)
        cursor = database.execute(f"select * from {table} order by 1")
        return [dict(zip([column.name for column in cursor.description], row)) for row in cursor]


def refusals(deployed):
    return {line["reason"] for line in deployed.log() if line.get("message") == "message failed"}


def queue_arn(deployed):
    attributes = deployed.localstack.client("sqs").get_queue_attributes(QueueUrl=deployed.queue_url, AttributeNames=["QueueArn"])
    return attributes["Attributes"]["QueueArn"]


def schedule_event(deployed):
    return deployed.localstack.client("scheduler").get_schedule(Name=f"{deployed.name}-maintenance")["Target"]["Input"]


def test_orders_come_through_sns(servers):
    first, second, third = tried("orders")
    assert first["row"]["currency"] == "CHF" and first["row"]["gift"] == "true" and second["row"]["masked_phone"] is None
    assert third == {"refused": "order.total.currency is missing"}
    deployed = deploy(servers, "orders")
    sns = servers.localstack.client("sns")
    topic = sns.create_topic(Name="orders")["TopicArn"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=queue_arn(deployed))
    for notification in lines("orders"):
        sns.publish(TopicArn=topic, Message=notification["Message"])
    rows = rows_of(servers, "orders", 2)
    assert [row["items"] for row in rows] == [[{"sku": "A-1", "count": 1}], [{"sku": "A-1", "count": 2}]]
    assert rows[0]["masked_email"] == rows[1]["masked_email"] and "@" not in rows[0]["masked_email"]
    assert [str(row["placed_at"].astimezone().date()) for row in rows] == ["2026-11-21", "2026-11-22"]
    assert rows[0]["sent_at"] and rows[0]["message_id"] != rows[1]["message_id"]
    until(lambda: "order.total.currency is missing" in refusals(deployed))


def test_clicks_come_through_eventbridge(servers):
    first, second, third = tried("clicks")
    assert first["row"]["masked_ip"] == second["row"]["masked_ip"] and first["row"]["bytes"] == "9007199254740994"
    assert third == {"refused": "detail.client.ip is not an IP address"}
    deployed = deploy(servers, "clicks")
    events = servers.localstack.client("events")
    events.put_rule(Name="clicks", EventPattern=json.dumps({"source": ["shop.web"]}))
    events.put_targets(Rule="clicks", Targets=[{"Id": "queue", "Arn": queue_arn(deployed)}])
    for event in lines("clicks"):
        events.put_events(Entries=[{"Source": event["source"], "DetailType": event["detail-type"], "Detail": json.dumps(event["detail"])}])
    rows = rows_of(servers, "web.clicks", 2)
    assert [(row["x"], row["y"], row["bytes"]) for row in rows] == [(10, 20, 9007199254740994), (20, 40, 9007199254740995)]
    assert rows[0]["masked_ip"] == rows[1]["masked_ip"]
    assert rows[0]["context"] == {"page": "/", "tags": ["a", "b"]} and rows[1]["context"] is None
    assert {row["queue"] for row in rows} == {deployed.queue_url.rsplit("/", 1)[1]}
    until(lambda: "detail.client.ip is not an IP address" in refusals(deployed))
    # The schedule's next event deletes rows older than 90 days.
    with servers.postgres.connect(autocommit=True) as database:
        database.execute("insert into web.clicks (day) select current_date - n from generate_series(88, 93) n")
        deployed.localstack.client("lambda").invoke(FunctionName=deployed.function_name, Payload=schedule_event(deployed))
        kept = database.execute("select (now() at time zone 'UTC')::date - day from web.clicks order by 1 desc limit 1").fetchone()
    assert kept == (90,)
