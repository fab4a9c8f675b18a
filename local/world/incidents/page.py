"""An incident's part of the runbook, and its place there."""

import json
import re

from world import paths, stack
from world.incidents import dashboard
from world.incidents.scene import Play, Scene

RUNBOOK = paths.ROOT / "docs" / "runbook.md"
IMAGES = paths.ROOT / "docs" / "images"
# The parts of `etlctl status` that show an incident.
PARTS = ("queue", "dead letters", "last hour", "rows          unknown")


class Page:
    """A played incident, as text and as a picture."""

    def __init__(self, play: Play, scene: Scene, account: str):
        self.play, self.scene = play, scene
        self.account = account

    def text(self) -> str:
        """The timeline, and then, as in a terminal, the output of `etlctl`, a line of the log, and the remedy."""
        said = [f"$ {command}\n{self._shown(command, output)}" for command, output in self.scene.seen]
        remedy = [words if words.startswith("#") else f"$ {words}" for words in self.scene.remedies]
        parts = [*self._story(), "", *said, "# one line of the log:", self._telling_line(), "# the remedy:", *remedy]
        return "\n".join(["```text", *parts, "```"])

    def picture(self) -> str:
        scene = self.scene
        samples, alarms = scene.watched(scene.pictured_log)
        log = [self._anonymous(line) for line in scene.pictured_log]
        body = scene.resources["Dashboard"]["Properties"]["DashboardBody"]
        return dashboard.draw(body, alarms.names, alarms.ringing(scene.pictured), samples, log, scene.pictured)

    def _story(self) -> list[str]:
        """The actions and the alarms' changes, in order."""
        _, alarms = self.scene.watched(self.scene.stack.log())
        events = [(minute, 1, what) for minute, what in self.scene.story]
        for rings, word in ((True, "ALARM"), (False, "OK")):
            changes: dict[int, list[str]] = {}
            for minute, name, now in alarms.changes(self.scene.ended):
                if now == rings:
                    changes.setdefault(minute, []).append(alarms.names[name].removeprefix(f"{stack.NAME}-"))
            events += [(minute, 0, f"{word:5}  {', '.join(names)}") for minute, names in changes.items()]
        events.append((self.scene.ended, 2, self.account))
        return [f"{dashboard.clock(minute)}  {what}" for minute, _, what in sorted(events, key=lambda event: event[:2])]

    def _shown(self, command: str, output: str) -> str:
        output = self._anonymous(output)
        lines = output.splitlines()
        if command.endswith("status"):
            lines = parts_of(lines[2:])
        elif command.endswith("doctor"):
            lines = what_is_wrong(lines)
        return "\n".join(line for line in lines if line)

    def _telling_line(self) -> str:
        """The last log line of the incident's kind before the picture, without the fields that every line shares."""
        lines = [line for line in self.scene.pictured_log if line.get("message", "").startswith(self.play.telling)]
        line = {name: value for name, value in self._anonymous(lines[-1]).items() if name not in ("timestamp", "target", "span")}
        return json.dumps(line, ensure_ascii=False)

    def _anonymous(self, what):
        """Replaces this run's generated names."""
        if isinstance(what, dict):
            return {name: self._anonymous(value) for name, value in what.items()}
        if not isinstance(what, str):
            return what
        return re.sub(r"(MaskingSecret|LoginQueue|DeadLetterQueue)-[0-9a-f]{8}(-\w{6})?", r"\1", what.replace(self.scene.name, stack.NAME))


def parts_of(lines: list[str]) -> list[str]:
    kept, keeping = [], False
    for line in lines:
        if not line.startswith(" "):
            keeping = line.startswith(PARTS)
        kept += [line] * keeping
    return kept


def what_is_wrong(lines: list[str]) -> list[str]:
    """The areas of `etlctl doctor` with a problem, without those that `etlctl status` shows too, and the summary line."""
    kept, area = [], ""
    for line in lines[:-1]:
        if not line.startswith(" "):
            area = line
        elif area != "last hour" and not line.startswith("  ok"):
            kept += [line] if area in kept else [area, line]
    return [*kept, lines[-1]]


def write(page: Page, name: str) -> None:
    """Writes an incident into the runbook, and its picture into docs/images."""
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / f"{name}.svg").write_text(page.picture())
    text = RUNBOOK.read_text()
    marks = re.compile(rf"(<!-- incident: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if marks.search(text):
        RUNBOOK.write_text(marks.sub(lambda match: f"{match[1]}{page.text()}\n{match[2]}", text))
