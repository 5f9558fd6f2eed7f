"""How many workers a pool should have for the work there is: a pure decision, with the clock passed in.

The work is measured in workers: those that are busy, and the batches that wait too long. Its mean over
`up_after` seconds says how many are needed. More are started as soon as that mean asks for them, fewer run once
`down_after` seconds have passed in which fewer would always have been enough.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

BUSY = 0.7  # share of the time that workers are to be busy: the rest is for bursts while another one loads
CALM = 0.6  # with so much work for the workers that would be left, one goes: below BUSY, or they would come and go
LONG_WAIT = 0.1  # seconds; requests that wait less, or not longer than one batch takes, are no reason for more workers
GROWTH = 2  # at most so many times the workers in one step: the measure says less the further it is from the truth


@dataclass(frozen=True, slots=True)
class Bounds:
    """Between how many workers, and after how many seconds.

    `low` 0: the last one goes after `zero_after` seconds without a request (0: it stays), and the first request starts
    one if `on_request`.
    """

    low: int
    high: int
    up_after: float = 2.0
    down_after: float = 60.0
    zero_after: float = 0.0
    on_request: bool = False

    @property
    def automatic(self) -> bool:
        return self.high > self.low


@dataclass(frozen=True, slots=True)
class Seen:
    """A pool at one moment: `busy` and `waiting` in workers, `submitted` counts all requests that ever came."""

    ready: int
    busy: float  # the workers at work, each by how full its batches are: while there is room in them, it can do more
    waiting: float  # workers that the queue would keep busy for one batch each
    oldest_wait: float  # seconds
    batch_seconds: float  # of the slowest worker
    submitted: int

    @property
    def work(self) -> float:
        """How many workers would be busy."""
        long = self.oldest_wait > max(LONG_WAIT, self.batch_seconds)
        return self.busy + (self.waiting if long else 0.0)


class Autoscaler:
    """Looks at one pool several times a second."""

    def __init__(self) -> None:
        self._works: deque[tuple[float, float]] = deque()  # when, how much; of the last `up_after` seconds
        self._sum = 0.0
        self._whole_since: float | None = None  # no worker is missing
        self._calm_since: float | None = None
        self._most = 0.0  # mean work since then
        self._submitted = 0
        self._idle_since: float | None = None

    def decide(self, now: float, target: int, bounds: Bounds, seen: Seen) -> int:
        """How many workers there are to be from `now` on; `target` is how many there were to be until now."""
        idle = self._idle(now, seen)
        if not target or (not bounds.low and bounds.zero_after and idle >= bounds.zero_after):
            return self._decided(0)  # from there, a request or a person brings the first one
        lowest = max(bounds.low, 1)
        if seen.ready < target:  # they are still loading, or are being replaced: what they will do is not known
            self._whole_since = None
        elif self._whole_since is None:
            self._whole_since = now
        mean = self._mean(now, bounds.up_after, seen.work)
        if mean is None:
            return max(target, lowest)
        wanted = min(_workers(mean, BUSY), GROWTH * target, bounds.high)
        if wanted > target and self._whole_since is not None and now - self._whole_since >= bounds.up_after:
            return self._decided(wanted)
        return max(self._after_calm(now, target, mean, bounds), lowest)

    def _after_calm(self, now: float, target: int, mean: float, bounds: Bounds) -> int:
        if target <= max(bounds.low, 1) or _workers(mean, CALM) >= target:
            self._calm_since = None
            return target
        if self._calm_since is None:
            self._calm_since, self._most = now, mean
        self._most = max(self._most, mean)
        if now - self._calm_since < bounds.down_after:
            return target
        return self._decided(_workers(self._most, CALM))

    def _idle(self, now: float, seen: Seen) -> float:
        """Seconds without a request."""
        if seen.submitted != self._submitted or seen.busy or seen.waiting or self._idle_since is None:
            self._submitted, self._idle_since = seen.submitted, now
        return now - self._idle_since

    def _mean(self, now: float, span: float, work: float) -> float | None:
        """Of the last `span` seconds; None while they are not over."""
        works = self._works
        works.append((now, work))
        self._sum += work
        while len(works) > 1 and works[1][0] <= now - span:
            self._sum -= works.popleft()[1]
        return self._sum / len(works) if now - works[0][0] >= span else None

    def _decided(self, target: int) -> int:
        self._forget()
        return target

    def _forget(self) -> None:
        """What was measured was measured with other workers."""
        self._works.clear()
        self._sum = 0.0
        self._calm_since = None


def _workers(work: float, share: float) -> int:
    """How many workers have `work` to do for `share` of their time."""
    return max(1, -int(-(work / share - 1e-9) // 1))
