"""What one worker has in hand: the dispatcher's account of it. Pure, no I/O. Front end's process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator

import msgspec

from mms.workers.job import Job
from mms.workers.objective import BatchLimit

AHEAD_SECONDS = 0.002  # work that may lie at a worker beyond what it needs now: bounds how long one job can hold others
MAX_FRAME_JOBS = 256


class Frame(msgspec.Struct, eq=False):
    """The jobs of one frame and their ids; `first` is the place of its first job among all the worker was ever sent.

    `left` of them are not answered yet. `cancel` tells the worker that nobody waits for a job any more, where jobs
    wait in workers. A Struct: its constructor runs in C.
    """

    first: int
    jobs: list[Job]
    ids: list[int]
    left: int
    cancel: Callable[[int], None] | None


class InFlight:
    """The jobs at one worker, by id, in the order in which they were sent, and what it may be sent ahead."""

    __slots__ = (
        "batch_limit",
        "batch_seconds",
        "cancel",
        "exclusive",
        "finished",
        "frames",
        "jobs",
        "overlaps",
        "preprocess_threads",
        "sent",
        "streams",
        "threads",
    )

    def __init__(self, threads: int = 1, preprocess_threads: int = 0) -> None:
        self.threads = threads  # batches that the worker runs at a time
        self.preprocess_threads = preprocess_threads  # with some, it prepares requests while batches run
        self.overlaps = threads > 1 or preprocess_threads > 0
        self.cancel: Callable[[int], None] | None = None  # of its frames
        self.jobs: dict[int, Job] = {}
        self.sent = 0
        self.finished = 0  # results received since the worker started
        self.frames: deque[Frame] = deque()  # those that are not answered as a whole
        self.exclusive = False  # the one job in hand is a retry: nothing else may share its fate
        self.streams = False  # it has answered with a stream: what lies behind one waits for its end
        self.batch_seconds: float | None = None  # time of a batch: follows rises at once, falls slowly
        self.batch_limit: BatchLimit | None = None  # its batch size, where that follows a latency objective

    def add(self, jobs: list[Job], now: float) -> None:
        """They are sent in one frame."""
        held, count = self.jobs, len(jobs)
        frame = Frame(self.sent, jobs, [job.id for job in jobs], count, self.cancel)
        for job in jobs:
            job.taken = now
            job.frame = frame
            held[job.id] = job
        self.frames.append(frame)
        self.sent += count

    def finish(self, ids: list[int]) -> list[Job] | None:
        """The jobs of these ids, answered and no longer in hand. None, and all stay in hand, if one is not there."""
        held, frames, count = self.jobs, self.frames, len(ids)
        if frames and (frame := frames[0]).left == count and frame.ids == ids:  # the usual case: all of a frame at once
            frames.popleft()
            done, frame.jobs = frame.jobs, []  # it must hold no cycle
            if len(held) == count:
                held.clear()
                self.exclusive = False
            else:
                for id in ids:
                    del held[id]
            self.finished += count
            return done
        pop = held.pop
        done = []
        try:
            for id in ids:
                done.append(pop(id))
        except KeyError:
            held.update([(job.id, job) for job in done])
            return None
        if not done:
            return done
        self.finished += count
        for job in done:
            its = job.frame
            assert its is not None
            its.left -= 1
            if not its.left:
                frames.remove(its)
                its.jobs = []
        if not self.jobs:
            self.exclusive = False
        return done

    def take_all(self) -> Iterator[tuple[int, Job]]:
        """Each job in hand with its place; then the worker has none."""
        frames, held = list(self.frames), self.jobs
        self.jobs = {}
        self.frames.clear()
        self.exclusive = False
        for frame in frames:
            for place, job in enumerate(frame.jobs, frame.first):
                if job.id in held:
                    yield place, job

    def take_places(self, places: Collection[int]) -> list[Job]:
        """The jobs at these places, no longer in hand."""
        jobs = [
            job
            for frame in self.frames
            for place, job in enumerate(frame.jobs, frame.first)
            if place in places and job.id in self.jobs
        ]
        return self.finish([job.id for job in jobs]) or []

    def begins_stream(self) -> None:
        """Times of its batches tell nothing any more of the next one: from now on nothing is sent ahead."""
        self.streams = True
        self.batch_seconds = None

    def observe(self, batches: int, seconds: float) -> None:
        """A RESULT frame reports that `batches` batches took `seconds` in the handler."""
        if self.streams:
            return
        mean = seconds / batches
        known = self.batch_seconds
        self.batch_seconds = mean if known is None or mean > known else 0.8 * known + 0.2 * mean

    def batches_ahead(self) -> int:
        """How many batches fit into AHEAD_SECONDS; 0 while nothing is known."""
        if self.batch_seconds is None:
            return 0
        return int(AHEAD_SECONDS / self.batch_seconds) if self.batch_seconds > 1e-6 else MAX_FRAME_JOBS
