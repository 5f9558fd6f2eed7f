"""/livez and /readyz on both ports, without and with nginx: who is missing, and how soon that is known."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from tests.asking import Reply, fetch
from tests.conftest import MakeArchive, MakeGate
from tests.servers import Server, free_ports, needs_nginx, scratch, server, start_arguments
from tests.traffic import Answering
from tests.waiting import eventually


def test_a_server_with_all_its_workers_is_ready(either: Server) -> None:
    for address in (either.url, either.management):
        assert fetch(address, "GET", "/livez").json() == {"status": "alive"}
        reply = fetch(address, "GET", "/readyz")
        assert (reply.status, reply.json()) == (200, {"status": "ready", "missing": []})


@pytest.mark.parametrize("edge", ["none", pytest.param("nginx", marks=needs_nginx)])
def test_f10_a_dead_worker_is_known_at_once(make_archive: MakeArchive, tmp_path: Path, edge: str) -> None:
    """Its replacement loads until the gate is there; another model that is registered meanwhile does not count."""
    gate = tmp_path / "gate"
    gate.touch()
    slow, echo = make_archive("loads_slowly", gate=str(gate)), make_archive("echo")
    other = make_archive("loads_slowly", model_name="other", gate=str(tmp_path / "never"))
    with server(slow, echo, spare=(other,), edge=edge) as running:
        (pid,) = running.workers("loads_slowly")
        assert running.manage("POST", "/models?url=other-1.0.mar&synchronous=false").status == 202
        assert running.manage("PUT", "/models/echo?min_worker=2").status == 202
        assert [fetch(address, "GET", "/readyz").status for address in (running.url, running.management)] == [200] * 2
        gate.unlink()
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        eventually(lambda: fetch(running.url, "GET", "/readyz").status == 503)
        assert time.monotonic() - killed < 1  # 0.1 s on a machine that does nothing else
        # the end of its channel is seen first, and the cause a moment later
        eventually(lambda: "SIGKILL" in fetch(running.url, "GET", "/readyz").message)
        for address in (running.url, running.management):
            reply = fetch(address, "GET", "/readyz")
            assert "loads_slowly 1.0 has 0 of 1 workers" in reply.message
            assert reply.json()["missing"] == [
                {
                    "model": "loads_slowly", "version": "1.0", "state": "READY", "ready": 0, "wanted": 1,
                    "reason": "a worker died: signal 9 (SIGKILL)",
                }
            ]  # fmt: skip
        assert running.manage("GET", "/models/loads_slowly/ready").status == 503
        assert running.manage("GET", "/models/echo/ready").status == 200
        gate.touch()
        eventually(lambda: fetch(running.url, "GET", "/readyz").status == 200)


def test_a_server_is_not_ready_before_its_models_are(make_archive: MakeArchive, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow = make_archive("loads_slowly", gate=str(gate))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch())
        addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
        running = Server(folder, [*start_arguments(folder, addresses, slow), "--models", slow.name], addresses)
        stack.callback(running.close)
        reply = first_answer(running.url, "/readyz")
        assert (reply.status, reply.json()["status"]) == (503, "starting")
        assert [line["model"] for line in reply.json()["missing"]] == ["loads_slowly"]
        assert fetch(running.url, "GET", "/livez").status == 200
        gate.touch()
        running.wait_until_ready()
        assert fetch(running.url, "GET", "/readyz").status == 200


def test_f9_a_model_that_fails_at_the_start_is_missing(make_archive: MakeArchive) -> None:
    with server(make_archive("echo"), make_archive("crashes_on_load")) as running:
        (line,) = running.manage("GET", "/readyz").json()["missing"]
        assert (line["model"], line["state"]) == ("crashes_on_load", "FAILED")
        assert "the weights are missing" in line["reason"]
        (line,) = fetch(running.url, "GET", "/readyz").json()["missing"]
        assert line["reason"] == "it failed to load"
        assert running.manage("GET", "/models/crashes_on_load/ready").json()["status"] == "FAILED"
        assert running.manage("PUT", "/models/crashes_on_load?min_worker=0").status == 202
        assert running.manage("GET", "/models/crashes_on_load/ready").json()["status"] == "incomplete"
        assert fetch(running.url, "GET", "/readyz").status == 200


def test_f48_readiness_goes_off_before_the_ports_close(make_archive: MakeArchive, make_gate: MakeGate) -> None:
    gate, answering = make_gate(), Answering()
    with server(make_archive("gate"), make_archive("echo"), drain_delay=30) as running:
        answering.send(running, "gate", gate.body)
        eventually(gate.begun)
        running.signal(signal.SIGTERM)
        for address in (running.url, running.management):
            reply = first_answer(address, "/readyz", 503)
            assert (reply.json()["status"], reply.message) == ("draining", "the server is draining")
        assert running.predict("echo", b"x").status == 200
        gate.open()
        assert [reply.status for reply in answering.results()] == [200]
        running.signal(signal.SIGTERM)
        assert running.stop(5) == 0


def test_f48_requests_in_hand_have_their_time_after_the_delay(make_archive: MakeArchive, make_gate: MakeGate) -> None:
    gate, answering = make_gate(), Answering()
    with server(make_archive("gate"), drain_delay=0.3, drain_timeout=30) as running:
        answering.send(running, "gate", gate.body)
        eventually(gate.begun)
        running.signal(signal.SIGTERM)
        eventually(lambda: answer(running.url, "/livez") is None)
        assert answer(running.management, "/readyz", 503)
        gate.open()
        assert [reply.status for reply in answering.results()] == [200]
        assert running.stop() == 0


def answer(address: str, path: str, status: int = 0) -> Reply | None:
    """None while nobody answers, or not with that status."""
    try:
        reply = fetch(address, "GET", path)
    except OSError:
        return None
    return reply if status in (0, reply.status) else None


def first_answer(address: str, path: str, status: int = 0) -> Reply:
    reply = eventually(lambda: answer(address, path, status))
    assert reply is not None
    return reply
