"""share_weights with real processes: workers forked from the one that has loaded, its death, and doing without."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from mms import wire
from mms.backend.sandbox import LANDLOCK_ABI, landlock_abi
from mms.errors import ModelLoadError
from tests.faults.misbehaving import MODULES, make_folder_public
from tests.processes.pools import Serve, Served, serve, subreaper, until

__all__ = ["make_folder_public", "serve", "subreaper"]


async def facts(served: Served, workers: int) -> list[dict[str, Any]]:
    """What each worker says of itself."""
    found: dict[int, dict[str, Any]] = {}
    while len(found) < workers:
        answers = await asyncio.gather(*(served.submit(b"") for _ in range(workers * 2)))
        found |= {fact["pid"]: fact for fact in map(json.loads, answers)}
    return list(found.values())


def template_of(served: Served) -> int:
    template = served.pool.starter.template
    assert template is not None and template.pid is not None
    return template.pid


def private(pid: int) -> int:
    lines = read(pid, "smaps_rollup").splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def test_workers_share_what_one_process_has_loaded(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("shares", workers=3, share_weights=True, cpu_threads=2) as served:
            told = await facts(served, 3)
            template = template_of(served)
            assert {fact["loaded_by"] for fact in told} == {template}
            assert {fact["forked"] for fact in told} == set(served.pids)
            assert len({fact["random"] for fact in told}) == len({fact["temporary"] for fact in told}) == 3
            assert {(fact["first"], fact["threads"]) for fact in told} == {(True, "2")}
            assert served.metrics.tallies.values["loaded", "counter", ()] == 1  # initialize has run once
            for pid in served.pids:
                assert private(pid) < 16 << 20 < psutil.Process(pid).memory_info().rss
                assert psutil.Process(pid).ppid() == os.getpid() and os.getsid(pid) == pid
                assert psutil.Process(pid).name() == "mms-m"
                assert read(pid, "oom_score_adj") == read(template, "oom_score_adj")

    uvloop.run(scenario())


def test_a_dead_worker_is_forked_anew_without_loading(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("shares", share_weights=True) as served:
            template, (first,) = template_of(served), served.pids
            os.kill(first, signal.SIGKILL)
            await until(lambda: served.pids and served.pids != [first])
            assert [fact["loaded_by"] for fact in await facts(served, 1)] == [template]

    uvloop.run(scenario())


def test_a_template_that_dies_costs_no_worker_and_is_replaced_when_one_is_needed(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serve("shares", share_weights=True) as served:
            template, (first,) = template_of(served), served.pids
            with caplog.at_level(logging.WARNING):
                os.kill(template, signal.SIGKILL)
                await until(lambda: not psutil.pid_exists(template))
            said = f"m 1: template (pid {template}) died: signal 9 (SIGKILL); another is started for the next worker"
            assert caplog.messages == [said]
            starter = served.pool.starter
            assert served.pids == [first] and starter.template is not None and starter.template.pid is None
            await served.scale(2)
            told = await facts(served, 2)
            assert {fact["loaded_by"] for fact in told} == {template, template_of(served)}

    uvloop.run(scenario())


def test_a_template_that_does_not_load_is_a_load_error(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("shares", workers=0, share_weights=True, model_config={"raises": True}) as served:
            with pytest.raises(ModelLoadError) as raised:
                await served.scale(1)
            assert raised.value.message == "the handler of m 1 failed to load: ValueError: no weights here"
            assert "initialize" in raised.value.traceback

    uvloop.run(scenario())


def test_a_template_that_takes_too_long_is_killed(serve: Serve, tmp_path: Path) -> None:
    async def scenario() -> None:
        never = {"gate": str(tmp_path / "never")}
        async with serve(
            "loads_slowly", workers=0, share_weights=True, startup_timeout=0.3, model_config=never
        ) as served:
            with pytest.raises(ModelLoadError, match=r"not ready within startup_timeout \(0.3 s\)"):
                await served.scale(1)

    uvloop.run(scenario())


def test_a_handler_that_starts_threads_is_loaded_by_each_worker(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serve("shares", workers=2, share_weights=True, model_config={"threads": True}) as served:
            told = await facts(served, 2)
            assert {fact["loaded_by"] for fact in told} == set(served.pids)
            assert {fact["forked"] for fact in told} == {0}

    uvloop.run(scenario())
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    said = "m 1: share_weights cannot be: its handler has started threads (1); workers load by themselves"
    assert warnings == [said]


def test_a_pool_that_is_scaled_to_zero_gives_the_memory_back(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("shares", share_weights=True) as served:
            template = template_of(served)
            await served.scale(0)
            await until(lambda: not psutil.pid_exists(template))
            await served.scale(1)
            assert template_of(served) != template

    uvloop.run(scenario())


@pytest.mark.skipif(landlock_abi() < LANDLOCK_ABI, reason="needs Linux 6.2 with Landlock")
def test_forked_workers_are_in_the_sandbox_of_their_template(serve: Serve) -> None:
    async def scenario() -> None:
        box = wire.Sandbox(files=True, network=False)
        async with serve("shares", workers=2, share_weights=True, sandbox=box) as served:
            told = await facts(served, 2)
            template = template_of(served)
            assert {fact["loaded_by"] for fact in told} == {template}
            assert all(fact["home"] == fact["temporary"] for fact in told)
            for pid in served.pids:
                status = read(pid, "status")
                assert "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status

    uvloop.run(scenario())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_forked_workers_are_the_user_that_their_template_is(serve: Serve, make_folder_public: None) -> None:
    async def scenario() -> None:
        box = wire.Sandbox(uid=65534, gid=65534, groups=(65534,))
        async with serve("shares", share_weights=True, sandbox=box, preload=MODULES) as served:
            (told,) = await facts(served, 1)
            assert told["home"] == told["temporary"]
            for pid in (template_of(served), *served.pids):
                assert psutil.Process(pid).uids().effective == 65534

    uvloop.run(scenario())
