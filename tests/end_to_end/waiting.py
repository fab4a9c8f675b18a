"""Waits for the deployed stack."""

import time


def until(condition, seconds=120):
    """Waits until `condition` returns a true value, and returns it."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)
    return result
