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
from collections.abc import Sequence

from mms import wire
from mms.errors import FrameError

log = logging.getLogger("mms.forkserver")

REPLY_LIMIT = 60.0  # seconds for one fork
PRELOAD_LIMIT = 300.0
MAX_MESSAGE = 256 << 10


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
            env={**os.environ, **one_thread},
        )
        theirs.close()
        self._ready: asyncio.Task[None] | None = None

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
        await asyncio.shield(self._ready)

    async def fork(self, request: wire.ForkRequest, descriptors: Sequence[int]) -> tuple[int, int]:
        """The pid and pidfd of a new worker that owns copies of `descriptors`. Raises ForkServerDied."""
        await self.ready()
        async with self._turn:
            try:
                socket.send_fds(self._control, [wire.encode(request)], descriptors)
            except OSError as error:
                raise ForkServerDied(f"the fork server is gone: {error.strerror}") from None
            message, received = await self._receive(REPLY_LIMIT)
        reply: wire.ForkReply = wire.decode(wire.ForkReply, message)
        if reply.error or len(received) != 1:
            for descriptor in received:
                os.close(descriptor)
            raise ForkServerDied(reply.error or "the fork server sent no pidfd")
        return reply.pid, received[0]

    def kill(self) -> None:
        """End the process and reap it; workers that it forked are not its children any more."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
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
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._control, readable.set)
        try:
            async with asyncio.timeout(limit):
                await readable.wait()
            message, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, 4)
        except (TimeoutError, OSError) as error:
            raise ForkServerDied(f"the fork server does not answer ({type(error).__name__})") from None
        finally:
            loop.remove_reader(self._control)
        if not message:
            raise ForkServerDied("the fork server ended")
        return message, list(descriptors)


class ForkServers:
    """The fork servers in use, by what they preload."""

    def __init__(self) -> None:
        self._servers: dict[tuple[str, ...], ForkServer] = {}

    async def fork(
        self, preload: tuple[str, ...], request: wire.ForkRequest, descriptors: Sequence[int]
    ) -> tuple[int, int]:
        """Fork a worker; a fork server that turns out to be dead is replaced once. Raises ForkServerDied."""
        try:
            return await self._fork(preload, request, descriptors)
        except (ForkServerDied, FrameError) as error:
            log.warning("%s; starting another", error)
            self.discard(preload)
            return await self._fork(preload, request, descriptors)

    def pids(self) -> list[int]:
        return [server.pid for server in self._servers.values()]

    def discard(self, preload: tuple[str, ...]) -> None:
        server = self._servers.pop(preload, None)
        if server is not None:
            server.kill()

    def close(self) -> None:
        for preload in list(self._servers):
            self.discard(preload)

    async def _fork(
        self, preload: tuple[str, ...], request: wire.ForkRequest, descriptors: Sequence[int]
    ) -> tuple[int, int]:
        server = self._servers.get(preload)
        if server is not None and not server.alive:
            self.discard(preload)
            server = None
        if server is None:
            server = self._servers[preload] = ForkServer(preload)
        await server.ready()
        if server.threads > 1:
            raise UnsafeFork(",".join(preload))
        return await server.fork(request, descriptors)


class UnsafeFork(Exception):
    """The preloaded modules started threads, so this set is not forked from."""
