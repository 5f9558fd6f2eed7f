"""The workers of one model version: as many as wanted, each dead one replaced, jobs handed to those with room.

Desired state: `target` says how many, `_reconcile` starts or stops the difference, and every event ends in it.
Front end's process, event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from mms import wire
from mms.errors import MMSError, ModelLoadError, ServiceUnavailableError
from mms.logs import model_logger
from mms.metrics import VersionMetrics
from mms.workers import environment
from mms.workers.batching import BatchQueue, Job
from mms.workers.forkserver import ForkServerDied, ForkServers
from mms.workers.gpus import Gpu
from mms.workers.oom import OutOfMemoryKills
from mms.workers.output import OutputReader
from mms.workers.process import Launch, launch
from mms.workers.worker import Worker, WorkerState

log = logging.getLogger("mms.pool")

MAX_BOOT_FAILURES = 3
BOOT_PAUSES = (0.1, 0.3)  # between the tries before a version is FAILED
FAILED_PAUSE = 5.0  # doubles up to FAILED_PAUSE_LIMIT
FAILED_PAUSE_LIMIT = 300.0
DEATH_WINDOW = 10.0  # the first death in it is replaced at once, further ones with back-off
DEATH_PAUSE = 0.1
DEATH_PAUSE_LIMIT = 10.0
RESTART_WINDOW = 10.0  # over all pools of the server: more deaths than MAX_RESTARTS in it, and each waits RESTART_PAUSE
MAX_RESTARTS = 20
RESTART_PAUSE = 1.0
KILLED = "signal 9 (SIGKILL)"
LAST_WORDS = 3  # lines of output in the log's line about a death
TICK = 0.25
ASLEEP = 1.0  # a tick this late means that this process itself stood still


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """What a pool needs to know of its version; durations in seconds.

    With `load.threads` 0, each worker gets its share of the cores when it starts. `interpreter` makes the Python that
    the workers run in, before the first one starts; it raises ModelLoadError.
    """

    label: str
    load: wire.Load
    launch: Launch
    interpreter: Callable[[], Awaitable[str]] | None
    gpus: Sequence[Gpu]
    response_timeout: float
    startup_timeout: float
    stop_grace: float
    boot_tries: int = MAX_BOOT_FAILURES
    max_requests: int = 0
    max_rss: int = 0


@dataclass(frozen=True, kw_only=True)
class LastFailure:
    """The latest worker that died or did not become ready: why, when (time.time()), what it printed last."""

    cause: str
    at: float
    output: tuple[str, ...]


class Restarts:
    """How many workers have died lately in all pools of a server: what they share is the machine."""

    def __init__(self) -> None:
        self.memory_kills = OutOfMemoryKills()
        self._deaths: deque[float] = deque()

    def pause(self, now: float) -> float:
        """Seconds that a worker's replacement has to wait because so many others have died; counts this death."""
        self._deaths.append(now)
        _forget_before(self._deaths, now - RESTART_WINDOW)
        return RESTART_PAUSE if len(self._deaths) > MAX_RESTARTS else 0.0


class WorkerPool:
    """The worker processes of one model version."""

    def __init__(
        self,
        settings: PoolSettings,
        queue: BatchQueue,
        metrics: VersionMetrics,
        forkservers: ForkServers,
        loads: asyncio.Semaphore,
        restarts: Restarts,
    ) -> None:
        self.target = 0
        self.workers: list[Worker] = []
        self.failure: ModelLoadError | None = None  # set while the version is FAILED
        self.minimum = 0  # fewer ready workers are an outage: all that were ready since the target was last lowered
        self.last_death = ""  # its cause, while a worker is missing for it
        self.was_ready = False  # requests may wait while a worker is replaced
        self.last_failure: LastFailure | None = None
        self._settings = settings
        self._queue = queue
        self._metrics = metrics
        self._forkservers = forkservers
        self._loads = loads
        self._restarts = restarts
        self.ready_workers: list[Worker] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._installing = False
        self._installed = ""  # the interpreter that settings.interpreter has made
        self._standing: dict[Worker, tuple[int, float]] = {}  # jobs done at the last look, and since when that many
        self._boot_failures = 0
        self._failed_pause = FAILED_PAUSE
        self._deaths: deque[float] = deque()
        self._hold_until = 0.0
        self._retry_at = 0.0  # of a FAILED pool
        self._leaving: tuple[Worker, str] | None = None  # it goes when its replacement is ready, and why
        self._too_big = False  # said that max_rss is less than what a worker needs
        self._wake: asyncio.Handle | None = None
        self._delay: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last_tick = 0.0
        self._changed = asyncio.Event()
        self._draining = False
        self._loop = asyncio.get_running_loop()
        self._log = model_logger(settings.load.model_name)

    @property
    def ready(self) -> int:
        """How many workers take jobs."""
        return len(self.ready_workers)

    @property
    def starting(self) -> bool:
        """Whether processes are being launched."""
        return bool(self._tasks)

    @property
    def installing(self) -> bool:
        """Whether the archive's requirements are being installed; the workers start afterwards."""
        return self._installing

    @property
    def missing(self) -> int:
        """How many workers wait for their next start, after one that died or did not become ready."""
        return 0 if self._installing else max(0, self.target - len(self._active()))

    @property
    def threads(self) -> int:
        """CPU threads that a worker gets that starts now."""
        return self._settings.load.threads or max(1, environment.cores() // max(1, self.target))

    @property
    def next_start(self) -> float | None:
        """Seconds until a missing worker is started, None when none waits."""
        at = self._retry_at if self.failure is not None else self._hold_until
        return max(0.0, at - time.monotonic()) if self.missing else None

    @property
    def deaths(self) -> int:
        """Workers that died in the last DEATH_WINDOW seconds."""
        _forget_before(self._deaths, time.monotonic() - DEATH_WINDOW)
        return len(self._deaths)

    @property
    def forkserver_deaths(self) -> int:
        """How often the fork server of these workers has died lately."""
        return self._forkservers.deaths(self._settings.launch.preload)

    @property
    def in_flight(self) -> int:
        return sum(len(worker.in_flight.jobs) for worker in self.workers)

    @property
    def bytes_in_flight(self) -> int:
        """Of the bodies that workers have in hand: they are kept until they are answered, to be run again."""
        return sum(job.size for worker in self.workers for job in worker.in_flight.jobs)

    # jobs

    def submit(self, job: Job) -> None:
        """Queue the job. Raises OverloadError or DrainingError."""
        self._queue.submit(job)
        if self._wake is None:
            self._wake_soon()

    def fail(self, job: Job, error: MMSError) -> None:
        """The job's outcome is `error`; counted."""
        if not job.settled:
            self.count_failure(error)
            job.fail(error)

    def count_failure(self, error: MMSError) -> None:
        self._metrics.requests[error.status] += 1
        self._metrics.errors[error.type] += 1

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
        for job, error in queue.expire(now):
            self.fail(job, error)
        if len(self.ready_workers) == 1:
            self._feed(self.ready_workers[0], now)
        else:
            idle = [worker for worker in self.ready_workers if not worker.in_flight.jobs]
            for worker in idle:
                self._feed(worker, now)
            if len(idle) < len(self.ready_workers) and queue.depth:
                for worker in self.ready_workers:
                    self._feed(worker, now)
        if queue.depth and queue.max_batch_delay:
            self._wake_later(now)

    def _feed(self, worker: Worker, now: float) -> None:
        frame = self._queue.take(worker.in_flight, now)
        if frame is not None:
            worker.send(*frame)

    def _wake_later(self, now: float) -> None:
        wake_at = self._queue.wake_at()
        if wake_at is not None and self._delay is None:
            self._delay = self._loop.call_later(max(wake_at - now, 0.0), self._look_again)

    def _look_again(self) -> None:
        self._delay = None
        self._dispatch()

    def wake(self) -> None:
        """What the queue hands out, or when, has changed: look again."""
        if self._delay is not None:
            self._delay.cancel()
            self._delay = None
        self._wake_soon()

    # desired state

    def set_target(self, count: int) -> None:
        """Begin to run `count` workers; a FAILED pool tries again now."""
        self.target = count
        self.minimum = min(self.minimum, count)
        self.was_ready = self.was_ready or not count
        self._boot_failures = 0
        self._failed_pause = FAILED_PAUSE
        self.failure = None
        self._hold_until = 0.0
        self._reconcile()

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
        while self._unfinished() and time.monotonic() < until:
            await self._change(until - time.monotonic())
        self.target = 0
        self._reconcile()
        for worker in list(self.workers):
            if worker.state is WorkerState.STARTING or worker.in_flight.jobs:
                worker.kill("stopped")
        while self.workers or self._tasks:
            for task in self._tasks:
                task.cancel()
            await self._change(TICK)
        for handle in (self._wake, self._delay, self._timer):
            if handle is not None:
                handle.cancel()

    def _unfinished(self) -> bool:
        """Whether somebody waits for a job that a worker has or can still take."""
        in_hand = (job for worker in self.workers for job in worker.in_flight.jobs)
        return bool(self._queue.depth and self.ready_workers) or any(not job.settled for job in in_hand)

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
        wanted = self.target + bool(self.target and self._leaving)
        if len(active) < wanted and self.failure is None and time.monotonic() >= self._hold_until:
            if self._settings.interpreter is not None and not self._installed:
                self._install(self._settings.interpreter)
            else:
                for _ in range(wanted - len(active)):
                    self._start_worker()
        surplus = sorted(active, key=lambda worker: (worker.state is WorkerState.READY, -len(worker.in_flight.jobs)))
        for worker in surplus[: max(0, len(active) - wanted)]:
            self._stop_worker(worker)
        if self._timer is None and (self.workers or self.target):
            self._last_tick = time.monotonic()
            self._timer = self._loop.call_later(TICK, self._tick)
        self._changed.set()

    def _active(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.state in (WorkerState.STARTING, WorkerState.READY)]

    def _install(self, make: Callable[[], Awaitable[str]]) -> None:
        if not self._installing:
            self._installing = True
            self._run(self._make_interpreter(make))

    async def _make_interpreter(self, make: Callable[[], Awaitable[str]]) -> None:
        failure = None
        try:
            self._installed = await make()
        except ModelLoadError as error:
            failure = error
        finally:
            self._installing = False
        if failure is None:
            self._reconcile()
        else:
            self._fail_version(failure, "")

    def _start_worker(self) -> None:
        used = {worker.slot for worker in self.workers}
        slot = next(number for number in range(len(used) + 1) if number not in used)
        worker = Worker(slot, self._free_gpu(), self, self._queue, self._metrics)
        self.workers.append(worker)
        task = self._run(self._boot(worker))
        task.add_done_callback(lambda _: self._unborn(worker))  # also of a task that was cancelled before it began

    def _free_gpu(self) -> int | None:
        """The GPU with the fewest workers that stay."""
        gpus = self._settings.gpus
        leaving = self._leaving[0] if self._leaving else None
        used = Counter(worker.gpu for worker in self._active() if worker is not leaving)
        return min((gpu.index for gpu in gpus), key=lambda index: used[index]) if gpus else None

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

        A replacement in a pool that has served does not wait behind other models that load.
        """
        async with nullcontext() if self.was_ready else self._loads:
            if worker.state is WorkerState.STARTING:
                worker.launched = time.monotonic()
                await self._launch(worker)
                while worker.state is WorkerState.STARTING and worker in self.workers:
                    await self._change(TICK)
        if worker.process is None:
            self._forget(worker)
            self._boot_failed(worker)

    def _unborn(self, worker: Worker) -> None:
        if worker.process is None:
            self._forget(worker)

    async def _launch(self, worker: Worker) -> None:
        load = msgspec.structs.replace(self._settings.load, threads=self.threads)
        try:
            process = await launch(self._launch_of(worker, load.threads), self._forkservers)
        except (ForkServerDied, OSError) as error:
            worker.cause = f"could not be started: {error}"
            return
        label = f"{self._settings.label} pid {process.pid}"
        await worker.attach(process, OutputReader(self._log, label), load)
        if worker.state is not WorkerState.STARTING:
            worker.kill("stopped")

    def _launch_of(self, worker: Worker, threads: int) -> Launch:
        how = self._settings.launch
        environ = {**how.environ, **environment.thread_counts(threads)}
        for gpu in self._settings.gpus:
            if gpu.index == worker.gpu:
                environ |= gpu.environment()
        return replace(how, environ=environ, interpreter=self._installed or how.interpreter)

    def _stop_worker(self, worker: Worker) -> None:
        starting = worker.state is WorkerState.STARTING
        worker.state = WorkerState.STOPPING
        if worker in self.ready_workers:
            self.ready_workers.remove(worker)
        if self._leaving is not None and self._leaving[0] is worker:
            self._leaving = None
        if starting:
            worker.kill("stopped")
        else:
            self._stop_when_idle(worker)

    def _stop_when_idle(self, worker: Worker) -> None:
        if not worker.in_flight.jobs:
            worker.stop()
            self._loop.call_later(self._settings.stop_grace, worker.kill, "did not stop in time")

    # Owner

    def worker_ready(self, worker: Worker, ready: wire.Ready) -> None:
        self._boot_failures = 0
        self._failed_pause = FAILED_PAUSE
        self.failure = None
        self.was_ready = True
        self.ready_workers.append(worker)
        self._queue.forget_rate()
        self.minimum = max(self.minimum, min(self.ready, self.target))
        if self.ready >= self.target:
            self.last_death = ""
        self._metrics.load_seconds = ready.load_seconds
        seconds = time.monotonic() - worker.launched
        log.info("%s: worker %d (pid %s) ready in %.2f s", self._settings.label, worker.slot, worker.pid, seconds)
        self._let_go()
        self._changed.set()
        self._dispatch()

    def worker_free(self, worker: Worker) -> None:
        if self._queue.depth:
            self._wake_soon()
        if worker.state is WorkerState.STOPPING:
            self._stop_when_idle(worker)
        if self._draining:
            self._changed.set()

    def worker_lost(self, worker: Worker) -> None:
        """Its channel has ended: it gets no more jobs."""
        if worker in self.ready_workers:
            self.ready_workers.remove(worker)

    def worker_gone(self, worker: Worker) -> None:
        """The process has ended, and all it has said has been read."""
        state = worker.state
        if worker.cause == KILLED and self._restarts.memory_kills.claim():
            worker.cause = "killed (out of memory)"
        self._forget(worker)
        if worker.in_flight.jobs:
            self._take_back(worker)
        if state is WorkerState.STARTING:
            self._boot_failed(worker)
        elif state is WorkerState.READY:
            self._died(worker)
        else:
            worker.state = WorkerState.STOPPED
            self._reconcile()

    def _forget(self, worker: Worker) -> None:
        if worker in self.workers:
            self.workers.remove(worker)
        if worker in self.ready_workers:
            self.ready_workers.remove(worker)
        self._standing.pop(worker, None)
        if self._leaving is not None and self._leaving[0] is worker:
            self._leaving = None
        self._changed.set()

    def _take_back(self, worker: Worker) -> None:
        done, started, _ = worker.process.progress()
        for job, error in self._queue.lose(worker.in_flight, started, worker.cause, time.monotonic(), done=done):
            self.fail(job, error)
        self._wake_soon()

    def _died(self, worker: Worker) -> None:
        worker.state = WorkerState.FAILED
        self.last_death = worker.cause
        now = time.monotonic()
        self._metrics.restarts[worker.cause] += 1
        self._deaths.append(now)
        recent = self.deaths
        pause = 0.0 if recent <= len(self.workers) + 1 else min(DEATH_PAUSE * 2 ** (recent - 2), DEATH_PAUSE_LIMIT)
        pause = max(pause, self._restarts.pause(now))
        self._note_failure(worker)
        log.error("%s: worker %d (pid %s) died: %s; replacing it%s%s", self._settings.label, worker.slot, worker.pid,
                  worker.cause, f" in {pause:.1f} s" if pause else "", self._last_words(worker))  # fmt: skip
        self._hold(pause)

    def _note_failure(self, worker: Worker) -> None:
        failed, output = worker.failure, worker.output
        cause = f"failed to load: {failed.message}" if failed is not None else worker.cause
        self.last_failure = LastFailure(
            cause=cause, at=time.time(), output=tuple(output.last_lines) if output is not None else ()
        )

    def _last_words(self, worker: Worker) -> str:
        lines = list(worker.output.last_lines)[-LAST_WORDS:] if worker.output is not None else []
        return f"; it last printed: {' | '.join(line[:200] for line in lines)}" if lines else ""

    def _boot_failed(self, worker: Worker) -> None:
        if worker.state is not WorkerState.STARTING:
            self._reconcile()
            return
        worker.state = WorkerState.FAILED
        self._boot_failures += 1
        self._note_failure(worker)
        if self.failure is not None:
            return
        if self.ready_workers:  # the others serve: only this place stays empty for a while
            pause = min(DEATH_PAUSE * 2**self._boot_failures, DEATH_PAUSE_LIMIT)
            log.error("%s: worker %d did not become ready: %s; next try in %.1f s", self._settings.label, worker.slot,
                      worker.failure.message if worker.failure else worker.cause, pause)  # fmt: skip
            self._hold(pause)
            return
        if self._boot_failures < self._settings.boot_tries:
            self._hold(BOOT_PAUSES[self._boot_failures - 1])
            return
        self._fail_version(self._describe_failure(worker), f" after {self._boot_failures} tries")

    def _fail_version(self, failure: ModelLoadError, tries: str) -> None:
        self.failure = failure
        self._retry_at = time.monotonic() + self._failed_pause
        log.error("%s: FAILED%s: %s; next try in %g s", self._settings.label, tries, failure.message,
                  self._failed_pause)  # fmt: skip
        self._loop.call_later(self._failed_pause, self._retry_failed)
        self._failed_pause = min(self._failed_pause * 2, FAILED_PAUSE_LIMIT)
        if not self.ready_workers:
            for job, error in self._queue.abandon(failed_to_load(self._settings.label)):
                self.fail(job, error)
        self._changed.set()

    def _retry_failed(self) -> None:
        if self.failure is not None and self.target:
            self.failure = None
            self._boot_failures = self._settings.boot_tries - 1
            self._reconcile()

    def _describe_failure(self, worker: Worker) -> ModelLoadError:
        if worker.failure is not None:
            return ModelLoadError(
                f"the handler of {self._settings.label} failed to load: {worker.failure.message}",
                traceback=worker.failure.traceback,
            )
        output = "\n".join(worker.output.last_lines) if worker.output else ""
        return ModelLoadError(
            f"a worker of {self._settings.label} ended before it was ready: {worker.cause}", traceback=output
        )

    def _hold(self, pause: float) -> None:
        """Reconcile after `pause` seconds."""
        if pause:
            self._hold_until = time.monotonic() + pause
            self._loop.call_later(pause + 0.001, self._reconcile)
        self._reconcile()

    # time

    def _tick(self) -> None:
        now = time.monotonic()
        asleep = now - self._last_tick > TICK + ASLEEP
        self._last_tick = now
        self._queue.tick(now)
        for job, error in self._queue.expire(now):
            self.fail(job, error)
        self._restarts.memory_kills.look(now)
        if self._settings.max_requests or self._settings.max_rss:
            self._recycle()
        if not asleep:  # answers may lie unread in the sockets: nobody is late yet
            for worker in list(self.workers):
                self._check(worker, now)
        alive = self.workers or self.target or self._queue.depth
        self._timer = self._loop.call_later(TICK, self._tick) if alive else None

    def _recycle(self) -> None:
        """Replace a worker that has had its share of requests or memory; one at a time, and it serves until then."""
        if self._leaving is not None or self.failure is not None or len(self.ready_workers) != self.target:
            return
        for worker in self.ready_workers:
            reason = self._outworn(worker)
            if reason:
                self._leaving = worker, reason
                log.info("%s: worker %d (pid %s) has reached %s; replacing it", self._settings.label, worker.slot,
                         worker.pid, reason)  # fmt: skip
                self._reconcile()
                return

    def _let_go(self) -> None:
        """End the worker that leaves, once the others are enough."""
        if self._leaving is not None and len(self.ready_workers) > self.target:
            worker, reason = self._leaving
            self._metrics.restarts[reason] += 1
            self._stop_worker(worker)

    def _outworn(self, worker: Worker) -> str:
        settings, answered = self._settings, worker.in_flight.finished
        if settings.max_requests and answered >= settings.max_requests:
            return "max_requests"
        if not settings.max_rss or worker.process.resident_bytes() <= settings.max_rss:
            return ""
        if answered:
            return "max_rss"
        if not self._too_big:  # a new one would be as big
            self._too_big = True
            log.warning("%s: max_rss (%d bytes) is less than what a worker needs before its first request",
                        settings.label, settings.max_rss)  # fmt: skip
        return ""

    def _check(self, worker: Worker, now: float) -> None:
        """Kill a worker whose batch or whose start takes too long."""
        settings = self._settings
        if worker.process is None:
            return
        if worker.state is WorkerState.STARTING:
            if now - worker.launched > settings.startup_timeout:
                worker.kill(f"not ready within startup_timeout ({settings.startup_timeout:g} s)")
        elif worker.in_flight.jobs:
            done, started, begun_at = worker.process.progress()
            if not begun_at:  # stopped or stuck between two batches: it owes the next one
                begun_at = max(worker.in_flight.jobs[0].taken, self._standing_since(worker, done, now))
                started = max(started, done + self._queue.batch_size)
            if now - begun_at > settings.response_timeout and not worker.cause:
                for job, error in self._queue.timed_out(
                    worker.in_flight, started, settings.response_timeout, done=done
                ):
                    self.fail(job, error)
                worker.kill("response_timeout")
                self.worker_lost(worker)
                self._dispatch()

    def _standing_since(self, worker: Worker, done: int, now: float) -> float:
        """When the worker was first seen to have finished as many jobs as now: until then it was at work."""
        seen, since = self._standing.get(worker, (0, 0.0))
        if seen != done:
            since = now
        self._standing[worker] = done, since
        return since


def failed_to_load(label: str) -> ServiceUnavailableError:
    """What is said to whoever asks a FAILED version, or waits for it as it becomes one."""
    return ServiceUnavailableError(
        f"model {label} failed to load; its description on the management port has the traceback"
    )


def _forget_before(times: deque[float], limit: float) -> None:
    while times and times[0] < limit:
        times.popleft()
