"""The server's side of its fork servers: one per set of preloaded modules, started when a model first needs it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from mms import wire
from mms.errors import FrameError
from mms.metrics import RestartFacts
from mms.workers.budget import Budget, how_it_ended
from mms.workers.forkprocess import ForkProcess

log = logging.getLogger("mms.forkserver")

REPLY_LIMIT = 60.0  # seconds for one fork
PRELOAD_LIMIT = 300.0
MAX_MESSAGE = 256 << 10
DEATHS = 5  # with more within DEATH_WINDOW, workers start as fresh interpreters
DEATH_WINDOW = 60.0


class ForkServerDied(Exception):
    """The fork server ended, hung or refused; the caller tries a new one or starts the worker another way."""


class ForkServer:
    """One fork server process and the conversation with it: one request at a time."""

    def __init__(self, preload: tuple[str, ...], started: ForkProcess | None = None) -> None:
        """`started` is a process that nobody has told yet what to import."""
        self.preload = preload
        self.threads = 1
        self._turn = asyncio.Lock()
        self._started = started or ForkProcess()
        self._process, self._control = self._started.process, self._started.control
        with contextlib.suppress(OSError):  # it has ended: who waits for it is told
            self._control.send(wire.encode(wire.Preload(list(preload))))
        self._ready: asyncio.Task[None] | None = None
        self._readable = asyncio.Event()
        self._closed = False
        self._fault = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def cause(self) -> str:
        """How it ended, or why it was killed; known after `kill`."""
        return self._fault or how_it_ended(self._process.wait())

    async def ready(self) -> None:
        """Wait for the imports; all who ask wait for the same answer. Raises ForkServerDied."""
        if self._ready is None:
            self._ready = asyncio.create_task(self._await_preload())
            self._ready.add_done_callback(_retrieve)
        await asyncio.shield(self._ready)

    async def fork(self, request: wire.ForkRequest, descriptors: Sequence[int]) -> tuple[int, int]:
        """The pid and pidfd of a new worker that owns copies of `descriptors`. Raises ForkServerDied."""
        await self.ready()
        async with self._turn:
            asked = now_since_boot()
            try:
                socket.send_fds(self._control, [wire.encode(request)], descriptors)
                message, received = await self._receive(REPLY_LIMIT)
            except BaseException as error:
                self.kill()  # a reply that nobody took would be the next caller's
                if isinstance(error, OSError):
                    raise ForkServerDied(f"the fork server is gone: {error.strerror}") from None
                raise
        try:
            return worker_of(wire.decode(wire.ForkReply, message), received, asked)
        except ForkServerDied:
            self._fault = "cannot fork"
            raise

    def kill(self) -> None:
        """End the process and reap it; who waits for it is told. The workers it has forked live on."""
        if self._closed:
            return
        self._closed = True
        self._readable.set()
        asyncio.get_running_loop().remove_reader(self._control)
        self._started.end()

    async def _await_preload(self) -> None:
        message, _ = await self._receive(PRELOAD_LIMIT)
        preloaded: wire.Preloaded = wire.decode(wire.Preloaded, message)
        self.threads = preloaded.threads
        for error in preloaded.errors:
            log.warning("preload failed, workers import it themselves: %s", error)
        if self.threads > 1:
            log.warning(
                "preloading %s started threads; its workers start as fresh interpreters", ",".join(self.preload)
            )

    async def _receive(self, limit: float) -> tuple[bytes, list[int]]:
        if self._closed:
            raise ForkServerDied("the fork server was given up")
        loop = asyncio.get_running_loop()
        self._readable.clear()
        loop.add_reader(self._control, self._readable.set)
        try:
            async with asyncio.timeout(limit):
                await self._readable.wait()
        except TimeoutError:
            self._fault = "no answer"
            raise ForkServerDied(f"the fork server did not answer within {limit:g} s") from None
        finally:
            if not self._closed:
                loop.remove_reader(self._control)
        if self._closed:
            raise ForkServerDied("the fork server was given up")
        try:
            message, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, 4)
        except OSError as error:
            raise ForkServerDied(f"the fork server is gone: {error.strerror}") from None
        if not message:
            raise ForkServerDied("the fork server ended")
        return message, list(descriptors)


def now_since_boot() -> int:
    """In ticks, as /proc says when a process began."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def worker_of(reply: wire.ForkReply, descriptors: Sequence[int], asked: int) -> tuple[int, int]:
    """The pid and pidfd of the worker that was forked. Raises ForkServerDied, and closes all descriptors, if none was.

    A model's code could have written the reply: it could name any process, or as 1 all of them, to be killed one day.
    So the pid is that of the pidfd, and no process is taken that was there before one was `asked` for.
    """
    try:
        if reply.error or len(descriptors) != 1:
            raise ForkServerDied(reply.error or "the reply came without a pidfd")
        facts = Path(f"/proc/self/fdinfo/{descriptors[0]}").read_text()
        pid = next((int(line[4:]) for line in facts.splitlines() if line.startswith("Pid:")), 0)
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19] if pid > 1 else "0"
        if int(began) < asked:
            raise ForkServerDied("the reply names no worker that was forked for it")
    except (ForkServerDied, OSError) as error:
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(error, OSError):
            raise ForkServerDied(f"the worker ended at once: {error.strerror}") from None
        raise
    return pid, descriptors[0]


def _retrieve(task: asyncio.Task[None]) -> None:
    """Whoever waits for the task gets its exception, too; nobody may be waiting any more."""
    if not task.cancelled():
        task.exception()


class ForkServers:
    """The fork servers in use, by what they preload."""

    def __init__(self) -> None:
        self.ahead: ForkProcess | None = None  # the first one that is needed becomes of this
        self._servers: dict[tuple[str, ...], ForkServer] = {}
        self._budgets: defaultdict[tuple[str, ...], Budget] = defaultdict(lambda: Budget(DEATHS, DEATH_WINDOW))
        self._given_up: set[tuple[str, ...]] = set()

    async def fork(
        self, preload: tuple[str, ...], request: wire.ForkRequest, descriptors: Sequence[int]
    ) -> tuple[int, int]:
        """Fork a worker; a fork server that fails is replaced once. Raises ForkServerDied or UnsafeFork."""
        server = self._get(preload)
        try:
            return await self._fork(server, request, descriptors)
        except (ForkServerDied, FrameError) as error:
            if self._servers.get(preload) is server:  # nobody was quicker
                self._died(server, f": {error}")
            return await self._fork(self._get(preload), request, descriptors)

    def begin(self, preload: tuple[str, ...]) -> None:
        """Workers will soon be forked with it: what they need is imported from now on, if that is done at all."""
        with contextlib.suppress(UnsafeFork):
            self._get(preload)

    def deaths(self, preload: tuple[str, ...]) -> int:
        """How often that fork server has died lately."""
        return self._budgets[preload].recent

    def spent_for(self, preload: tuple[str, ...]) -> float:
        """Seconds for which workers start without it, because it has died too often; mostly 0."""
        return self._budgets[preload].spent_for

    def facts(self) -> Iterator[RestartFacts]:
        """One for each fork server there has been."""
        for preload, budget in self._budgets.items():
            if seconds := budget.spent_for:
                state = f"workers start as fresh interpreters for {seconds:.0f} s"
            else:
                state = "running" if preload in self._servers else "started when it is needed"
            yield budget.facts("forkserver", state, ",".join(preload))

    def pids(self) -> list[int]:
        ahead = [] if self.ahead is None else [self.ahead.process.pid]
        return [server.pid for server in self._servers.values()] + ahead

    def close(self) -> None:
        if self.ahead is not None:
            self.ahead.end()
        for server in list(self._servers.values()):
            self._discard(server)

    def _get(self, preload: tuple[str, ...]) -> ForkServer:
        """The one that lives, else a new one. Raises UnsafeFork while too many have died."""
        server = self._servers.get(preload)
        if server is not None and not server.alive:
            self._died(server)
            server = None
        if self._budgets[preload].spent:
            raise UnsafeFork(",".join(preload))
        if preload in self._given_up:
            self._given_up.discard(preload)
            log.info("the fork server (preload: %s) is used again", _named(preload))
        if server is None:
            ahead, self.ahead = self.ahead, None
            server = self._servers[preload] = ForkServer(preload, ahead)
        return server

    def _died(self, server: ForkServer, seen: str = "") -> None:
        self._discard(server)
        preload, cause = server.preload, server.cause
        self._budgets[preload].count(cause)
        log.error("the fork server (preload: %s) died: %s%s", _named(preload), cause, seen)
        if self._budgets[preload].spent:
            self._given_up.add(preload)
            log.error("the fork server (preload: %s) died more than %d times within %g s; until one of these is longer "
                      "ago, workers start as fresh interpreters", _named(preload), DEATHS, DEATH_WINDOW)  # fmt: skip

    def _discard(self, server: ForkServer) -> None:
        """Give up this one; its successor, if another caller was quicker, stays."""
        if self._servers.get(server.preload) is server:
            del self._servers[server.preload]
        server.kill()

    async def _fork(self, server: ForkServer, request: wire.ForkRequest, descriptors: Sequence[int]) -> tuple[int, int]:
        await server.ready()
        if server.threads > 1:
            raise UnsafeFork(",".join(server.preload))
        return await server.fork(request, descriptors)


def _named(preload: tuple[str, ...]) -> str:
    return ",".join(preload) or "nothing"


class UnsafeFork(Exception):
    """This set is not forked from: its modules started threads, or its fork server has died too often."""
