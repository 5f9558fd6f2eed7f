"""How a process ended, and how often one that died is started again: within limits. Front end's process."""

from __future__ import annotations

import signal
import time
from collections import Counter, deque

from mms.metrics import RestartFacts


def how_it_ended(code: int) -> str:
    """An exit code, or minus the number of a signal, in words."""
    return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"


class Budget:
    """Of one thing that is started again when it dies: `limit` deaths within `window` seconds are put up with."""

    def __init__(self, limit: int, window: float) -> None:
        self.causes: Counter[str] = Counter()  # of all deaths there were
        self._limit = limit
        self._window = window
        self._deaths: deque[float] = deque()
        self._last = ""

    @property
    def recent(self) -> int:
        """Deaths within the window."""
        while self._deaths and self._deaths[0] < time.monotonic() - self._window:
            self._deaths.popleft()
        return len(self._deaths)

    @property
    def spent_for(self) -> float:
        """Seconds until there are no more deaths within the window than are put up with; 0 while there are not."""
        over = self.recent - self._limit
        return max(0.0, self._deaths[over - 1] + self._window - time.monotonic()) if over > 0 else 0.0

    @property
    def spent(self) -> bool:
        return self.recent > self._limit

    def count(self, cause: str) -> None:
        self.causes[cause] += 1
        self._deaths.append(time.monotonic())
        self._last = cause

    def facts(self, level: str, state: str, preload: str = "") -> RestartFacts:
        """For the metrics collector and /readyz."""
        return RestartFacts(
            level=level,
            preload=preload,
            causes=self.causes,
            recent=self.recent,
            limit=self._limit,
            window=self._window,
            last_cause=self._last,
            spent=self.spent,
            state=state,
        )
