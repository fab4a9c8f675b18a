"""Tests the template's stacks in LocalStack: each kind is deployed, changed while messages flow, rolled back, and deleted."""

import io
import json
import random
import threading
import uuid
import zipfile
from contextlib import suppress

import pytest
from waiting import until
from world import messages, paths, stack, template
from world.localstack import ACCOUNT, REGION

KEY = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/00000000-0000-0000-0000-000000000000"
TOPIC = f"arn:aws:sns:{REGION}:{ACCOUNT}:on-call"


class Sender:
    """Sends logins of unique users to a stack's queue: some at once, or a few at a time until it is stopped."""

    def __init__(self, deployed):
        self.sqs = deployed.localstack.client("sqs")
        self.queue_url = deployed.queue_url
        self.name = f"user-{uuid.uuid4()}"
        self.sent = 0
        self.stopped = threading.Event()

    def send(self, count=10):
        chance = random.Random(self.sent)
        for start in range(0, count, 10):
            entries = [self.entry(chance) for _ in range(start, min(count, start + 10))]
            assert not self.sqs.send_message_batch(QueueUrl=self.queue_url, Entries=entries).get("Failed")

    def entry(self, chance):
        self.sent += 1
        body = json.dumps(messages.login(chance, user_id=f"{self.name}-{self.sent}"))
        group = {"MessageGroupId": str(self.sent % 3), "MessageDeduplicationId": str(self.sent)} if self.queue_url.endswith(".fifo") else {}
        return {"Id": str(self.sent), "MessageBody": body, **group}

    def __enter__(self):
        self.thread = threading.Thread(target=self.go_on)
        self.thread.start()
        return self

    def go_on(self):
        while not self.stopped.wait(0.2):
            self.send(5)

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()

    def rows(self, servers):
        with servers.postgres.connect() as database:
            return [row[0] for row in database.execute("select user_id from user_logins where user_id like %s", [f"{self.name}-%"])]

    def all_are_rows_once(self, servers):
        wanted = sorted(f"{self.name}-{number}" for number in range(1, self.sent + 1))
        until(lambda: len(self.rows(servers)) >= self.sent)
        return sorted(self.rows(servers)) == wanted


@pytest.fixture
def deploy(servers):
    """Deploys a stack under a new name, and deletes it in the end."""
    names = []

    def deploy(name=None, **parameters):
        if name is None:
            name = f"stack-{uuid.uuid4().hex[:8]}"
            names.append(name)
        return stack.deploy(servers, name, **{"FunctionTimeout": 3, "MaxReceiveCount": 10, "OutageDelay": 1, **parameters})

    yield deploy
    for name in names:
        # LocalStack sometimes fails to delete an updated stack; the stack then ends with the servers.
        with suppress(servers.localstack.client("cloudformation").exceptions.ClientError):
            delete(servers, name)


def delete(servers, name):
    stacks = servers.localstack.client("cloudformation")
    stacks.delete_stack(StackName=name)

    def gone():
        with suppress(stacks.exceptions.ClientError):
            return stacks.describe_stacks(StackName=name)["Stacks"][0]["StackStatus"] == "DELETE_COMPLETE"
        return True

    until(gone)


def mapping(deployed):
    functions = deployed.localstack.client("lambda")
    [mapping] = functions.list_event_source_mappings(FunctionName=deployed.name)["EventSourceMappings"]
    return mapping


def network(servers):
    ec2 = servers.localstack.client("ec2")
    subnets = [subnet["SubnetId"] for subnet in ec2.describe_subnets()["Subnets"]][:2]
    return {"VpcSubnetIds": ",".join(subnets), "VpcSecurityGroupIds": ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"]}


WATCHED = {"AlarmTopicArn": TOPIC, "PageTopicArn": TOPIC, "SilenceHours": 2, "Tracing": "Active", "RunbookUrl": "https://example.com/runbook"}
KEYS = {"KmsKeyArn": KEY, "SecretsKmsKeyArn": KEY, "LogKmsKeyArn": KEY}
BOUNDED = {"ReserveConcurrency": "true", "MaximumConcurrency": 5, "PermissionsBoundaryArn": "arn:aws:iam::aws:policy/PowerUserAccess"}


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({"QueueType": "fifo"}, id="fifo"),
        pytest.param({"QueueType": "fifo"} | KEYS | WATCHED, id="fifo, own keys, watched"),
        pytest.param(KEYS | BOUNDED, id="own keys, bounded"),
        pytest.param({"MaximumPollers": 4} | WATCHED, id="pollers, watched"),
        pytest.param(None, id="in a VPC"),
    ],
)
def test_each_kind_of_stack_loads_messages(servers, deploy, parameters):
    deployed = deploy(**(network(servers) if parameters is None else parameters))
    sender = Sender(deployed)
    sender.send(50)
    assert sender.all_are_rows_once(servers)
    assert deployed.depth(deployed.dead_letter_queue_url)[0] == 0


def test_every_alarm_is_created_with_its_topic(servers, deploy):
    deployed = deploy(**WATCHED)
    alarms = servers.localstack.client("cloudwatch").describe_alarms(AlarmNamePrefix=f"{deployed.name}-", AlarmTypes=["MetricAlarm", "CompositeAlarm"])
    made = {alarm["AlarmName"].removeprefix(f"{deployed.name}-"): alarm for alarm in alarms["MetricAlarms"] + alarms["CompositeAlarms"]}
    declared = [resource for resource in template.resolve(WATCHED).values() if "Alarm" in resource["Type"]]
    assert set(made) == {resource["Properties"]["AlarmName"].removeprefix("login-etl-") for resource in declared}
    for name, alarm in made.items():
        assert alarm["AlarmActions"] == alarm["OKActions"] == [TOPIC]
        assert alarm["AlarmDescription"].endswith(f"https://example.com/runbook#{name}")


def test_a_running_stack_is_changed_and_rolled_back_without_losing_a_message(servers, deploy):
    deployed = deploy()
    with Sender(deployed) as sender:
        until(lambda: sender.rows(servers))
        deploy(deployed.name, MemorySize=512, BatchWindow=5, FunctionTimeout=5, MaxReceiveCount=9)
        changed = sender.sent
        until(lambda: len(sender.rows(servers)) > changed)
        deploy(deployed.name)
    assert sender.all_are_rows_once(servers)
    assert deployed.depth(deployed.dead_letter_queue_url)[0] == 0


def test_a_change_that_breaks_the_function_is_rolled_back_and_no_message_is_lost(servers, deploy):
    deployed = deploy()
    with Sender(deployed) as sender:
        until(lambda: sender.rows(servers))
        deploy(deployed.name, DatabaseCa="/gone.pem")
        until(lambda: "cannot use DATABASE_CA" in deployed.log_text())
        broken = len(sender.rows(servers))
        deploy(deployed.name)
        until(lambda: len(sender.rows(servers)) > broken)
    assert sender.all_are_rows_once(servers)
    assert deployed.depth(deployed.dead_letter_queue_url)[0] == 0


@pytest.fixture
def gradual(servers):
    """A stack with gradual deployment. LocalStack lacks CodeDeploy, and creates the alias before the resources in its update policy, so the
    fixture expands SAM's macro itself and removes that policy."""
    name = f"gradual-{uuid.uuid4().hex[:8]}"
    s3, stacks = servers.localstack.client("s3"), servers.localstack.client("cloudformation")
    code = io.BytesIO()
    with zipfile.ZipFile(code, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(paths.SAM_BUILD / "LoginFunction" / "bootstrap", "bootstrap")
    s3.create_bucket(Bucket=name)
    s3.put_object(Bucket=name, Key="code", Body=code.getvalue())
    parameters = stack.parameters_for(servers) | {"GradualDeployment": "true", "Release": "one", "FunctionTimeout": 3, "MaxReceiveCount": 10, "OutageDelay": 1}
    expanded = template.expand({name: str(value) for name, value in parameters.items()})
    expanded["Resources"]["LoginFunction"]["Properties"]["Code"] = {"S3Bucket": name, "S3Key": "code"}
    assert expanded["Resources"]["LoginFunctionAliaslive"].pop("UpdatePolicy")["CodeDeployLambdaAliasUpdate"]
    # Without blanks, because CloudFormation accepts 51,200 characters in a request; SAM CLI uses S3 instead.
    stacks.create_stack(StackName=name, TemplateBody=json.dumps(expanded, separators=(",", ":")), Capabilities=["CAPABILITY_IAM"])
    until(lambda: stacks.describe_stacks(StackName=name)["Stacks"][0]["StackStatus"] == "CREATE_COMPLETE")
    yield stack.Stack(servers, name)
    delete(servers, name)


def test_with_gradual_deployment_the_traffic_moves_with_the_alias_and_back(servers, gradual):
    """The test moves the alias as CodeDeploy would."""
    assert mapping(gradual)["FunctionArn"].endswith(f":{gradual.name}:live")
    functions = servers.localstack.client("lambda")
    functions.update_function_configuration(FunctionName=gradual.name, Environment={"Variables": {}})
    until(lambda: functions.get_function_configuration(FunctionName=gradual.name)["LastUpdateStatus"] == "Successful")
    broken = functions.publish_version(FunctionName=gradual.name)["Version"]
    with Sender(gradual) as sender:
        # A version that is not live does no harm.
        until(lambda: sender.rows(servers))
        functions.update_alias(FunctionName=gradual.name, Name="live", FunctionVersion=broken)
        until(lambda: "initialisation failed" in gradual.log_text())
        functions.update_alias(FunctionName=gradual.name, Name="live", FunctionVersion="1")
        put_back = sender.sent
        until(lambda: len(sender.rows(servers)) > put_back)
    assert sender.all_are_rows_once(servers)


def test_a_deleted_stack_leaves_nothing_that_runs(servers, deploy):
    deployed = deploy()
    delete(servers, deployed.name)
    functions = servers.localstack.client("lambda")
    assert deployed.name not in [function["FunctionName"] for function in functions.list_functions()["Functions"]]
    assert deployed.queue_url.rpartition("/")[2] not in str(functions.list_event_source_mappings()["EventSourceMappings"])
    assert not servers.localstack.client("cloudwatch").describe_alarms(AlarmNamePrefix=f"{deployed.name}-")["MetricAlarms"]

