"""Draws the template's dashboard as one SVG, similar to CloudWatch."""

import json
import math
import textwrap
from html import escape

from world.incidents import insights
from world.incidents.samples import Metric, Samples

WIDTH, HEADER, ROW, GAP = 1600, 40, 46, 6
COLUMN = WIDTH / 24
# Widths and heights of the text of axes and tables, in pixels.
LETTER = 6.8
LINE = 16
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")
INK, FAINT, GRID, RED, GREEN = "#16191f", "#545b64", "#e9ebed", "#d13212", "#1d8102"
STYLE = f"""text {{ font: 12px 'Helvetica Neue', Arial, sans-serif; fill: {FAINT} }}
.title {{ font-size: 15px; font-weight: bold; fill: {INK} }}
.cell {{ fill: {INK} }} .on {{ fill: #fff }} .note {{ fill: {RED} }} .loud {{ font-weight: bold }}
.end {{ text-anchor: end }} .mid {{ text-anchor: middle }}
path {{ fill: none; stroke-width: 2; stroke-linejoin: round }}"""


def draw(body: str, names: dict[str, str], ringing: set[str], samples: Samples, log: list[dict], minutes: int) -> str:
    """The dashboard of a resolved template from the start to the end of minute `minutes`. `names` are the alarms' names, by logical id."""
    widgets = json.loads(body)["widgets"]
    height = HEADER + max(widget["y"] + widget["height"] for widget in widgets) * ROW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"<style>{STYLE}</style>",
        rect(0, 0, WIDTH, height, "#f2f3f3"),
        text(GAP + 4, 26, f"login-etl, {clock(0)} to {clock(minutes)}", "title"),
    ]
    for widget in widgets:
        x, y = widget["x"] * COLUMN + GAP / 2, HEADER + widget["y"] * ROW + GAP / 2
        box = Box(x, y, widget["width"] * COLUMN - GAP, widget["height"] * ROW - GAP)
        properties = widget["properties"]
        parts += [rect(x, y, box.width, box.height, "#fff", GRID), text(x + 12, y + 22, properties["title"], "title")]
        match widget["type"]:
            case "alarm":
                alarms = [arn.removesuffix(".Arn") for arn in properties["alarms"]]
                parts += box.alarms([(names[name], name in ringing) for name in alarms])
            case "metric":
                parts += box.chart(properties, samples, minutes)
            case "log":
                parts += box.table(*insights.query(properties["query"], log))
            case kind:
                raise ValueError(f"unknown widget type: {kind}")
    return "\n".join([*parts, "</svg>\n"])


class Box:
    """A widget's place."""

    def __init__(self, x: float, y: float, width: float, height: float):
        self.x, self.y, self.width, self.height = x, y, width, height

    def alarms(self, states: list[tuple[str, bool]]) -> list[str]:
        columns = math.ceil(len(states) / 3)
        width, height = (self.width - 24) / columns, (self.height - 40) / 3
        parts = []
        for place, (name, rings) in enumerate(states):
            x, y = self.x + 12 + place % columns * width, self.y + 34 + place // columns * height
            parts.append(rect(x, y, width - 6, height - 4, RED if rings else "#fff", RED if rings else GREEN))
            parts.append(text(x + 10, y + height / 2 + 2, name, "on" if rings else "cell"))
            parts.append(text(x + width - 16, y + height / 2 + 2, "ALARM" if rings else "OK", "on end loud" if rings else "end"))
        return parts

    def chart(self, properties: dict, samples: Samples, minutes: int) -> list[str]:
        lines = list(series(properties, samples, minutes))
        notes = properties.get("annotations", {}).get("horizontal", [])
        sides = {side: [note["value"] for note in notes if note.get("yAxis", "left") == side] for side in ("left", "right")}
        for line in lines:
            sides[line["side"]] += [value for value in line["values"] if value is not None]
        left, right = self.x + 58, self.x + self.width - (52 if any(line["side"] == "right" for line in lines) else 18)
        top, bottom = self.y + 54, self.y + self.height - 48
        tops = {side: ticks(max(values, default=0)) for side, values in sides.items()}

        def at(minute: float) -> float:
            return left + (right - left) * minute / minutes

        def level(value: float, side: str) -> float:
            return bottom - (bottom - top) * value / tops[side][-1]

        parts = [text(self.x + 12, self.y + 38, properties["yAxis"]["left"]["label"])]
        for value in tops["left"]:
            y = level(value, "left")
            parts += [line_between(left, y, right, y, GRID), text(left - 6, y + 4, number(value), "end")]
        if right < self.x + self.width - 18:
            parts += [text(right + 6, level(value, "right") + 4, number(value)) for value in tops["right"]]
        step = next(step for step in (2, 5, 10, 15, 30, 60, 120) if minutes / step <= 9)
        parts += [text(at(minute), bottom + 17, clock(minute), "mid") for minute in range(0, minutes + 1, step)]
        for note in notes:
            side = note.get("yAxis", "left")
            y = level(note["value"], side)
            parts.append(line_between(left, y, right, y, RED, dashes=True))
            parts.append(text(right - 4, y - 5, f"{note['label']} ({number(note['value'])}{', right' * (side == 'right')})", "note end"))
        legend = left
        for line, usual in zip(lines, COLOURS, strict=False):
            colour = line["colour"] or usual
            # A datapoint's time is the beginning of its period.
            points = [None if value is None else (at(minute), level(value, line["side"])) for minute, value in enumerate(line["values"])]
            parts += curve(points, colour)
            label = line["label"] + (" (right)" if line["side"] == "right" else "")
            below = self.y + self.height - 12
            parts += [rect(legend, below - 10, 10, 10, colour), text(legend + 15, below, label)]
            legend += 36 + LETTER * len(label)
        return parts

    def table(self, columns: list[str], rows: list[list]) -> list[str]:
        widths = [LETTER * max(len(str(cell)) for cell in cells) + 14 for cells in zip(columns, *rows)]
        # The widest column gets the remaining width, and its text is wrapped.
        widest = widths.index(max(widths))
        widths[widest] += self.width - 24 - sum(widths)
        places = [self.x + 12 + sum(widths[:place]) for place in range(len(columns))]
        y = self.y + 46
        parts = [text(x, y, column) for x, column in zip(places, columns)]
        parts.append(line_between(self.x + 12, y + 6, self.x + self.width - 12, y + 6, GRID))
        for row in rows:
            cells = [textwrap.wrap(str(value), int((width - 10) / LETTER)) for value, width in zip(row, widths)]
            if y + LINE * (1 + max(map(len, cells))) > self.y + self.height:
                break
            for x, lines in zip(places, cells):
                parts += [text(x, y + LINE * (place + 1) + 6, line, "cell") for place, line in enumerate(lines)]
            y += LINE * max(map(len, cells)) + 8
        if not rows:
            parts.append(text(self.x + self.width / 2, self.y + self.height / 2 + 8, "No results", "mid"))
        return parts


def series(properties: dict, samples: Samples, minutes: int):
    """Yields each line of a chart: its label, its side, its colour, and the datapoint of each minute."""
    for metric in properties["metrics"]:
        *named, options = metric if isinstance(metric[-1], dict) else [*metric, {}]
        namespace, name, *dimensions = named
        statistic = options.get("stat", properties["stat"])
        watched = Metric(namespace, name, "/".join(dimensions[1::2]))
        values = [samples.datapoint(watched, statistic, minute + 1) for minute in range(minutes)]
        yield {"label": options.get("label", name), "side": options.get("yAxis", "left"), "colour": options.get("color"), "values": values}


def curve(points: list[tuple[float, float] | None], colour: str) -> list[str]:
    """A line with gaps for missing datapoints; a datapoint between two gaps is a dot."""
    parts, run = [], []
    for point in [*points, None]:
        if point:
            run.append(point)
            continue
        if len(run) == 1:
            parts.append(f'<circle cx="{run[0][0]:.1f}" cy="{run[0][1]:.1f}" r="2.5" fill="{colour}"/>')
        elif run:
            parts.append(f'<path stroke="{colour}" d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in run) + '"/>')
        run = []
    return parts


def ticks(most: float) -> list[float]:
    """Five round figures from 0 to at least `most`."""
    most = most or 1
    magnitude = 10 ** math.floor(math.log10(most / 4))
    step = next(times * magnitude for times in (1, 2, 2.5, 5, 10) if times * magnitude * 4 >= most)
    return [step * place for place in range(5)]


def number(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"


def clock(minute: int) -> str:
    """A minute as played time."""
    return f"{12 + minute // 60}:{minute % 60:02}"


def text(x: float, y: float, words: str, style: str = "") -> str:
    styled = f' class="{style}"' if style else ""
    return f'<text x="{x:.0f}" y="{y:.0f}"{styled}>{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" fill="{fill}" stroke="{stroke}"/>'


def line_between(x1: float, y1: float, x2: float, y2: float, stroke: str, dashes: bool = False) -> str:
    dashed = ' stroke-dasharray="5 4"' if dashes else ""
    return f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" stroke="{stroke}"{dashed}/>'
