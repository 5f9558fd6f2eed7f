"""The workers of one model version: as many as wanted, each dead one replaced. How they get jobs is in `feeding`.

Desired state: `scaling.target` says how many, `_reconcile` starts or stops the difference, and every event ends in it.
Front end's process, event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import nullcontext
from typing import Any

from mms import wire
from mms.errors import MMSError, ModelLoadError
from mms.metrics import VersionMetrics
from mms.workers import environment
from mms.workers.autoscaler import Bounds
from mms.workers.batching import BatchQueue
from mms.workers.feeding import Feeder
from mms.workers.forkserver import ForkServers
from mms.workers.lateness import Lateness
from mms.workers.losses import Losses
from mms.workers.others import FrontEnds
from mms.workers.recycling import Recycling
from mms.workers.restarts import Restarts, no_workers
from mms.workers.scaling import Scaling
from mms.workers.settings import PoolSettings
from mms.workers.starting import Starter
from mms.workers.worker import Worker, WorkerState

log = logging.getLogger("mms.pool")

TICK = 0.25
ASLEEP = 1.0  # a tick this late means that this process itself stood still


class WorkerPool(Feeder):
    """The worker processes of one model version."""

    def __init__(
        self,
        settings: PoolSettings,
        queue: BatchQueue,
        metrics: VersionMetrics,
        forkservers: ForkServers,
        loads: asyncio.Semaphore,
        restarts: Restarts,
        others: FrontEnds | None = None,
    ) -> None:
        super().__init__(queue, metrics, shared=others is not None)
        self.scaling = Scaling(settings.label, queue, metrics)
        self.losses = Losses(settings, metrics, restarts, self._reconcile, self._abandon)
        self.was_ready = False  # requests may wait while a worker is replaced
        self._has_served = False  # since it last had no workers: those that start are replacements, or more of them
        self.placement = settings.placement
        self._settings = settings
        self._loads = loads
        self._restarts = restarts
        self._tasks: set[asyncio.Task[None]] = set()
        self._others = others  # that use its workers, too
        self.starter = Starter(settings, forkservers, shared=others is not None)
        self._recycling = Recycling(settings)
        self._lateness = Lateness(settings, queue)
        self._timer: asyncio.TimerHandle | None = None
        self._last_tick = 0.0
        self._changed = asyncio.Event()
        self._draining = False

    @property
    def target(self) -> int:
        """How many workers are wanted now."""
        return self.scaling.target

    @property
    def failure(self) -> ModelLoadError | None:
        """Set while the version is FAILED."""
        return self.losses.failure

    @property
    def ready(self) -> int:
        """How many workers take jobs."""
        return len(self.ready_workers)

    @property
    def owed(self) -> int:
        """How many workers have to be there: those that were asked for, or when FAILED all that are wanted."""
        return self.target if self.failure is not None else self.scaling.owed

    @property
    def starting(self) -> bool:
        """Whether processes are being launched."""
        return bool(self._tasks)

    @property
    def installing(self) -> bool:
        """Whether the archive's requirements are being installed; the workers start afterwards."""
        return self.starter.installing

    @property
    def missing(self) -> int:
        """How many workers wait for their next start, after one that died or did not become ready."""
        return 0 if self.installing else max(0, self.target - len(self._active()))

    @property
    def cpu_threads(self) -> int:
        """CPU threads that a worker gets that starts now."""
        return self._cpu_threads(self._settings.load.threads)

    def _cpu_threads(self, threads: int) -> int:
        """For each of the `threads` batches at a time that a worker runs."""
        return self._settings.load.cpu_threads or max(1, environment.cores() // max(1, self.scaling.most * threads))

    @property
    def next_start(self) -> float | None:
        """Seconds until a missing worker is started, None when none waits."""
        return self.losses.next_start if self.missing else None

    @property
    def waiting_elsewhere(self) -> int:
        """Requests that wait in other front ends, as far as is known."""
        return self._others.waiting(self._settings.number) if self._others is not None else 0

    # desired state

    def set_target(self, count: int, bounds: Bounds | None = None) -> None:
        """Begin to run `count` workers, and later as many within `bounds` as there is work for (default: `count`)."""
        self.scaling.ask(bounds or Bounds(count, count), count)
        self.was_ready = self.was_ready or not count
        self.try_now()

    def try_now(self) -> None:
        """Start what is missing without a pause; a FAILED pool tries again."""
        self.losses.forgive()
        self._reconcile()

    def rouse(self) -> None:
        """Start the first worker, if requests may."""
        if not self._draining and self.scaling.rouse():
            self.try_now()

    async def settled(self) -> None:
        """Wait until as many workers are ready as wanted and no more. Raises ModelLoadError."""
        while True:
            if self.failure is not None:
                raise self.failure
            if len(self.ready_workers) == self.target == len(self.workers):
                return
            self._changed.clear()
            await self._changed.wait()

    async def close(self, drain: float) -> None:
        """Let the jobs in hand and in the queue finish for up to `drain` seconds, then end every worker."""
        self._draining = True
        until = time.monotonic() + drain
        if self._others is not None:
            self._others.leave(self._settings.number, self._queue.closed, self._changed.set)
        while self._unfinished() and time.monotonic() < until:
            await self._change(until - time.monotonic())
        self.scaling.ask(Bounds(0, 0), 0)
        self._reconcile()
        for worker in list(self.workers):
            if worker.state is WorkerState.STARTING or worker.in_flight.count or self._unfinished_elsewhere:
                worker.kill("stopped")
        while self.workers or self._tasks:
            for task in self._tasks:
                task.cancel()
            await self._change(TICK)
        await self.starter.close()
        if self._timer is not None:
            self._timer.cancel()
        self._stop_feeding()
        self.losses.close()
        if self._others is not None:
            self._others.forget(self._settings.number)

    @property
    def _unfinished_elsewhere(self) -> bool:
        return self._others is not None and self._others.unfinished(self._settings.number)

    def _unfinished(self) -> bool:
        """Whether somebody waits for a job that a worker has or can still take, if only one that replaces another."""
        in_hand = (job for worker in self.workers for job in worker.in_flight.jobs)
        served = self.ready_workers or (self.was_ready and self.target and self.failure is None)
        return (
            bool(self._queue.depth and served) or any(not job.settled for job in in_hand) or self._unfinished_elsewhere
        )

    async def _change(self, within: float) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(max(within, 0.0)):
                await self._changed.wait()
        except TimeoutError:
            return

    def _reconcile(self) -> None:
        """Start what is missing, stop what is too many."""
        self._let_go()
        active = self._active()
        wanted = self.target + bool(self.target and self._recycling.leaving)
        if len(active) < wanted and self.losses.may_start:
            if self.starter.lacks_interpreter:
                self._install()
            else:
                for _ in range(wanted - len(active)):
                    self._start_worker()
        for _ in range(len(active) - wanted):
            worker = self.starter.surplus(active)
            active.remove(worker)
            self._stop_worker(worker)
        if not self.target:
            self._has_served = False
        if not self.missing:
            self.starter.release(self.workers, target=self.target)
        if not self.target and self._queue.depth and not self.workers and not self._draining:
            self._left_waiting()
        if self._timer is None and (self.workers or self.target):
            self._last_tick = time.monotonic()
            self._timer = self._loop.call_later(TICK, self._tick)
        self._changed.set()

    def _left_waiting(self) -> None:
        """The last worker went before it could take all that waited: they are treated as those who come now."""
        if self.scaling.rouse():
            self._loop.call_soon(self._reconcile)
        else:
            self._abandon(no_workers(self._settings.label))

    def _active(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.state in (WorkerState.STARTING, WorkerState.READY)]

    def _install(self) -> None:
        if not self.starter.installing:
            self.starter.installing = True
            self._run(self._make_interpreter())

    async def _make_interpreter(self) -> None:
        try:
            await self.starter.install()
        except ModelLoadError as error:
            self.losses.fail(error)
        else:
            self._reconcile()

    def _start_worker(self) -> None:
        used = {worker.slot for worker in self.workers}
        slot = next(number for number in range(len(used) + 1) if number not in used)
        staying = [worker for worker in self._active() if worker is not self._recycling.leaving]
        worker = Worker(slot, self.starter.free_place(staying), self, self._queue, self._metrics)
        self.workers.append(worker)
        task = self._run(self._boot(worker))
        task.add_done_callback(lambda _: self._unborn(worker))  # also of a task that was cancelled before it began

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._booted)
        return task

    def _booted(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()
        if not task.cancelled() and task.exception() is not None:
            self._loop.call_exception_handler(
                {"message": "a worker could not be started", "exception": task.exception()}
            )

    async def _boot(self, worker: Worker) -> None:
        """Launch the process and hold one of the server's load places until it is ready or dead.

        A replacement in a pool that has served does not wait behind other models that load; one that wakes does.
        """
        async with nullcontext() if self._has_served else self._loads:
            if worker.state is WorkerState.STARTING:
                worker.launched = time.monotonic()
                threads = self._cpu_threads(worker.place.threads)
                await self.starter.start(worker, threads, self.scaling.most)
                while worker.process is not None and worker.state is WorkerState.STARTING and worker in self.workers:
                    await self._change(TICK)
        if worker.process is None:
            self._forget(worker)
            self._boot_failed(worker)

    def _unborn(self, worker: Worker) -> None:
        if worker.process is None:
            self._forget(worker)

    def _stop_worker(self, worker: Worker) -> None:
        starting = worker.state is WorkerState.STARTING
        worker.state = WorkerState.STOPPING
        if worker in self.ready_workers:
            self.ready_workers.remove(worker)
        self._recycling.forget(worker)
        if starting:
            worker.kill("stopped")
        else:
            if self._others is not None:
                self._others.recall(worker)
            self._stop_when_idle(worker)

    def _stop_when_idle(self, worker: Worker) -> None:
        """With no worker to stay, those that go take what waits; nobody else comes to wait."""
        if self._queue.depth and not self.target and not self._draining and worker.connected:
            now = time.monotonic()
            self._expire(now)
            self._feed(worker, now)
        if not worker.in_flight.count and not worker.elsewhere:
            worker.stop(self._settings.stop_grace)

    # Owner

    def worker_ready(self, worker: Worker, ready: wire.Ready) -> None:
        self.was_ready = self._has_served = True
        self._serves(worker)
        if self._others is not None:
            self._others.lend(worker, self._settings.number)
        self._queue.forget_rate()
        self.scaling.had(self.ready)
        self.losses.recovered(wholly=self.ready >= self.target)
        self._metrics.load_seconds = ready.load_seconds
        seconds = time.monotonic() - worker.launched
        log.info("%s: worker %d (pid %s) ready in %.2f s", self._settings.label, worker.slot, worker.pid, seconds)
        self._let_go()
        if self.starter.owners is not None and self.starter.owners.ready(worker, ready):
            self.starter.release(self.workers, target=self.target)
        self._changed.set()
        self._dispatch()

    def worker_free(self, worker: Worker) -> None:
        if self._queue.depth:
            self._wake_soon()
        if worker.state is WorkerState.STOPPING:
            self._stop_when_idle(worker)
        if self._draining:
            self._changed.set()

    def objective_missed(self, worker: Worker, seconds: float) -> None:
        log.warning("%s: one request alone takes %.0f ms, longer than latency_objective_ms: the objective cannot be "
                    "kept, and batches are of one request", self._settings.label, seconds * 1000)  # fmt: skip

    def worker_gone(self, worker: Worker) -> None:
        """The process has ended, and all it has said has been read."""
        state = worker.state
        worker.cause = self._restarts.cause(worker)
        self._forget(worker)
        if self._others is not None:
            self._others.gone(worker)
        if worker.in_flight.count:
            self._take_back(worker)
        if state is WorkerState.STARTING:
            self._boot_failed(worker)
        elif state is WorkerState.READY:
            self.losses.died(worker, len(self.workers))
        else:
            worker.state = WorkerState.STOPPED
            self._reconcile()

    def _forget(self, worker: Worker) -> None:
        if worker in self.workers:
            self.workers.remove(worker)
        if worker in self.ready_workers:
            self.ready_workers.remove(worker)
        self._lateness.forget(worker)
        self._recycling.forget(worker)
        self._queue.forget_worker(worker.in_flight)
        self._changed.set()

    def _boot_failed(self, worker: Worker) -> None:
        self.losses.not_ready(worker, others_serve=bool(self.ready_workers))

    def _abandon(self, error: MMSError) -> None:
        """Those who wait have nobody left to wait for, unless another worker serves."""
        if not self.ready_workers:
            for job, outcome in self._queue.abandon(error):
                self.fail(job, outcome)
        self._changed.set()

    # time

    def _tick(self) -> None:
        timer = self._timer = self._loop.call_later(TICK, self._tick)  # first: whatever fails, the clock goes on
        now = time.monotonic()
        asleep = now - self._last_tick > TICK + ASLEEP
        self._last_tick = now
        self._queue.tick(now)
        self._expire(now)
        self._restarts.tick(now)
        if self._recycling.wanted:
            self._recycle()
        if not asleep:  # answers may lie unread in the sockets: nobody is late yet
            for worker in list(self.workers):
                self._check(worker, now)
            others = self._others.loads(self._settings.number) if self._others is not None else ()
            if self.failure is None and not self._draining and self.scaling.look(now, self.ready_workers, others):
                self._reconcile()
        if not (self.workers or self.target or self._queue.depth):
            timer.cancel()
            self._timer = None

    def _recycle(self) -> None:
        """Replace a worker that has had its share of requests or memory; one at a time, and it serves until then."""
        if self._recycling.leaving is not None or self.failure is not None or len(self.ready_workers) != self.target:
            return
        if self._recycling.choose(self.ready_workers):
            self._reconcile()

    def _let_go(self) -> None:
        """End the worker that leaves, once the others are enough."""
        worker = self._recycling.leaving
        if worker is not None and len(self.ready_workers) > self.target:
            self._metrics.restarts[self._recycling.reason] += 1
            self._stop_worker(worker)

    def _check(self, worker: Worker, now: float) -> None:
        """Kill a worker whose batch or whose start takes too long; what an idle one does not need is given back."""
        if worker.process is None:
            return
        if worker.process.arena is not None and not worker.in_flight.count:
            worker.process.arena.tidy(now)
        if self._lateness.stands_still(worker, now):
            worker.kill("response_timeout")
        if self._lateness.starts_too_long(worker, now):
            worker.kill(f"not ready within startup_timeout ({self._settings.startup_timeout:g} s)")
        self._end_overdue(worker, self._lateness, now)
