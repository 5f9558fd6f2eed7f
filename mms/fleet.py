"""The further front ends, as the main process runs them: started, told, asked, started again, stopped.

Each gets the whole picture of what is served whenever that has changed, and a channel to each worker that is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mms import arena, fronts, lending, sharedpage
from mms.errors import StartError
from mms.frontprocess import Front
from mms.http.limits import Limits
from mms.metrics import RestartFacts, VersionFacts
from mms.models.registry import ModelRegistry
from mms.models.version import ModelVersion
from mms.totals import Totals
from mms.workers.budget import Budget
from mms.workers.process import CHANNEL_BUFFER
from mms.workers.worker import Loan, Worker, WorkerState

log = logging.getLogger("mms.fleet")

TICK = 0.25
DEATHS = 5  # with more within DEATH_WINDOW, the server ends
DEATH_WINDOW = 60.0
SILENCE = 15.0  # seconds without a word after which a front end is ended and started again
LOOK_LIMIT = 1.0  # seconds that a scrape waits for what they have counted
STRAYS_FOR = 1.0  # seconds after the end of a front end in which a worker may still begin what that has sent
SHUT_LIMIT = 3.0
END_LIMIT = 1.0


class Fleet:
    """`count` front ends, of which the main process is the first. With that one alone, nothing here does anything.

    `probes` tells what probes are told, `limits` what each front end holds its clients to, and `lost` is called when
    they cannot be kept running.
    """

    def __init__(
        self,
        count: int,
        registry: ModelRegistry,
        hello: fronts.Hello,
        probes: Callable[[], tuple[str, tuple[int, dict[str, Any]]]],
        settings: Callable[[], tuple[Limits, str]],
        lost: Callable[[], None],
    ) -> None:
        self.count = count
        self._registry = registry
        self._hello = hello
        self._probes = probes
        self._settings = settings
        self._lost = lost
        self._fronts: dict[int, Front] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._lent: dict[int, tuple[Worker, int]] = {}  # workers that are ready, with their versions' numbers
        self._numbers: dict[Worker, int] = {}
        self._next_worker = itertools.count(1).__next__
        self._changed: dict[int, Callable[[], None]] = {}  # of versions that are being unloaded
        self._heard = asyncio.Event()
        self._budget = Budget(DEATHS, DEATH_WINDOW)
        self.totals = Totals(self._counts)
        self._strays: list[tuple[Worker, int, Loan, float]] = []  # of front ends that have ended, and when
        self._timer: asyncio.TimerHandle | None = None
        self._last_tick = 0.0
        self._closing = False

    @property
    def pids(self) -> set[int]:
        return {front.pid for front in self._fronts.values()}

    def restarts(self) -> list[RestartFacts]:
        """How often one has died; empty when there are none beside the main process."""
        running = f"{len(self._fronts)} of {self.count - 1} running"
        return [self._budget.facts("frontend", running)] if self.count > 1 else []

    # their life

    def start(self, sockets: Sequence[socket.socket]) -> None:
        """One for each of the listening sockets, which stay ours, too: so a restart loses none that waits there.

        Raises StartError.
        """
        if not sockets:
            return
        self._sockets = dict(enumerate(sockets, 1))
        try:
            for number in self._sockets:
                self._start(number)
        except OSError as error:
            raise StartError(f"a front end cannot be started: {error.strerror}") from None
        self._last_tick = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)

    async def listen(self, number: int, sock: socket.socket) -> None:
        """That front end accepts on this socket from now on."""
        self._sockets[number].close()
        self._sockets[number] = sock
        if number in self._fronts:
            self._fronts[number].tell(fronts.Listen(), [sock.fileno()])

    async def shut(self) -> None:
        """As HttpServer.shut, in all of them; from now on, none is started again."""
        self._closing = True
        for sock in self._sockets.values():  # else it would still take connections that nobody serves
            sock.close()
        for front in self._fronts.values():
            front.tell(fronts.Shut())
        try:
            async with asyncio.timeout(SHUT_LIMIT):
                await self.sync()
        except TimeoutError:
            for front in self._fronts.values():
                if front.synced < front.asked:
                    front.kill("does not answer")

    async def drain(self, limit: float) -> int:
        """As HttpServer.drain, in all of them."""
        waiting = []
        for front in self._fronts.values():
            front.cut = asyncio.get_running_loop().create_future()
            front.tell(fronts.Drain(limit))
            waiting.append(front.cut)
        if not waiting:
            return 0
        done, _ = await asyncio.wait(waiting, timeout=limit + END_LIMIT)
        return sum(each.result() for each in done)

    async def close(self) -> None:
        """They end, when what they were told last has reached their clients."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_LIMIT):
                await self.sync()
        for front in self._fronts.values():
            front.kill("stopped")
        for sock in self._sockets.values():
            sock.close()
        while self._fronts:
            self._heard.clear()
            await self._heard.wait()

    def _start(self, number: int) -> None:
        """All that there is to know comes before the first connection."""
        front = self._fronts[number] = Front(number, self._told, self._ended)
        front.tell(self._hello)
        self._show(front, self._picture())
        for worker_number, (worker, version) in self._lent.items():
            self._lend(front, worker_number, worker, version)
        front.tell(fronts.Listen(), [self._sockets[number].fileno()])
        front.sync()

    def _ended(self, front: Front) -> None:
        del self._fronts[front.number]
        if front.cut is not None and not front.cut.done():
            front.cut.set_result(0)
        if front.counts is not None:
            self.totals.keep(front.counts)
        for worker, version in list(self._lent.values()):
            if front.number in worker.elsewhere:
                self._strays.append((worker, version, worker.elsewhere[front.number], time.monotonic()))
                worker.left(front.number)
        for number in front.leaving:
            self._changed[number]()
        self._heard.set()
        if self._closing:
            return
        self._budget.count(front.cause)
        if self._budget.spent:
            log.critical("front end %d ended: %s; it cannot be kept running; stopping", front.number, front.cause)
            self._lost()
            return
        log.error("front end %d ended: %s; starting it again", front.number, front.cause)
        try:
            self._start(front.number)
        except OSError as error:
            log.critical("front end %d cannot be started: %s; stopping", front.number, error.strerror)
            self._lost()

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)
        now = time.monotonic()
        asleep = now - self._last_tick > 4 * TICK
        self._last_tick = now
        self.show()
        for front in list(self._fronts.values()):
            if asleep:
                front.silent_since = None if front.silent_since is None else now
            elif front.silent_since is None:
                front.sync()
            elif now - front.silent_since > SILENCE:
                front.kill(f"said nothing for {SILENCE:g} s")
        self._end_strays(now)

    def _end_strays(self, now: float) -> None:
        """Nobody else watches a worker that is at what a front end has sent which has ended since."""
        if not self._strays:
            return
        self._strays = [(w, v, loan, at) for w, v, loan, at in self._strays if loan.begun_at or now - at < STRAYS_FOR]
        for worker, version, loan, _ in self._strays:
            if loan.begun_at and now - loan.begun_at > self._response_timeout(version):
                worker.kill("response_timeout")

    def _response_timeout(self, number: int) -> float:
        return max(
            (v.settings.response_timeout for v in self._registry.versions() if v.number == number), default=math.inf
        )

    # what they are told

    async def sync(self) -> None:
        self.show()
        wanted = {front: front.sync() for front in self._fronts.values()}

        def behind() -> bool:
            return any(self._fronts.get(front.number) is front and front.synced < to for front, to in wanted.items())

        while behind():
            self._heard.clear()
            await self._heard.wait()  # it answers, or it is ended by the tick

    def lend(self, worker: Worker, number: int) -> None:
        known = self._numbers[worker] = self._next_worker()
        self._lent[known] = worker, number
        self.show()
        for front in self._fronts.values():
            self._lend(front, known, worker, number)

    def recall(self, worker: Worker) -> None:
        for number in worker.elsewhere:
            self._fronts[number].tell(fronts.Recall(self._numbers[worker]))

    def gone(self, worker: Worker) -> None:
        number = self._numbers.pop(worker, None)
        if number is None:
            return
        del self._lent[number]
        self.show()  # a version has fewer workers than it had: probes are to know it at once
        self._strays = [stray for stray in self._strays if stray[0] is not worker]
        for front in worker.elsewhere:
            self._fronts[front].tell(fronts.Gone(number, worker.cause))
        worker.elsewhere.clear()

    def leave(self, number: int, reason: str, changed: Callable[[], None]) -> None:
        self.show()
        self._changed[number] = changed
        for front in self._fronts.values():
            front.leaving.add(number)
            front.tell(fronts.Leave(number, reason))

    def unfinished(self, number: int) -> bool:
        return any(number in front.leaving for front in self._fronts.values())

    def forget(self, number: int) -> None:
        for front in self._fronts.values():
            front.leaving.discard(number)
            front.loads.pop(number, None)
            front.tell(fronts.Forget(number))
        self._changed.pop(number, None)
        self.totals.forget(number)

    def _lend(self, front: Front, known: int, worker: Worker, number: int) -> None:
        if worker.control is None or worker.state is not WorkerState.READY:
            return
        threads = worker.in_flight.threads, worker.in_flight.preprocess_threads
        try:
            with contextlib.ExitStack() as ours:
                channel, file, loan = _channel(worker.control, sharedpage.page_size(*threads), ours)
                worker.elsewhere[front.number] = loan
                front.tell(fronts.Lent(known, number, worker.pid or 0, *threads), [channel.fileno(), file])
        except (BrokenPipeError, ConnectionResetError):
            return  # it has ended: that is seen soon
        except OSError as error:  # no descriptor is left
            worker.kill(f"could not be shared with front end {front.number}: {error.strerror}")

    def show(self) -> None:
        """What they tell probes, and know of what is served, has changed."""
        if self._fronts:
            picture = self._picture()
            for front in self._fronts.values():
                self._show(front, picture)

    def _show(self, front: Front, picture: fronts.Picture) -> None:
        if front.picture != picture:
            front.picture = picture
            front.tell(picture)

    def _picture(self) -> fronts.Picture:
        health, report = self._probes()
        limits, log_level = self._settings()
        return fronts.Picture(
            versions=[_shown(version) for version in self._registry.versions()],
            defaults={model.name: model.default for model in self._registry},
            announced=[(name, number, why) for (name, number), why in self._registry.announced.items()],
            health=health,
            report=report,
            limits=limits,
            log_level=log_level,
        )

    # what they tell

    def _told(self, front: Front, message: Any) -> None:
        match message:
            case fronts.Left():
                if message.worker in self._lent:
                    self._lent[message.worker][0].left(front.number)
            case fronts.Empty():
                front.leaving.discard(message.number)
                if message.number in self._changed:
                    self._changed[message.number]()
            case fronts.Kill():
                if message.worker in self._lent:
                    self._lent[message.worker][0].kill(message.cause)
            case fronts.Load():
                self._loaded(front, message)
            case fronts.Rouse():
                for version in self._registry.versions():
                    if version.number == message.number and version.pool is not None:
                        version.pool.rouse()
            case fronts.Counts():
                front.counts = message
            case fronts.Said():
                logging.getLogger(message.logger).log(message.level, "front end %d: %s", front.number, message.text)
            case fronts.Drained():
                if front.cut is not None and not front.cut.done():
                    front.cut.set_result(message.cut)
        self._heard.set()

    def _loaded(self, front: Front, load: fronts.Load) -> None:
        front.loads[load.number] = load
        for known, (worker, number) in self._lent.items():
            if number == load.number and front.number in worker.elsewhere:
                worker.elsewhere[front.number].jobs = load.jobs.get(known, 0)

    def loads(self, number: int) -> list[fronts.Load]:
        return [front.loads[number] for front in self._fronts.values() if number in front.loads]

    # what they have counted

    async def look(self) -> None:
        for front in self._fronts.values():
            front.tell(fronts.Ask())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_LIMIT):
                await self.sync()

    def waiting(self, number: int) -> int:
        return self.totals.waiting(number)

    def version_facts(self) -> Iterator[VersionFacts]:
        """Of what is registered, for the metrics collector."""
        for version in self._registry.versions():
            facts = version.facts()
            yield facts if self.count == 1 else self.totals.version(facts, version.number, self.count)

    def _counts(self) -> list[fronts.Counts]:
        return [front.counts for front in self._fronts.values() if front.counts is not None]


def _channel(control: socket.socket, size: int, ours: contextlib.ExitStack) -> tuple[socket.socket, int, Loan]:
    """A channel to the worker and the file of its arena and page, which `ours` closes. Raises OSError."""
    near, far = socket.socketpair()
    ours.enter_context(near)
    with far:
        file = arena.create(size)
        ours.callback(os.close, file)
        for sock in (near, far):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHANNEL_BUFFER)
        loan = Loan(arena.attach(file)[1])
        lending.lend(control, far, file)
    return near, file, loan


def _shown(version: ModelVersion) -> fronts.Shown:
    settings = version.settings
    told = {name: getattr(settings, name) for name in fronts.QueueSettings.__struct_fields__}
    return fronts.Shown(
        number=version.number,
        name=version.name,
        version=version.version,
        settings=fronts.QueueSettings(**told),
        state=str(version.state),
        can_wait=version.can_wait,
        next_start_at=version.pool.losses.next_start_at if version.pool is not None else 0.0,
        scales=version.pool is not None and version.pool.scaling.bounds.automatic,
    )
