"""Faults of fork servers (rows F39 to F45)."""

from __future__ import annotations

import logging
import os
import resource
import signal
from functools import partial
from pathlib import Path

import psutil
import pytest
import uvloop

from mms.workers import forkserver
from tests.faults.misbehaving import serves
from tests.processes.pools import Serve, serve, subreaper, until

__all__ = ["serve", "subreaper"]


def is_zombie(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_f39_a_stopped_fork_server_is_replaced(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "REPLY_LIMIT", 0.3)

    async def scenario() -> None:
        async with serve("misbehaves") as served:
            (stopped,) = served.forkservers.pids()
            os.kill(stopped, signal.SIGSTOP)
            assert await serves(served)
            await served.scale(2)
            assert served.forkservers.pids() != [stopped]
            assert [facts.last_cause for facts in served.forkservers.facts()] == ["no answer"]
            assert not psutil.pid_exists(stopped)

    uvloop.run(scenario())


def test_a_fork_server_that_cannot_be_kept_is_done_without(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serve("misbehaves") as served:
            for _ in range(forkserver.DEATHS + 1):
                (pid,) = served.forkservers.pids()
                os.kill(pid, signal.SIGKILL)
                await until(partial(is_zombie, pid))
                await served.scale(1)
                await served.scale(2)
            assert served.forkservers.pids() == []
            assert (served.pool.ready, served.pool.starter.forkserver_deaths) == (2, forkserver.DEATHS + 1)
            assert 0 < served.pool.starter.forkserver_back_in <= forkserver.DEATH_WINDOW
            (facts,) = served.forkservers.facts()
            assert (facts.spent, facts.causes) == (True, {"signal 9 (SIGKILL)": forkserver.DEATHS + 1})
            assert await serves(served)

    with caplog.at_level(logging.WARNING, "mms"):
        uvloop.run(scenario())
    lines = [record.message for record in caplog.records if "as fresh interpreters" in record.message]
    assert len(lines) == 1


def test_f41_what_a_preload_prints_is_not_in_the_workers_logs(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "talkative.py").write_text("print('from the preload', end='')\n")
    monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:{tmp_path}")

    async def scenario() -> None:
        async with serve("misbehaves", workers=2, preload=("talkative",)) as served:
            assert await serves(served)

    with caplog.at_level(logging.INFO, "mms"):
        uvloop.run(scenario())
    assert "from the preload" not in caplog.text


def test_f42_a_preload_that_starts_threads_is_not_forked_from(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:{tmp_path}")

    async def scenario() -> None:
        async with serve("misbehaves", preload=("threaded",)) as served:
            assert await serves(served)

    with caplog.at_level(logging.WARNING, "mms"):
        uvloop.run(scenario())
    assert "preloading threaded started threads; its workers start as fresh interpreters" in caplog.text


def test_f43_a_fork_that_fails_is_a_cause_and_no_more(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves") as served:
            (pid,) = served.forkservers.pids()
            limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (5, limits[1]))  # no room for a pidfd
            await served.scale(2)
            assert await serves(served)

    uvloop.run(scenario())


def test_f44_each_worker_gets_its_own_variables(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("tells_threads", cpu_threads=3) as served:
            assert await served.submit(b"") == b"3"

    uvloop.run(scenario())


def test_f45_s7_the_fork_server_has_no_address_that_others_could_connect_to(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves") as served:
            (pid,) = served.forkservers.pids()
            assert all(not connection.laddr for connection in psutil.Process(pid).net_connections("all"))

    uvloop.run(scenario())
