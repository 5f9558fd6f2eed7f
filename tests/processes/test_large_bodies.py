"""Bodies that pass through memory shared with a worker, as real workers see them and leave them."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
import uvloop

from mms.arena import Arena
from mms.errors import MMSError as Error
from tests.conftest import MakeGate
from tests.gates import Gate
from tests.processes.pools import Caller, Serve, Served, serve, subreaper, until

__all__ = ["serve", "subreaper"]

MIB = 1 << 20
SIZES = (65 << 10, 100 << 10, 64 << 10, 3 * MIB, 300_001)


def arenas(served: Served) -> list[Arena]:
    found = [worker.process.arena for worker in served.pool.workers]
    return [arena for arena in found if arena is not None]


class Keeper(Caller):
    """Keeps the answer as it was handed out, as a connection does whose client is slow."""

    def answer(self, status: int, head: bytes, body: bytes | memoryview) -> None:
        self.kept = body
        super().answer(status, head, b"")


async def keep(served: Served, body: bytes) -> bytes | memoryview:
    """The answer to that body, where it lies."""
    caller = Keeper()
    await served.submit(b"\n" + body, caller)
    return caller.kept


@pytest.mark.parametrize("how", [{}, {"threads": 2}], ids=["plain", "threads"])
def test_many_at_a_time_are_right_byte_for_byte(serve: Serve, how: dict[str, int]) -> None:
    async def scenario() -> None:
        async with serve("large", workers=2, batch_size=2, **how) as served:
            bodies = [os.urandom(size) for size in SIZES * 3]
            answers = await asyncio.gather(*[served.submit(b"\n" + body) for body in bodies])
            assert answers == bodies
            assert all(arena.requests.free and arena.answers.free for arena in arenas(served))

    uvloop.run(scenario())


def test_f2_a_body_whose_worker_dies_is_sent_again_as_it_was(serve: Serve, make_gate: MakeGate) -> None:
    async def scenario(gate: Gate) -> None:
        async with serve("large") as served:
            (pid,) = served.pids
            body = os.urandom(2 * MIB)
            outcome = served.submit(gate.body + b"\n" + body)
            await until(gate.begun)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: len(gate.begun()) == 2)
            gate.open()
            assert await outcome == body
            assert gate.begun()[1] != pid

    uvloop.run(scenario(make_gate()))


def test_f32_a_late_answer_is_nobodys(serve: Serve, make_gate: MakeGate) -> None:
    async def scenario(gate: Gate) -> None:
        async with serve("large", response_timeout=0.2) as served:
            late = served.submit(gate.body + b"\n" + bytes(MIB))
            await until(gate.begun)
            behind = [os.urandom(MIB) for _ in range(4)]
            outcomes = [served.submit(b"\n" + body) for body in behind]
            with pytest.raises(Error):
                await late
            gate.open()
            assert await asyncio.gather(*outcomes) == behind

    uvloop.run(scenario(make_gate()))


def test_an_answer_on_its_way_outlives_its_worker_and_the_next_bodies(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("large") as served:
            body = os.urandom(MIB)
            kept = await keep(served, body)
            assert isinstance(kept, memoryview)
            others = [os.urandom(MIB) for _ in range(8)]
            assert [await served.submit(b"\n" + other) for other in others] == others
            assert kept == body
            (pid,) = served.pids
            os.kill(pid, signal.SIGKILL)
            await until(lambda: served.pids not in ([], [pid]))
            assert await served.submit(b"\n" + others[0]) == others[0]
            assert kept == body

    uvloop.run(scenario())


def test_answers_that_nobody_takes_leave_others_their_way(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("large") as served:
            bodies = [os.urandom(12 * MIB) for _ in range(3)]
            kept = [await keep(served, body) for body in bodies]  # more than there is room for
            assert await served.submit(b"\n" + bodies[0]) == bodies[0]
            assert kept == bodies
            (arena,) = arenas(served)
            kept.clear()
            assert arena.answers.free

    uvloop.run(scenario())
