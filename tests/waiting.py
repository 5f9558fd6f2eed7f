"""Tests wait for facts, not for time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

POLL = 0.01

T = TypeVar("T")


def eventually(predicate: Callable[[], T], timeout: float = 5.0) -> T:
    """The predicate's first true value; fails when there is none in time."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        assert time.monotonic() < deadline, f"still not true after {timeout:g} s"
        threading.Event().wait(POLL)
    return value
