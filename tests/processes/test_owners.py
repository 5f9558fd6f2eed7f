"""share_weights on a GPU, whose part the CPU plays: real workers and owners, and torch tensors that stay on the CPU."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal

import psutil
import pytest
import uvloop

from mms.errors import ModelLoadError
from mms.instances import InstanceGroup
from mms.workers.gpus import Gpu
from mms.workers.owners import Owners
from mms.workers.placement import Place, Placement
from tests.processes.pools import Serve, Served, serve, subreaper, until
from tests.processes.test_template import facts, private

__all__ = ["serve", "subreaper"]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")

GPUS = Place(Gpu(0, "GPU-a")), Place(Gpu(1, "GPU-b"))
PLAN = Placement([(InstanceGroup("gpu", count=2), GPUS[:1]), (InstanceGroup("gpu"), GPUS[1:])])
WEIGHTS = 64 << 20  # far more than two workers differ in otherwise


def owners_of(served: Served) -> Owners:
    assert served.pool.starter.owners is not None
    return served.pool.starter.owners


def owner_of(served: Served) -> int:
    (owner,) = owners_of(served).describe()
    assert owner["gpuId"] == 0 and owner["weights"] == WEIGHTS
    return int(owner["pid"])


def test_f113_workers_on_one_gpu_have_one_copy_and_are_replaced_when_its_owner_has_died(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        how = {"share_weights": True, "placement": PLAN, "preload": ("torch",)}
        async with serve("lends", workers=3, **how, model_config={"asks": True}) as served:
            alone, *others = sorted(await facts(served, 3), key=lambda fact: fact["asked"])
            owner = owner_of(served)
            assert not alone["asked"] and alone["weights_of"] == alone["pid"]  # it has its GPU to itself
            assert {fact["weights_of"] for fact in others} == {owner} and all(fact["asked"] for fact in others)
            borrowed = {worker.pid: worker.borrowed for worker in served.pool.workers}
            assert borrowed == {alone["pid"]: 0, **{fact["pid"]: WEIGHTS for fact in others}}
            assert all(private(fact["pid"]) < private(alone["pid"]) - WEIGHTS // 2 for fact in others)

            gone = others[0]["pid"]
            os.kill(gone, signal.SIGKILL)
            await until(lambda: len(served.pids) == 3 and gone not in served.pids)
            assert owner in {fact["weights_of"] for fact in await facts(served, 3)} and owner_of(served) == owner

            orphans = set(served.pids) - {alone["pid"]}
            caplog.clear()
            os.kill(owner, signal.SIGKILL)
            fewest = 3
            while orphans & set(served.pids):
                fewest = min(fewest, len(served.pool.ready_workers))
                await served.submit(b"")
            assert fewest == 3 and served.metrics.restarts["owner_died"] == 2
            told = await facts(served, 3)
            assert {fact["weights_of"] for fact in told} == {owner_of(served), alone["pid"]} and alone in told
            said = f"m 1: owner (pid {owner}) died: signal 9 (SIGKILL); another is started for the next worker"
            assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [said]

            owner = owner_of(served)
            await served.scale(0)
            await until(lambda: not psutil.pid_exists(owner))

    uvloop.run(scenario())


@pytest.mark.slow
def test_weights_that_do_not_fit_stay_with_each_worker_and_that_is_said_once(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        how = {"share_weights": True, "placement": Placement([(InstanceGroup("gpu", count=2), GPUS[:1])])}
        config = {"differs": True}
        async with serve("lends", workers=2, **how, preload=("torch",), model_config=config) as served:
            assert all(fact["weights_of"] == fact["pid"] for fact in await facts(served, 2))
            await until(lambda: not owners_of(served).pids)
            config["asks"] = True
            with pytest.raises(ModelLoadError, match=r"lends do not fit: network\.own is"):
                async with serve("lends", workers=2, **how, preload=("torch",), model_config=config):
                    pass

    with caplog.at_level(logging.WARNING, "mms.template"):
        uvloop.run(scenario())
    said = [record.message for record in caplog.records if record.name == "mms.template"]
    assert len(said) == 1
    assert said[0].startswith("m 1: share_weights cannot be on GPU 0: network.own is float32 [")
    assert said[0].endswith("] on cpu in the owner; workers keep what they load")
