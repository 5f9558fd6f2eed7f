"""What the main process and its further front ends share: the line between them, the counts, the worker's turns."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import threading
import time
from collections import deque
from typing import Any, cast

import pytest
import uvloop

from mms import arena, fronts, lending, sharedpage, wire
from mms.backend.channel import Channel
from mms.backend.turns import Busy, Turns
from mms.errors import MMSError as Error
from mms.frontend.replica import LentWorker, Replica
from mms.fronts import Counted, Counts
from mms.metrics import FrontEndFacts, VersionFacts, VersionMetrics
from mms.model_settings import ModelSettings
from mms.totals import Totals
from mms.workers.job import Job
from tests.processes.pools import Caller


def test_messages_arrive_in_order_and_each_with_its_descriptors() -> None:
    """More of them than the socket takes at once."""
    large = "x" * (300 << 10)
    heard: list[tuple[str, list[int]]] = []

    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        done = asyncio.Event()
        ended = asyncio.Event()
        sender = fronts.Line(ours, fronts.ToMain, ended.set)
        receiver = fronts.Line(theirs, fronts.ToMain, ended.set)

        def told(message: Any, received: deque[int]) -> None:
            count = 2 if message.logger == "two" else 0
            heard.append((message.logger, [received.popleft() for _ in range(count)]))
            if message.logger == "last":
                done.set()

        receiver.listen(told)
        read_end, write_end = os.pipe()
        for number in range(4):
            sender.tell(fronts.Said("none", number, large))
            sender.tell(fronts.Said("two", number, ""), [read_end, write_end])
        sender.tell(fronts.Said("last", 0, ""))
        os.close(read_end)
        os.close(write_end)
        await asyncio.wait_for(done.wait(), 5)
        sender.close()
        await asyncio.wait_for(ended.wait(), 5)

    uvloop.run(scenario())
    assert [name for name, _ in heard] == ["none", "two"] * 4 + ["last"]
    for name, descriptors in heard:
        if name == "two":
            reader, writer = descriptors
            os.write(writer, b"y")
            assert os.read(reader, 1) == b"y"
            os.close(reader)
            os.close(writer)


def test_what_the_other_end_has_said_before_it_ended_is_heard() -> None:
    heard: list[Any] = []

    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        receiver = fronts.Line(ours, fronts.ToMain, lambda: None)
        receiver.listen(lambda message, descriptors: heard.append(message))
        sender = fronts.Line(theirs, fronts.ToMain, lambda: None)
        for number in range(3):
            sender.tell(fronts.Said("mms", number, "x" * (30 << 10)))
        sender.close()
        receiver.finish()

    uvloop.run(scenario())
    assert [message.level for message in heard] == [0, 1, 2]


def counts(answered: int, seconds: float) -> Counts:
    metrics = VersionMetrics()
    metrics.requests[200] += answered
    metrics.duration.observe_all([seconds] * answered)
    metrics.streams = answered
    counted = Counted(
        parts=metrics.parts(),
        cancelled=1,
        retries=0,
        queue_depth=2,
        queue_bytes=0,
        newest_first=False,
        drain_rate=0.0,
        in_flight=3,
    )
    return Counts({7: counted}, [(404, "ModelNotFoundException", 1)], 5, 100, 0)


def test_what_front_ends_have_counted_is_added_up_and_that_of_the_dead_stays() -> None:
    told = [counts(10, 0.2)]
    totals = Totals(lambda: told)
    own = VersionFacts(
        model="m", version="1", metrics=VersionMetrics(), queue_depth=1, queue_capacity=50, queue_bytes=0,
        newest_first=False, drain_rate=0.0, cancelled=0, retries=0, in_flight=0, workers=[], failed_workers=0,
        wanted_workers=0,
    )  # fmt: skip
    own.metrics.requests[200] += 1
    for _ in range(2):  # nothing is added to the main process's own
        both = totals.version(own, 7, 2)
        assert both.metrics.requests[200] == 11
        assert sum(both.metrics.duration.counts) == both.metrics.streams == 10
        assert (both.queue_depth, both.queue_capacity, both.in_flight) == (3, 100, 3)
    totals.keep(told.pop())
    told.append(counts(5, 0.1))
    both = totals.version(own, 7, 2)
    assert both.metrics.requests[200] == 16
    assert both.cancelled == 2
    assert both.queue_depth == 3  # what waited at the dead one waits no more
    assert totals.failures({(404, "ModelNotFoundException"): 1}) == {(404, "ModelNotFoundException"): 3}
    assert totals.front_ends(FrontEndFacts(1, 1, 1)) == FrontEndFacts(6, 101, 1)


def test_what_comes_back_from_a_worker_of_an_unloaded_version_fails() -> None:
    """Its channel is seen to end last, when the version is forgotten already."""
    told: list[Any] = []

    async def scenario() -> Error:
        defaults = ModelSettings()
        settings = {name: getattr(defaults, name) for name in fronts.QueueSettings.__struct_fields__}
        shown = fronts.Shown(1, "m", "1.0", fronts.QueueSettings(**settings), "READY", True, 0.0, False)
        replica = Replica(shown, 2, told.append)
        near, far = socket.socketpair()
        await replica.pool.add(fronts.Lent(5, 1, 4711, 1, 0), near.detach(), arena.create(sharedpage.PAGE))
        caller = Caller()
        replica.submit(Job(1, wire.RequestFacts("", "", b"", False, []), b"", [b"x"], 1, caller, time.monotonic()))
        await asyncio.sleep(0)
        (worker,) = replica.pool.workers
        assert worker.in_flight.count
        replica.leave("it is being unloaded")
        cast(LentWorker, worker).ended("stopped")
        replica.forget()
        far.close()
        with pytest.raises(Error) as failed:
            await asyncio.wait_for(caller.outcome, 5)
        return failed.value

    assert uvloop.run(scenario()).message == "model m 1.0 is unloaded"
    assert told == [fronts.Empty(1)]


class Echo:
    """Writes the ids of each frame back; notes which pages say meanwhile that the worker is at work."""

    def __init__(self, channel: Channel, pages: list[mmap.mmap], busy: list[list[bool]]) -> None:
        self._channel = channel
        self._pages = pages
        self._busy = busy

    def predict(self, frame: Any, payload: bytearray, at: int) -> None:
        self._busy.append([sharedpage.read_busy(page) for page in self._pages])
        self._channel.write(wire.STREAM, wire.Chunks(frame.ids, [], {}), [], 0)

    def close(self) -> None:
        self._channel.close()


def test_a_worker_serves_all_channels_in_turn_until_its_own_ends() -> None:
    def page() -> tuple[int, mmap.mmap]:
        file = arena.create(sharedpage.PAGE)
        return file, arena.attach(file)[1]

    def send(sock: socket.socket, id: int) -> None:
        sock.sendall(wire.pack(wire.PREDICT, wire.Predict(1, [id], [0], [b""], [], [])))

    def ids(sock: socket.socket) -> list[int]:
        ((_, head, _),) = wire.FrameReader().feed(sock.recv(4096))
        return list(wire.decode(wire.Chunks, head).ids)

    ours, theirs = socket.socketpair()
    control, further = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lent, borrowed = socket.socketpair()
    seen: list[list[bool]] = []
    descriptor, own = page()
    os.close(descriptor)
    descriptor, shared = page()
    loop = Turns(Channel(theirs), further, own, lambda channel, page: Echo(channel, [own, shared], seen), Busy())
    thread = threading.Thread(target=loop.run)
    thread.start()
    lending.lend(control, borrowed, descriptor)
    os.close(descriptor)
    borrowed.close()
    for id, sock in enumerate((lent, ours, lent), 1):
        send(sock, id)
        assert ids(sock) == [id]
    lent.close()  # a front end that has gone
    send(ours, 4)
    assert ids(ours) == [4]
    ours.close()
    thread.join(5)
    assert not thread.is_alive()
    for sock in (theirs, control):
        sock.close()
    assert seen[:3] == [[True, True]] * 3
    assert not sharedpage.read_busy(own) and not sharedpage.read_busy(shared)
