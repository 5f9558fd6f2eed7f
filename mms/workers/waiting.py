"""The jobs that wait, in the order in which they are served: one line, or one per priority.

Part of the dispatcher: pure, no I/O. Front end's process.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Protocol

from mms.wire import FAIR_TURN
from mms.workers.inflight import MAX_FRAME_JOBS
from mms.workers.job import Job

MAX_FRAME_BYTES = 1 << 20  # beyond the first batch


class Waiting(Protocol):
    """What the dispatcher asks of either; iterating gives the next to be served first, those settled among them."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Job]: ...

    def append(self, job: Job, /) -> None: ...

    def extend(self, jobs: Iterable[Job], /) -> None: ...

    def clear(self) -> None: ...

    def oldest(self) -> Job | None:
        """The longest waiting job that is not settled."""
        ...

    def some(self, limit: int, batch_size: int, newest_first: bool) -> list[Job]:
        """Up to `limit` jobs, taken out; fewer (but a batch) when their bodies are large."""
        ...

    def late(self, now: float, longest: float) -> list[Job]:
        """The jobs that have waited for `longest`, taken out."""
        ...

    def put_back(self, jobs: Iterable[Job]) -> None:
        """They were taken before, and go where they were."""
        ...

    def drop(self, job: Job) -> None:
        """It has been settled while it waited."""
        ...

    def tidy(self, depth: int) -> None:
        """`depth` jobs in it are not settled."""
        ...

    def below(self, level: int) -> Iterator[Job]:
        """The jobs of lower priority than that, the first to give way first."""
        ...

    def waiting_at(self, level: int) -> int:
        """How many wait at that level."""
        ...


class Line(deque[Job]):
    """All jobs in one line. Those settled in it are skipped when their turn comes."""

    def oldest(self) -> Job | None:
        while self:
            if not self[0].settled:
                return self[0]
            self.popleft()
        return None

    def some(self, limit: int, batch_size: int, newest_first: bool) -> list[Job]:
        jobs: list[Job] = []
        size = 0
        pop = self.pop if newest_first else self.popleft
        while self and len(jobs) < limit:
            if size > MAX_FRAME_BYTES and len(jobs) >= batch_size:
                break
            job = pop()
            if not job.settled:
                jobs.append(job)
                size += job.size
        return jobs

    def late(self, now: float, longest: float) -> list[Job]:
        late = []
        while self and (self[0].settled or self[0].arrived + longest <= now):
            job = self.popleft()
            if not job.settled:
                late.append(job)
        return late

    def put_back(self, jobs: Iterable[Job]) -> None:
        self.extend(jobs)
        ordered = sorted(self, key=_by_arrival)  # the front is what expires next
        self.clear()
        self.extend(ordered)

    def drop(self, job: Job) -> None:
        pass

    def tidy(self, depth: int) -> None:
        if len(self) > 2 * depth + MAX_FRAME_JOBS:  # cancelled, below others that nobody takes
            alive = [job for job in self if not job.settled]
            self.clear()
            self.extend(alive)

    def below(self, level: int) -> Iterator[Job]:
        return iter(())

    def waiting_at(self, level: int) -> int:
        return len(self)


class Levels:
    """A line per priority, 0 the highest, each oldest first. Higher ones go first, but at least one frame in FAIR_TURN
    begins with the longest waiting job of the lower ones.
    """

    def __init__(self, count: int, default: int) -> None:
        self._lines: list[OrderedDict[int, Job]] = [OrderedDict() for _ in range(count)]
        self._default = default
        self._passed = 0  # frames in a row that left the longest waiting job of the lower levels where it was

    def __len__(self) -> int:
        return sum(map(len, self._lines))

    def __iter__(self) -> Iterator[Job]:
        return itertools.chain.from_iterable([line.values() for line in self._lines])

    def append(self, job: Job, /) -> None:
        self._line(job)[job.id] = job

    def extend(self, jobs: Iterable[Job], /) -> None:
        for job in jobs:
            self.append(job)

    def clear(self) -> None:
        self._passed = 0
        for line in self._lines:
            line.clear()

    def oldest(self) -> Job | None:
        return min(self._first(), key=_by_arrival, default=None)

    def some(self, limit: int, batch_size: int, newest_first: bool) -> list[Job]:
        jobs: list[Job] = []
        passed = self._longest_below()
        if passed is not None and self._passed >= FAIR_TURN - 1:
            self._take(self._line(passed), min(limit, batch_size), batch_size, jobs)
        for line in self._lines:
            self._take(line, limit, batch_size, jobs)
        self._passed = self._passed + 1 if passed is not None and passed.id in self._line(passed) else 0
        return jobs

    def late(self, now: float, longest: float) -> list[Job]:
        late = []
        for line in self._lines:
            while line and (job := next(iter(line.values()))).arrived + longest <= now:
                del line[job.id]
                late.append(job)
        return late

    def put_back(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self.append(job)
        for line in self._lines:
            for job in sorted(line.values(), key=_by_arrival):
                line.move_to_end(job.id)

    def drop(self, job: Job) -> None:
        del self._line(job)[job.id]

    def tidy(self, depth: int) -> None:
        pass

    def below(self, level: int) -> Iterator[Job]:
        return itertools.chain.from_iterable([reversed(line.values()) for line in reversed(self._lines[level + 1 :])])

    def waiting_at(self, level: int) -> int:
        return len(self._lines[level])

    def _line(self, job: Job) -> OrderedDict[int, Job]:
        return self._lines[job.terms.level if job.terms is not None else self._default]

    def _first(self) -> list[Job]:
        return [next(iter(line.values())) for line in self._lines if line]

    def _longest_below(self) -> Job | None:
        """Of those below the highest level in which any wait."""
        return min(self._first()[1:], key=_by_arrival, default=None)

    def _take(self, line: OrderedDict[int, Job], limit: int, batch_size: int, jobs: list[Job]) -> None:
        while line and len(jobs) < limit:
            if len(jobs) >= batch_size and sum([job.size for job in jobs]) > MAX_FRAME_BYTES:
                break
            jobs.append(line.popitem(last=False)[1])


def _by_arrival(job: Job) -> tuple[float, int]:
    return job.arrived, job.id
