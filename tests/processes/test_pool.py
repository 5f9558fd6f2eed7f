"""A WorkerPool with real workers, without HTTP: scale, deaths, retries, time limits, the end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
import weakref

import psutil
import pytest
import uvloop

from mms.errors import MMSError as Error
from mms.errors import ModelLoadError, QueueFullError, ServiceUnavailableError
from mms.workers.autoscaler import Bounds
from tests.conftest import MakeGate
from tests.gates import Gate
from tests.processes.pools import Serve, serve, subreaper, until

__all__ = ["serve", "subreaper"]


def test_workers_are_ours_in_sessions_of_their_own_without_foreign_descriptors(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison", workers=2) as served:
            assert len(set(served.pids)) == 2
            for pid in served.pids:
                assert psutil.Process(pid).ppid() == os.getpid()
                assert os.getsid(pid) == os.getpgid(pid) == pid
                assert psutil.Process(pid).name() == "mms-m"
                held = {os.readlink(f"/proc/{pid}/fd/{fd}").split(":")[0] for fd in os.listdir(f"/proc/{pid}/fd")}
                assert held == {"/dev/null", "/memfd", "pipe", "socket"}

    uvloop.run(scenario())


def test_scaling_keeps_the_workers_there_are(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison") as served:
            (first,) = served.pids
            await served.scale(3)
            assert first in served.pids
            assert len(served.pids) == served.pool.ready == 3
            gone = set(served.pids)
            await served.scale(1)
            assert len(served.pids) == 1
            gone -= set(served.pids)
            assert not any(psutil.pid_exists(pid) for pid in gone)
            assert await served.submit(b"x") == b"x"
            await served.scale(0)
            assert served.pids == []

    uvloop.run(scenario())


def test_jobs_wait_for_the_first_worker(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison", workers=0) as served:
            waiting = served.submit(b"x")
            served.pool.set_target(1)
            assert await asyncio.wait_for(waiting, 5) == b"x"

    uvloop.run(scenario())


def test_those_who_wait_when_it_is_scaled_to_0_are_served_before_the_workers_go(
    serve: Serve, make_gate: MakeGate
) -> None:
    async def scenario(gate: Gate) -> None:
        async with serve("gate") as served:
            outcomes = [served.submit(gate.body) for _ in range(5)]
            await until(gate.begun)
            served.pool.set_target(0)
            gate.open()
            assert len({await asyncio.wait_for(outcome, 5) for outcome in outcomes}) == 1
            await served.pool.settled()

    uvloop.run(scenario(make_gate()))


def test_those_who_wait_for_a_worker_that_is_not_wanted_any_more_are_told_at_once(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison", workers=0) as served:
            waiting = served.submit(b"x")
            served.pool.set_target(1)
            served.pool.set_target(0)
            with pytest.raises(ServiceUnavailableError, match="has no workers; scale it up"):
                await asyncio.wait_for(waiting, 5)
            served.pool.set_target(0, Bounds(0, 1, on_request=True))
            served.pool.rouse()
            waiting = served.submit(b"x")
            served.pool.set_target(0, Bounds(0, 1, on_request=True))
            assert await asyncio.wait_for(waiting, 5) == b"x", "it counts as one that comes now"

    uvloop.run(scenario())


@pytest.mark.parametrize("failed", [False, True])
def test_f105_a_closed_pool_is_freed_at_once_without_the_collector(serve: Serve, failed: bool) -> None:
    async def scenario() -> None:
        async with serve("poison", workers=not failed, stop_grace=60) as served:
            if failed:
                served.pool.losses.fail(ModelLoadError("no"))
                with pytest.raises(ModelLoadError):
                    await served.pool.settled()
            else:
                assert await served.submit(b"x") == b"x"
        gone = weakref.ref(served.pool)
        del served.pool
        await until(lambda: gone() is None)

    gc.disable()
    try:
        uvloop.run(scenario())
    finally:
        gc.enable()


def test_a_pool_that_closes_waits_for_the_worker_that_a_request_has_brought(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison", workers=0) as served:
            served.pool.set_target(0, Bounds(0, 1, on_request=True))
            served.pool.rouse()
            waiting = served.submit(b"x")
            await served.pool.close(20)
            assert waiting.done() and await waiting == b"x"

    uvloop.run(scenario())


def test_a_full_queue_refuses(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison", workers=0, capacity=1) as served:
            waiting = served.submit(b"x")
            with pytest.raises(QueueFullError):
                served.submit(b"y")
            await served.scale(1)
            assert await waiting == b"x"

    uvloop.run(scenario())


def test_f1_a_dead_worker_is_replaced_within_half_a_second(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison") as served:
            (pid,) = served.pids
            os.kill(pid, signal.SIGKILL)
            await until(lambda: served.pids not in ([], [pid]), within=0.5)
            assert served.metrics.restarts == {"signal 9 (SIGKILL)": 1}
            assert await served.submit(b"x") == b"x"

    uvloop.run(scenario())


def test_f2_a_begun_job_is_run_once_more(serve: Serve, make_gate: MakeGate) -> None:
    async def scenario(gate: Gate) -> None:
        async with serve("gate") as served:
            (pid,) = served.pids
            outcome = served.submit(gate.body)
            await until(gate.begun)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: len(gate.begun()) == 2)
            gate.open()
            assert int(await outcome) == gate.begun()[1] != pid
            assert served.queue.retries == 1

    uvloop.run(scenario(make_gate()))


def test_f3_jobs_that_only_waited_are_not_counted(serve: Serve, make_gate: MakeGate) -> None:
    async def scenario(gates: list[Gate]) -> None:
        async with serve("gate") as served:
            outcomes = [served.submit(gate.body) for gate in gates]
            await until(gates[0].begun)
            os.kill(served.pids[0], signal.SIGKILL)
            for gate in gates:
                gate.open()
            await asyncio.wait_for(asyncio.gather(*outcomes), 5)
            assert [len(gate.begun()) for gate in gates] in ([2, 1, 1, 1], [1, 1, 1, 1])
            assert served.queue.retries <= 1

    uvloop.run(scenario([make_gate() for _ in range(4)]))


def test_f6_poison_kills_exactly_two_and_its_neighbours_live(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison", batch_size=4, workers=0) as served:
            bodies = [b"one", b"abort", b"two", b"three"]
            outcomes = [served.submit(body) for body in bodies]
            await served.scale(1)
            results = await asyncio.wait_for(asyncio.gather(*outcomes, return_exceptions=True), 10)
            assert [results[0], *results[2:]] == [b"one", b"two", b"three"]
            assert isinstance(results[1], Error)
            assert (results[1].status, results[1].type) == (500, "WorkerDiedException")
            assert "signal 6 (SIGABRT)" in results[1].message
            assert served.metrics.restarts == {"signal 6 (SIGABRT)": 2}
            assert served.pool.failure is None

    uvloop.run(scenario())


def test_f8_without_retry_a_begun_job_fails(serve: Serve, make_gate: MakeGate) -> None:
    async def scenario(gate: Gate) -> None:
        async with serve("gate", retry=0) as served:
            outcome = served.submit(gate.body)
            await until(gate.begun)
            os.kill(served.pids[0], signal.SIGKILL)
            with pytest.raises(Error, match="retry is off for this model") as caught:
                await asyncio.wait_for(outcome, 5)
            assert caught.value.status == 503
            assert len(gate.begun()) == 1

    uvloop.run(scenario(make_gate()))


def test_f12_a_batch_that_takes_too_long_is_504_and_its_worker_killed(serve: Serve, make_gate: MakeGate) -> None:
    async def scenario(gate: Gate, second: Gate) -> None:
        async with serve("gate", response_timeout=0.2) as served:
            (pid,) = served.pids
            outcome, ahead = served.submit(gate.body), served.submit(second.body)
            second.open()
            with pytest.raises(Error, match="response_timeout") as caught:
                await asyncio.wait_for(outcome, 5)
            assert caught.value.status == 504
            assert int(await asyncio.wait_for(ahead, 5)) != pid
            assert not psutil.pid_exists(pid)
            assert (gate.begun(), len(second.begun())) == ([pid], 1)
            assert served.metrics.restarts == {"response_timeout": 1}

    uvloop.run(scenario(make_gate(), make_gate()))


def test_f12_a_stopped_worker_that_begins_nothing_is_504_and_killed(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison", response_timeout=0.2) as served:
            (pid,) = served.pids
            assert await served.submit(b"x") == b"x"
            os.kill(pid, signal.SIGSTOP)
            begun = time.monotonic()
            with pytest.raises(Error, match="response_timeout") as caught:
                await asyncio.wait_for(served.submit(b"y"), 5)
            assert caught.value.status == 504
            assert time.monotonic() - begun > 0.2
            assert await asyncio.wait_for(served.submit(b"z"), 5) == b"z"
            assert not psutil.pid_exists(pid)
            assert served.metrics.restarts == {"response_timeout": 1}

    uvloop.run(scenario())


def test_a_stopped_worker_costs_only_the_next_batch(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison", response_timeout=0.2) as served:
            for _ in range(8):
                await served.submit(b"x")  # so quick that several batches make a frame
            os.kill(served.pids[0], signal.SIGSTOP)
            outcomes = await asyncio.wait_for(
                asyncio.gather(*map(served.submit, (b"1", b"2", b"3")), return_exceptions=True), 5
            )
            assert isinstance(outcomes[0], Error) and outcomes[1:] == [b"2", b"3"]

    uvloop.run(scenario())


def test_settings_that_change_wake_those_who_wait_for_a_fuller_batch(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison", batch_size=8) as served:
            served.queue.max_batch_delay = 30.0
            waiting = served.submit(b"x")
            await asyncio.sleep(0)
            served.queue.max_batch_delay = 0.0
            served.pool.wake()
            assert await asyncio.wait_for(waiting, 5) == b"x"

    uvloop.run(scenario())


@pytest.mark.parametrize("body", [b"close", b"garbage", b"empty"])
def test_f20_f33_a_worker_that_breaks_its_channel_is_killed(serve: Serve, body: bytes) -> None:
    async def scenario() -> None:
        async with serve("closes_descriptors") as served:
            (pid,) = served.pids
            with pytest.raises(Error, match="its channel"):
                await asyncio.wait_for(served.submit(body), 5)
            assert await asyncio.wait_for(served.submit(b"good"), 5) == b"good"
            assert not psutil.pid_exists(pid)

    uvloop.run(scenario())


def test_f20_scaling_to_0_sends_nothing_to_a_worker_that_has_closed_its_channel(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("closes_descriptors") as served:
            for _ in range(20):  # quick ones, so that it would be sent work ahead
                await served.submit(b"good")
            outcomes = [served.submit(b"close")]
            await until(lambda: not served.pool.ready)
            outcomes.append(served.submit(b"good"))
            served.pool.set_target(0)
            for outcome in outcomes:
                with pytest.raises(ServiceUnavailableError, match="has no workers"):
                    await asyncio.wait_for(outcome, 5)

    uvloop.run(scenario())


def test_closing_waits_for_what_is_in_hand(serve: Serve, make_gate: MakeGate) -> None:
    async def scenario(gates: list[Gate]) -> None:
        async with serve("gate") as served:
            outcomes = [served.submit(gate.body) for gate in gates]
            await until(gates[0].begun)
            closing = asyncio.ensure_future(served.pool.close(10))
            await asyncio.sleep(0)
            assert not closing.done()
            for gate in gates:
                gate.open()
            await asyncio.wait_for(asyncio.gather(*outcomes), 5)
            await asyncio.wait_for(closing, 5)

    uvloop.run(scenario([make_gate() for _ in range(3)]))


def test_closing_waits_for_the_replacement_of_a_worker_that_dies_meanwhile(serve: Serve, make_gate: MakeGate) -> None:
    """Found by `make chaos`: those that waited were told that the version was unloaded."""

    async def scenario(first: Gate, second: Gate) -> None:
        async with serve("gate") as served:
            in_hand, waits = served.submit(first.body), served.submit(second.body)
            await until(first.begun)
            served.queue.close("model m 1 is being unloaded")
            closing = asyncio.ensure_future(served.pool.close(10))
            await asyncio.sleep(0)
            second.open()
            os.kill(served.pids[0], signal.SIGKILL)
            with pytest.raises(Error, match="the worker process died running this request"):
                await asyncio.wait_for(in_hand, 5)
            assert int(await asyncio.wait_for(waits, 5)) == second.begun()[0]
            await asyncio.wait_for(closing, 5)

    uvloop.run(scenario(make_gate(), make_gate()))


def test_no_thread_of_these_tests_is_left() -> None:
    assert [thread.name for thread in threading.enumerate() if not thread.daemon] == ["MainThread"]
