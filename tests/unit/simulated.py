"""What the simulation of the dispatcher is made of: clients, worker processes, the rules of scheduling told anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection

from mms.errors import DeadlineError, MMSError, ObjectiveError, QueueFullError
from mms.workers.batching import BatchQueue
from mms.workers.job import Job, StreamCaller, Terms
from mms.workers.objective import LEAST_WAIT

Chance = Callable[[], float]


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

    def __init__(self, batch_seconds: float, queue: BatchQueue, threads: int = 1, preprocess_threads: int = 0) -> None:
        self.in_flight = queue.new_worker(threads, preprocess_threads)
        self.batch_seconds = batch_seconds
        self.started = 0
        self.done = 0
        self.sent = 0
        self.finished: list[Job] = []  # answers that the worker still holds back
        self.written: deque[Job] = deque()  # answers in the socket
        self.batches = 0
        self._frames: deque[tuple[int, deque[Job]]] = deque()
        self._batch: list[Job] = []
        self._begun_at = 0.0

    def receive(self, batch_size: int, jobs: list[Job]) -> None:
        self._frames.append((batch_size, deque(jobs)))
        self.sent += len(jobs)

    def advance(self, now: float, chance: Chance, hangs: Callable[[Job], bool]) -> list[Job]:
        """Go a step further; the batch that begins with it, if one does."""
        if self._batch:
            if not any(map(hangs, self._batch)):
                self._end_batch(chance)
            return []
        if not self._frames:
            return []
        batch_size, jobs = self._frames[0]
        self._batch = [jobs.popleft() for _ in range(min(batch_size, len(jobs)))]
        self.started += len(self._batch)
        self._begun_at = now
        return self._batch

    def running(self) -> list[tuple[float, list[int]]]:
        """When the work in hand began, and the places of its jobs."""
        return [(self._begun_at, list(range(self.done, self.started)))] if self._batch else []

    def flush(self) -> None:
        self.written.extend(self.finished)
        self.finished = []

    def _end_batch(self, chance: Chance) -> None:
        self.finished += self._batch
        self._batch = []
        self.done = self.started
        self.batches += 1
        if not self._frames[0][1]:
            self._frames.popleft()
            self.flush()
        elif chance() < 0.5:
            self.flush()


class Pipeline(Process):
    """A worker process with threads: prepares requests and runs batches side by side, answers as they end."""

    def __init__(self, batch_seconds: float, queue: BatchQueue, threads: int, preprocess_threads: int) -> None:
        super().__init__(batch_seconds, queue, threads, preprocess_threads)
        self._threads = threads
        self._preparers = preprocess_threads
        self._batch_size = 1
        self._places: dict[int, int] = {}
        self._waiting: deque[Job] = deque()
        self._preparing: list[tuple[float, list[Job]]] = []
        self._ready: list[Job] = []
        self._running: list[tuple[float, list[Job]]] = []
        self._done: set[int] = set()

    def receive(self, batch_size: int, jobs: list[Job]) -> None:
        self._batch_size = batch_size
        for job in jobs:
            self._places[job.id] = self.sent
            self.sent += 1
        if self._preparers:
            self._waiting.extend(jobs)
        else:
            self._ready += jobs

    def advance(self, now: float, chance: Chance, hangs: Callable[[Job], bool]) -> list[Job]:
        """What it can do now, in any order. Some that hang do so while they are prepared."""
        turn = chance()
        if turn < 0.5 and self._ready and len(self._running) < self._threads:
            return self._begin_batch(now)
        if turn < 0.7 and self._waiting and len(self._preparing) < self._preparers:
            job = self._waiting.popleft()
            self._begin([job])
            self._preparing.append((now, [job]))
            return []
        ends = [work for work in self._preparing if not (work[1][0].id % 2 and hangs(work[1][0]))]
        if ends and turn < 0.8:
            work = ends[int(chance() * len(ends))]
            self._preparing.remove(work)
            self._ready += work[1]
            return []
        ends = [work for work in self._running if not any(map(hangs, work[1]))]
        if ends:
            self._end_work(ends[int(chance() * len(ends))])
            if chance() < 0.5:
                self.flush()
        else:
            self.flush()
        return []

    def running(self) -> list[tuple[float, list[int]]]:
        return [
            (begun_at, [self._places[job.id] for job in jobs]) for begun_at, jobs in self._preparing + self._running
        ]

    def end_late(self, places: Collection[int]) -> None:
        """Batches that were taken for stuck end after all."""
        for work in self._running[:]:
            if self._places[work[1][0].id] in places:
                self._end_work(work)
        self.flush()

    def _end_work(self, work: tuple[float, list[Job]]) -> None:
        self._running.remove(work)
        self.finished += work[1]
        self.batches += 1
        self._done.update([self._places[job.id] for job in work[1]])
        while self.done in self._done:
            self.done += 1

    def _begin_batch(self, now: float) -> list[Job]:
        """With preprocess threads, of one of two buckets, from whatever frames."""
        ready = self._ready
        same = [job for job in ready if not self._preparers or job.size == ready[0].size]
        batch = same[: self._batch_size]
        self._ready = [job for job in ready if job not in batch]
        self._begin(batch)
        self._running.append((now, batch))
        return batch

    def _begin(self, jobs: list[Job]) -> None:
        self.started = max(self.started, *[self._places[job.id] + 1 for job in jobs])


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
