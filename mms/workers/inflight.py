"""What one worker has in hand: the dispatcher's account of it. Pure, no I/O. Front end's process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import cast

import msgspec

from mms.structs import quickly_set
from mms.workers.job import Job
from mms.workers.objective import BatchLimit

AHEAD_SECONDS = 0.002  # work that may lie at a worker beyond what it needs now: bounds how long one job can hold others
MAX_FRAME_JOBS = 256


@quickly_set
class Frame(msgspec.Struct, eq=False):
    """The jobs of one frame and their ids, `taken` from the queue at that time, with bodies of `size` bytes in all.

    `first` is the place of its first job among all the worker was ever sent. `cancel` tells the worker that nobody
    waits for a job any more, where jobs wait in workers. A Struct: its constructor runs in C.
    """

    first: int
    jobs: list[Job]  # none once they are looked at one by one
    ids: list[int]
    size: int
    taken: float
    cancel: Callable[[int], None] | None
    left: int = 0  # not answered, of those that are looked at one by one


class InFlight:
    """The jobs at one worker, in the order in which they were sent, and what it may be sent ahead."""

    __slots__ = (
        "batch_limit",
        "batch_seconds",
        "cancel",
        "count",
        "exclusive",
        "finished",
        "frames",
        "opened",
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
        self.count = 0  # jobs in hand
        self.sent = 0
        self.finished = 0  # results received since the worker started
        self.frames: deque[Frame] = deque()  # those in which a job is not answered
        self.opened: dict[int, Job] = {}  # in hand, by id, from frames that are not answered as a whole
        self.exclusive = False  # the one job in hand is a retry: nothing else may share its fate
        self.streams = False  # it has answered with a stream: what lies behind one waits for its end
        self.batch_seconds: float | None = None  # time of a batch: follows rises at once, falls slowly
        self.batch_limit: BatchLimit | None = None  # its batch size, where that follows a latency objective

    @property
    def jobs(self) -> list[Job]:
        """Those in hand."""
        return [job for frame in self.frames for _, job in self._placed(frame)]

    def get(self, id: int) -> Job | None:
        """The one of that id, if it is in hand."""
        if id not in self.opened:
            self._open()
        return self.opened.get(id)

    def add(self, jobs: list[Job], size: int, now: float) -> None:
        """They are sent in one frame; their bodies have `size` bytes in all."""
        frame = Frame(self.sent, jobs, [job.id for job in jobs], size, now, self.cancel)
        for job in jobs:
            job.frame = frame
        self.frames.append(frame)
        self.sent += len(jobs)
        self.count += len(jobs)

    def finish(self, ids: list[int]) -> list[Job] | None:
        """The jobs of these ids, answered and no longer in hand. None, and all stay in hand, if one is not there."""
        frames = self.frames
        for frame in frames:
            if frame.jobs and frame.ids == ids:
                frames.remove(frame)
                done, frame.jobs = frame.jobs, []  # it must hold no cycle
                break
        else:
            some = self._take(ids)
            if some is None:
                return None
            done = some
        self.finished += len(done)
        self.count -= len(done)
        if not self.count:
            self.exclusive = False
        return done

    def take_all(self) -> list[tuple[int, Job]]:
        """Each job in hand with its place; then the worker has none."""
        taken = [placed for frame in self.frames for placed in self._placed(frame)]
        for frame in self.frames:
            frame.jobs = []
        self.frames.clear()
        self.opened.clear()
        self.count = 0
        self.exclusive = False
        return taken

    def take_places(self, places: Collection[int]) -> list[Job]:
        """The jobs at these places, no longer in hand."""
        ids = [job.id for frame in self.frames for place, job in self._placed(frame) if place in places]
        return self.finish(ids) or []

    def _placed(self, frame: Frame) -> Iterable[tuple[int, Job]]:
        """Its jobs that are not answered, with their places."""
        if frame.jobs:
            return enumerate(frame.jobs, frame.first)
        opened = self.opened
        return [(place, opened[id]) for place, id in enumerate(frame.ids, frame.first) if id in opened]

    def _open(self) -> None:
        """The jobs in hand are looked at one by one: who is answered is not kept for the others of the frame."""
        for frame in self.frames:
            if frame.jobs:
                self.opened.update(zip(frame.ids, frame.jobs, strict=True))
                frame.jobs, frame.left = [], len(frame.ids)

    def _take(self, ids: list[int]) -> list[Job] | None:
        """Those of these ids, from whichever frames."""
        self._open()
        opened = self.opened
        done: list[Job] = []
        for id in ids:
            job = opened.pop(id, None)
            if job is None:
                opened.update([(job.id, job) for job in done])
                return None
            done.append(job)
        for job in done:
            cast(Frame, job.frame).left -= 1
        self.frames = deque([frame for frame in self.frames if frame.left])
        return done

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
