"""The log of one execution environment: the function's output between the platform's own lines."""

import json
from datetime import datetime, timezone
from pathlib import Path


class Log:
    """Owns one file that the function's processes and the platform append to.

    The processes write straight into the file, so no output is lost or late when an invocation ends.
    """

    def __init__(self, path: Path, *, as_json: bool) -> None:
        self.path = path
        self._as_json = as_json
        self._taken = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def platform(self, kind: str, text: str, record: dict) -> None:
        """Appends a line of the platform: ``text``, or the event ``platform.<kind>`` if the function logs JSON."""
        if self._as_json:
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            text = json.dumps({"time": now, "type": f"platform.{kind}", "record": record}, separators=(",", ":"))
        with self.path.open("a") as file:
            file.write(text + "\n")

    def take(self) -> str:
        """The output since the last call."""
        with self.path.open("rb") as file:
            file.seek(self._taken)
            new = file.read()
        self._taken += len(new)
        return new.decode(errors="replace")

    def read(self) -> str:
        """Everything written so far."""
        return self.path.read_text(errors="replace")
