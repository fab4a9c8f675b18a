"""Runs the dashboard's log queries over a function's log: the part of CloudWatch Logs Insights' language that they use."""

import re


def query(text: str, log: list[dict]) -> tuple[list[str], list[list]]:
    """The column names and rows of a query's result."""
    _, *commands = [command.strip() for command in text.split("|")]
    rows, columns = log, []
    for command in commands:
        word, rest = command.split(" ", 1)
        match word:
            case "filter":
                rows = [row for row in rows if passes(row, rest)]
            case "stats":
                rows, columns = grouped(rows, rest)
            case "sort":
                column, direction = rest.split()
                rows = sorted(rows, key=lambda row: row[column], reverse=direction == "desc")
            case "limit":
                rows = rows[: int(rest)]
            case _:
                raise ValueError(f"unknown command: {word}")
    return columns, [[row.get(column) for column in columns] for row in rows]


def passes(row: dict, condition: str) -> bool:
    if match := re.fullmatch(r"(\w+) = '(.*)'", condition):
        return row.get(match[1]) == match[2]
    if match := re.fullmatch(r"(\w+) like /(.*)/", condition):
        return re.search(match[2], str(row.get(match[1], ""))) is not None
    raise ValueError(f"unknown condition: {condition}")


def grouped(rows: list[dict], text: str) -> tuple[list[dict], list[str]]:
    counts, _, by = text.partition(" by ")
    keys = [key.strip() for key in by.split(",")]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    figures = {}
    for count in re.split(r",\s*(?=count)", counts):
        match = re.fullmatch(r"(count|count_distinct)\((.+)\) as (\w+)", count.strip())
        if not match:
            raise ValueError(f"unknown statistic: {count}")
        figures[match[3]] = (match[1], match[2])
    result = []
    for key, members in groups.items():
        row = dict(zip(keys, key))
        for name, (function, field) in figures.items():
            row[name] = len(members) if function == "count" else len({member.get(field) for member in members})
        result.append(row)
    return result, [*keys, *figures]
