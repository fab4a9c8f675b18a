"""Checks that the function, the template, etlctl and docs/metrics-and-logs.md use the same names of metrics and log lines."""

import json
import re
from collections import defaultdict

import pytest
from world import paths, template

DOCUMENT = (paths.ROOT / "docs" / "metrics-and-logs.md").read_text()
# Parameters with which the stack has every alarm.
EVERYTHING = {"GradualDeployment": "true", "SilenceHours": 6}
CONTEXT = {"timestamp", "level", "message", "target", "span"}


def rows(section):
    """The cells of a section's table, without its header."""
    text = re.search(rf"^#+ {section}\n(.*?)(?=^#|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)[1]
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    return lines[1:]


def names(cell):
    return re.findall(r"`([^`]+)`", cell)


def documented_lines():
    """Level and fields of each documented message."""
    return {names(message)[0]: (level, frozenset(names(fields))) for level, message, fields, _ in rows("Log lines")}


def logged_lines():
    """Level and fields of each message, from the code's macros."""
    lines = {}
    for file in sorted((paths.ROOT / "src").rglob("*.rs")):
        text = file.read_text()
        macros = re.findall(r'\btracing::(trace|debug|info|warn|error)!\(((?:[^";]|"[^"]*"(?=,))*?)"([^"]*)",?\s*\)', text)
        assert len(macros) == len(re.findall(r"\btracing::\w+!\(", text)), f"cannot parse a macro in {file}"
        for level, arguments, message in macros:
            fields = frozenset(re.findall(r"(?:^|,)\s*[%?]?(\w+)", arguments))
            assert lines.setdefault(message, (level.upper(), fields)) == (level.upper(), fields), message
    return lines


def stack_metrics():
    """Maps namespace and name of each metric that the stack's alarms or dashboard read to the suffixes of these alarms."""
    resources = template.resolve(EVERYTHING)
    read = defaultdict(set)
    for resource in resources.values():
        if resource["Type"] == "AWS::CloudWatch::Alarm":
            alarm = resource["Properties"]
            for metric in [each["MetricStat"]["Metric"] for each in alarm.get("Metrics", []) if "MetricStat" in each] or [alarm]:
                read[metric["Namespace"], metric["MetricName"]].add(alarm["AlarmName"].removeprefix("login-etl-"))
    for widget in widgets():
        for namespace, name, *_ in widget.get("metrics", []):
            read[namespace, name] |= set()
    return read


def widgets():
    body = template.resolve(EVERYTHING)["Dashboard"]["Properties"]["DashboardBody"]
    return [widget["properties"] for widget in json.loads(body)["widgets"]]


def alarms_of(cell):
    return set(re.findall(r"\]\(runbook\.md#([a-z-]+)\)", cell))


@pytest.fixture(scope="module")
def events(stack):
    """The function's metrics events, including those of a batch and of the schedule."""
    schedule = stack.localstack.client("scheduler").get_schedule(Name=f"{stack.name}-maintenance")
    for event in ((paths.ROOT / "events" / "valid.json").read_text(), schedule["Target"]["Input"]):
        stack.localstack.client("lambda").invoke(FunctionName=stack.function_name, Payload=event)
    return [line for line in stack.log() if "_aws" in line and line["FunctionName"] == stack.function_name]


# Metrics


def test_the_function_emits_the_documented_metrics_with_their_units_and_no_other(events):
    definitions = [metric for event in events for directive in event["_aws"]["CloudWatchMetrics"] for metric in directive["Metrics"]]
    emitted = {(metric["Name"], metric["Unit"]) for metric in definitions}
    assert emitted == {(names(name)[0], unit) for name, unit, *_ in rows("Metrics")}


def test_metrics_have_the_alarms_namespace_and_dimension(stack, events):
    directives = [directive for event in events for directive in event["_aws"]["CloudWatchMetrics"]]
    assert {directive["Namespace"] for directive in directives} == {"login-etl"}
    assert all(directive["Dimensions"] == [["FunctionName"]] for directive in directives)
    names = [f"{stack.name}-{suffix}" for suffix in set().union(*stack_metrics().values())]
    alarms = stack.localstack.client("cloudwatch").describe_alarms(AlarmNames=names)["MetricAlarms"]
    metrics = [each["MetricStat"]["Metric"] for alarm in alarms for each in alarm.get("Metrics", []) if "MetricStat" in each] + alarms
    asked = [metric["Dimensions"] for metric in metrics if metric.get("Namespace") == "login-etl"]
    assert asked
    assert all(dimensions == [{"Name": "FunctionName", "Value": events[0]["FunctionName"]}] for dimensions in asked)


def test_events_have_the_documented_properties_and_a_value_for_each_metric(events):
    [sentence] = re.findall(r"^Each event has two properties.*?(?=\n\n)", DOCUMENT, re.MULTILINE | re.DOTALL)
    properties = {name for name in names(sentence) if name != "Ok"}
    for event in events:
        [directive] = event["_aws"]["CloudWatchMetrics"]
        values = {metric["Name"] for metric in directive["Metrics"]}
        assert set(event) - {"_aws", "FunctionName"} == values | properties
        assert all(isinstance(event[name], int | float) for name in values)


def test_every_metric_that_alarms_and_dashboard_read_is_emitted(events):
    emitted = {metric["Name"] for event in events for metric in event["_aws"]["CloudWatchMetrics"][0]["Metrics"]}
    read = {name for namespace, name in stack_metrics() if namespace == "login-etl"}
    assert read
    assert read - emitted == set()


def test_each_metrics_documented_alarms_read_it():
    documented = {("login-etl", names(name)[0]): alarms_of(alarms) for name, *_, alarms in rows("Metrics")}
    documented |= {tuple(names(name)): alarms_of(alarms) for name, *_, alarms in rows("AWS's own metrics")}
    read = {metric: alarms for metric, alarms in stack_metrics().items() if metric[0] == "login-etl" or alarms}
    assert {metric: alarms for metric, alarms in documented.items() if alarms or metric in read} == read


# Log lines


def test_the_code_logs_the_documented_lines_and_no_other():
    assert logged_lines() == documented_lines()


def test_the_functions_lines_have_the_documented_level_and_fields(stack, events):
    lines = [line for line in stack.log() if line.get("target", "").split("::")[0] == "login_etl"]
    assert lines
    documented = documented_lines()
    for line in lines:
        assert (line["level"], frozenset(line) - CONTEXT) == documented[line["message"]], line


def test_the_platforms_lines_are_documented(stack, events):
    seen = {line["type"] for line in stack.log() if "record" in line}
    assert seen
    assert seen - {name for types, _ in rows("Lambda's own lines") for name in names(types)} == set()


def test_every_error_type_is_documented():
    sources = [(paths.ROOT / "src" / name).read_text() for name in ("handler.rs", "store/error.rs")]
    bodies = [re.search(r"fn error_type\(.*?\n    }\n", source, re.DOTALL)[0] for source in sources]
    in_code = {name for body in bodies for name in re.findall(r'=> "(\w+)"', body)}
    [sentence] = re.findall(r"^`error_type`, `Outcome` and .*?(?=\n\n)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert {name for name in names(sentence) if name not in ("error_type", "Outcome", "errorType")} == in_code


# Searches


def test_the_dashboards_searches_find_lines_that_the_function_logs():
    queries = [widget["query"] for widget in widgets() if "query" in widget]
    assert queries
    for query in queries:
        [phrase] = re.findall(r"filter message (?:= '|like /\^)([^'/]+)['/]", query)
        [(_, fields)] = [line for message, line in logged_lines().items() if message.startswith(phrase)]
        used = {name for names in re.findall(r"\bby ([a-z_, ]+?) *\|", query) for name in names.split(", ")}
        used |= set(re.findall(r"count_distinct\((\w+)\)", query))
        assert used and used <= fields, query


def test_etlctl_searches_for_logged_lines_and_their_fields():
    source = (paths.ROOT / "etlctl" / "src" / "logs.rs").read_text()
    fields = {}
    for variable, phrase in re.findall(r'let (.+?) = lines\(settings, "([^"]+)"', source):
        [(_, fields[variable])] = [line for message, line in logged_lines().items() if message.startswith(phrase)]
    assert len(fields) == len(re.findall(r"= lines\(settings, ", source)) > 0
    used = [("loaded", name) for name in re.findall(r'\bsum\("(\w+)"\)', source)] + re.findall(r'\bby\(&(\w+)\.lines, "(\w+)"\)', source)
    assert len(used) > 4
    for variable, name in used:
        assert name in fields[variable], (variable, name)
    asked = set(re.findall(r'\bline\["(\w+)"\]|\btext\(line, "(\w+)"\)', source))
    assert {name for pair in asked for name in pair if name} - CONTEXT <= frozenset().union(*fields.values())
