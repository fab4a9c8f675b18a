"""Checks that a stack that was just deployed works, as far as AWS can tell: smoke.py ENVIRONMENT, one of samconfig.toml's.

It sends no message and writes no row. It invokes the function with an empty batch, which shows that it starts with its settings and secrets.
To check the connection to the database and its schema, run `etlctl doctor` from a machine that can reach the database.
"""

import json
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import boto3

# CloudFormation does not wait until an event source mapping has reached its target state.
PATIENCE_SECONDS = 120
TICK_SECONDS = 2


def main() -> int:
    config = tomllib.loads((Path(__file__).parents[1] / "samconfig.toml").read_text())
    stack = config[sys.argv[1]]["deploy"]["parameters"]["stack_name"]
    found = list(faults(stack))
    print("\n".join(found) or f"{stack} is deployed and starts, its queue is read, and no alarm is on.")
    return 1 if found else 0


def faults(stack: str) -> Iterator[str]:
    cloudformation = boto3.client("cloudformation")
    status = cloudformation.describe_stacks(StackName=stack)["Stacks"][0]["StackStatus"]
    if status not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
        yield f"The stack {stack} is {status}."
    # Not by name prefix: another stack's alarms may share it.
    resources = [
        (resource["ResourceType"], resource["PhysicalResourceId"])
        for page in cloudformation.get_paginator("list_stack_resources").paginate(StackName=stack)
        for resource in page["StackResourceSummaries"]
    ]
    [mapping] = [name for kind, name in resources if kind == "AWS::Lambda::EventSourceMapping"]
    yield from faults_of_mapping(mapping)
    yield from alarms([name for kind, name in resources if kind in ("AWS::CloudWatch::Alarm", "AWS::CloudWatch::CompositeAlarm")])


def faults_of_mapping(uuid: str) -> Iterator[str]:
    functions = boto3.client("lambda")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (mapping := functions.get_event_source_mapping(UUID=uuid))["State"] in ("Creating", "Enabling", "Updating"):
        if time.monotonic() > deadline:
            break
        time.sleep(TICK_SECONDS)
    if mapping["State"] != "Enabled":
        yield f"The event source mapping is {mapping['State']}: {mapping.get('StateTransitionReason')}"
    answer = functions.invoke(FunctionName=mapping["FunctionArn"], Payload=json.dumps({"Records": []}))
    if "FunctionError" in answer:
        error = json.load(answer["Payload"])
        yield f"The function fails with an empty batch: {error.get('errorType')}: {error.get('errorMessage')}"


def alarms(names: list[str]) -> Iterator[str]:
    described = boto3.client("cloudwatch").describe_alarms(AlarmNames=names, AlarmTypes=["MetricAlarm", "CompositeAlarm"])
    for alarm in [*described["MetricAlarms"], *described["CompositeAlarms"]]:
        # Perhaps nobody has sent a message yet.
        if alarm["StateValue"] == "ALARM" and not alarm["AlarmName"].endswith("-silence"):
            yield f"The alarm {alarm['AlarmName']} is on: {alarm['StateReason']}"


if __name__ == "__main__":
    sys.exit(main())
