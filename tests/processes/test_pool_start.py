"""How the workers of a pool start: fork servers, preloaded modules, interpreters, and what fails."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import signal
import sys
from pathlib import Path

import pytest
import uvloop

from mms.errors import MMSError as Error
from mms.errors import ModelLoadError
from mms.workers.forkprocess import ForkProcess
from mms.workers.forkserver import ForkServers
from mms.workers.pool import WorkerPool
from tests.processes.pools import Serve, serve, subreaper, until

__all__ = ["serve", "subreaper"]


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


@pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("numpy", "torch", "threadpoolctl")), reason="needs torch and scikit-learn"
)
@pytest.mark.parametrize(("preload", "blas", "torch"), [(("numpy",), 3, 0), (("numpy", "torch"), 1, 3)])
def test_what_is_preloaded_gets_the_cpu_threads_but_numpy_one_beside_torch(
    serve: Serve, preload: tuple[str, ...], blas: int, torch: int
) -> None:
    async def scenario() -> None:
        async with serve("tells_blas", cpu_threads=3, preload=preload) as served:
            assert json.loads(await served.submit(b"")) == [blas, torch]

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


def test_f36_workers_outlive_their_fork_server_and_a_new_one_is_started(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
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
    (line,) = [record.message for record in caplog.records if "fork server" in record.message]
    assert line.startswith("the fork server (preload: nothing) died: signal 9 (SIGKILL)")


def test_the_first_fork_server_that_is_needed_is_the_one_that_was_started_ahead(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("uses_preload", workers=0, preload=("colorsys",)) as served:
            ahead = served.forkservers.ahead = ForkProcess()
            served.forkservers.begin(("colorsys",))
            await served.scale(1)
            assert served.forkservers.pids() == [ahead.process.pid]
            assert await served.submit(b"") == b"True"

    uvloop.run(scenario())


def test_a_fork_server_that_nobody_has_needed_ends_with_the_others() -> None:
    forkservers = ForkServers()
    ahead = forkservers.ahead = ForkProcess()
    assert forkservers.pids() == [ahead.process.pid]
    forkservers.close()
    assert ahead.process.returncode == -signal.SIGKILL


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
