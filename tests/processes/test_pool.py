"""A WorkerPool with real workers and real fork servers, without HTTP: scale, deaths, retries, time limits, output."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import itertools
import logging
import os
import resource
import signal
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from mms import wire
from mms.archive import ModelArchive
from mms.config import Config
from mms.errors import MMSError as Error
from mms.errors import ModelLoadError, QueueFullError, ServiceUnavailableError
from mms.instances import InstanceGroup
from mms.metrics import VersionMetrics
from mms.workers import environment
from mms.workers.autoscaler import Bounds
from mms.workers.batching import BatchQueue
from mms.workers.forkserver import ForkServers
from mms.workers.job import Job, StreamCaller
from mms.workers.output import KEPT_LINES, MAX_LINE, MAX_PER_SECOND, OutputReader
from mms.workers.placement import Place, Placement
from mms.workers.pool import WorkerPool
from mms.workers.process import Launch, prepare_process
from mms.workers.restarts import Restarts
from mms.workers.sandbox import Sandboxes
from mms.workers.settings import PoolSettings
from tests.conftest import Gate, MakeArchive, MakeGate, T, eventually

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


class Caller:
    """Turns a job's one outcome into a future."""

    def __init__(self) -> None:
        self.outcome: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def begin(self, status: int, head: bytes) -> StreamCaller:
        raise AssertionError("nothing streams here")

    def answer(self, status: int, head: bytes, body: bytes | memoryview) -> None:
        self.outcome.set_result(bytes(body))

    def fail(self, error: Error) -> None:
        self.outcome.set_exception(error)


class Served:
    """One pool and what surrounds it in a server."""

    def __init__(self, folder: Path, handler: str, forkservers: ForkServers, scratch: Path, **how: Any) -> None:
        self.forkservers = forkservers
        self.metrics = VersionMetrics()
        self.queue = BatchQueue(
            batch_size=how.get("batch_size", 1),
            max_batch_delay=0.0,
            capacity=how.get("capacity", 100),
            timeout=how.get("queue_timeout", 20.0),
            retry=how.get("retry", 1),
        )
        load = wire.Load(
            model_name="m", version="1", directory=str(folder), handler=handler, manifest={},
            model_config=how.get("model_config", {}), batch_size=1, isolate_errors="auto", gpu=None,
            cpu_threads=how.get("cpu_threads", 1), max_request_size=1 << 20, max_response_size=16 << 20,
            threads=how.get("threads", 1), preprocess_threads=how.get("preprocess_threads", 0),
            preparation=how.get("preparation", wire.Preparation()),
        )  # fmt: skip
        launch = Launch(
            name="mms-m",
            directory=str(folder),
            environ=environment.worker_environment(()),
            preload=how.get("preload", ()),
            scratch=scratch,
            sandbox=how.get("sandbox", wire.Sandbox()),
            interpreter=how.get("interpreter"),
        )
        settings = PoolSettings(
            label="m 1",
            load=load,
            launch=launch,
            interpreter=how.get("make_interpreter"),
            placement=how.get("placement", Placement([(InstanceGroup("cpu"), [Place(None, how.get("threads", 1))])])),
            response_timeout=how.get("response_timeout", 20.0),
            startup_timeout=how.get("startup_timeout", 20.0),
            stop_grace=how.get("stop_grace", 0.5),
            max_requests=how.get("max_requests", 0),
            max_rss=how.get("max_rss", 0),
            share_weights=how.get("share_weights", False),
        )
        self.loads = asyncio.Semaphore(how.get("parallel_loads", 4))
        self.pool = WorkerPool(settings, self.queue, self.metrics, forkservers, self.loads, Restarts())
        self._ids = 0

    async def scale(self, count: int) -> None:
        """Run `count` workers; returns when that many are ready."""
        self.pool.set_target(count)
        await self.pool.settled()

    def submit(self, body: bytes) -> asyncio.Future[bytes]:
        self._ids += 1
        facts = wire.RequestFacts("", "", b"", False, [])
        caller = Caller()
        self.pool.submit(Job(self._ids, facts, b"id-%d" % self._ids, [body], len(body), caller, time.monotonic()))
        return caller.outcome

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self.pool.workers if worker.pid and worker.state == "READY"]


async def until(predicate: Callable[[], T], within: float = 5.0) -> T:
    """As eventually, beside a running event loop."""
    return await asyncio.to_thread(eventually, predicate, within)


@pytest.fixture(autouse=True)
def subreaper() -> Iterator[None]:
    """This process plays the server: orphans become its children; afterwards it is as before, and none is left."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    known = set(psutil.Process().children())
    prepare_process()
    yield
    eventually(lambda: not others(known))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def others(known: set[psutil.Process]) -> list[psutil.Process]:
    """Children that have come since; the dead ones are buried."""
    found = [child for child in psutil.Process().children() if child not in known]
    for child in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, 0)
    return found


Serve = Callable[..., contextlib.AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve(make_archive: MakeArchive, tmp_path: Path) -> Serve:
    """A pool for one of tests/archives; closed at the end, with nothing left in flight."""

    numbers = itertools.count()

    @contextlib.asynccontextmanager
    async def begin(name: str, *, workers: int = 1, **how: Any) -> AsyncIterator[Served]:
        archive = ModelArchive.open(make_archive(name))
        folder = tmp_path / f"{name}-{next(numbers)}"
        archive.extract(folder)
        forkservers = ForkServers()
        if "sandbox" in how and how["sandbox"].uid != -1:
            Sandboxes(Config(worker_user=str(how["sandbox"].uid)), tmp_path).hand_over(folder)
        scratch = tmp_path / f"scratch-{next(numbers)}"
        scratch.mkdir()
        served = Served(folder, archive.manifest.handler, forkservers, scratch, **how)
        try:
            if workers:
                await served.scale(workers)
            yield served
        finally:
            await served.pool.close(0)
            for job, error in served.queue.abandon(Error("the test is over")):
                served.pool.fail(job, error)
            forkservers.close()
            assert (served.pool.in_flight, served.pool.workers) == (0, [])
            await until(lambda: not list(scratch.iterdir()))

    return begin


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


def test_a_worker_that_starts_gets_its_share_of_the_cores(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mms.workers.environment.cores", lambda: 6)

    async def scenario() -> None:
        async with serve("tells_threads", cpu_threads=0) as served:
            (first,) = served.pids
            assert await served.submit(b"") == b"6"
            await served.scale(2)
            assert served.pool.cpu_threads == 3
            assert first in served.pids, "the others go on as they are"
            os.kill(first, signal.SIGKILL)
            await until(lambda: len(served.pids) == 2 and first not in served.pids)
            assert {await served.submit(b"") for _ in range(4)} == {b"3"}

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


def test_an_interpreter_that_cannot_be_made_fails_the_version_until_it_can(serve: Serve) -> None:
    tries = []

    async def make() -> str:
        tries.append(served_pools[0].installing)
        if len(tries) == 1:
            raise ModelLoadError(
                "the requirements of m 1 cannot be installed: no such package", traceback="pip's words"
            )
        return sys.executable

    served_pools: list[WorkerPool] = []

    async def scenario() -> None:
        async with serve("poison", workers=0, make_interpreter=make) as served:
            served_pools.append(served.pool)
            with pytest.raises(ModelLoadError, match="no such package"):
                await served.scale(2)
            assert (served.pool.failure is not None, served.pool.missing, tries) == (True, 2, [True])
            await served.scale(2)
            assert (served.pool.missing, tries) == (0, [True, True]), "made once for both"
            assert served.forkservers.pids() == []
            assert await served.submit(b"x") == b"x"

    uvloop.run(scenario())


def test_f9_who_waits_for_a_version_that_becomes_failed_is_told_at_once(serve: Serve, tmp_path: Path) -> None:
    mended = tmp_path / "mended"
    mended.touch()

    async def scenario() -> None:
        async with serve("mends", model_config={"mended": str(mended)}) as served:
            mended.unlink()
            os.kill(served.pids[0], signal.SIGKILL)
            await until(lambda: not served.pool.ready)
            with pytest.raises(Error, match="m 1 failed to load; its description") as caught:
                await asyncio.wait_for(served.submit(b"x"), 10)
            assert (caught.value.status, served.queue.depth) == (503, 0)
            mended.touch()
            await served.scale(1)
            assert await served.submit(b"x") == b"x"

    uvloop.run(scenario())


@pytest.mark.parametrize(
    ("name", "message", "words"),
    [
        ("crashes_on_load", "the handler of m 1 failed to load: RuntimeError: the weights are missing", "initialize"),
        ("dies_on_load", "a worker of m 1 ended before it was ready: exit code 3", "these are my last words"),
    ],
)
def test_f9_a_pool_that_cannot_boot_is_failed(
    serve: Serve, name: str, message: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serve(name, workers=0) as served:
            with pytest.raises(ModelLoadError) as caught:
                await served.scale(1)
            assert caught.value.message == message
            assert words in caught.value.traceback
            assert served.pool.failure is caught.value
            assert (served.pool.workers, served.pool.missing) == ([], 1)

    with caplog.at_level(logging.INFO, "mms"):
        uvloop.run(scenario())
    assert len([record for record in caplog.records if "FAILED after 3 tries" in record.message]) == 1


def test_f9_a_failed_pool_tries_again_on_request(serve: Serve, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve("mends", workers=0, model_config={"mended": str(tmp_path / "mended")}) as served:
            with pytest.raises(ModelLoadError, match="not mended yet"):
                await served.scale(1)
            (tmp_path / "mended").touch()
            await served.scale(1)
            assert served.pool.failure is None
            assert await served.submit(b"x") == b"x"

    uvloop.run(scenario())


def test_f35_a_load_that_takes_too_long_is_failed(serve: Serve, tmp_path: Path) -> None:
    async def scenario() -> None:
        config = {"gate": str(tmp_path / "never")}
        async with serve("loads_slowly", workers=0, startup_timeout=0.2, model_config=config) as served:
            with pytest.raises(ModelLoadError, match=r"startup_timeout \(0.2 s\)"):
                await served.scale(1)

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


def test_f36_workers_outlive_their_fork_server_and_a_new_one_is_started(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison", workers=2) as served:
            before, (forkserver,) = served.pids, served.forkservers.pids()
            os.kill(forkserver, signal.SIGKILL)
            for _ in range(20):
                assert await served.submit(b"x") == b"x"
            assert served.pids == before
            os.kill(before[0], signal.SIGKILL)
            await until(lambda: len(served.pids) == 2 and before[0] not in served.pids)
            assert before[1] in served.pids
            assert served.forkservers.pids() != [forkserver]

    uvloop.run(scenario())


def test_preloaded_modules_are_there_before_the_handler(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("uses_preload", preload=("colorsys",)) as served:
            assert await served.submit(b"") == b"True"
        async with serve("uses_preload") as served:
            assert await served.submit(b"") == b"False"

    uvloop.run(scenario())


def test_f40_a_preload_that_fails_is_named_once_and_workers_start(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serve("poison", workers=2, preload=("colorsys", "no_such_module")) as served:
            assert await served.submit(b"x") == b"x"

    with caplog.at_level(logging.WARNING, "mms"):
        uvloop.run(scenario())
    warnings = [record.message for record in caplog.records if "preload failed" in record.message]
    assert warnings == [
        "preload failed, workers import it themselves: "
        "no_such_module: ModuleNotFoundError: No module named 'no_such_module'"
    ]


def test_a_worker_may_have_an_interpreter_of_its_own(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison", interpreter=sys.executable) as served:
            (pid,) = served.pids
            assert served.forkservers.pids() == []
            os.kill(pid, signal.SIGKILL)
            assert await asyncio.wait_for(served.submit(b"x"), 10) == b"x"

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


def test_f22_f23_what_workers_print_is_logged_within_bounds(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serve("prints_a_lot") as served:
            assert await asyncio.wait_for(served.submit(b"0"), 5) == b"printed"
            output = served.pool.workers[0].output
            assert output is not None
            await until(lambda: "last line" in output.last_lines)
            assert "\\xff\\x00\\x1b[31m" in output.last_lines
            assert await asyncio.wait_for(served.submit(b"50"), 10) == b"printed", "a flood does not block the worker"
            assert sum(map(len, output.last_lines)) <= KEPT_LINES * MAX_LINE

    with caplog.at_level(logging.INFO, "mms.model.m"):
        uvloop.run(scenario())
    lines = [record.getMessage() for record in caplog.records if record.name == "mms.model.m"]
    assert all(line.startswith("[m 1 pid ") for line in lines)
    assert max(map(len, lines)) <= MAX_LINE * 4 + 100
    assert sum(map(len, lines)) < 10 * MAX_PER_SECOND


def test_dropped_output_is_counted(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("mms.workers.output.time.monotonic", lambda: now)
    reader = OutputReader(logging.getLogger("mms.model.x"), "x 1 pid 1")
    with caplog.at_level(logging.INFO, "mms.model.x"):
        reader.feed(b"y" * (MAX_PER_SECOND + 1) + b"\n")
        assert not caplog.records
        now = 101.0
        reader.feed(b"again\n")
    assert f"{MAX_PER_SECOND + 2} bytes of output dropped" in caplog.records[0].getMessage()
    assert caplog.records[1].getMessage() == "[x 1 pid 1] again"


def test_a_pipe_is_closed_once(tmp_path: Path) -> None:
    """Its number may be somebody else's as soon as it is closed."""

    async def scenario() -> None:
        reader = OutputReader(logging.getLogger("mms.model.x"), "x 1 pid 1")
        read_end, write_end = os.pipe()
        reader.start(read_end)
        os.write(write_end, b"last words")
        os.close(write_end)
        await until(lambda: list(reader.last_lines) == ["last words"])
        other = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
        assert other == read_end
        reader.finish()
        os.write(other, b"still open")
        os.close(other)

    uvloop.run(scenario())


def test_no_thread_of_these_tests_is_left() -> None:
    assert [thread.name for thread in threading.enumerate() if not thread.daemon] == ["MainThread"]


@pytest.mark.parametrize("state", ["not begun", "launching", "attaching"])
def test_f52_a_pool_that_is_closed_while_its_workers_start_leaves_nothing(serve: Serve, state: str) -> None:
    """Found by `make chaos`: a version whose hung worker was replaced at the end of its draining never went."""

    async def scenario() -> None:
        async with serve("echo") as served:
            served.pool.set_target(3)
            for _ in range(0 if state == "not begun" else 1_000_000):
                await asyncio.sleep(0)
                if state == "launching" or any(
                    worker.state == "STARTING" and worker.process for worker in served.pool.workers
                ):
                    break
            async with asyncio.timeout(5):
                await served.pool.close(0)
            assert served.pool.workers == []

    uvloop.run(scenario())


# several batches at a time


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
