"""How near the front end is to the end of its descriptors and memory, and what it therefore stops doing, in steps."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Callable
from typing import Protocol

from mms.errors import ServerBusyError, ServiceUnavailableError

log = logging.getLogger("mms.shedding")

STEPS = (0.80, 0.90, 0.95)  # of the descriptors or of the bytes
HYSTERESIS = 0.05  # so much less before a step is taken back
COUNT_BELOW = 1000  # connections up to which all descriptors are counted at every tick
NO_KEEP_ALIVE, NO_REQUESTS, NO_CONNECTIONS = 1, 2, 3

_DOES = (
    "serves as usual again",
    "closes connections after each answer",
    "refuses requests with 429",
    "refuses connections with 503",
)


class Reader(Protocol):
    """A connection whose client reads slower than it is answered."""

    @property
    def unsent(self) -> int:
        """Bytes that are to be sent."""
        ...


class Shedding:
    """The account of one front end. `step` is 0 to 3; from each step on something more is not done."""

    def __init__(self, *, max_bytes: int, max_connections: int, held: Callable[[], int]) -> None:
        self.step = 0
        self.bytes = 0  # of bodies and answers, as of the last tick and of what was read since
        self.room = max_connections  # connections that may be open
        self.slow: set[Reader] = set()
        self._max_bytes = max_bytes
        self._max_connections = max_connections
        self._held = held  # bytes of the bodies that the application has
        self._reading = 0  # bytes of the bodies that are being read
        self._others = -1  # descriptors that are no connections

    def apply(self, *, max_bytes: int, max_connections: int) -> None:
        """Other bounds; from the next tick on."""
        self._max_bytes = max_bytes
        self._max_connections = max_connections

    def read(self, more: int, *, before: int, to_come: int) -> ServerBusyError | None:
        """A connection has read `more` bytes of a body, and `before` earlier; what speaks against the rest.

        What is only promised is not counted: promises cost a client nothing. One body may be read, whatever its size.
        """
        if self.bytes > before and self.bytes + more + to_come > STEPS[NO_REQUESTS - 1] * self._max_bytes:
            return self.busy()
        self._reading += more
        self.bytes += more
        return None

    def drop(self, size: int) -> None:
        """So much of a body was read, and is dropped."""
        self._reading -= size
        self.bytes -= size

    def hand_over(self, size: int) -> None:
        """So much of a body was read, and the application has it."""
        self._reading -= size

    def busy(self) -> ServerBusyError:
        return ServerBusyError("the server holds as many bytes or connections as it may; try again later")

    def full(self) -> ServiceUnavailableError:
        if self.room == self._max_connections:
            return ServiceUnavailableError(f"more than {self._max_connections} connections")
        return ServiceUnavailableError("the server has no file descriptors or memory left for more connections")

    def tick(self, connections: int) -> bool:
        """Called a few times a second: count again. Returns whether the step has changed."""
        self.bytes = self._reading + self._held() + sum([reader.unsent for reader in self.slow])
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        try:
            if self._others < 0 or connections <= COUNT_BELOW:
                self._others = max(0, len(os.listdir("/proc/self/fd")) - 1 - connections)
            descriptors = (self._others + connections) / limit
        except OSError:  # none is left to count them with
            descriptors = 1.0
        used = max(self.bytes / self._max_bytes, descriptors)
        step = sum(used >= share for share in STEPS)
        if step < self.step:
            step = max(step, min(self.step, sum(used >= share - HYSTERESIS for share in STEPS)))
        spare = int(STEPS[NO_CONNECTIONS - 1] * limit) - self._others
        self.room = 0 if step == NO_CONNECTIONS else max(0, min(self._max_connections, spare))
        if step == self.step:
            return False
        what = "file descriptors" if used == descriptors else "max_bytes_in_flight"
        log.warning("step %d of %d: %.0f %% of %s are used; the front end %s", step, len(STEPS), 100 * used, what,
                    _DOES[step])  # fmt: skip
        self.step = step
        return True
