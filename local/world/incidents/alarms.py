"""Evaluates the template's alarms over samples, by CloudWatch's published rules.

An alarm is evaluated every minute, over a sliding window:
https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/alarm-evaluation-window.html
Older datapoints replace missing ones; only if there are too few of them, the treatment of missing data applies:
https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/alarms-and-missing-data.html
"""

import ast
import operator
from collections.abc import Callable

from world.incidents.samples import Metric, Samples

# The number of periods that CloudWatch looks back beyond the evaluation periods, as in its documentation's examples.
FURTHER_BACK = 2
COMPARISONS = {
    "GreaterThanOrEqualToThreshold": operator.ge,
    "GreaterThanThreshold": operator.gt,
    "LessThanThreshold": operator.lt,
    "LessThanOrEqualToThreshold": operator.le,
}
# Whether missing data counts as breaching.
TREATMENTS = {"notBreaching": False, "breaching": True}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


class Alarms:
    """The alarms of a resolved template, by logical id."""

    def __init__(self, resources: dict, samples: Samples):
        self._samples = samples
        self._simple = {name: it["Properties"] for name, it in resources.items() if it["Type"] == "AWS::CloudWatch::Alarm"}
        self._composite = {name: it["Properties"] for name, it in resources.items() if it["Type"] == "AWS::CloudWatch::CompositeAlarm"}
        self.names = {name: it["AlarmName"] for name, it in (self._simple | self._composite).items()}

    def ringing(self, minute: int) -> set[str]:
        """The alarms in ALARM at the end of a minute."""
        simple = {name for name, alarm in self._simple.items() if self._is_breached(alarm, minute)}
        return simple | {name for name, alarm in self._composite.items() if follows(alarm["AlarmRule"], simple)}

    def changes(self, minutes: int) -> list[tuple[int, str, bool]]:
        """Each change to ALARM or back to OK up to a minute: the minute, the alarm, and whether it is in ALARM."""
        before, changes = set(), []
        for minute in range(1, minutes + 1):
            now = self.ringing(minute)
            changes += [(minute, name, name in now) for name in self.names if (name in now) != (name in before)]
            before = now
        return changes

    def _is_breached(self, alarm: dict, minute: int) -> bool:
        periods, period = int(alarm["EvaluationPeriods"]), period_of(alarm)
        if TREATMENTS[alarm["TreatMissingData"]] and minute < periods * period:
            # Data from before the first sample does not count as missing.
            return False
        seen = [self._datapoint(alarm, minute - place * period, period) for place in range(periods + FURTHER_BACK)]
        compare, threshold = COMPARISONS[alarm["ComparisonOperator"]], float(alarm["Threshold"])
        breaching = [compare(value, threshold) for value in seen if value is not None][:periods]
        breaching += [TREATMENTS[alarm["TreatMissingData"]]] * (periods - len(breaching))
        return sum(breaching) >= int(alarm.get("DatapointsToAlarm", periods))

    def _datapoint(self, alarm: dict, end: int, period: int) -> float | None:
        """The value that the alarm compares, for the period that ends at `end`."""
        if "Metrics" not in alarm:
            return self._samples.datapoint(metric_of(alarm), alarm["Statistic"], end, period)
        values, watched = {}, None
        for query in alarm["Metrics"]:
            if stat := query.get("MetricStat"):
                values[query["Id"]] = self._samples.datapoint(metric_of(stat["Metric"]), stat["Stat"], end, period)
            else:
                watched = query["Expression"]
        return calculate(watched, values)


def metric_of(properties: dict) -> Metric:
    values = (dimension["Value"] for dimension in properties["Dimensions"])
    return Metric(properties["Namespace"], properties["MetricName"], "/".join(values))


def period_of(alarm: dict) -> int:
    """The alarm's period, in minutes."""
    seconds = alarm.get("Period") or next(query["MetricStat"]["Period"] for query in alarm["Metrics"] if "MetricStat" in query)
    return int(seconds) // 60


def calculate(expression: str, values: dict[str, float | None]) -> float | None:
    """Metric math on one period's datapoints, as far as the template uses it. The result of a missing datapoint is missing, except with FILL."""

    def of(node: ast.expr) -> float | None:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name):
                return values[name]
            case ast.BinOp(left=left, op=op, right=right):
                left, right = of(left), of(right)
                missing = left is None or right is None or (isinstance(op, ast.Div) and right == 0)
                return None if missing else ARITHMETIC[type(op)](left, right)
            case ast.Call(func=ast.Name(id="FILL"), args=[series, filling]):
                return of(filling) if (value := of(series)) is None else value
            case ast.Call(func=ast.Name(id="MAX"), args=[ast.List(elts=series)]):
                return max((value for one in series if (value := of(one)) is not None), default=None)
        raise ValueError(f"unknown metric math: {ast.unparse(node)}")

    return of(ast.parse(expression, mode="eval").body)


def follows(rule: str, ringing: set[str]) -> bool:
    """Whether a composite alarm's rule holds while these alarms ring."""

    def of(node: ast.expr) -> bool:
        match node:
            case ast.Call(func=ast.Name(id="ALARM"), args=[ast.Constant(value=name)]):
                return name in ringing
            case ast.BoolOp(op=op, values=parts):
                combine: Callable = any if isinstance(op, ast.Or) else all
                return combine(of(part) for part in parts)
            case ast.UnaryOp(op=ast.Not(), operand=part):
                return not of(part)
        raise ValueError(f"unknown alarm rule: {ast.unparse(node)}")

    words = " ".join(word.lower() if word in ("AND", "OR", "NOT") else word for word in rule.split())
    return of(ast.parse(words, mode="eval").body)
