"""What the simulation of the dispatcher is made of: clients, worker processes, the rules of scheduling told anew."""

from __future__ import annotations

from collections import deque

from mms.errors import DeadlineError, MMSError, ObjectiveError, QueueFullError
from mms.workers.batching import BatchQueue
from mms.workers.job import Job, StreamCaller, Terms
from mms.workers.objective import LEAST_WAIT


class Client:
    """Waits for one job, and is told its outcome once."""

    def __init__(self) -> None:
        self.outcome: object = None
        self.job: Job
        self.poison = False
        self.hangs = False
        self.runs = 0
        self.killed = 0

    def begin(self, status: int, head: bytes) -> StreamCaller:
        raise AssertionError("nothing streams here")

    def answer(self, status: int, head: bytes, body: bytes | memoryview) -> None:
        assert self.outcome is None, f"a second outcome: {status} after {self.outcome}"
        self.outcome = bytes(body)

    def fail(self, error: MMSError) -> None:
        assert self.outcome is None, f"a second outcome: {error} after {self.outcome}"
        self.outcome = error


class Process:
    """A worker process: begins batches in order, answers in order, may end between any two steps."""

    def __init__(self, batch_seconds: float, queue: BatchQueue) -> None:
        self.in_flight = queue.new_worker()
        self.batch_seconds = batch_seconds
        self.frames: deque[tuple[int, deque[Job]]] = deque()
        self.batch: list[Job] = []
        self.begun_at = 0.0
        self.started = 0
        self.sent = 0
        self.finished: list[Job] = []  # answers that the worker still holds back
        self.written: deque[Job] = deque()  # answers in the socket
        self.batches = 0


def is_full(queue: BatchQueue, terms: Terms, size: int) -> bool:
    """Whether a request on these terms finds no room, even if all that is less important gives way."""
    waiting = [job for job in queue._waiting if not job.settled]
    level_sizes = queue.scheduling.level_sizes
    if level_sizes and level_sizes[terms.level]:
        same = sum(job.terms is not None and job.terms.level == terms.level for job in waiting)
        if same >= level_sizes[terms.level]:
            return True
    lower = [job.size for job in waiting if job.terms is not None and job.terms.level > terms.level]
    if queue.depth >= queue.room and not lower:
        return True
    return queue.depth > len(lower) and queue.bytes - sum(lower) + size > queue.max_bytes


def deadline(job: Job) -> float:
    """0 without one."""
    return job.arrived + job.terms.timeout if job.terms is not None and job.terms.timeout else 0.0


def next_below(queue: BatchQueue) -> Job | None:
    """Of the levels below the highest that waits, the longest waiting job."""
    if queue.scheduling.levels == 1:
        return None
    jobs = [job for job in queue._waiting if job.terms is not None]
    highest = min([job.terms.level for job in jobs if job.terms], default=0)
    below = [job for job in jobs if job.terms and job.terms.level > highest]
    return min(below, key=lambda job: (job.arrived, job.id), default=None)


def check_reason(queue: BatchQueue, job: Job, error: MMSError, now: float) -> None:
    """Why a job is given up, waiting or at a worker."""
    waited = now - job.arrived
    if isinstance(error, QueueFullError):
        assert queue.scheduling.levels > 1 and job.terms is not None and job.terms.level > 0 and not job.taken
    elif isinstance(error, ObjectiveError):
        assert queue.objective is not None
        least = queue.objective.seconds * LEAST_WAIT
        assert waited >= least - 1e-9 and (not job.taken or queue.scheduling.default_output is not None)
    else:
        assert isinstance(error, DeadlineError)
        assert 0 < deadline(job) <= now or (job.arrived + queue.timeout <= now and not job.taken)
