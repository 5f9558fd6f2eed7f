"""Where real workers run, on GPUs that are made up, and how their number follows the work."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from mms.config import Config
from mms.controlplane import ControlPlane
from mms.errors import ConfigError
from mms.instances import parse_instances
from mms.models.registry import ModelRegistry
from mms.models.store import ModelStore
from mms.rundir import CacheDirectory
from mms.workers.autoscaler import Bounds
from mms.workers.gpus import Gpu
from mms.workers.placement import Place, Placement
from tests.conftest import MakeArchive, MakeGate
from tests.gates import Gate
from tests.processes.pools import Serve, Served, serve, subreaper, until

__all__ = ["serve", "subreaper"]

GPUS = [Gpu(0, "GPU-a"), Gpu(1, "MIG-b")]
GROUPS = [{"kind": "gpu", "gpus": [1]}, {"kind": "cpu", "threads": 2}]


def placement() -> Placement:
    on_gpus, on_cpu = parse_instances(GROUPS)
    return Placement([(on_gpus, [Place(GPUS[1])]), (on_cpu, [Place(None, 2, hides_gpus=True)])])


def places(served: Served) -> dict[int, str]:
    return {worker.pid or 0: worker.place.kind for worker in served.pool.ready_workers}


async def replaced(served: Served, pid: int) -> None:
    """Kill a worker and wait for the one that comes for it."""
    before = len(served.pids)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: pid not in served.pids and len(served.pids) == before)


def test_each_worker_sees_its_own_device_and_its_replacement_the_same(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("tells_its_place", workers=2, placement=placement()) as served:
            for gone in ("gpu", "cpu"):
                told = {await served.submit(b"") for _ in range(20)}
                assert told <= {b"cuda:0 MIG-b", b"cpu "}
                before = places(served)
                assert sorted(before.values()) == ["cpu", "gpu"]
                await replaced(served, next(pid for pid, kind in before.items() if kind == gone))
                assert sorted(places(served).values()) == ["cpu", "gpu"]
            await served.scale(1)
            assert await served.submit(b"") == b"cuda:0 MIG-b", "the last place was given up first"

    uvloop.run(scenario())


def test_workers_come_for_a_queue_and_go_when_it_is_gone(serve: Serve, make_gate: MakeGate) -> None:
    async def scenario(gate: Gate) -> None:
        async with serve("gate") as served:
            served.pool.set_target(1, Bounds(1, 3, up_after=0.3, down_after=0.5))
            outcomes = [served.submit(gate.body) for _ in range(6)]
            await until(lambda: len(served.pids) == 3)
            assert served.pool.scaling.minimum == 1, "only the first was asked for"
            gate.open()
            await asyncio.gather(*outcomes)
            await until(lambda: len(served.pids) == 1 == len(served.pool.workers))
            assert served.metrics.scalings == {"up": 2, "down": 1}
            assert served.metrics.restarts == {}

    uvloop.run(scenario(make_gate()))


def test_the_first_request_brings_a_worker_and_idleness_takes_it(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison", workers=0) as served:
            served.pool.set_target(0, Bounds(0, 1, zero_after=0.3, on_request=True))
            assert served.pool.scaling.asleep
            for _ in range(2):
                served.pool.rouse()
                assert await asyncio.wait_for(served.submit(b"x"), 5) == b"x"
                await until(lambda: not served.pool.workers)
                assert served.pool.scaling.asleep
            assert served.metrics.scalings == {"up": 2, "down": 2}

    uvloop.run(scenario())


def test_f114_who_is_woken_waits_for_others_that_load_and_who_is_replaced_does_not(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison", workers=0, parallel_loads=1) as served:
            served.pool.set_target(0, Bounds(0, 1, on_request=True))
            await served.loads.acquire()  # another model loads
            served.pool.rouse()
            waiting = served.submit(b"x")
            await asyncio.sleep(0)
            served.loads.release()
            assert served.loads.locked(), "it did not wait for its turn"
            assert await asyncio.wait_for(waiting, 5) == b"x"
            async with served.loads:
                await replaced(served, served.pids[0])

    uvloop.run(scenario())


def test_requests_do_not_wake_what_nobody_asked_to_be_woken(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison", workers=0) as served:
            served.pool.set_target(0, Bounds(0, 2))
            served.pool.rouse()
            assert (served.pool.target, served.pool.workers) == (0, [])

    uvloop.run(scenario())


@contextlib.asynccontextmanager
async def control_plane(archive: Path, folder: Path, **settings: Any) -> AsyncIterator[ControlPlane]:
    """One that sees the GPUs made up above."""
    cache = CacheDirectory(folder)
    cache.acquire(None)
    config = Config(model_store=archive.parent, run_dir=folder, workers=-1, **settings)
    control = ControlPlane(config, ModelRegistry(), ModelStore(config.model_store), cache)
    control.pools.gpus = GPUS
    try:
        yield control
    finally:
        await control.close(0)
        cache.release()


def test_a_description_shows_which_worker_runs_where(make_archive: MakeArchive, tmp_path: Path) -> None:
    archive = make_archive("tells_its_place", min_workers=-1, instances=GROUPS)

    async def scenario() -> None:
        async with control_plane(archive, tmp_path) as control:
            version = await control.register(archive.name)
            assert version.pool is not None and version.gpus == [GPUS[1]]
            on_gpu = next(worker.pid for worker in version.pool.workers if worker.gpu is not None)
            version.gpu_memory = {on_gpu or 0: 4096, -1: 1}
            described = version.describe()
            assert described["instances"] == [
                {"kind": "gpu", "count": 1, "gpus": [1], "threads": 1},
                {"kind": "cpu", "count": 1, "threads": 2},
            ]
            assert (described["minWorkers"], described["maxWorkers"]) == (2, 2)
            facts = ("kind", "gpu", "gpuId", "gpuUuid", "threads", "gpuMemoryUsage")
            workers = [{name: worker.get(name) for name in facts} for worker in described["workers"]]
            assert workers == [
                dict(zip(facts, ("gpu", True, 1, "MIG-b", 1, 4096), strict=True)),
                dict(zip(facts, ("cpu", False, None, None, 2, None), strict=True)),
            ]
            assert all(worker["memoryUsage"] > 0 for worker in described["workers"])

    uvloop.run(scenario())


def test_a_group_on_a_device_that_is_not_there_is_refused(make_archive: MakeArchive, tmp_path: Path) -> None:
    archive = make_archive("tells_its_place", min_workers=-1)
    wrong = {"instances": [{"kind": "gpu", "gpus": [0, 4, "GPU-x"]}]}
    message = "gpus: 4, GPU-x do not exist; this server sees: 0 .GPU-a., 1 .MIG-b."

    async def scenario() -> None:
        async with control_plane(archive, tmp_path) as control:
            with pytest.raises(ConfigError, match=message):
                await control.register(archive.name, changes=wrong)
            assert not control.registry.versions()

    uvloop.run(scenario())


def test_the_servers_instances_are_those_of_models_that_say_nothing(make_archive: MakeArchive, tmp_path: Path) -> None:
    archive = make_archive("tells_its_place", min_workers=-1)

    async def scenario() -> None:
        async with control_plane(archive, tmp_path, instances=parse_instances(GROUPS)) as control:
            version = await control.register(archive.name, changes={"min_workers": 0})
            assert version.pool is not None and version.pool.placement.size == 2
            version = await control.register(archive.name, name="b", changes={"device": "cpu", "min_workers": 0})
            assert version.pool is not None and version.pool.placement.gpus == ()

    uvloop.run(scenario())


def test_at_most_so_many_workers_is_a_bound_for_the_plan(make_archive: MakeArchive, tmp_path: Path) -> None:
    archive = make_archive("tells_its_place", min_workers=-1, instances=[{"kind": "cpu", "count": 3}])

    async def scenario() -> None:
        async with control_plane(archive, tmp_path) as control:
            version = await control.register(archive.name, changes={"max_workers": 1})
            assert (version.settings.min_workers, version.settings.max_workers) == (1, 1)

    uvloop.run(scenario())
