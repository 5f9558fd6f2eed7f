"""The server's side of its fork servers: one per set of preloaded modules, started when a model first needs it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Sequence

from mms import wire
from mms.errors import FrameError
from mms.workers import environment

log = logging.getLogger("mms.forkserver")

REPLY_LIMIT = 60.0  # seconds for one fork
PRELOAD_LIMIT = 300.0
MAX_MESSAGE = 256 << 10
DEATHS = 5  # within DEATH_WINDOW: then workers start as fresh interpreters
DEATH_WINDOW = 60.0


class ForkServerDied(Exception):
    """The fork server ended, hung or refused; the caller tries a new one or starts the worker another way."""


class ForkServer:
    """One fork server process and the conversation with it: one request at a time."""

    def __init__(self, preload: tuple[str, ...]) -> None:
        self.preload = preload
        self.threads = 1
        self._turn = asyncio.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        command = [sys.executable, "-P", "-m", "mms.backend.forkserver", "--control", str(theirs.fileno())]
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [*command, "--preload", ",".join(preload)],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**environment.worker_environment(()), **one_thread},  # a worker can read what it was started with
        )
        theirs.close()
        self._ready: asyncio.Task[None] | None = None
        self._readable = asyncio.Event()
        self._closed = False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

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
            try:
                socket.send_fds(self._control, [wire.encode(request)], descriptors)
                message, received = await self._receive(REPLY_LIMIT)
            except BaseException as error:
                self.kill()  # a reply that nobody took would be the next caller's
                if isinstance(error, OSError):
                    raise ForkServerDied(f"the fork server is gone: {error.strerror}") from None
                raise
        reply: wire.ForkReply = wire.decode(wire.ForkReply, message)
        if reply.error or len(received) != 1:
            for descriptor in received:
                os.close(descriptor)
            raise ForkServerDied(reply.error or "the fork server sent no pidfd")
        return reply.pid, received[0]

    def kill(self) -> None:
        """End the process and reap it; who waits for it is told. The workers it has forked live on."""
        if self._closed:
            return
        self._closed = True
        self._readable.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()

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


def _retrieve(task: asyncio.Task[None]) -> None:
    """Whoever waits for the task gets its exception, too; nobody may be waiting any more."""
    if not task.cancelled():
        task.exception()


class ForkServers:
    """The fork servers in use, by what they preload."""

    def __init__(self) -> None:
        self._servers: dict[tuple[str, ...], ForkServer] = {}
        self._deaths: defaultdict[tuple[str, ...], deque[float]] = defaultdict(deque)

    async def fork(
        self, preload: tuple[str, ...], request: wire.ForkRequest, descriptors: Sequence[int]
    ) -> tuple[int, int]:
        """Fork a worker; a fork server that fails is replaced once. Raises ForkServerDied or UnsafeFork."""
        server = self._get(preload)
        try:
            return await self._fork(server, request, descriptors)
        except (ForkServerDied, FrameError) as error:
            if self._servers.get(preload) is server:  # nobody was quicker
                log.warning("%s; starting another", error)
                self._died(server)
            return await self._fork(self._get(preload), request, descriptors)

    def deaths(self, preload: tuple[str, ...]) -> int:
        """How often that fork server has died lately."""
        died = self._deaths.get(preload, deque())
        while died and died[0] < time.monotonic() - DEATH_WINDOW:
            died.popleft()
        return len(died)

    def pids(self) -> list[int]:
        return [server.pid for server in self._servers.values()]

    def close(self) -> None:
        for server in list(self._servers.values()):
            self._discard(server)

    def _get(self, preload: tuple[str, ...]) -> ForkServer:
        """The one that lives, else a new one. Raises UnsafeFork while too many have died."""
        server = self._servers.get(preload)
        if server is not None and not server.alive:
            self._died(server)
            server = None
        if self.deaths(preload) >= DEATHS:
            raise UnsafeFork(",".join(preload))
        if server is None:
            server = self._servers[preload] = ForkServer(preload)
        return server

    def _died(self, server: ForkServer) -> None:
        self._discard(server)
        preload = server.preload
        self._deaths[preload].append(time.monotonic())
        if self.deaths(preload) >= DEATHS:
            log.error("the fork server (preload: %s) died %d times within %g s; until one of these is longer ago, "
                      "workers start as fresh interpreters", ",".join(preload) or "nothing", DEATHS,
                      DEATH_WINDOW)  # fmt: skip

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


class UnsafeFork(Exception):
    """This set is not forked from: its modules started threads, or its fork server has died too often."""
