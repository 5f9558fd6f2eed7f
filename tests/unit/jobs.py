"""Jobs, a queue and its workers, for the tests of the dispatcher's rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mms.errors import MMSError
from mms.wire import RequestFacts
from mms.workers.batching import BatchQueue
from mms.workers.inflight import InFlight
from mms.workers.job import Job, StreamCaller

NOW = 1000.0
QUICK = 1e-5  # seconds a batch takes: many fit into the time that may be sent ahead
SLOW = 1.0
FACTS = RequestFacts("", "", b"", False, [])


@dataclass
class Caller:
    outcomes: list[object] = field(default_factory=list)

    def begin(self, status: int, head: bytes) -> StreamCaller:
        raise AssertionError("nothing streams here")

    def answer(self, status: int, head: bytes, body: bytes | memoryview) -> None:
        self.outcomes.append(bytes(body))

    def fail(self, error: MMSError) -> None:
        self.outcomes.append(error)


def make_queue(**settings: Any) -> BatchQueue:
    defaults = {"batch_size": 1, "max_batch_delay": 0.0, "capacity": 1000, "timeout": 60.0, "retry": 1}
    return BatchQueue(**{**defaults, **settings})


def make_worker(batch_seconds: float | None = None) -> InFlight:
    worker = InFlight()
    if batch_seconds is not None:
        worker.observe(1, batch_seconds)
    return worker


def make_job(number: int, *, size: int = 10, arrived: float = NOW, facts: RequestFacts = FACTS) -> Job:
    return Job(number, facts, b"r%d" % number, [b"%d" % number], size, Caller(), arrived)


def fill(queue: BatchQueue, count: int, *, first: int = 1, size: int = 10, arrived: float = NOW) -> list[Job]:
    jobs = [make_job(number, size=size, arrived=arrived) for number in range(first, first + count)]
    for job in jobs:
        queue.submit(job)
    return jobs


def take(queue: BatchQueue, worker: InFlight, now: float = NOW) -> list[int]:
    frame = queue.take(worker, now)
    return [] if frame is None else [job.id for job in frame[1]]


def finish(worker: InFlight, *numbers: int) -> None:
    jobs = worker.finish(list(numbers))
    assert jobs is not None
    for job in jobs:
        job.settled = True


def numbers(failed: list[tuple[Job, MMSError]]) -> list[int]:
    return [job.id for job, _ in failed]
