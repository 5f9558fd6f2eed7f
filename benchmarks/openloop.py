"""An open loop: requests leave at times drawn beforehand, whether or not earlier ones were answered.

Latency counts from the scheduled time, so that what a stalled server makes wait is not left out. The generator runs in
a process of its own and notes how late it was itself: if it was, the run says nothing.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import random
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import cast

import uvloop

LATENESS = 0.002  # p99 beyond which a run is void
PATIENCE = 5.0  # how long the generator waits for answers after its last request
SPARE = 64  # connections that are opened before the first request


@dataclass(frozen=True)
class Phase:
    """So many requests per second for so long; who is refused tries again at once, up to `retries` times."""

    rate: float
    seconds: float
    retries: int = 0


@dataclass
class Request:
    """Times in seconds since the begin of the run; status 0: no answer."""

    phase: int
    scheduled: float
    late: float = 0.0
    took: float = 0.0
    status: int = 0
    tries: int = 0
    retry_after: int = 0


def schedule(phases: Sequence[Phase], seed: int) -> list[Request]:
    """Poisson arrivals."""
    draw, begun, requests = random.Random(seed).expovariate, 0.0, []
    for number, phase in enumerate(phases):
        at = begun + draw(phase.rate)
        while at < begun + phase.seconds:
            requests.append(Request(number, at))
            at += draw(phase.rate)
        begun += phase.seconds
    return requests


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def run(port: int, path: str, phases: Sequence[Phase], seed: int) -> list[Request]:
    """All requests of the phases, sent by another process, in the order of their schedule."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_generate, port, path, phases, seed).result()


def lateness(requests: Sequence[Request]) -> float:
    return percentile([request.late for request in requests], 0.99)


class _Client(asyncio.Protocol):
    """One connection; carries one request at a time."""

    def __init__(self, generator: _Generator) -> None:
        self.request: Request | None = None
        self._generator = generator
        self._transport = cast(asyncio.Transport, None)
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self.request is None:
            self._generator.free.append(self)
        else:
            self._transport.write(self._generator.message)

    def send(self, request: Request) -> None:
        self.request = request
        if self._transport is not None:
            self._transport.write(self._generator.message)

    def data_received(self, data: bytes) -> None:
        received = self._received = self._received + data
        head, end, body = received.partition(b"\r\n\r\n")
        fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:]) if end else {}
        if not end or len(body) < int(fields[b"content-length"]) or self.request is None:
            return
        self._received = b""
        request, self.request = self.request, None
        request.status = int(received[9:12])
        request.retry_after = int(fields.get(b"retry-after", 0))
        closes = fields.get(b"connection") == b"close"
        if closes:
            self._transport.close()
        again = self._generator.done(request)
        if closes:
            if again:
                self._generator.send(request)
        elif again:
            self.send(request)
        else:
            self._generator.free.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self in self._generator.free:
            self._generator.free.remove(self)


class _Generator:
    def __init__(self, port: int, path: str, phases: Sequence[Phase], requests: list[Request]) -> None:
        self.free: deque[_Client] = deque()
        self.message = b"POST %b HTTP/1.1\r\nHost: bench\r\nContent-Length: 2\r\n\r\nhi" % path.encode()
        self._port = port
        self._phases = phases
        self._requests = requests
        self._next = 0
        self._open = 0
        self._begun = 0.0
        self._finished = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[object]] = set()

    async def run(self) -> None:
        for _ in range(SPARE):
            await self._loop.create_connection(lambda: _Client(self), "127.0.0.1", self._port)
        self._begun = time.monotonic() + 0.05
        self._send_due()
        end = self._begun + sum(phase.seconds for phase in self._phases) + PATIENCE
        try:
            async with asyncio.timeout(end - time.monotonic()):
                await self._finished.wait()
        except TimeoutError:
            return

    def send(self, request: Request) -> None:
        if self.free:
            self.free.pop().send(request)
            return
        client = _Client(self)
        client.request = request
        task = self._loop.create_task(self._loop.create_connection(lambda: client, "127.0.0.1", self._port))
        self._tasks.add(cast("asyncio.Task[object]", task))
        task.add_done_callback(self._tasks.discard)

    def done(self, request: Request) -> bool:
        """The request was answered; whether it is sent again."""
        request.tries += 1
        if request.status in (429, 503) and request.tries <= self._phases[request.phase].retries:
            return True
        request.took = time.monotonic() - self._begun - request.scheduled
        self._open -= 1
        if not self._open and self._next == len(self._requests):
            self._finished.set()
        return False

    def _send_due(self) -> None:
        now = time.monotonic() - self._begun
        while self._next < len(self._requests) and (request := self._requests[self._next]).scheduled <= now:
            self._next += 1
            self._open += 1
            request.late = now - request.scheduled
            self.send(request)
        if self._next < len(self._requests):
            wait = self._requests[self._next].scheduled - now
            self._loop.call_later(max(0.0, wait - 0.0005), self._send_due)


def _generate(port: int, path: str, phases: Sequence[Phase], seed: int) -> list[Request]:
    requests = schedule(phases, seed)
    gc.disable()  # a collection would make the generator late

    async def main() -> None:
        await _Generator(port, path, phases, requests).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    return requests
