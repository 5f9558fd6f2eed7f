"""The main process's side of a further front end, which is a real one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from mms import fleet, fronts
from mms.archive import ModelArchive
from mms.fleet import Fleet
from mms.http.limits import Limits
from mms.metrics import VersionMetrics
from mms.model_settings import ModelSettings
from mms.models.registry import ModelRegistry
from mms.models.served import VersionState
from mms.models.version import ModelVersion
from mms.workers.batching import BatchQueue
from mms.workers.placement import Place
from mms.workers.worker import Owner, Worker
from tests.asking import fetch
from tests.conftest import MakeArchive
from tests.waiting import eventually

LIMITS = Limits(
    max_request_size=1 << 20, max_connections=100, header_timeout=10.0, body_timeout=10.0, keepalive_timeout=10.0
)


class Probes:
    """What the server says of itself."""

    status = 200

    def __call__(self) -> tuple[str, tuple[int, dict[str, Any]]]:
        return "Healthy", (self.status, {})


class Waiting(ModelVersion):
    """Requests wait for a worker that never comes."""

    state = VersionState.READY
    can_wait = True


def with_one(
    scenario: Callable[[Fleet, str, Probes], Awaitable[None]],
    registry: ModelRegistry | None = None,
    token_file: str = "",
) -> None:
    """Run it with one that is up, and its address."""
    lost = asyncio.Event()

    async def run() -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        address = "{}:{}".format(*sock.getsockname())
        hello = fronts.Hello(front_ends=2, edge=False, limits=LIMITS, token="", token_file=token_file)
        probes = Probes()
        running = Fleet(2, registry or ModelRegistry(), hello, probes, lambda: (LIMITS, "info"), lost.set)
        running.start([sock])
        try:
            await asyncio.wait_for(running.sync(), 5)
            await scenario(running, address, probes)
        finally:
            await running.close()

    uvloop.run(run())
    assert not lost.is_set()


def test_f10_probes_hear_at_once_that_a_worker_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "TICK", 3600.0)

    async def scenario(running: Fleet, address: str, probes: Probes) -> None:
        queue = BatchQueue(batch_size=1, max_batch_delay=0.0, capacity=1, timeout=0.0, retry=1)
        worker = Worker(0, Place(None), cast(Owner, None), queue, VersionMetrics())
        running.lend(worker, 1)
        probes.status = 503
        running.gone(worker)
        await asyncio.to_thread(eventually, lambda: fetch(address, "GET", "/readyz").status == 503)

    with_one(scenario)


def test_f47_one_that_hangs_holds_a_management_call_up_only_until_it_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(running: Fleet, address: str, probes: Probes) -> None:
        monkeypatch.setattr(fleet, "SILENCE", 0.1)
        (pid,) = running.pids
        os.kill(pid, signal.SIGSTOP)
        await asyncio.wait_for(running.sync(), 5)
        assert pid not in running.pids
        monkeypatch.setattr(fleet, "SILENCE", 15.0)
        (facts,) = running.restarts()
        assert dict(facts.causes) == {"said nothing for 0.1 s": 1}

    with_one(scenario)


def test_one_starts_while_the_file_of_its_token_is_missing(tmp_path: Path) -> None:
    """As the main process, it refuses whoever needs the token until the file is there."""

    async def scenario(running: Fleet, address: str, probes: Probes) -> None:
        reply = await asyncio.to_thread(fetch, address, "POST", "/predictions/any")
        assert reply.status == 401
        assert not running.restarts()[0].causes

    with_one(scenario, token_file=str(tmp_path / "token"))


def test_a_version_that_a_stop_unloads_stays_registered(make_archive: MakeArchive) -> None:
    registry = ModelRegistry()

    async def scenario(running: Fleet, address: str, probes: Probes) -> None:
        version = Waiting("m", "1.0", ModelArchive.open(make_archive("echo")), ModelSettings())
        registry.add(version)
        running.leave(version.number, "it is being unloaded", lambda: None)
        running.forget(version.number)
        probes.status = 503
        await running.sync()
        assert not running.restarts()[0].causes
        reply = await asyncio.to_thread(fetch, address, "POST", "/predictions/m", b"x")
        assert reply.status == 503

    with_one(scenario, registry)


def test_f48_what_fails_at_the_very_end_is_told_its_clients(make_archive: MakeArchive) -> None:
    registry = ModelRegistry()

    async def scenario(running: Fleet, address: str, probes: Probes) -> None:
        version = Waiting("m", "1.0", ModelArchive.open(make_archive("echo")), ModelSettings())
        registry.add(version)
        await running.sync()
        reply = asyncio.create_task(asyncio.to_thread(fetch, address, "POST", "/predictions/m", b"x"))
        while not running.waiting(version.number):
            await running.look()
        registry.remove(version)
        running.leave(version.number, "it is being unloaded", lambda: None)
        running.forget(version.number)
        await running.close()
        assert (await reply).status == 503

    with_one(scenario, registry)
