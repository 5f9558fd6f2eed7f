"""A further front end: connections, queues and channels to the workers. What it serves, the main process tells it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
from collections import deque
from pathlib import Path
from typing import Any

from mms import fronts, logs
from mms.api.predictions import InferenceApi
from mms.dataplane import DataPlane
from mms.frontend.replica import LentWorker, Replica
from mms.http.listener import HttpServer
from mms.http.shedding import NO_CONNECTIONS
from mms.models.readiness import refusing, unready
from mms.models.registry import Versions
from mms.token import Token, TokenFile

log = logging.getLogger("mms.frontend")

TICK = 1.0
_DESCRIPTORS: dict[type, int] = {fronts.Listen: 1, fronts.Lent: 2}  # beside a message


class Log(logging.Handler):
    """The log is the main process's."""

    def __init__(self, line: fronts.Line) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        self._line.tell(fronts.Said(record.name, record.levelno, self.format(record)))


class Told:
    """What the main process says to probes, unless this front end takes no connections itself."""

    def __init__(self) -> None:
        self.picture: fronts.Picture | None = None
        self.http: HttpServer | None = None

    def health(self) -> str:
        return self.picture.health if self.picture is not None else "Unhealthy"

    def report(self, *, details: bool) -> tuple[int, dict[str, Any]]:
        if self.http is not None and self.http.shedding.step == NO_CONNECTIONS:
            return unready(*refusing(self.http.shedding.full().message))
        return self.picture.report if self.picture is not None else (503, {})


class FrontEnd:
    """The life of the process: messages are carried out one after another."""

    def __init__(self, sock: socket.socket) -> None:
        self._messages: asyncio.Queue[tuple[Any, list[int]]] = asyncio.Queue()
        self._registry: Versions[Replica] = Versions()
        self._replicas: dict[int, Replica] = {}  # that may have workers: registered ones, and those that are unloaded
        self._told = Told()
        self._line = fronts.Line(sock, fronts.ToFront, lambda: os._exit(0))  # the main process has ended

    async def run(self) -> None:
        self._line.listen(self._take)
        for name in ("mms", "asyncio"):
            logging.getLogger(name).handlers[:] = [Log(self._line)]
        hello, _ = await self._messages.get()
        assert type(hello) is fronts.Hello
        self._front_ends = hello.front_ends
        self._inference = InferenceApi(DataPlane(self._registry), self._told, _token(hello))
        self._http = self._told.http = HttpServer(self._inference, hello.limits, edge=hello.edge)
        self._registry.forget = self._forget_versions
        self._listening = False
        self._tick()
        while True:
            message, descriptors = await self._messages.get()
            await self._do(message, descriptors)

    def _take(self, message: Any, received: deque[int]) -> None:
        count = _DESCRIPTORS.get(type(message), 0)
        if len(received) < count:
            log.critical("no descriptor is left for a channel or a socket; ending")
            os._exit(71)  # EX_OSERR
        self._messages.put_nowait((message, [received.popleft() for _ in range(count)]))

    async def _do(self, message: Any, descriptors: list[int]) -> None:
        match message:
            case fronts.Picture():
                self._show(message)
            case fronts.Listen():
                await self._listen(socket.socket(fileno=descriptors[0]))
            case fronts.Lent():
                await self._borrow(message, *descriptors)
            case fronts.Recall():
                for worker in self._lent(message.worker):
                    worker.recall()
            case fronts.Gone():
                for worker in self._lent(message.worker):
                    worker.ended(message.cause)
            case fronts.Leave():
                self._leave(message)
            case fronts.Forget():
                if message.number in self._replicas:
                    self._replicas.pop(message.number).forget()
            case fronts.Sync():
                self._line.tell(fronts.Synced(message.number))
            case fronts.Ask():
                self._line.tell(self._counts())
            case fronts.Shut():
                self._http.shut()
            case fronts.Drain():
                self._draining = asyncio.create_task(self._drain(message.seconds))

    def _lent(self, number: int) -> list[LentWorker]:
        """That worker; none if it was left."""
        workers = (worker for replica in self._replicas.values() for worker in replica.pool.workers)
        return [worker for worker in workers if worker.slot == number and isinstance(worker, LentWorker)]

    def _show(self, picture: fronts.Picture) -> None:
        if self._told.picture is None or picture.log_level != self._told.picture.log_level:
            logging.getLogger("mms").setLevel(picture.log_level.upper())
        self._told.picture = picture
        self._http.apply(picture.limits)
        registry = self._registry
        known = {version.told: version for version in registry.versions()}
        shown = {one.number: one for one in picture.versions}
        for number in known.keys() - shown.keys():
            registry.remove(known[number])
        for number, one in shown.items():
            if number in known:  # maybe without workers for good: a stop leaves registered what it unloads
                known[number].show(one)
            else:
                self._replicas[number] = Replica(one, self._front_ends, self._line.tell)
                registry.add(self._replicas[number])
        for name, default in picture.defaults.items():
            if registry.model(name).default != default:
                registry.set_default(name, default)
        registry.announced = {(name, number): why for name, number, why in picture.announced}

    async def _borrow(self, lent: fronts.Lent, channel: int, file: int) -> None:
        replica = self._replicas.get(lent.number)
        if replica is not None:
            await replica.pool.add(lent, channel, file)
            return
        os.close(channel)  # the version was being unloaded when this process started
        os.close(file)
        self._line.tell(fronts.Left(lent.worker))

    async def _listen(self, sock: socket.socket) -> None:
        if self._listening:
            await self._http.listen(sock)
            return
        self._listening = True
        gc.collect()
        gc.freeze()
        await self._http.start(sock)

    def _leave(self, message: fronts.Leave) -> None:
        replica = self._replicas.get(message.number)
        if replica is not None:
            replica.leave(message.reason)
        else:
            self._line.tell(fronts.Empty(message.number))

    async def _drain(self, seconds: float) -> None:
        self._line.tell(fronts.Drained(await self._http.drain(seconds)))

    def _counts(self) -> fronts.Counts:
        return fronts.Counts(
            versions={number: replica.counted() for number, replica in self._replicas.items()},
            failures=[(status, cause, count) for (status, cause), count in self._inference.failures.items()],
            connections=len(self._http.connections),
            bytes_in_flight=self._http.shedding.bytes,
            shedding_step=self._http.shedding.step,
        )

    def _forget_versions(self) -> None:
        self._inference.forget_routes()
        self._http.forget_heads()

    def _tick(self) -> None:
        asyncio.get_running_loop().call_later(TICK, self._tick)
        self._inference.renew_token()


def _token(hello: fronts.Hello) -> Token | None:
    """As the main process has it: it serves on with a file that is missing or unsafe, and so does this one."""
    if hello.token:
        return Token(hello.token.encode())
    return TokenFile(Path(hello.token_file), read=False) if hello.token_file else None


def main(number: int) -> None:
    """Runs in the front end's process, with the socket to the main process."""
    import uvloop

    logs.setup("info", None)  # until there is a line
    sock = socket.socket(fileno=number)

    async def serve() -> None:
        await FrontEnd(sock).run()

    uvloop.run(serve())
