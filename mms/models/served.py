"""One version of one model as requests see it: its settings, its queue, what is said when it cannot serve.

Front end's process: in the main one it is a ModelVersion, with all that belongs to its workers.
"""

from __future__ import annotations

import enum
import itertools
from abc import ABC, abstractmethod
from dataclasses import replace

from mms.errors import DrainingError, LoadingError, MMSError, ServiceUnavailableError
from mms.metrics import VersionMetrics
from mms.model_settings import ModelSettings
from mms.workers.batching import BatchQueue
from mms.workers.feeding import Feeder
from mms.workers.job import Job, Terms, Work
from mms.workers.restarts import failed_to_load, no_workers
from mms.workers.scheduling import Scheduling, largest_batch

_next_number = itertools.count(1).__next__


class VersionState(enum.StrEnum):
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    UNLOADED = "UNLOADED"
    FAILED = "FAILED"


class ServedVersion(ABC):
    """What a request is answered by. Of the queue's bounds, each of `front_ends` processes has its part."""

    alike = True  # requests without terms need not be looked at one by one

    def __init__(self, name: str, version: str, settings: ModelSettings, front_ends: int = 1) -> None:
        self.number = _next_number()  # of all that were ever registered in this process
        self.name = name
        self.version = version
        self.settings = settings
        self.front_ends = front_ends
        self.metrics = VersionMetrics(self.label)
        sizes = tuple(part(size, front_ends) for size in settings.priority_queue_sizes)
        self.scheduling = replace(Scheduling.of(settings), level_sizes=sizes)
        self.queue = BatchQueue(
            batch_size=largest_batch(settings),
            max_batch_delay=settings.max_batch_delay,
            capacity=part(settings.queue_size, front_ends),
            timeout=settings.queue_timeout,
            retry=settings.retry,
            max_bytes=part(settings.queue_bytes, front_ends),
            fifo=settings.queue_order == "fifo",
            scheduling=self.scheduling,
        )
        self.pool: Feeder | None = None

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"

    @property
    @abstractmethod
    def state(self) -> VersionState: ...

    @property
    @abstractmethod
    def can_wait(self) -> bool:
        """No worker is ready at the moment, but one is being replaced, or the request brings one: it may wait."""
        ...

    @property
    @abstractmethod
    def next_start(self) -> float:
        """Seconds until workers are started again, when they could not be."""
        ...

    def submit(self, job: Job) -> Work:
        """Queue the job; returns what its caller can cancel.

        Raises OverloadError, or ServiceUnavailableError with the reason; both are counted.
        """
        pool = self.pool
        try:
            if pool is None:
                raise self.unavailable()
            if not pool.ready_workers:
                if not self.can_wait:
                    raise self.unavailable()
                pool.rouse()
            pool.submit(job)
        except MMSError as error:
            raise self._refused(error) from None
        return job

    def submit_all(self, jobs: list[Job]) -> None:
        """Queue jobs without terms; one that is refused fails with what `submit` raises."""
        pool = self.pool
        if pool is not None and pool.ready_workers and pool.submit_all(jobs):
            return
        for job in jobs:
            try:
                self.submit(job)
            except MMSError as error:
                job.fail(error)

    def refusal(self, size: int, terms: Terms | None) -> MMSError | None:
        """Why a request with a body of `size` bytes would be refused now, before the body is read."""
        pool = self.pool
        if pool is None or not (pool.ready_workers or self.can_wait):
            return self.unavailable()
        refusal = self.queue.refusal(size, terms)
        return refusal if refusal is None else self.scheduling.outcome(refusal)

    def count(self, error: MMSError) -> None:
        """A request to this version was refused."""
        self.metrics.count(error)

    @property
    def held(self) -> int:
        """Bytes of the bodies that wait or are at workers."""
        return self.queue.bytes + (self.pool.bytes_in_flight if self.pool is not None else 0)

    def apply(self, settings: ModelSettings) -> None:
        """Take over what can change while the version is served: batching and queue limits."""
        self.settings = settings
        self.queue.set_batches(largest_batch(settings), settings.preferred_batch_sizes)
        self.queue.max_batch_delay = settings.max_batch_delay
        self.queue.apply(
            capacity=part(settings.queue_size, self.front_ends),
            max_bytes=part(settings.queue_bytes, self.front_ends),
            timeout=settings.queue_timeout,
            fifo=settings.queue_order == "fifo",
        )
        if self.pool is not None:
            self.pool.wake()

    def _refused(self, error: MMSError) -> MMSError:
        """What its caller is told. Not a variable of the frame that raises it: that cycle would keep the request."""
        outcome = self.scheduling.outcome(error)
        self.count(outcome)
        return outcome

    def unavailable(self) -> ServiceUnavailableError:
        """Why no request is taken."""
        state = self.state
        if state is VersionState.FAILED:
            return failed_to_load(self.label, self.next_start)
        if state is VersionState.LOADING:
            return LoadingError(f"model {self.label} is still loading; try again soon")
        if state is VersionState.READY:
            return no_workers(self.label)
        return DrainingError(f"model {self.label} is {state.lower()}")


def part(bound: int, front_ends: int) -> int:
    """What each front end has of a bound that is meant for all of them together."""
    return -(-bound // front_ends)
