"""How the jobs of a queue reach workers that have room for them, and how those whose time is over end.

Front end's process, event loop.
"""

from __future__ import annotations

import asyncio
import time

from mms.errors import MMSError
from mms.metrics import VersionMetrics
from mms.workers.alarm import Alarm
from mms.workers.batching import BatchQueue
from mms.workers.busypoll import BusyPoll
from mms.workers.job import Job
from mms.workers.lateness import Lateness
from mms.workers.worker import Worker


class Feeder:
    """Hands the jobs of one queue to `ready_workers`; a base class, so that a request passes no further object."""

    def __init__(self, queue: BatchQueue, metrics: VersionMetrics, *, shared: bool = False) -> None:
        self.workers: list[Worker] = []
        self.ready_workers: list[Worker] = []
        self._queue = queue
        self._metrics = metrics
        self._shared = shared  # other front ends use the workers, too
        self._in_turns = shared
        self._wake: asyncio.Handle | None = None
        self._loop = asyncio.get_running_loop()
        self._busy_poll = BusyPoll(self._loop)
        self._delay = Alarm(self._loop, self._dispatch)  # a batch has waited for max_batch_delay
        self._alarm = Alarm(self._loop, self._deadline)  # at the earliest deadline of a request

    @property
    def in_flight(self) -> int:
        return sum(worker.in_flight.count for worker in self.workers)

    @property
    def bytes_in_flight(self) -> int:
        """Of the bodies that workers have in hand: they are kept until they are answered, to be run again."""
        return sum(job.size for worker in self.workers for job in worker.in_flight.jobs)

    def rouse(self) -> None:
        """A request is about to come, and no worker is ready."""

    def submit(self, job: Job) -> None:
        """Queue the job. Raises OverloadError or DrainingError."""
        self._queue.submit(job)
        if self._wake is None:
            self._wake_soon()

    def submit_all(self, jobs: list[Job]) -> bool:
        """Queue all that have arrived together, none with terms, and hand them out at once; False, and none is taken,
        when they must be looked at one by one.
        """
        queue, idle = self._queue, None
        if not self._in_turns:
            for worker in self.ready_workers:
                if not worker.in_flight.count:
                    idle = worker
                    break
        if idle is not None and queue.pass_on(jobs, idle.in_flight, now := time.monotonic()):
            idle.send(queue.batch_size, jobs)
            if len(jobs) == 1:
                self._busy_poll.sent(idle.in_flight, now)
        elif not queue.submit_all(jobs):
            return False
        elif idle is not None or self._in_turns or not queue.plain or queue.depth >= queue.batch_size:
            self._dispatch()  # else all workers are busy, and are sent nothing ahead that is less than a batch
        return True

    def fail(self, job: Job, error: MMSError) -> None:
        """The job's outcome is `error`; counted."""
        if not job.settled:
            outcome = self._queue.scheduling.outcome(error)
            self._metrics.count(outcome)
            self._metrics.streams_cut += job.streams
            job.fail(outcome)

    def _wake_soon(self) -> None:
        """Hand out jobs at the end of this turn of the event loop: what else arrives in it goes along."""
        if self._wake is None:
            self._wake = self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._wake = None
        queue = self._queue
        if not queue.depth:
            return
        now = time.monotonic()
        self._expire(now)
        if self._in_turns:
            self._feed_in_turns(now)
        elif len(self.ready_workers) == 1:
            self._feed(self.ready_workers[0], now)
        else:
            idle = [worker for worker in self.ready_workers if not worker.in_flight.count]
            for worker in idle:
                self._feed(worker, now)
            if len(idle) < len(self.ready_workers) and queue.depth:
                for worker in self.ready_workers:
                    self._feed(worker, now)
        if queue.depth and queue.max_batch_delay:
            self._wake_later(now)
        if queue.deadlines.heap:
            self._watch_deadlines(now)

    def _feed(self, worker: Worker, now: float) -> bool:
        frame = self._queue.take(worker.in_flight, now)
        if frame is None:
            return False
        worker.send(*frame)
        return True

    def _feed_in_turns(self, now: float) -> None:
        """Workers that have room for several batches, or are shared, get one each in turn, those with the fewest first,
        and of these the ones that are not at work for other front ends.
        """
        workers = sorted(self.ready_workers, key=_all_load if self._shared else _load)
        while self._queue.depth and any([self._feed(worker, now) for worker in workers]):
            pass

    def _wake_later(self, now: float) -> None:
        wake_at = self._queue.wake_at()
        if wake_at is not None and wake_at > now:  # else a worker that becomes free looks anyway
            self._delay.set(wake_at, now)

    def _watch_deadlines(self, now: float) -> None:
        at = self._queue.deadlines.next()
        if at is not None:
            self._alarm.set(at, now)

    def _deadline(self) -> None:
        """A request, waiting or at a worker, is not to be answered any more."""
        now = time.monotonic()
        self._expire(now)
        self._watch_deadlines(now)

    def _expire(self, now: float) -> None:
        for job, error in self._queue.expire(now):
            self.fail(job, error)

    def worker_idle(self) -> None:
        """Of those that take jobs; a batch waits."""
        self._dispatch()

    def wake(self) -> None:
        """What the queue hands out, or when, has changed: look again."""
        self._wake_soon()

    def _serves(self, worker: Worker) -> None:
        """It takes jobs from now on."""
        self.ready_workers.append(worker)
        self._in_turns = self._shared or any(worker.in_flight.overlaps for worker in self.ready_workers)

    def worker_lost(self, worker: Worker) -> None:
        """Its channel has ended: it gets no more jobs."""
        if worker in self.ready_workers:
            self.ready_workers.remove(worker)

    def _end_overdue(self, worker: Worker, lateness: Lateness, now: float) -> None:
        """A worker whose batch takes too long ends, and the batch fails."""
        overdue = lateness.overdue(worker, now)
        if overdue is not None:
            for job, error in overdue:
                self.fail(job, error)
            worker.kill("response_timeout")
            self.worker_lost(worker)
            self._dispatch()

    def _take_back(self, worker: Worker) -> None:
        """It has ended: what it had in hand is run again or fails."""
        done, started, _ = worker.process.progress()
        for job, error in self._queue.lose(worker.in_flight, started, worker.cause, time.monotonic(), done=done):
            self.fail(job, error)
        self._wake_soon()

    def _stop_feeding(self) -> None:
        """Nothing is handed out any more.

        Without the cycles between itself and its alarms it is freed at once, and all that it knows with it: the
        collector would come many registrations later, and what lives that long is scattered among what stays.
        """
        if self._wake is not None:
            self._wake.cancel()
        self._delay.close()
        self._alarm.close()


def _load(worker: Worker) -> int:
    return len(worker.in_flight.frames)


def _all_load(worker: Worker) -> tuple[int, bool]:
    return len(worker.in_flight.frames), worker.process.busy
