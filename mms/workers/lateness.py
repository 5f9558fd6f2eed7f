"""Which worker takes too long to start or for a batch (startup_timeout, response_timeout). Front end's process."""

from __future__ import annotations

from typing import Protocol

from mms.errors import MMSError
from mms.workers.batching import BatchQueue
from mms.workers.job import Job
from mms.workers.worker import Worker, WorkerState

PATIENCE = 20.0  # seconds beyond response_timeout: a front end that does not read is ended before (fleet.SILENCE)


class TimeLimits(Protocol):
    """Seconds, of a model's settings."""

    @property
    def response_timeout(self) -> float: ...

    @property
    def startup_timeout(self) -> float: ...


class Lateness:
    """Looks at the workers of one pool."""

    def __init__(self, settings: TimeLimits, queue: BatchQueue) -> None:
        self._settings = settings
        self._queue = queue
        self._standing: dict[Worker, tuple[int, float]] = {}  # jobs done at the last look, and since when that many
        self._between: dict[Worker, tuple[int, float]] = {}  # the same of all front ends, while it is between batches

    def forget(self, worker: Worker) -> None:
        self._standing.pop(worker, None)
        self._between.pop(worker, None)

    def starts_too_long(self, worker: Worker, now: float) -> bool:
        return worker.state is WorkerState.STARTING and now - worker.launched > self._settings.startup_timeout

    def stands_still(self, worker: Worker, now: float) -> bool:
        """Whether a worker that several front ends use stays between two batches, and says that it is at work: all of
        them would wait for it. Unless it is stopped, it may be waiting for one of them, and has PATIENCE.
        """
        if worker.control is None or worker.state is WorkerState.STARTING:
            return False
        answered = worker.answered
        seen, since = self._between.get(worker, (0, now))
        if seen != answered or not worker.between_batches:
            since = now
        self._between[worker] = answered, since
        late = now - since - self._settings.response_timeout
        return late > PATIENCE or (late > 0 and worker.process.stopped)

    def overdue(self, worker: Worker, now: float) -> list[tuple[Job, MMSError]] | None:
        """The jobs of a worker's batch that takes too long, each with its error; None while it is in time."""
        if worker.state is WorkerState.STARTING or not worker.in_flight.count:
            return None
        limit = self._settings.response_timeout
        if worker.cause:
            return None
        running = worker.process.running()
        if running:
            late = {place for begun_at, places in running if now - begun_at > limit for place in places}
            return self._queue.overdue(worker.in_flight, late, limit) if late else None
        done, started, begun_at = worker.process.progress()
        if not begun_at:  # stopped or stuck between two batches: it owes the next one
            begun_at = max(worker.in_flight.frames[0].taken, self._standing_since(worker, done, now))
            if worker.in_flight.preprocess_threads:  # it may wait for a fuller batch
                begun_at += self._queue.max_batch_delay
            started = max(started, done + self._queue.batch_size_of(worker.in_flight))
        if now - begun_at <= limit:
            return None
        return self._queue.timed_out(worker.in_flight, started, limit, done=done)

    def _standing_since(self, worker: Worker, done: int, now: float) -> float:
        """When the worker was first seen to have finished as many jobs as now, and not to be at those of other front
        ends: until then it was at work.
        """
        seen, since = self._standing.get(worker, (0, 0.0))
        if seen != done or worker.process.busy:
            since = now
        self._standing[worker] = done, since
        return since
