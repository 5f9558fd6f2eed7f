"""A latency objective instead of a batch size: per worker, the batch grows until its time is half of the objective.

A request waits for about one batch and then runs in one, so a batch may take half of the time. The limit adapts as in
Clipper (Crankshaw et al., NSDI 2017, section 4.3): additive increase, multiplicative decrease. It looks at the time at
the worker and not at the whole latency, because a long queue is no reason for smaller batches: they would make it
longer. Part of the dispatcher: pure, no I/O. Front end's process.
"""

from __future__ import annotations

BATCH_SHARE = 0.49  # of the objective that a batch may take: half, less a little for the way there and back
LEAST_WAIT = 0.25  # of the objective: that long a request may wait, however slow the workers are
DECREASE = 0.9
PATIENCE = 16  # full batches in time before the limit grows by one, once it has been too high
ALLOWED = 100  # one in so many batches may take longer: the 99th percentile
HOPELESS = 3  # batches of one request in a row that took longer than the objective


class BatchLimit:
    """The batch size of one worker."""

    __slots__ = ("_climbing", "_good", "_hopeless", "_objective", "_since_late", "limit", "most", "seconds", "threads")

    def __init__(self, objective: float, most: int, threads: int = 1) -> None:
        self.limit = 1
        self.most = most
        self.threads = threads  # batches that the worker runs at a time
        self.seconds = 0.0  # time of a batch at the worker: follows rises at once, falls slowly; 0 while unknown
        self._objective = objective
        self._good = 0
        self._since_late = ALLOWED
        self._climbing = True  # it was never too high: it grows with every full batch
        self._hopeless = 0

    @property
    def attainable(self) -> bool:
        """Whether a single request takes less than the objective, as far as is known."""
        return self._hopeless < HOPELESS

    def observe(self, largest: int, seconds: float) -> bool:
        """A frame, in which the largest batch had so many requests, was answered after so long.

        Returns whether the objective has just turned out to be out of reach.
        """
        self.seconds = seconds if seconds > self.seconds else 0.8 * self.seconds + 0.2 * seconds
        if seconds > BATCH_SHARE * self._objective:
            if self._since_late < ALLOWED:
                self.limit = max(1, min(self.limit - 1, round(self.limit * DECREASE)))
                self._climbing = False
                self._since_late = ALLOWED
            else:
                self._since_late = 0
            self._good = 0
            if largest == 1 and seconds > self._objective:
                self._hopeless += 1
                return self._hopeless == HOPELESS
            return False
        self._since_late += 1
        self._hopeless = 0
        if largest >= self.limit:
            self._good += 1
            if self._climbing or self._good >= PATIENCE:
                self._good = 0
                self.limit = min(self.limit + 1, self.most)
        return False


class Objective:
    """The objective of one queue and the limits of its workers."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.limits: list[BatchLimit] = []

    @property
    def attainable(self) -> bool:
        """Whether any worker can answer a single request in time, as far as is known."""
        return not self.limits or any([limit.attainable for limit in self.limits])

    def longest_wait(self) -> float:
        """Who has waited for longer cannot be answered in time."""
        slowest = max([limit.seconds for limit in self.limits], default=0.0)
        return max(self.seconds - slowest, self.seconds * LEAST_WAIT)

    def room(self) -> int | None:
        """How many may wait so that the last of them is answered in time; None while that is not known."""
        known = [limit for limit in self.limits if limit.seconds]
        if not known:
            return None
        return sum([limit.threads * limit.limit * max(1, int(self.seconds / limit.seconds) - 1) for limit in known])
