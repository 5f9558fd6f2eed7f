"""How fast a queue empties, whether it still does, and what follows: how many may wait, and who is served first.

Part of the dispatcher: pure, no I/O, the clock passed in. Front end's process.
"""

from __future__ import annotations

import math
from collections import deque

STANDING_WAIT = 0.005  # the oldest job has waited longer than this, and than two batches take ...
STANDING_SECONDS = 0.1  # ... for so long: the queue does not empty any more
EXCESS = 1.2  # so many times as many jobs come as leave ...
EXCESS_SECONDS = 0.5  # ... in this time, or in that of some batches if it is longer, ...
EXCESS_WINDOWS = 2  # ... twice in a row: patient clients that come all at once are no overload, but fill one
FEWEST_WAITING = 20  # that many may wait even while overloaded: fewer would refuse some in normal times
RATE_SECONDS = 2.0  # the drain rate is measured over so long ...
RATE_BATCHES = 4  # ... and at least so many batches
MAX_RETRY_AFTER = 60
GOLDEN = 0.618033988749895  # its multiples spread evenly over 0 to 1 without any state but a counter


class Overload:
    """The record of one queue's coming and going."""

    def __init__(self, *, fifo: bool) -> None:
        self.fifo = fifo  # the oldest are always served first, and as many may wait as ever
        self.rate = 0.0  # jobs per second that leave while others wait; 0 while that was not measured
        self.emptied = True  # nobody waited at some time since the last look
        self.newest_first = False  # in force since the last look
        self.overloaded = False  # more come than leave, and not for a moment only
        self.standing_since: float | None = None
        self._drain: deque[tuple[float, int]] = deque()  # when how many were handed out, while others waited
        self._refused = 0
        self._window = (0.0, 0, 0)  # when it began, jobs that had come, and that had been handed out
        self._windows = 0  # in a row in which too many came

    def forget_rate(self) -> None:
        self.rate = 0.0
        self._drain.clear()

    def is_standing(self, waited: float, batch_seconds: float, now: float) -> bool:
        """Whether the newest are to be served first: too many come, the oldest job has waited too long for too long,
        and the queue was never empty meanwhile. Clients that wait for an answer before they send again are served in
        order however many there are: they cannot bring more than leaves.
        """
        self._look_whether_emptied()
        if waited <= max(STANDING_WAIT, 2 * batch_seconds):
            self.standing_since = None
        elif self.standing_since is None:
            self.standing_since = now
        standing = self.standing_since is not None and now - self.standing_since >= STANDING_SECONDS
        self.newest_first = standing and self.overloaded
        return self.newest_first

    def measure(self, now: float, submitted: int, handed: int, depth: int, batch_size: int) -> bool:
        """The rate at which jobs leave while others wait: an idle queue tells nothing of how fast its workers are.

        Returns whether there is other room than before.
        """
        self.emptied = self.emptied or not depth
        self._look_whether_emptied()
        changed = self._compare(now, submitted + self._refused, handed, depth, batch_size)
        if not depth:
            return changed
        drain = self._drain
        drain.append((now, handed))
        enough = RATE_BATCHES * batch_size
        while len(drain) > 2 and now - drain[1][0] >= RATE_SECONDS and handed - drain[1][1] >= enough:
            drain.popleft()
        since, before = drain[0]
        if handed - before >= enough:
            self.rate = (handed - before) / (now - since)
            changed = True
        return changed

    def _compare(self, now: float, came: int, left: int, depth: int, batch_size: int) -> bool:
        """Whether more come than leave; returns whether that is new."""
        was = self.overloaded
        begun, came_before, left_before = self._window
        if not depth or not begun:
            self._windows, self.overloaded = 0, False
        elif now - begun < EXCESS_SECONDS or left - left_before < RATE_BATCHES * batch_size:
            return False
        else:
            self._windows = self._windows + 1 if came - came_before > EXCESS * (left - left_before) else 0
            self.overloaded = self._windows >= EXCESS_WINDOWS and not self.fifo
        self._window = now, came, left
        return self.overloaded is not was

    def room(self, capacity: int, batch_size: int, timeout: float) -> int:
        """How many may wait: by number, and by the time they would wait."""
        if not self.rate:
            return capacity
        room = min(capacity, max(batch_size, int(self.rate * timeout)))
        if self.overloaded:  # who waits below the newest waits for long: let there be few of them
            room = min(room, max(FEWEST_WAITING, 4 * batch_size, int(self.rate * STANDING_SECONDS)))
        return room

    def retry_after(self, depth: int) -> int:
        """Whole seconds until those that wait now are gone, spread so that not all who were refused return at once."""
        self._refused += 1
        wait = depth / self.rate if self.rate else 0.0
        return min(MAX_RETRY_AFTER, max(1, math.ceil(wait * (1 + self._refused * GOLDEN % 0.5))))

    def _look_whether_emptied(self) -> None:
        if self.emptied:
            self.emptied = self.newest_first = False
            self.standing_since = None
            self._drain.clear()
