"""Waiting on conditions in place of sleeping."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], seconds: float = 120) -> float:
    """Wait until it holds; give how long that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "the condition did not come true in time"
        time.sleep(0.05)
    return time.monotonic() - started
