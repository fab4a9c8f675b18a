"""Checks rules that the stack must follow with any values of its parameters."""

import itertools
import json
import math
import re
from dataclasses import dataclass

import pytest
from world import paths, template

ACCOUNT = "123456789012"
KEYS = {name: f"arn:aws:kms:us-east-1:{ACCOUNT}:key/{name}" for name in ("KmsKeyArn", "SecretsKmsKeyArn", "LogKmsKeyArn")}
# Each of the two given secrets may have its own key.
KEYS["SecretsKmsKeyArn"] += "," + KEYS["SecretsKmsKeyArn"].replace("Secrets", "Keyring")
# Each of these is given or not, in every combination; "rest" has the parameters that do not depend on the others.
OPTIONS = {
    "fifo": {"QueueType": "fifo"},
    "vpc": {"VpcSubnetIds": "subnet-1,subnet-2", "VpcSecurityGroupIds": "sg-1"},
    "keys": KEYS,
    "gradual": {"GradualDeployment": "true"},
    "pollers": {"MaximumPollers": "20"},
    "rest": {
        "AlarmTopicArn": f"arn:aws:sns:us-east-1:{ACCOUNT}:alarms",
        "LayerArn": f"arn:aws:lambda:us-east-1:{ACCOUNT}:layer:roots:1",
        "MaskingSecretArn": f"arn:aws:secretsmanager:us-east-1:{ACCOUNT}:secret:keyring-AbCdEf",
        "PageTopicArn": f"arn:aws:sns:us-east-1:{ACCOUNT}:page",
        "PermissionsBoundaryArn": f"arn:aws:iam::{ACCOUNT}:policy/boundary",
        "ReserveConcurrency": "true",
        "RunbookUrl": "https://wiki.example/runbook",
        "SilenceHours": 6,
        "Tracing": "Active",
    },
}
DAY = 86_400
# https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-visibility-timeout.html
LONGEST_VISIBILITY_TIMEOUT = DAY // 2
QUEUES = ("LoginQueue", "DeadLetterQueue")
# The function's name, which equals the stack's.
FUNCTION = "login-etl"
# The dimensions that alarms and dashboard may read, by namespace.
DIMENSIONS = {
    "AWS/SQS": [{"QueueName": f"{queue}.QueueName"} for queue in QUEUES],
    "AWS/Lambda": [{"FunctionName": FUNCTION}, {"FunctionName": FUNCTION, "Resource": f"{FUNCTION}:live"}],
    "login-etl": [{"FunctionName": FUNCTION}],
}


@dataclass(frozen=True)
class Variant:
    """The stack with some of `OPTIONS`."""

    options: frozenset[str]
    parameters: dict[str, object]
    resources: dict[str, dict]

    def of_type(self, *types: str) -> dict[str, dict]:
        """Properties by logical id."""
        return {name: resource["Properties"] for name, resource in self.resources.items() if resource["Type"] in types}

    def properties(self, name: str) -> dict:
        return self.resources[name]["Properties"]

    def alarms(self) -> dict[str, dict]:
        return self.of_type("AWS::CloudWatch::Alarm", "AWS::CloudWatch::CompositeAlarm")

    def widgets(self) -> list[dict]:
        return json.loads(self.properties("Dashboard")["DashboardBody"])["widgets"]

    def allowed(self) -> list[dict]:
        """The roles' statements with the effect Allow."""
        policies = [policy for role in self.of_type("AWS::IAM::Role").values() for policy in role.get("Policies", [])]
        return [statement for policy in policies for statement in policy["PolicyDocument"]["Statement"] if statement["Effect"] == "Allow"]


def variant_of(*options: str, **parameters: object) -> Variant:
    for option in options:
        parameters |= OPTIONS[option]
    return Variant(frozenset(options), parameters, template.resolve(parameters))


COMBINATIONS = [options for count in range(len(OPTIONS) + 1) for options in itertools.combinations(OPTIONS, count)]


@pytest.fixture(scope="module", params=COMBINATIONS, ids="+".join)
def variant(request):
    return variant_of(*request.param)


def allowed_values(parameter):
    return template.source()["Parameters"][parameter]["AllowedValues"]


def many(value):
    return value if isinstance(value, list) else [value]


# Queues


@pytest.mark.parametrize("queue_type", allowed_values("QueueType"))
@pytest.mark.parametrize("timeout", allowed_values("FunctionTimeout"))
@pytest.mark.parametrize("window", allowed_values("BatchWindow"))
def test_a_message_stays_hidden_for_six_timeouts_and_the_window(queue_type, timeout, window):
    variant = variant_of(QueueType=queue_type, FunctionTimeout=timeout, BatchWindow=window)
    hidden = int(variant.properties("LoginQueue")["VisibilityTimeout"])
    gathered = int(variant.properties("Logins").get("MaximumBatchingWindowInSeconds", 0))
    assert int(variant.properties("LoginFunction")["Timeout"]) == int(timeout)
    assert gathered == (0 if queue_type == "fifo" else int(window))
    assert hidden == 6 * int(timeout) + int(window)
    assert hidden <= LONGEST_VISIBILITY_TIMEOUT


def test_both_queues_are_fifo_or_both_are_standard(variant):
    kinds = [variant.properties(queue).get("FifoQueue", False) for queue in QUEUES]
    assert kinds == ["fifo" in variant.options] * 2


def test_dead_letters_are_kept_longer_than_messages_and_less_long_than_ledger_keys(variant):
    queue, dead_letters = (variant.properties(name) for name in QUEUES)
    assert queue["RedrivePolicy"]["deadLetterTargetArn"] == "DeadLetterQueue.Arn"
    assert dead_letters["MessageRetentionPeriod"] > queue["MessageRetentionPeriod"]
    remembered = template.source()["Parameters"]["LedgerRetentionDays"]["MinValue"] * DAY
    assert queue["MessageRetentionPeriod"] + dead_letters["MessageRetentionPeriod"] <= remembered


def test_queues_refuse_requests_without_tls(variant):
    policies = list(variant.of_type("AWS::SQS::QueuePolicy").values())
    assert sorted(policy["Queues"] for policy in policies) == [[queue] for queue in sorted(QUEUES)]
    for policy in policies:
        [statement] = policy["PolicyDocument"]["Statement"]
        assert (statement["Effect"], statement["Principal"], statement["Action"]) == ("Deny", "*", "sqs:*")
        assert statement["Resource"] == f"{policy['Queues'][0]}.Arn"
        assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


# The event source mapping


def test_a_failed_message_is_redelivered_without_its_batch(variant):
    assert variant.properties("Logins").get("FunctionResponseTypes") == ["ReportBatchItemFailures"]


def test_no_message_is_deleted_by_a_filter(variant):
    assert "FilterCriteria" not in variant.properties("Logins")


def test_batches_are_as_large_as_their_queue_and_window_allow(variant):
    mapping = variant.properties("Logins")
    if "fifo" in variant.options:
        assert mapping["BatchSize"] <= 10
        assert "MaximumBatchingWindowInSeconds" not in mapping
    else:
        assert mapping["BatchSize"] <= 10 or int(mapping["MaximumBatchingWindowInSeconds"]) >= 1


@pytest.mark.parametrize("queue_type", allowed_values("QueueType"))
@pytest.mark.parametrize("window", allowed_values("BatchWindow"))
@pytest.mark.parametrize("size", [1, 9, 10, 11, 100, 10_000])
def test_a_large_batch_without_a_window_is_refused_before_anything_is_created(queue_type, window, size):
    impossible = queue_type == "standard" and int(window) == 0 and size > 10
    broken = template.broken_rules({"QueueType": queue_type, "BatchWindow": window, "BatchSize": size})
    assert broken == (["BatchSize above 10 needs a BatchWindow of a second or more."] if impossible else [])


def test_invocations_are_bounded_by_pollers_or_by_concurrency_and_never_by_both(variant):
    mapping = variant.properties("Logins")
    assert ("ProvisionedPollerConfig" in mapping) == ("pollers" in variant.options)
    assert ("ScalingConfig" in mapping) == ("pollers" not in variant.options)


def test_reserved_concurrency_does_not_throttle_the_mapping(variant):
    reserved = variant.properties("LoginFunction").get("ReservedConcurrentExecutions")
    assert (reserved is not None) == ("rest" in variant.options)
    if reserved is not None and "pollers" not in variant.options:
        assert reserved >= variant.properties("Logins")["ScalingConfig"]["MaximumConcurrency"]


def test_the_queue_calls_the_alias_if_deployment_is_gradual(variant):
    gradual = "gradual" in variant.options
    called = variant.properties("Logins")["FunctionName"]
    assert called == ("LoginFunctionAliaslive" if gradual else "LoginFunction.Arn")
    assert template.outputs(variant.parameters)["LiveFunction"] == ("LoginFunction:live" if gradual else "LoginFunction")


def test_a_gradual_deployment_is_rolled_back_only_if_the_new_version_fails(variant):
    groups = list(variant.of_type("AWS::CodeDeploy::DeploymentGroup").values())
    assert len(groups) == ("gradual" in variant.options)
    for group in groups:
        assert {alarm["Name"] for alarm in group["AlarmConfiguration"]["Alarms"]} == {"NewVersionErrors"}
        [errors] = [dimensions for namespace, name, dimensions in metrics_read(variant) if name == "Errors" and "Resource" in dimensions]
        alias = variant.properties("LoginFunctionAliaslive")
        assert errors["Resource"].split(":")[1] == alias["Name"]
        assert errors["ExecutedVersion"] == alias["FunctionVersion"]


# Secrets, keys and rights


def test_queues_and_keyring_outlive_the_stack(variant):
    kept = variant.of_type("AWS::SQS::Queue", "AWS::SQS::QueuePolicy", "AWS::SecretsManager::Secret", "AWS::SecretsManager::ResourcePolicy")
    assert set(QUEUES) < set(kept)
    for name in kept:
        resource = variant.resources[name]
        assert resource.get("DeletionPolicy") in ("Retain", "RetainExceptOnCreate"), name
        assert resource.get("UpdateReplacePolicy") == "Retain", name


def test_the_keyring_is_created_or_given_and_nobody_may_delete_a_created_one(variant):
    secrets = variant.of_type("AWS::SecretsManager::Secret")
    policies = list(variant.of_type("AWS::SecretsManager::ResourcePolicy").values())
    made = [] if "rest" in variant.options else ["MaskingSecret"]
    assert list(secrets) == made
    assert [policy["SecretId"] for policy in policies] == made
    for policy in policies:
        [statement] = policy["ResourcePolicy"]["Statement"]
        assert (statement["Effect"], statement["Principal"], statement["Action"]) == ("Deny", "*", "secretsmanager:DeleteSecret")


def test_everything_with_messages_or_keys_is_encrypted_with_the_given_key(variant):
    key = KEYS["KmsKeyArn"] if "keys" in variant.options else None
    for name, queue in variant.of_type("AWS::SQS::Queue").items():
        assert queue.get("KmsMasterKeyId") == key, name
        assert queue.get("SqsManagedSseEnabled") == (None if key else True), name
    for name, secret in variant.of_type("AWS::SecretsManager::Secret").items():
        assert secret.get("KmsKeyId") == key, name
    assert variant.properties("LoginFunction").get("KmsKeyArn") == key
    assert variant.properties("LogGroup").get("KmsKeyId") == (KEYS["LogKmsKeyArn"] if key else None)


@pytest.mark.parametrize("given", [names for count in range(4) for names in itertools.combinations(KEYS, count)], ids="+".join)
def test_the_function_may_decrypt_with_the_keys_of_its_queue_and_secrets_and_no_other(given):
    [policy] = variant_of(**{name: KEYS[name] for name in given}).properties("Role")["Policies"]
    statements = [statement for statement in policy["PolicyDocument"]["Statement"] if "kms" in str(statement["Action"])]
    assert [statement["Action"] for statement in statements] == ["kms:Decrypt"] * len(statements)
    resources = {"KmsKeyArn": KEYS["KmsKeyArn"], "SecretsKmsKeyArn": KEYS["SecretsKmsKeyArn"].split(",")}
    assert [statement["Resource"] for statement in statements] == [resources[name] for name in given if name in resources]
    for statement in statements:
        if statement["Resource"] == resources["SecretsKmsKeyArn"]:
            assert statement.get("Condition") == {"StringEquals": {"kms:ViaService": "secretsmanager.us-east-1.amazonaws.com"}}


def test_a_token_replaces_the_databases_secret():
    database = {"DatabaseAuth": "iam", "DatabaseHost": "db.example", "DatabaseResourceId": "db-ABC", "DatabaseUser": "loader"}
    by_token, by_password = variant_of(**database), variant_of()
    assert of_action(by_token, "rds-db:connect") == [f"arn:aws:rds-db:us-east-1:{ACCOUNT}:dbuser:db-ABC/loader"]
    assert of_action(by_password, "rds-db:connect") == []
    assert len(of_action(by_token, "secretsmanager:GetSecretValue")) == 1
    assert len(of_action(by_password, "secretsmanager:GetSecretValue")) == 2
    variables = [variant.properties("LoginFunction")["Environment"]["Variables"] for variant in (by_token, by_password)]
    assert [v["DATABASE_AUTH"] for v in variables] == ["iam", "password"]
    assert [v.get("DATABASE_USER") for v in variables] == ["loader", None]
    assert ["DATABASE_SECRET_ID" in v for v in variables] == [False, True]


def test_the_schedule_invokes_the_function_with_its_own_event_and_may_do_nothing_else(variant):
    schedule, role = variant.properties("Maintenance"), variant.properties("MaintenanceRole")
    [policy] = role["Policies"]
    invoke, *others = policy["PolicyDocument"]["Statement"]
    assert (invoke["Action"], invoke["Resource"]) == ("lambda:InvokeFunction", schedule["Target"]["Arn"])
    assert [statement["Action"] for statement in others] in ([], ["kms:Decrypt"])
    arn = f"arn:aws:scheduler:us-east-1:{ACCOUNT}:schedule/default/{schedule['Name']}"
    assert json.loads(schedule["Target"]["Input"]) == {"maintenance": arn}
    assert variant.properties("LoginFunction")["Environment"]["Variables"]["MAINTENANCE_SCHEDULE"] == arn


def of_action(variant, action):
    """The resources on which the function's role may do this."""
    return [resource for statement in variant.allowed() if action in many(statement["Action"]) for resource in many(statement["Resource"])]


@pytest.mark.parametrize(
    ("given", "broken"),
    [
        ({}, []),
        ({"DatabaseSecretArn": ""}, ["DatabaseAuth=password needs a DatabaseSecretArn."]),
        ({"DatabaseAuth": "iam", "DatabaseHost": "h", "DatabaseResourceId": "db-A"}, []),
        ({"DatabaseAuth": "iam"}, ["DatabaseAuth=iam needs a DatabaseHost.", "DatabaseAuth=iam needs a DatabaseResourceId."]),
        ({"DatabaseAuth": "iam", "DatabaseHost": "h", "DatabaseResourceId": "db-A", "DatabaseTls": "disable"}, ["DatabaseAuth=iam needs TLS."]),
    ],
)
def test_missing_parameters_of_a_sign_in_method_are_refused_before_anything_is_created(given, broken):
    assert template.broken_rules(given) == broken


def test_no_right_has_a_wildcard_except_x_rays_which_needs_one(variant):
    statements = variant.allowed()
    for statement in statements:
        assert {"Effect", "Action", "Resource"} <= set(statement) <= {"Effect", "Action", "Resource", "Condition"}
        assert not any("*" in action for action in many(statement["Action"])), statement
        if not all(action.startswith("xray:") for action in many(statement["Action"])):
            assert not any("*" in resource for resource in many(statement["Resource"])), statement
    assert any("xray" in str(statement) for statement in statements) == ("rest" in variant.options)


def test_the_roles_have_no_rights_but_these(variant):
    managed = [arn.split("/")[-1] for role in variant.of_type("AWS::IAM::Role").values() for arn in role.get("ManagedPolicyArns", [])]
    expected = ["AWSLambdaENIManagementAccess"] * ("vpc" in variant.options)
    expected += ["AWSCodeDeployRoleForLambdaLimited"] * ("gradual" in variant.options)
    assert managed == expected
    assert not variant.of_type("AWS::IAM::Policy", "AWS::IAM::ManagedPolicy", "AWS::IAM::RolePolicy")
    trusted = [role["AssumeRolePolicyDocument"]["Statement"] for role in variant.of_type("AWS::IAM::Role").values()]
    services = ["lambda.amazonaws.com", "scheduler.amazonaws.com"] + ["codedeploy.amazonaws.com"] * ("gradual" in variant.options)
    assert [statement["Principal"] for [statement] in trusted] == [{"Service": service} for service in services]


def test_a_permissions_boundary_bounds_every_role(variant):
    roles = variant.of_type("AWS::IAM::Role")
    boundary = variant.parameters.get("PermissionsBoundaryArn")
    assert len(roles) == 2 + ("gradual" in variant.options)
    assert [role.get("PermissionsBoundary") for role in roles.values()] == [boundary] * len(roles)


def test_the_function_is_in_the_vpc_that_is_given(variant):
    vpc = variant.properties("LoginFunction").get("VpcConfig")
    assert vpc == ({"SubnetIds": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]} if "vpc" in variant.options else None)


# Alarms


def test_an_alarm_links_to_its_section_of_the_runbook(variant):
    runbook = variant.parameters.get("RunbookUrl", "docs/runbook.md")
    for name, alarm in variant.alarms().items():
        suffix = alarm["AlarmName"].removeprefix("login-etl-")
        assert alarm["AlarmName"] != suffix
        assert alarm["AlarmDescription"].strip().endswith(f" {runbook}#{suffix}"), name
        assert len(alarm["AlarmDescription"]) <= 1024, name


def test_the_runbook_has_a_section_for_each_alarm():
    headings = re.findall(r"^#+ +(.+?) *$", (paths.ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    suffixes = {alarm["AlarmName"].removeprefix("login-etl-") for alarm in variant_of(*OPTIONS).alarms().values()}
    assert suffixes - anchors == set()


def test_alarms_go_to_the_topics_that_are_given_and_the_page_to_its_own(variant):
    for name, alarm in variant.alarms().items():
        topic = variant.parameters.get("PageTopicArn" if name == "Page" else "AlarmTopicArn")
        assert alarm.get("AlarmActions") == alarm.get("OKActions") == ([topic] if topic else None), name


def test_an_alarm_sets_the_treatment_of_missing_data(variant):
    for name, alarm in variant.of_type("AWS::CloudWatch::Alarm").items():
        assert alarm.get("TreatMissingData") == ("breaching" if name in ("Silence", "MaintenanceStopped") else "notBreaching"), name


@pytest.mark.parametrize("silence_hours", range(25))
def test_an_alarm_looks_back_no_further_than_cloudwatch_does(silence_hours):
    # https://docs.aws.amazon.com/AmazonCloudWatch/latest/APIReference/API_PutMetricAlarm.html
    alarms = variant_of("gradual", SilenceHours=silence_hours).of_type("AWS::CloudWatch::Alarm")
    assert ("Silence" in alarms) == (silence_hours > 0)
    for name, alarm in alarms.items():
        periods = {metric["MetricStat"]["Period"] for metric in alarm.get("Metrics", []) if "MetricStat" in metric} or {alarm["Period"]}
        assert len(periods) == 1, name
        [period] = periods
        assert period * alarm["EvaluationPeriods"] <= (DAY if period < 3600 else 7 * DAY), name
        assert alarm.get("DatapointsToAlarm", 1) <= alarm["EvaluationPeriods"], name


def test_an_alarm_on_an_expression_watches_it_and_has_exactly_the_metrics_in_it(variant):
    for name, alarm in variant.of_type("AWS::CloudWatch::Alarm").items():
        if "Metrics" not in alarm:
            assert {"Namespace", "MetricName", "Statistic"} <= set(alarm), name
            continue
        [watched] = [metric for metric in alarm["Metrics"] if metric.get("ReturnData", True)]
        read = [metric["Id"] for metric in alarm["Metrics"] if metric is not watched]
        assert sorted(re.findall(r"\b[a-z]\w*", watched["Expression"])) == sorted(read), name


def test_alarm_and_dashboard_know_the_maximum_concurrency(variant):
    if variant.properties("LoginFunction").get("ReservedConcurrentExecutions"):
        most = variant.properties("LoginFunction")["ReservedConcurrentExecutions"]
    elif "pollers" in variant.options:
        # A poller has up to ten: https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-scaling.html
        most = 10 * int(variant.properties("Logins")["ProvisionedPollerConfig"]["MaximumPollers"])
    else:
        most = variant.properties("Logins")["ScalingConfig"]["MaximumConcurrency"]
    [expression] = [metric["Expression"] for metric in variant.properties("NearMaximumConcurrency")["Metrics"] if "Expression" in metric]
    [factors] = re.findall(r"^100 \* concurrent / \(([\d* ]+)\)$", expression)
    assert math.prod(map(int, factors.split("*"))) == most
    lines = [line for widget in variant.widgets() for line in widget["properties"].get("annotations", {}).get("horizontal", [])]
    assert [line["value"] for line in lines if line["label"] == "maximum"] == [most]


def test_the_page_consists_of_existing_alarms(variant):
    names = re.findall(r'ALARM\("([^"]+)"\)', variant.properties("Page")["AlarmRule"])
    assert variant.properties("Page")["AlarmRule"] == " OR ".join(f'ALARM("{name}")' for name in names)
    assert set(names) == {"Late", "FunctionErrors", "DeadLetters"}
    assert set(names) <= set(variant.of_type("AWS::CloudWatch::Alarm"))


# The dashboard


def test_no_widget_covers_another(variant):
    covered = [
        (column, row)
        for widget in variant.widgets()
        for column in range(widget["x"], widget["x"] + widget["width"])
        for row in range(widget["y"], widget["y"] + widget["height"])
    ]
    assert len(covered) == len(set(covered))
    assert max(column for column, _ in covered) < 24
    # No place is left empty, either.
    assert len(covered) == 24 * (max(row for _, row in covered) + 1)


def test_the_dashboard_shows_every_alarm_that_every_stack_has(variant):
    [shown] = [widget["properties"]["alarms"] for widget in variant.widgets() if widget["type"] == "alarm"]
    alarms = set(variant.alarms()) - {"Silence", "NewVersionErrors"}
    assert sorted(shown) == sorted(f"{name}.Arn" for name in alarms)


def test_widgets_have_a_title_and_a_region_and_search_the_functions_log(variant):
    for widget in variant.widgets():
        assert widget["properties"]["title"].endswith("?")
        assert widget["properties"].get("region", "us-east-1") == "us-east-1"
        assert ("region" in widget["properties"]) == (widget["type"] != "alarm")
        if widget["type"] == "log":
            assert widget["properties"]["query"].startswith("SOURCE 'LogGroup' | ")


def metrics_read(variant):
    """Namespace, name and dimensions of each metric that alarms and dashboard read."""
    for alarm in variant.of_type("AWS::CloudWatch::Alarm").values():
        for metric in [each["MetricStat"]["Metric"] for each in alarm.get("Metrics", []) if "MetricStat" in each] or [alarm]:
            dimensions = {dimension["Name"]: dimension["Value"] for dimension in metric["Dimensions"]}
            yield metric["Namespace"], metric["MetricName"], dimensions
    for widget in variant.widgets():
        for namespace, name, *rest in widget["properties"].get("metrics", []):
            pairs = [each for each in rest if isinstance(each, str)]
            yield namespace, name, dict(zip(pairs[::2], pairs[1::2], strict=True))


def test_every_metric_is_of_this_stacks_queues_or_function(variant):
    assert variant.properties("LoginFunction")["FunctionName"] == FUNCTION
    read = list(metrics_read(variant))
    assert {namespace for namespace, _, _ in read} == set(DIMENSIONS)
    for namespace, name, dimensions in read:
        # Another test checks the version.
        of_any = {dimension: value for dimension, value in dimensions.items() if dimension != "ExecutedVersion"}
        assert of_any in DIMENSIONS[namespace], (namespace, name)


# Parameters


def test_the_console_asks_for_every_parameter_once():
    groups = template.source()["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]
    asked = [name for group in groups for name in group["Parameters"]]
    assert sorted(asked) == sorted(template.source()["Parameters"])


def test_every_parameter_is_described_and_has_a_default():
    parameters = template.source()["Parameters"]
    assert [name for name, parameter in parameters.items() if not parameter.get("Description")] == []
    assert [name for name, parameter in parameters.items() if "Default" not in parameter] == []


def test_every_documented_setting_has_a_parameter():
    text = (paths.ROOT / "docs" / "settings.md").read_text()
    [table] = re.findall(r"## Settings\n.*?(\|.*?)\n\n", text, re.DOTALL)
    documented = set(re.findall(r"`([A-Z_]+)`", "".join(line.split("|")[1] for line in table.splitlines())))
    by_password, by_token = variant_of(), variant_of(DatabaseAuth="iam", DatabaseHost="db", DatabaseResourceId="db-A")
    given = {name for stack in (by_password, by_token) for name in stack.properties("LoginFunction")["Environment"]["Variables"]}
    # Lambda sets AWS_LAMBDA_*, etlctl alone needs DATABASE_HOSTADDR, and nobody should change what the libraries read.
    ours = {name for name in documented if not name.startswith("AWS_LAMBDA_")} - {"DATABASE_HOSTADDR"}
    assert ours == given - {"SSL_CERT_FILE"}


def test_a_cold_start_does_not_read_the_systems_roots():
    # OpenSSL would read them in each new environment, which takes half as long as all else together.
    assert variant_of().properties("LoginFunction")["Environment"]["Variables"]["SSL_CERT_FILE"] == "/dev/null"


def test_every_setting_in_the_code_is_documented():
    code = (paths.ROOT / "src" / "config.rs").read_text().partition("#[cfg(test)]")[0]
    page = (paths.ROOT / "docs" / "settings.md").read_text()
    # Names of versions before, which are refused or still understood.
    old = {"APP_VERSION_ENCODING", "DATABASE_CA_FILE"}
    assert [name for name in sorted(set(re.findall(r'"([A-Z][A-Z0-9_]{2,})"', code)) - old) if f"`{name}`" not in page] == []


def test_every_output_exists(variant):
    outputs = template.outputs(variant.parameters)
    names = ["QueueUrl", "QueueArn", "DeadLetterQueueUrl", "FunctionName", "LiveFunction", "MaskingSecretArn", "DashboardUrl"]
    assert list(outputs) == names
    assert all(outputs.values())
