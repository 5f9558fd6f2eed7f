"""The dispatcher of one model version: which job goes to which worker, and what becomes of it when that worker dies.

A pure state machine in the front end's process: events in, decisions out, the clock (`now`, monotonic seconds) passed
in, no I/O. A job is owned by exactly one of the queue, a worker's InFlight or nobody (settled), and is settled once.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Collection

from mms.errors import (
    DeadlineError,
    DrainingError,
    MMSError,
    QueueBytesError,
    QueueFullError,
    QueueWaitError,
    WorkerDiedError,
)
from mms.workers.inflight import MAX_FRAME_JOBS, InFlight
from mms.workers.job import Job

MAX_FRAME_BYTES = 1 << 20  # beyond the first batch
RETRY_SHARE = 0.1
RETRY_MINIMUM = 3
RETRY_WINDOW = 10.0
POISON_MEMORY = 10.0  # seconds for which the like of a request that has crashed two workers is not run
MAX_POISONS = 64
MAX_POISON_BYTES = 1 << 20  # a larger one is not remembered: to compare with it would hold up the event loop
_FROM_OUTSIDE = ("signal 9 ", "signal 15 ")  # these deaths say nothing about the request
STANDING_WAIT = 0.005  # the oldest job has waited longer than this, and than two batches take ...
STANDING_SECONDS = 0.1  # ... for so long: the queue does not empty any more, and the newest jobs are served first
FEWEST_WAITING = 20  # that many may wait even while overloaded: fewer would refuse some in normal times
RATE_SECONDS = 2.0  # the drain rate is measured over so long ...
RATE_BATCHES = 4  # ... and at least so many batches
MAX_RETRY_AFTER = 60
GOLDEN = 0.618033988749895  # its multiples spread evenly over 0 to 1 without any state but a counter


class BatchQueue:
    """The waiting jobs of one model version, and the rules by which its workers pull them."""

    def __init__(
        self,
        *,
        batch_size: int,
        max_batch_delay: float,
        capacity: int,
        timeout: float,
        retry: int,
        max_bytes: int = 512 << 20,
        fifo: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self.max_batch_delay = max_batch_delay
        self.capacity = capacity
        self.timeout = timeout
        self.retry = retry
        self.max_bytes = max_bytes
        self.fifo = fifo  # oldest first even while overloaded
        self.room = capacity  # jobs that may wait: by number, and by the time they would wait
        self.rate = 0.0  # jobs per second that leave while others wait; 0 while that was not measured
        self.closed = ""  # why nothing is taken any more; empty while open
        self.depth = 0  # waiting jobs that somebody still waits for
        self.bytes = 0  # of their bodies
        self.submitted = 0
        self.retries = 0
        self.cancelled = 0
        self._waiting: deque[Job] = deque()
        self._alone: deque[Job] = deque()  # retries: each runs in a frame of its own, before anything else
        self._retried: deque[float] = deque()
        self._window: deque[tuple[float, int]] = deque()
        self._poisons: dict[tuple[int, int], float] = {}  # size and content -> until when it is not run
        self._handed = 0  # jobs that workers were given
        self._drain: deque[tuple[float, int]] = deque()  # when how many were handed out, while others waited
        self._emptied = True  # nobody waited at some time since the last look
        self._standing_since: float | None = None
        self._refused = 0
        self._offered = (0, 0)  # jobs that came, and that were handed out, up to the last tick
        self._overloaded = False  # the queue is standing, and more came than left
        self.newest_first = False  # in force since the last look

    def submit(self, job: Job) -> None:
        """Take the job in. Raises OverloadError, DrainingError while closed, or WorkerDiedError for one whose like has
        just crashed two workers.
        """
        if self._poisons:
            self._refuse_poison(job)
        held = self.bytes + job.size
        if self.depth >= self.room or held > self.max_bytes:
            refusal = self.refusal(job.size)
            if refusal is not None:
                raise refusal
        self.submitted += 1
        self.depth += 1
        self.bytes = held
        job.queue = self
        self._waiting.append(job)

    def refusal(self, size: int) -> MMSError | None:
        """What speaks against a job with a body of `size` bytes now. An empty queue takes a body of any size."""
        if self.closed:
            return DrainingError(self.closed)
        if self.depth >= self.capacity:
            return QueueFullError(
                f"the queue is full: {self.depth} requests wait; try again later", retry_after=self._retry_after()
            )
        if self.depth >= self.room and self._overloaded:
            return QueueFullError(
                f"{self.depth} requests wait, and more come than can be served; try again later",
                retry_after=self._retry_after(),
            )
        if self.depth >= self.room:
            return QueueWaitError(
                f"{self.depth} requests wait, another one would wait longer than queue_timeout ({self.timeout:g} s)",
                retry_after=self._retry_after(),
            )
        if self.depth and self.bytes + size > self.max_bytes:
            return QueueBytesError(
                f"the queue is full: the requests that wait have {self.bytes} bytes, and queue_bytes is "
                f"{self.max_bytes}; try again later",
                retry_after=self._retry_after(),
            )
        return None

    def apply(self, *, capacity: int, max_bytes: int, timeout: float, fifo: bool) -> None:
        """Change the limits, and whether the newest jobs may be served first, from now on; forgets poison."""
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.timeout = timeout
        self.fifo = fifo
        self.forget_poison()
        self._make_room()

    def forget_poison(self) -> None:
        """What crashed workers may be well by now: somebody has changed something, or asks for another try."""
        self._poisons.clear()

    def forget_rate(self) -> None:
        """There are other workers than those whose rate was measured."""
        self.rate = 0.0
        self._drain.clear()
        self._make_room()

    def take(self, worker: InFlight, now: float) -> tuple[int, list[Job]] | None:
        """The next frame for `worker`, as (batch size, jobs), or None when it should get nothing now."""
        if worker.exclusive:
            return None
        idle = not worker.jobs
        if self._alone:
            if not idle:
                return None
            job = self._next_alone()
            if job is not None:
                worker.exclusive = True
                job.taken = now
                return self._hand_over(worker, [job], 1)
        limit = self._limit(worker, now) if self.depth else 0
        if not limit:
            return None
        waiting, batch_size = self._waiting, self.batch_size
        if len(waiting) <= limit and self.bytes <= MAX_FRAME_BYTES:
            jobs = [job for job in waiting if not job.settled]
            waiting.clear()
            self._emptied = True
        else:
            jobs = self._some(limit, self._newest_first(worker, now))
        for job in jobs:
            job.taken = now
        self.depth -= len(jobs)
        self.bytes -= sum([job.size for job in jobs])
        return self._hand_over(worker, jobs, batch_size)

    def wake_at(self) -> float | None:
        """When an idle worker should look again, if it waits for a fuller batch."""
        if not self.max_batch_delay or not self.depth or self.depth >= self.batch_size:
            return None
        return self._oldest().arrived + self.max_batch_delay

    def lose(
        self, worker: InFlight, started: int, cause: str, now: float, *, done: int | None = None
    ) -> list[tuple[Job, MMSError]]:
        """The worker died after it had begun `started` jobs: requeue what can be run again, return what cannot.

        Jobs of the batch in hand are retried once, each alone, within the budget; jobs sent ahead go back to the front,
        and so do those that were `done` but not yet answered.
        """
        lost = self._part(worker, started, done)
        retryable = [job for job in lost if job.attempts < self.retry]
        affordable = bool(retryable) and not self.closed and self._spend_retry(now)
        failed: list[tuple[Job, MMSError]] = []
        for job in lost:
            job.attempts += 1
            if not affordable or job.attempts > self.retry:
                if job.attempts > 1 and _is_crash(cause):
                    self._remember_poison(job, now)
                failed.append((job, self._death(job, cause)))
            else:
                self.retries += 1
                job.taken = 0.0
                self._alone.append(job)
                self.depth += 1
                self.bytes += job.size
        self._alone = _by_arrival(self._alone)
        return failed

    def timed_out(
        self, worker: InFlight, started: int, limit: float, *, done: int | None = None
    ) -> list[tuple[Job, MMSError]]:
        """The batch in hand ran longer than `limit` seconds: its jobs fail with 504, the others go back."""
        error = f"the handler did not answer within response_timeout ({limit:g} s)"
        return [(job, DeadlineError(error)) for job in self._part(worker, started, done)]

    def overdue(self, worker: InFlight, places: Collection[int], limit: float) -> list[tuple[Job, MMSError]]:
        """The jobs at these places, of a worker that runs several batches, ran longer than `limit` seconds: they fail
        with 504. The worker keeps the others, until it is killed.
        """
        error = f"the handler did not answer within response_timeout ({limit:g} s)"
        return [(job, DeadlineError(error)) for job in worker.take_places(places)]

    def expire(self, now: float) -> list[tuple[Job, MMSError]]:
        """The jobs that have waited longer than the queue's timeout."""
        expired: list[tuple[Job, MMSError]] = []
        for queue in (self._alone, self._waiting):
            while queue and (queue[0].settled or queue[0].arrived + self.timeout <= now):
                job = queue.popleft()
                if not job.settled:
                    self.depth -= 1
                    self.bytes -= job.size
                    expired.append(
                        (job, DeadlineError(f"no worker was free within queue_timeout ({self.timeout:g} s)"))
                    )
        return expired

    def close(self, reason: str) -> None:
        """Refuse new jobs with `reason`; those that wait are still served."""
        self.closed = reason
        self._make_room()

    def abandon(self, error: MMSError) -> list[tuple[Job, MMSError]]:
        """Every waiting job, to be failed with `error`."""
        jobs = [job for job in itertools.chain(self._alone, self._waiting) if not job.settled]
        self._alone.clear()
        self._waiting.clear()
        self.depth = self.bytes = 0
        return [(job, error) for job in jobs]

    def _part(self, worker: InFlight, started: int, done: int | None) -> list[Job]:
        """Take everything from a worker; returns the batch in hand, all else goes back to the queue's front.

        Without a retry, what was done but not answered must not run again: it counts as in hand.
        """
        finished = done if done is not None and self.retry else 0
        begun: list[Job] = []
        back: list[Job] = []
        for place, job in worker.take_all():
            if not job.settled:
                (begun if finished <= place < started else back).append(job)
        for job in back:
            job.taken = 0.0
            (self._alone if job.attempts else self._waiting).append(job)
        if back:
            self._waiting = _by_arrival(self._waiting)
            self._alone = _by_arrival(self._alone)
        self.depth += len(back)
        self.bytes += sum([job.size for job in back])
        return begun

    def _limit(self, worker: InFlight, now: float) -> int:
        """How many jobs may go to `worker` now: whole batches, more than one only if they are short."""
        batch_size = self.batch_size
        ahead = worker.batches_ahead()
        if not worker.jobs or len(worker.frames) < worker.threads:
            if self.max_batch_delay and self.depth < batch_size and self._oldest().arrived + self.max_batch_delay > now:
                return 0
            return min(max(1, ahead) * batch_size, max(MAX_FRAME_JOBS, batch_size))
        if worker.preprocess_threads:  # a batch more for the preprocess threads, and what they have in hand
            window = max(batch_size * (worker.threads + 1) + worker.preprocess_threads, ahead * batch_size)
            return max(0, min(window - len(worker.jobs), MAX_FRAME_JOBS))
        if len(worker.frames) > worker.threads or self.depth < batch_size:
            return 0
        room = ahead * worker.threads * batch_size - len(worker.jobs)
        return min(room, MAX_FRAME_JOBS) if room >= batch_size else 0

    def _hand_over(self, worker: InFlight, jobs: list[Job], batch_size: int) -> tuple[int, list[Job]]:
        worker.add(jobs)
        self._handed += len(jobs)
        return batch_size, jobs

    def _next_alone(self) -> Job | None:
        while self._alone:
            job = self._alone.popleft()
            if not job.settled:
                self.depth -= 1
                self.bytes -= job.size
                return job
        return None

    def _newest_first(self, worker: InFlight, now: float) -> bool:
        """Whether the queue has been standing: its oldest job waited too long for too long, and it was never empty."""
        if self.fifo:
            self.newest_first = False
            return False
        self._look_whether_emptied()
        waiting = self._waiting
        while waiting[0].settled:
            waiting.popleft()
        if now - waiting[0].arrived <= max(STANDING_WAIT, 2 * (worker.batch_seconds or 0.0)):
            self._standing_since = None
        elif self._standing_since is None:
            self._standing_since = now
        self.newest_first = self._standing_since is not None and now - self._standing_since >= STANDING_SECONDS
        return self.newest_first

    def _look_whether_emptied(self) -> None:
        if self._emptied:
            self._emptied = self.newest_first = False
            self._standing_since = None
            self._drain.clear()

    def _some(self, limit: int, newest_first: bool) -> list[Job]:
        """Up to `limit` waiting jobs, fewer (but a batch) when their bodies are large."""
        jobs: list[Job] = []
        size, waiting = 0, self._waiting
        pop = waiting.pop if newest_first else waiting.popleft
        while waiting and len(jobs) < limit:
            if size > MAX_FRAME_BYTES and len(jobs) >= self.batch_size:
                break
            job = pop()
            if not job.settled:
                jobs.append(job)
                size += job.size
        self._emptied = self._emptied or not waiting
        return jobs

    def _oldest(self) -> Job:
        """The longest waiting job; only while `depth` is positive."""
        return next(job for job in itertools.chain(self._alone, self._waiting) if not job.settled)

    def _remember_poison(self, job: Job, now: float) -> None:
        if job.size <= MAX_POISON_BYTES and len(self._poisons) < MAX_POISONS:
            self._poisons[job.size, _content(job)] = now + POISON_MEMORY

    def _refuse_poison(self, job: Job) -> None:
        """Raises WorkerDiedError for a known one. That renews nothing: later, one is run again, and may be well."""
        now = job.arrived
        for known in [known for known, until in self._poisons.items() if until < now]:
            del self._poisons[known]
        if any(size == job.size for size, _ in self._poisons) and (job.size, _content(job)) in self._poisons:
            raise WorkerDiedError("the same request has just crashed two worker processes; it is not run again",
                                  status=500)  # fmt: skip

    def _death(self, job: Job, cause: str) -> WorkerDiedError:
        if job.attempts > 1:
            return WorkerDiedError(f"the worker process died twice running this request ({cause})", status=500)
        why = "too many requests were retried lately"
        if self.closed or not self.retry:
            why = self.closed or "retry is off for this model"
        return WorkerDiedError(f"the worker process died running this request ({cause}); {why}")

    def _spend_retry(self, now: float) -> bool:
        """Whether one more lost batch may be run again: at most RETRY_SHARE of the last RETRY_WINDOW's requests."""
        for record in (self._retried, self._window):
            _drop_before(record, now - RETRY_WINDOW)
        recent = self.submitted - (self._window[0][1] if self._window else 0)
        if len(self._retried) >= max(RETRY_MINIMUM, RETRY_SHARE * recent):
            return False
        self._retried.append(now)
        return True

    def tick(self, now: float) -> None:
        """Called a few times a second: remembers how many requests there were, and how fast they left."""
        self._window.append((now, self.submitted))
        _drop_before(self._window, now - RETRY_WINDOW)
        self._measure(now)

    def _measure(self, now: float) -> None:
        """The rate at which jobs leave while others wait: an idle queue tells nothing of how fast its workers are."""
        if len(self._waiting) > 2 * self.depth + MAX_FRAME_JOBS:  # cancelled, below others that nobody takes
            self._waiting = deque([job for job in self._waiting if not job.settled])
        self._emptied = self._emptied or not self.depth
        self._look_whether_emptied()
        came, left = self._offered
        self._offered = self.submitted + self._refused, self._handed
        overloaded = self.newest_first and self._offered[0] - came > self._handed - left
        if overloaded is not self._overloaded:
            self._overloaded = overloaded
            self._make_room()
        if not self.depth:
            return
        drain = self._drain
        drain.append((now, self._handed))
        enough = RATE_BATCHES * self.batch_size
        while len(drain) > 2 and now - drain[1][0] >= RATE_SECONDS and self._handed - drain[1][1] >= enough:
            drain.popleft()
        since, handed = drain[0]
        if self._handed - handed >= enough:
            self.rate = (self._handed - handed) / (now - since)
            self._make_room()

    def _make_room(self) -> None:
        room = self.capacity
        if self.rate:
            room = min(room, max(self.batch_size, int(self.rate * self.timeout)))
            if self._overloaded:  # who waits below the newest waits for long: let there be few of them
                room = min(room, max(FEWEST_WAITING, 4 * self.batch_size, int(self.rate * STANDING_SECONDS)))
        self.room = 0 if self.closed else room

    def _retry_after(self) -> int:
        """Whole seconds until those that wait now are gone, spread so that not all who were refused return at once."""
        self._refused += 1
        wait = self.depth / self.rate if self.rate else 0.0
        return min(MAX_RETRY_AFTER, max(1, math.ceil(wait * (1 + self._refused * GOLDEN % 0.5))))


def _is_crash(cause: str) -> bool:
    return cause.startswith(("signal ", "exit code ")) and not cause.startswith(_FROM_OUTSIDE)


def _content(job: Job) -> int:
    """All that a handler can see of a request: what differs in a header alone need not crash it."""
    facts = job.facts
    return hash((facts.query, facts.query_is_input, *facts.headers, b"".join(job.parts)))


def _by_arrival(jobs: deque[Job]) -> deque[Job]:
    """Oldest first again after jobs came back, so that the front is what expires next."""
    return deque(sorted(jobs, key=lambda job: (job.arrived, job.id)))


def _drop_before(record: deque[float] | deque[tuple[float, int]], limit: float) -> None:
    while record and (record[0] if isinstance(record[0], float) else record[0][0]) < limit:
        record.popleft()
