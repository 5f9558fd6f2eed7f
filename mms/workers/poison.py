"""What a death says of the requests in hand: which are not to be run again, and how many may be.

Part of the dispatcher: pure, no I/O, the clock passed in. Front end's process.
"""

from __future__ import annotations

from collections import deque

from mms.errors import WorkerDiedError
from mms.workers.job import Job

POISON_MEMORY = 10.0  # seconds for which the like of a request that has crashed two workers is not run
MAX_POISONS = 64
MAX_POISON_BYTES = 1 << 20  # a larger one is not remembered: to compare with it would hold up the event loop
RETRY_SHARE = 0.1
RETRY_MINIMUM = 3
RETRY_WINDOW = 10.0
_FROM_OUTSIDE = ("signal 9 ", "signal 15 ")  # these deaths say nothing about the request


class Poisons:
    """Requests that have crashed two workers each; nearly always there are none."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, int], float] = {}  # size and content -> until when it is not run

    def remember(self, job: Job, cause: str, now: float) -> None:
        """The job's second worker has died of `cause`."""
        if _is_crash(cause) and job.size <= MAX_POISON_BYTES and len(self.known) < MAX_POISONS:
            self.known[job.size, _content(job)] = now + POISON_MEMORY

    def refuse(self, job: Job) -> None:
        """Raises WorkerDiedError for a known one. That renews nothing: later, one is run again, and may be well."""
        now = job.arrived
        for known in [known for known, until in self.known.items() if until < now]:
            del self.known[known]
        if any(size == job.size for size, _ in self.known) and (job.size, _content(job)) in self.known:
            raise WorkerDiedError("the same request has just crashed two worker processes; it is not run again",
                                  status=500)  # fmt: skip


class RetryBudget:
    """At most RETRY_SHARE of the last RETRY_WINDOW's requests are worth a retry of a lost batch."""

    def __init__(self) -> None:
        self._retried: deque[float] = deque()
        self._window: deque[tuple[float, int]] = deque()

    def tick(self, now: float, submitted: int) -> None:
        self._window.append((now, submitted))
        _drop_before(self._window, now - RETRY_WINDOW)

    def spend(self, now: float, submitted: int) -> bool:
        """Whether one more lost batch may be run again."""
        for record in (self._retried, self._window):
            _drop_before(record, now - RETRY_WINDOW)
        recent = submitted - (self._window[0][1] if self._window else 0)
        if len(self._retried) >= max(RETRY_MINIMUM, RETRY_SHARE * recent):
            return False
        self._retried.append(now)
        return True


def _is_crash(cause: str) -> bool:
    return cause.startswith(("signal ", "exit code ")) and not cause.startswith(_FROM_OUTSIDE)


def _content(job: Job) -> int:
    """All that a handler can see of a request: what differs in a header alone need not crash it."""
    facts = job.facts
    return hash((facts.query, facts.query_is_input, *facts.headers, b"".join(job.parts)))


def _drop_before(record: deque[float] | deque[tuple[float, int]], limit: float) -> None:
    while record and (record[0] if isinstance(record[0], float) else record[0][0]) < limit:
        record.popleft()
