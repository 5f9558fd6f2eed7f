"""The server's side of processes that have loaded a handler and serve nothing: templates, which fork their workers.

Such a process is started when a worker is needed, and again when it has died and another is needed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from mms import wire
from mms.errors import FrameError
from mms.logs import model_logger
from mms.workers import environment
from mms.workers.forkserver import (
    DEATH_WINDOW,
    DEATHS,
    MAX_MESSAGE,
    REPLY_LIMIT,
    ForkServerDied,
    ForkServers,
    now_since_boot,
    worker_of,
)
from mms.workers.output import OutputReader
from mms.workers.process import Launch, WorkerProcess, launch
from mms.workers.settings import PoolSettings

log = logging.getLogger("mms.template")


class TemplateFailed(Exception):
    """It did not load: the text is the cause; `failure` is what the handler raised, `output` what was printed."""

    def __init__(self, cause: str, failure: wire.Failed | None, output: OutputReader) -> None:
        super().__init__(cause)
        self.failure = failure
        self.output = output


class LoadedProcess:
    """One such process and the conversation with it: one request at a time."""

    def __init__(
        self, process: WorkerProcess, output: OutputReader, when_gone: Callable[[LoadedProcess], None]
    ) -> None:
        self.process = process
        self.output = output
        self.cause = ""  # why it was killed, or how it ended
        self.gone = asyncio.Event()
        self._when_gone = when_gone
        self._turn = asyncio.Lock()
        self._channel = process.channel
        self._channel.setblocking(False)
        self._readable = asyncio.Event()
        self._receiving = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(process.pidfd, self._ended)
        output.start(process.output)

    async def load(self, load: wire.Load, limit: float) -> wire.Preloaded:
        """Load the handler; what it says then. Raises TemplateFailed."""
        failure = None
        try:
            async with asyncio.timeout(limit):
                await self._loop.sock_sendall(self._channel, wire.pack(wire.LOAD, load))
                kind, head, _ = await self._receive()
                if kind == wire.LOADED:
                    loaded: wire.Preloaded = wire.decode(wire.Preloaded, head)
                    return loaded
                failure = wire.decode(wire.Failed, head)
                await self.gone.wait()
        except TimeoutError:
            self.kill(f"not ready within startup_timeout ({limit:g} s)")
        except (OSError, FrameError, ForkServerDied) as error:
            self.kill(str(error))
        except BaseException:
            self.kill("stopped")
            raise
        await self.gone.wait()
        raise TemplateFailed(self.cause, failure, self.output)

    async def fork(
        self, preload: tuple[str, ...], request: wire.ForkRequest, descriptors: Sequence[int]
    ) -> tuple[int, int]:
        """As of ForkServers; what is preloaded was settled when the template started. Raises ForkServerDied."""
        async with self._turn:
            received: list[int] = []
            asked = now_since_boot()
            try:
                if self.gone.is_set():
                    raise ForkServerDied("the template has ended")
                socket.send_fds(self._channel, [wire.pack(wire.FORK, request)], descriptors)
                async with asyncio.timeout(REPLY_LIMIT):
                    _, head, received = await self._receive()
                reply: wire.ForkReply = wire.decode(wire.ForkReply, head)
            except BaseException as error:
                self.kill("did not fork")  # a reply that nobody took would be the next caller's
                if isinstance(error, OSError | FrameError):
                    raise ForkServerDied(f"the template did not fork: {error}") from None
                raise
        return worker_of(reply, received, asked)

    def kill(self, cause: str) -> None:
        """End it; `gone` is set when it has ended. The workers it has forked live on."""
        if not self.gone.is_set():
            self.cause = self.cause or cause
            self.process.kill()

    async def _receive(self) -> tuple[int, memoryview, list[int]]:
        """The next frame and the descriptors beside it. Raises ForkServerDied, OSError or FrameError."""
        frames = wire.FrameReader()
        received: list[int] = []
        self._receiving = True
        self._loop.add_reader(self._channel, self._readable.set)
        try:
            while True:
                await self._readable.wait()
                self._readable.clear()
                try:
                    data, more, _, _ = socket.recv_fds(self._channel, MAX_MESSAGE, 4)
                except BlockingIOError:
                    continue
                received += more
                if not data:
                    await self.gone.wait()
                    raise ForkServerDied("the template has ended")
                if len(received) > 1:  # a frame in many pieces could bring any number of them
                    raise FrameError("it sent more than one descriptor")
                for kind, head, _ in frames.feed(data):
                    return kind, head, received
        except BaseException:
            for descriptor in received:
                os.close(descriptor)
            raise
        finally:
            self._receiving = False
            self._loop.remove_reader(self._channel)
            if self.gone.is_set():
                self._channel.close()

    def _ended(self) -> None:
        exit_status = self.process.reap()
        if exit_status is None:
            return
        self.cause = self.cause or exit_status
        self._loop.remove_reader(self.process.pidfd)
        self.output.finish()
        if not self._receiving:  # else its last words are still to be read
            self._channel.close()
        self.process.close(keep_scratch=True)
        self.gone.set()
        self._when_gone(self)


class Kept(ABC):
    """The process that has loaded, while there is one."""

    role = ""  # in one word

    def __init__(self, settings: PoolSettings, forkservers: ForkServers) -> None:
        self._settings = settings
        self._forkservers = forkservers
        self._current: LoadedProcess | None = None
        self._processes: set[LoadedProcess] = set()  # the current one, and those that are about to end
        self._scratches: list[Path] = []  # workers that live on may have theirs in those of dead templates
        self._loading: asyncio.Task[LoadedProcess] | None = None
        self._unfit = False  # it cannot do what it is for, and no other could
        self._deaths: deque[float] = deque()

    @property
    def pids(self) -> set[int]:
        return {each.process.pid for each in self._processes}

    @property
    def pid(self) -> int | None:
        """That of the current one."""
        return self._current.process.pid if self._current is not None else None

    @property
    def usable(self) -> bool:
        """Whether workers can be started with it; else they start as if there were none."""
        while self._deaths and self._deaths[0] < time.monotonic() - DEATH_WINDOW:
            self._deaths.popleft()
        return not self._unfit and len(self._deaths) < DEATHS

    def release(self) -> None:
        """Nothing is to be started with it for now: give its memory back."""
        if self._current is not None:
            self._current.kill("stopped")
            self._current = None

    async def close(self) -> None:
        """End it, and remove what its workers have left; they have ended before."""
        loading = self._loading
        if loading is not None:
            loading.cancel()
            await asyncio.wait([loading])
        self.release()
        for each in list(self._processes):
            each.kill("stopped")
            await each.gone.wait()
        for scratch in self._scratches:
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)

    async def _loaded(self, how: Launch) -> LoadedProcess:
        """The one there is, or a new one; all who ask meanwhile wait for the same."""
        if self._current is not None:
            return self._current
        if self._loading is None:
            self._loading = asyncio.create_task(self._load(how))
            self._loading.add_done_callback(self._has_loaded)
        return await asyncio.shield(self._loading)

    def _has_loaded(self, task: asyncio.Task[LoadedProcess]) -> None:
        self._loading = None
        if not task.cancelled():
            task.exception()  # whoever waits gets it, too; nobody may be waiting any more

    async def _load(self, how: Launch) -> LoadedProcess:
        settings, role = self._settings, self.role
        environ = {**how.environ, **environment.thread_counts(1)}
        process = await launch(replace(how, name=f"mms-{role}", environ=environ), self._forkservers)
        self._scratches.append(process.scratch)
        label = f"{settings.label} {role} pid {process.pid}"
        kept = LoadedProcess(process, OutputReader(model_logger(settings.load.model_name), label), self._gone)
        self._processes.add(kept)
        loaded = await kept.load(self._load_of(settings.load), settings.startup_timeout)
        fault = self._fault_of(loaded)
        if fault:
            self._unfit = True
            log.warning("%s: share_weights cannot be: %s; workers load by themselves", settings.label, fault)
            kept.kill("stopped")
        else:
            log.info("%s: %s (pid %d) has loaded", settings.label, role, process.pid)
            self._current = kept
        return kept

    @abstractmethod
    def _load_of(self, load: wire.Load) -> wire.Load:
        """What it is told to load."""

    @abstractmethod
    def _fault_of(self, loaded: wire.Preloaded) -> str:
        """Why it cannot be used, or nothing."""

    def _gone(self, kept: LoadedProcess) -> None:
        self._processes.discard(kept)
        if self._current is not kept:  # it was not wanted any more, or never loaded
            return
        self._current = None
        self._deaths.append(time.monotonic())
        label, role = self._settings.label, self.role
        log.warning("%s: %s (pid %d) died: %s; another is started for the next worker", label, role, kept.process.pid,
                    kept.cause)  # fmt: skip
        if not self.usable:
            log.error("%s: its %s died %d times within %g s; until one of these is longer ago, workers load by "
                      "themselves", label, role, DEATHS, DEATH_WINDOW)  # fmt: skip


class Template(Kept):
    """The process that the workers of a pool on CPUs are forked from."""

    role = "template"

    async def launch(self, how: Launch) -> WorkerProcess | None:
        """A worker that was forked from the template; None if that cannot be. Raises TemplateFailed or OSError."""
        while self.usable:
            template = await self._loaded(how)
            if self._unfit:
                break
            try:
                forked = replace(how, interpreter=None, scratch=template.process.scratch)
                return await launch(forked, template)
            except ForkServerDied as error:
                log.warning("%s: %s; starting another", self._settings.label, error)
                await template.gone.wait()
        return None

    def _load_of(self, load: wire.Load) -> wire.Load:
        wanted = msgspec.structs.replace(load.preparation, template=True)
        return msgspec.structs.replace(load, cpu_threads=1, preparation=wanted)

    def _fault_of(self, loaded: wire.Preloaded) -> str:
        others = loaded.threads - 1
        return f"its handler has started threads ({others})" if others else ""
