"""A WorkerPool with real workers and real fork servers, without HTTP: what tests of pools share."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import os
import resource
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mms import wire
from mms.archive import ModelArchive
from mms.config import Config
from mms.errors import MMSError as Error
from mms.instances import InstanceGroup
from mms.metrics import VersionMetrics
from mms.workers import environment
from mms.workers.batching import BatchQueue
from mms.workers.forkserver import ForkServers
from mms.workers.job import Job, StreamCaller
from mms.workers.placement import Place, Placement
from mms.workers.pool import WorkerPool
from mms.workers.process import Launch, prepare_process
from mms.workers.restarts import Restarts
from mms.workers.sandbox import Sandboxes
from mms.workers.settings import PoolSettings
from tests.conftest import MakeArchive
from tests.waiting import T, eventually

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

    def submit(self, body: bytes, caller: Caller | None = None) -> asyncio.Future[bytes]:
        self._ids += 1
        facts = wire.RequestFacts("", "", b"", False, [])
        caller = caller or Caller()
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
