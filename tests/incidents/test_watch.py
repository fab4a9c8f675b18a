"""Tests the samples of the incidents, the template's alarms over them, and its dashboard."""

import json
from html import escape

import pytest
from world import template
from world.incidents import dashboard, insights
from world.incidents.alarms import Alarms, calculate, follows
from world.incidents.samples import FUNCTION, Metric, Samples, oldest_message

FAILED = Metric("login-etl", "Failed", FUNCTION)


@pytest.fixture(scope="module")
def resources():
    return template.resolve({"FreshnessObjective": 10, "SilenceHours": 2, "GradualDeployment": "true"})


def samples_of(values, metric=FAILED):
    """One sample a minute; None for a minute without a sample."""
    samples = Samples()
    for minute, value in enumerate(values):
        if value is not None:
            samples.add(metric, minute + 0.5, value)
    return samples


def rings(values, minute=None, **properties):
    usual = {
        "AlarmName": "it",
        "Namespace": FAILED.namespace,
        "MetricName": FAILED.name,
        "Dimensions": [{"Name": "FunctionName", "Value": FAILED.of}],
        "Statistic": "Sum",
        "Period": 60,
        "ComparisonOperator": "GreaterThanOrEqualToThreshold",
        "Threshold": 5,
        "EvaluationPeriods": 3,
        "TreatMissingData": "notBreaching",
    }
    alarm = {"Type": "AWS::CloudWatch::Alarm", "Properties": usual | properties}
    return Alarms({"It": alarm}, samples_of(values)).ringing(minute or len(values)) == {"It"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [([9, 0, 9], True), ([9, 0, 0], False), ([0, 9, 9], True), ([9, 9, 0, 0], False), ([9, 9, 0], True)],
)
def test_an_alarm_rings_while_m_of_n_datapoints_breach(values, expected):
    assert rings(values, DatapointsToAlarm=2) == expected


def test_without_a_number_of_datapoints_all_must_breach():
    assert rings([9, 9, 9]) and not rings([9, 0, 9])


@pytest.mark.parametrize(
    ("values", "of_breaching", "of_not_breaching"),
    # The table in CloudWatch's documentation: three of three datapoints, and the two before them.
    [
        ([0, None, 9, None, 9], False, False),
        ([None, None, None, None, 0], False, False),
        ([None, None, None, None, None], True, False),
        ([0, 9, 9, None, 9], True, True),
        ([None, None, 9, None, None], True, False),
    ],
)
def test_older_datapoints_replace_missing_ones_before_missing_data_is_treated(values, of_breaching, of_not_breaching):
    assert rings(values, TreatMissingData="breaching") == of_breaching
    assert rings(values, TreatMissingData="notBreaching") == of_not_breaching


def test_the_window_of_a_longer_period_slides_by_the_minute():
    values = [0, 0, 0, 3, 0, 0, 3, 0, 0, 0]
    at = {minute: rings(values, minute, Period=300, EvaluationPeriods=1) for minute in range(5, 11)}
    assert at == {5: False, 6: False, 7: True, 8: True, 9: False, 10: False}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [("100 * a / b", 50), ("100 * a / (1000 * 3)", 1 / 15), ("100 * a / zero", None), ("100 * a / gone", None)]
    + [("MAX([FILL(a, 0), FILL(gone, 0)])", 2), ("MAX([FILL(gone, 0), FILL(gone, 0)])", 0), ("MAX([a, b])", 4)],
)
def test_metric_math_on_a_missing_datapoint_is_missing_unless_filled(expression, expected):
    assert calculate(expression, {"a": 2, "b": 4, "zero": 0, "gone": None}) == (expected if expected is None else pytest.approx(expected))


def test_unknown_metric_math_is_refused():
    with pytest.raises(ValueError, match="RATE"):
        calculate("RATE(a)", {"a": 1})


def test_a_composite_alarm_follows_its_rule():
    rule = 'ALARM("A") AND NOT ALARM("B") OR ALARM("C")'
    assert [follows(rule, ringing) for ringing in ({"A"}, {"A", "B"}, {"B", "C"}, set())] == [True, False, True, False]


def test_the_page_rings_for_late_rows_and_not_for_failing_messages(resources):
    late = samples_of([60] * 3, Metric("login-etl", "AgeOfOldestMessage", FUNCTION))
    assert {"Late", "Page"} <= Alarms(resources, late).ringing(3)
    failing = Alarms(resources, samples_of([50] * 3)).ringing(3)
    assert "MessagesFailing" in failing and "Page" not in failing


def test_no_alarm_of_the_template_rings_while_all_is_well(resources):
    calm = Alarms(resources, samples_of([20] * 30, Metric("login-etl", "Messages", FUNCTION)))
    assert calm.changes(30) == []


def test_the_age_of_the_oldest_message_ignores_messages_received_three_times():
    sent_and_received = ((10, 3), (40, 2), (90, 0))
    messages = [
        {"Attribute": {"SentTimestamp": str(sent * 1000), "ApproximateReceiveCount": str(receives)}} for sent, receives in sent_and_received
    ]
    assert oldest_message(messages, 100) == 60
    assert oldest_message([], 100) == 0


def test_a_percentile_lies_between_the_nearest_samples():
    samples = Samples()
    for value in (1, 2, 3, 4):
        samples.add(FAILED, 0.1, value)
    statistics = {"p50": 2.5, "p99": pytest.approx(3.97), "Average": 2.5, "Maximum": 4}
    assert {statistic: samples.datapoint(FAILED, statistic, 1) for statistic in statistics} == statistics


LOG = [
    {"message": "message failed", "message_id": "1", "reason": "user_id is missing"},
    {"message": "message failed", "message_id": "1", "reason": "user_id is missing"},
    {"message": "message failed", "message_id": "2", "reason": "user_id is missing"},
    {"message": "message failed", "message_id": "3", "reason": "body is not JSON"},
    {"message": "batch failed; all its messages return to the queue", "error_type": "DatabaseUnavailable", "error": "refused <here>"},
    {"message": "batch loaded"},
]


def test_a_log_query_groups_and_counts_as_logs_insights_does():
    text = "SOURCE 'it' | filter message = 'message failed'"
    text += " | stats count(*) as failures, count_distinct(message_id) as messages by reason"
    columns, rows = insights.query(text + " | sort failures desc | limit 10", LOG)
    assert columns == ["reason", "failures", "messages"]
    assert rows == [["user_id is missing", 3, 2], ["body is not JSON", 1, 1]]
    assert insights.query(text + " | sort failures desc | limit 1", LOG)[1] == rows[:1]


def test_every_widget_line_note_and_alarm_of_the_dashboard_is_in_the_picture(resources):
    body = resources["Dashboard"]["Properties"]["DashboardBody"]
    names = Alarms(resources, Samples()).names
    picture = dashboard.draw(body, names, {"Late", "Page"}, samples_of([1, None, 2, 3]), LOG, 4)
    for widget in json.loads(body)["widgets"]:
        properties = widget["properties"]
        expected = [properties["title"], *(names[arn.removesuffix(".Arn")] for arn in properties.get("alarms", []))]
        expected += [options["label"] for *_, options in properties.get("metrics", [])]
        expected += [note["label"] for note in properties.get("annotations", {}).get("horizontal", [])]
        assert all(escape(words) in picture for words in expected)
    assert picture.count(">ALARM<") == 2
    assert all(escape(words) in picture for words in ("user_id is missing", "DatabaseUnavailable", "refused <here>"))


def test_a_line_is_broken_where_datapoints_are_missing():
    parts = dashboard.curve([(0, 0), (1, 1), None, (3, 3), None, (5, 5), (6, 6)], "#000")
    assert [part.split()[0] for part in parts] == ["<path", "<circle", "<path"]
