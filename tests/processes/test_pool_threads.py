"""Pools whose workers run several batches at a time."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
import uvloop

from mms.errors import MMSError as Error
from mms.workers.worker import describe_worker
from tests.conftest import MakeGate
from tests.processes.pools import Serve, serve, subreaper, until

__all__ = ["serve", "subreaper"]


def test_a_worker_with_threads_gets_as_many_batches(serve: Serve, make_gate: MakeGate) -> None:
    async def scenario() -> None:
        async with serve("gate", threads=3) as served:
            gates = [make_gate() for _ in range(4)]
            outcomes = [served.submit(gate.body) for gate in gates]
            await until(lambda: all(gate.begun() for gate in gates[:3]))
            assert not gates[3].begun()
            gates[1].open()
            await outcomes[1]
            await until(gates[3].begun)
            for gate in gates:
                gate.open()
            await asyncio.gather(*outcomes)
            assert len(served.pids) == 1

    uvloop.run(scenario())


@pytest.mark.parametrize(("archive", "threads"), [("request_style", 2), ("rows", None)])
def test_a_worker_shows_the_threads_that_prepare(serve: Serve, archive: str, threads: int | None) -> None:
    """Batch style has none, whatever is asked for."""

    async def scenario() -> None:
        async with serve(archive, preprocess_threads=2) as served:
            shown = [describe_worker(worker, 1, None, None) for worker in served.pool.workers]
            assert [worker.get("preprocessThreads") for worker in shown] == [threads]

    uvloop.run(scenario())


def test_what_a_worker_prepares_waits_to_be_a_full_batch(serve: Serve, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve("held", preprocess_threads=1, batch_size=2) as served:
            served.queue.max_batch_delay = 60.0
            held = tmp_path / "2.preprocess.held"
            held.touch()
            outcomes = [served.submit(str(tmp_path / name).encode()) for name in "12"]
            await until((tmp_path / "2.preprocess").exists)
            held.unlink()
            assert await asyncio.gather(*outcomes) == [b"2", b"2"]

    uvloop.run(scenario())


def test_batches_are_spread_over_workers_with_threads(serve: Serve, make_gate: MakeGate) -> None:
    async def scenario() -> None:
        async with serve("gate", threads=2, workers=2) as served:
            gates = [make_gate() for _ in range(2)]
            outcomes = [served.submit(gate.body) for gate in gates]
            await until(lambda: all(gate.begun() for gate in gates))
            for gate in gates:
                gate.open()
            assert len({await outcome for outcome in outcomes}) == 2

    uvloop.run(scenario())


def test_only_the_batch_that_runs_too_long_is_late(serve: Serve, make_gate: MakeGate) -> None:
    async def scenario() -> None:
        async with serve("gate", threads=2, response_timeout=0.6) as served:
            stuck, late = make_gate(), make_gate()
            first = served.submit(stuck.body)
            await until(stuck.begun)
            begun = time.monotonic()  # the second batch is to be younger when the first one is too late
            await until(lambda: time.monotonic() - begun > 0.4)
            second = served.submit(late.body)
            await until(late.begun)
            with pytest.raises(Error, match="response_timeout"):
                await first
            late.open()
            assert await second
            assert len(stuck.begun()) == 1

    uvloop.run(scenario())


def test_the_neighbours_of_a_batch_that_kills_the_worker_are_run_again(serve: Serve, make_gate: MakeGate) -> None:
    async def scenario() -> None:
        async with serve("gate", threads=2, preprocess_threads=1) as served:
            gates = [make_gate() for _ in range(3)]
            outcomes = [served.submit(gate.body) for gate in gates]
            await until(lambda: all(gate.begun() for gate in gates[:2]))
            os.kill(served.pids[0], signal.SIGKILL)
            for gate in gates:
                gate.open()
            assert len({await outcome for outcome in outcomes}) == 1
            assert [len(gate.begun()) for gate in gates] == [2, 2, 1]

    uvloop.run(scenario())
