"""A timer of the event loop that only ever needs to ring once, at the earliest of many times. Front end's process."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

TICKS = 1000  # per second: the loop's timers are no finer, and one that rings too early is set again and again


class Alarm:
    """Calls `ring` at the earliest time it was set to; then it is not set any more."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def set(self, at: float, now: float) -> None:
        """Ring at `at` (monotonic seconds), unless it rings earlier anyway."""
        if self._timer is not None:
            if self._at <= at:
                return
            self._timer.cancel()
        self._at = at
        self._timer = self._loop.call_later(max(math.ceil((at - now) * TICKS), 0) / TICKS, self._due)

    def close(self) -> None:
        """It is never set again; lets go of what it calls."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._ring = lambda: None

    def _due(self) -> None:
        self._timer = None
        self._ring()
