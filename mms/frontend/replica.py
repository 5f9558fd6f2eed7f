"""What is served, as a further front end knows it: versions with queues of their own, and workers lent to them."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mms import fronts
from mms.arena import attach
from mms.errors import DrainingError
from mms.model_settings import ModelSettings
from mms.models.served import ServedVersion, VersionState
from mms.workers.feeding import Feeder
from mms.workers.lateness import Lateness
from mms.workers.placement import Place
from mms.workers.process import WorkerProcess
from mms.workers.worker import Worker, WorkerState

TICK = 0.25
ASLEEP = 1.0  # a tick this late means that this process itself stood still
SILENCE = 2.0  # seconds after the end of a channel in which the main process should have told of the worker's end

Tell = Callable[[Any], None]


class LentProcess(WorkerProcess):
    """A child of the main process, of which this one has a channel, an arena and a page."""

    def __init__(self, lent: fronts.Lent, channel: int, file: int) -> None:
        bodies, page = attach(file)
        os.close(file)  # the maps keep descriptors of their own
        super().__init__(lent.pid, -1, socket.socket(fileno=channel), page, -1, Path(), bodies)

    def close(self, *, keep_scratch: bool = False) -> None:
        self._page.close()
        if self.arena is not None:
            self.arena.close()


class LentWorker(Worker):
    """A worker as a further front end sees it: the main process alone starts, judges and ends it."""

    def __init__(self, lent: fronts.Lent, process: LentProcess, pool: ReplicaPool, version: Replica, tell: Tell):
        super().__init__(lent.worker, Place(None), pool, version.queue, version.metrics)
        self.process = process
        self.state = WorkerState.READY
        self.in_flight = version.queue.new_worker(lent.threads, lent.preprocess_threads)
        if self.in_flight.overlaps:
            self.in_flight.cancel = process.cancel
        self._tell = tell

    async def join(self) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, sock=self.process.channel)

    def kill(self, cause: str) -> None:
        self.cause = self.cause or cause
        self._tell(fronts.Kill(self.slot, cause))

    def recall(self) -> None:
        """Send it nothing more; it is left when it has answered."""
        self.state = WorkerState.STOPPING
        self._owner.worker_lost(self)
        self._owner.worker_free(self)

    def leave(self) -> None:
        """It owes nothing."""
        if self.state is not WorkerState.STOPPED:
            self.state = WorkerState.STOPPED
            self._gone = True
            self._transport.close()
            self.process.close()
            self._tell(fronts.Left(self.slot))

    def ended(self, cause: str) -> None:
        """The main process has seen its end. What it has said until then is still read."""
        self.cause = self._exit = cause
        if self._channel_ended:
            self._finish()
        else:
            asyncio.get_running_loop().call_later(SILENCE, self._finish)

    def connection_lost(self, error: Exception | None) -> None:
        self._channel_ended = True
        if self._gone:
            return
        self._owner.worker_lost(self)
        if self._exit is not None:
            self._finish()
        else:
            asyncio.get_running_loop().call_later(SILENCE, self._kill_silent)


class ReplicaPool(Feeder):
    """The workers that are lent to one version."""

    def __init__(self, version: Replica, tell: Tell) -> None:
        super().__init__(version.queue, version.metrics, shared=True)
        self._version = version
        self._tell = tell
        self._lateness = Lateness(version.settings, version.queue)
        self._timer = self._loop.call_later(TICK, self._tick)
        self._last_tick = time.monotonic()
        self._leaving = False  # and Empty is not said yet
        self._roused_at = 0.0
        self._load: fronts.Load | None = None  # that was told last

    async def add(self, lent: fronts.Lent, channel: int, file: int) -> None:
        worker = LentWorker(lent, LentProcess(lent, channel, file), self, self._version, self._tell)
        self.workers.append(worker)
        await worker.join()
        if worker.connected:
            self._serves(worker)
            self._queue.forget_rate()
            self._dispatch()

    def rouse(self) -> None:
        now = time.monotonic()
        if now - self._roused_at >= TICK:  # it may have been too early: the last worker was just going
            self._roused_at = now
            self._tell(fronts.Rouse(self._version.told))

    def leave(self) -> None:
        """No more requests come; say Empty when all are answered."""
        self._leaving = True
        self._look()

    def close(self) -> None:
        self._timer.cancel()
        self._stop_feeding()

    # Owner

    def worker_ready(self, worker: Worker, ready: object) -> None:
        """It was when it was lent."""

    def objective_missed(self, worker: Worker, seconds: float) -> None:
        """There are no objectives here."""

    def worker_free(self, worker: Worker) -> None:
        if self._queue.depth:
            self._wake_soon()
        if worker.state is WorkerState.STOPPING:
            self._leave_when_idle(worker)
        if self._leaving:
            self._look()

    def worker_gone(self, worker: Worker) -> None:
        self._forget(worker)
        if worker.in_flight.count:
            self._take_back(worker)
        self._look()

    def _leave_when_idle(self, worker: Worker) -> None:
        """With no worker to stay, those that go take what waits."""
        if self._queue.depth and not self.ready_workers and worker.connected:
            now = time.monotonic()
            self._expire(now)
            self._feed(worker, now)
        unloading = self._version.state is VersionState.DRAINING  # then what nobody waits for is not waited for
        owes = any(not (unloading and job.settled) for job in worker.in_flight.jobs)
        if not owes and isinstance(worker, LentWorker):
            self._forget(worker)
            worker.leave()

    def _forget(self, worker: Worker) -> None:
        self.worker_lost(worker)
        if worker in self.workers:
            self.workers.remove(worker)
        self._lateness.forget(worker)
        self._queue.forget_worker(worker.in_flight)

    def _look(self) -> None:
        """Whether somebody waits in vain, and whether somebody waits at all."""
        version, queue = self._version, self._queue
        if queue.depth and not self.workers and not version.can_wait and version.state is not VersionState.LOADING:
            for job, error in queue.abandon(version.unavailable()):
                self.fail(job, error)
        in_hand = (job for worker in self.workers for job in worker.in_flight.jobs)
        if self._leaving and not queue.depth and all(job.settled for job in in_hand):
            self._leaving = False
            self._tell(fronts.Empty(version.told))

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK, self._tick)  # first: whatever fails, the clock goes on
        now = time.monotonic()
        asleep = now - self._last_tick > TICK + ASLEEP
        self._last_tick = now
        self._queue.tick(now)
        self._expire(now)
        self._look()
        if self._queue.depth and not self.workers:
            self.rouse()
        if self._version.scales:
            self._tell_load(now)
        if not asleep:
            for worker in list(self.workers):
                self._check(worker, now)

    def _tell_load(self, now: float) -> None:
        """How many workers there are to be is decided in the main process."""
        load = fronts.Load(
            self._version.told,
            jobs={worker.slot: worker.in_flight.count for worker in self.workers if worker.in_flight.count},
            waiting=self._queue.depth,
            oldest_wait=self._queue.oldest_wait(now),
            batch_seconds=max((worker.in_flight.batch_seconds or 0.0 for worker in self.workers), default=0.0),
            submitted=self._queue.submitted,
        )
        if load != self._load:
            self._load = load
            self._tell(load)

    def _check(self, worker: Worker, now: float) -> None:
        if worker.process.arena is not None and not worker.in_flight.count:
            worker.process.arena.tidy(now)
        self._end_overdue(worker, self._lateness, now)


class Replica(ServedVersion):
    """A version whose workers are the main process's."""

    pool: ReplicaPool

    def __init__(self, shown: fronts.Shown, front_ends: int, tell: Tell) -> None:
        super().__init__(shown.name, shown.version, settings_of(shown.settings), front_ends)
        self.told = shown.number  # the main process's number of it
        self._shown = shown
        self.pool = ReplicaPool(self, tell)

    @property
    def state(self) -> VersionState:
        return VersionState(self._shown.state)

    @property
    def can_wait(self) -> bool:
        return self._shown.can_wait

    @property
    def scales(self) -> bool:
        return self._shown.scales

    @property
    def next_start(self) -> float:
        return max(0.0, self._shown.next_start_at - time.monotonic())

    def show(self, shown: fronts.Shown) -> None:
        """What the main process says of it now."""
        before, self._shown = self._shown, shown
        if shown.settings != before.settings:
            self.apply(settings_of(shown.settings))

    def leave(self, reason: str) -> None:
        self._shown = msgspec.structs.replace(self._shown, state=str(VersionState.DRAINING))
        self.queue.close(reason)
        self.pool.leave()

    def forget(self) -> None:
        """Its workers have ended. What they had in hand may come back yet, and then fails, too."""
        self._shown = msgspec.structs.replace(self._shown, state=str(VersionState.UNLOADED), can_wait=False)
        for job, error in self.queue.abandon(DrainingError(f"model {self.label} was unloaded")):
            self.pool.fail(job, error)
        self.pool.close()

    def counted(self) -> fronts.Counted:
        queue = self.queue
        return fronts.Counted(
            parts=self.metrics.parts(),
            cancelled=queue.cancelled,
            retries=queue.retries,
            queue_depth=queue.depth,
            queue_bytes=queue.bytes,
            newest_first=queue.newest_first,
            drain_rate=queue.rate,
            in_flight=self.pool.in_flight,
        )


def settings_of(told: fronts.QueueSettings) -> ModelSettings:
    return dataclasses.replace(ModelSettings(), **msgspec.structs.asdict(told))
