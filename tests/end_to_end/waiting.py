"""Waiting for what the deployed stack does in its own time."""

import time


def until(condition, seconds=120):
    """Waits for what `condition` returns to be true, and returns it."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)
    return result
