"""Repeats an action in a thread, beside an incident."""

import threading
import time
from collections.abc import Callable


class Ticker:
    """Calls `act` every `seconds`, as a context manager; `stop` raises the exception that `act` raised."""

    def __init__(self, seconds: float, act: Callable[[], None]):
        self._seconds, self._act = seconds, act
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._failure: Exception | None = None

    def __enter__(self) -> "Ticker":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        if self._failure:
            raise self._failure

    def _run(self) -> None:
        due = time.monotonic()
        try:
            while not self._over.wait(max(0.0, due - time.monotonic())):
                due += self._seconds
                self._act()
        except Exception as failure:
            self._failure = failure
