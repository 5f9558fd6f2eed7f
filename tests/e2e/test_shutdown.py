"""The end of a server: on request, in a hurry, and killed; what clients lose (nothing) and what is left (nothing)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.asking import CLIENT_TIMEOUT, fetch
from tests.conftest import MakeArchive, MakeGate
from tests.servers import Server, free_ports, mms, needs_nginx, processes_in, scratch, server, start_arguments
from tests.traffic import Answering, Traffic
from tests.waiting import eventually

EDGES = ["none", pytest.param("nginx", marks=needs_nginx)]


@pytest.mark.parametrize(
    ("number", "edge"), [(signal.SIGINT, "none"), pytest.param(signal.SIGTERM, "nginx", marks=needs_nginx)]
)
def test_an_idle_server_stops_at_once(make_archive: MakeArchive, edge: str, number: signal.Signals) -> None:
    with server(make_archive("echo", min_workers=2), edge=edge) as running:
        running.predict("echo", b"x")
        begun = time.monotonic()
        running.signal(number)
        assert running.stop() == 0
        assert time.monotonic() - begun < 2


@pytest.mark.parametrize("edge", EDGES)
def test_f48_a_stop_answers_every_request_in_hand(make_archive: MakeArchive, make_gate: MakeGate, edge: str) -> None:
    """Those that run and those that wait; afterwards nobody listens any more."""
    with server(make_archive("gate"), edge=edge) as running:
        gates, answering = [make_gate() for _ in range(4)], Answering()
        for gate in gates:
            answering.send(running, "gate", gate.body)
        eventually(lambda: running.metric("mms_queue_depth", model="gate") == 3)
        running.signal(signal.SIGTERM)
        eventually(lambda: refuses(running))
        assert running.process.poll() is None
        for gate in gates:
            gate.open()
        assert [reply.status for reply in answering.results()] == [200] * 4
        assert running.stop() == 0


def test_f48_a_stop_waits_for_an_answer_that_is_being_read(make_archive: MakeArchive) -> None:
    """Long after the worker is done with it, most of it lies in the server's buffer."""
    size = 20 << 20
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(server(make_archive("big")))
        host, _, port = running.url.rpartition(":")
        client = stack.enter_context(socket.create_connection((host, int(port)), CLIENT_TIMEOUT))
        body = b"%d" % size
        client.sendall(b"POST /predictions/big HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        head, _, rest = client.recv(4096).partition(b"\r\n\r\n")
        assert b" 200 " in head
        eventually(lambda: running.metric("mms_requests_total", model="big") == 1)
        running.signal(signal.SIGTERM)
        eventually(lambda: refuses(running))
        received = len(rest)
        while piece := client.recv(1 << 18):
            received += len(piece)
            if received < size // 4:
                threading.Event().wait(0.01)  # a slow client: an idle server would have ended long before it has all
        assert received == size
        assert running.stop() == 0


@pytest.mark.parametrize("edge", EDGES)
def test_f48_a_stop_under_load_answers_every_request_that_was_begun(make_archive: MakeArchive, edge: str) -> None:
    with server(make_archive("echo"), edge=edge) as running, Traffic(running, until_refused=True) as traffic:
        traffic.flows()
        running.signal(signal.SIGTERM)
        assert running.stop() == 0
        traffic.join()
    assert traffic.failures == []


def test_f48_an_answer_says_that_its_connection_closes(make_archive: MakeArchive, make_gate: MakeGate) -> None:
    gate = make_gate()
    with server(make_archive("gate")) as running:
        host, _, port = running.url.rpartition(":")
        with socket.create_connection((host, int(port)), 10) as sock:
            sock.sendall(b"POST /predictions/gate HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(gate.body))
            sock.sendall(gate.body)
            eventually(gate.begun)
            running.signal(signal.SIGTERM)
            eventually(lambda: refuses(running))
            gate.open()
            received = b"".join(iter(lambda: sock.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nconnection: close\r\n" in received


def test_f48_a_stop_waits_no_longer_than_the_drain_time(make_archive: MakeArchive, make_gate: MakeGate) -> None:
    gate, answering = make_gate(), Answering()
    with server(make_archive("gate"), drain_timeout=0.3) as running:
        answering.send(running, "gate", gate.body)
        eventually(gate.begun)
        begun = time.monotonic()
        running.signal(signal.SIGTERM)
        assert running.stop() == 0
        assert 0.3 <= time.monotonic() - begun < 2
        assert "1 connections were cut" in running.output


@needs_nginx
def test_f48_all_parts_of_a_stop_share_the_drain_time(make_archive: MakeArchive, make_gate: MakeGate) -> None:
    """nginx waits for the answer, so would the front end, so would the pool: each only for what the one before left."""
    gate, answering = make_gate(), Answering()
    with server(make_archive("gate"), edge="nginx", drain_timeout=2.5) as running:
        answering.send(running, "gate", gate.body)
        eventually(gate.begun)
        begun = time.monotonic()
        stopped = mms("stop", "--run-dir", str(running.run_dir))
        assert 2.5 <= time.monotonic() - begun < 5
        assert stopped.returncode == 0, stopped
        assert stopped.stderr == f"waiting for 2 s: pid {running.pid} finishes requests in hand, at most 17.5 s\n"
        assert "nginx was ended: its requests took longer than drain_timeout (2.5 s)" in running.output


def test_f48_a_stop_that_takes_too_long_becomes_a_kill(make_archive: MakeArchive, make_gate: MakeGate) -> None:
    gate, answering = make_gate(), Answering()
    with server(make_archive("gate")) as running:
        answering.send(running, "gate", gate.body)
        eventually(gate.begun)
        stopped = mms("stop", "--run-dir", str(running.run_dir), "--timeout", "0.1")
        assert stopped.returncode == 1
        text = f"mms: error: the server (pid {running.pid}) did not stop within 0.1 s and was killed\n"
        assert stopped.stderr == text
        running.expected_exit = -signal.SIGKILL


@pytest.mark.parametrize("edge", EDGES)
def test_f48_a_second_signal_ends_the_server_at_once(make_archive: MakeArchive, make_gate: MakeGate, edge: str) -> None:
    gate, answering = make_gate(), Answering()
    with server(make_archive("gate"), edge=edge, drain_timeout=60) as running:
        answering.send(running, "gate", gate.body)
        eventually(gate.begun)
        running.signal(signal.SIGTERM)
        eventually(lambda: refuses(running))
        running.signal(signal.SIGTERM)
        begun = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - begun < 3


@pytest.mark.parametrize("edge", EDGES)
def test_f46_a_killed_server_leaves_nothing_and_the_next_one_starts(make_archive: MakeArchive, edge: str) -> None:
    echo = make_archive("echo", min_workers=2)
    with scratch() as folder:
        with server(echo, folder=folder, edge=edge) as first, Traffic(first, until_refused=True) as traffic:
            traffic.flows()
            assert len(processes_in(folder)) >= 4
            first.kill()
            eventually(lambda: not processes_in(folder))
        addresses: dict[str, Any] = {
            "inference_address": first.url,
            "management_address": first.management,
            "metrics_address": first.metrics,
        }
        killed = f"no server is running in {folder}/run; the last one there (pid {first.pid}) was killed\n"
        assert [mms(word, "--run-dir", str(folder / "run")).stdout for word in ("status", "stop")] == [killed] * 2
        with server(echo, folder=folder, edge=edge, **addresses) as second:
            assert fetch(first.url, "POST", "/predictions/echo", b"x").status == 200
            record = json.loads((second.run_dir / "mms.json").read_text())
            assert record["pid"] == second.pid
            assert len(second.extracted) == 1


def test_f46_a_killed_server_takes_a_worker_that_loads_with_it(make_archive: MakeArchive, tmp_path: Path) -> None:
    slow = make_archive("loads_slowly", model_name="slow", gate=str(tmp_path / "never"))
    with server(spare=(slow,)) as running:
        running.manage("POST", "/models?url=slow-1.0.mar&synchronous=false")
        eventually(lambda: running.named("mms-slow"))
        running.kill()
        eventually(lambda: not processes_in(running.folder))


def test_f49_other_signals_do_no_harm(make_archive: MakeArchive) -> None:
    with server(make_archive("echo")) as running:
        for number in (signal.SIGPIPE, signal.SIGWINCH):
            running.signal(number)
            assert running.predict("echo", b"x").status == 200


def test_f50_a_server_that_slept_kills_no_worker_for_it(make_archive: MakeArchive) -> None:
    with server(make_archive("echo", response_timeout=0.5)) as running:
        before = running.workers("echo")
        running.signal(signal.SIGSTOP)
        try:
            eventually(lambda: psutil.Process(running.pid).status() == psutil.STATUS_STOPPED)
            answering = Answering()
            answering.send(running, "echo", b"x")
            threading.Event().wait(1.5)  # the time that passes is what is tested
        finally:
            running.signal(signal.SIGCONT)
        assert [reply.status for reply in answering.results()] == [200]
        assert running.workers("echo") == before


def test_only_logs_are_left_after_a_stop(make_archive: MakeArchive) -> None:
    with server(make_archive("echo")) as running:
        running.predict("echo", b"x")
        running.stop()
        assert {path.name for path in running.run_dir.iterdir()} <= {"lock", "logs"}
        assert not list((running.cache_dir / "servers").iterdir())
        assert os.stat(running.run_dir).st_mode & 0o777 == 0o700


def refuses(running: Server) -> bool:
    host, _, port = running.url.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return True
    return False


def test_f52_a_stop_during_a_registration_leaves_nothing(make_archive: MakeArchive, tmp_path: Path) -> None:
    slow = make_archive("loads_slowly", gate=str(tmp_path / "never"))
    with server(spare=(slow,)) as running:
        asked = threading.Thread(target=quietly, args=(running, "/models?url=loads_slowly-1.0.mar"))
        asked.start()
        eventually(lambda: running.manage("GET", "/models/loads_slowly").status == 200)
        running.signal(signal.SIGTERM)
        assert running.stop(5) == 0
        asked.join()


def test_f52_a_stop_during_the_start_never_says_ready(make_archive: MakeArchive, tmp_path: Path) -> None:
    slow = make_archive("loads_slowly", gate=str(tmp_path / "never"))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch())
        addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
        words = start_arguments(folder, addresses, slow)
        running = Server(folder, [*words, "--models", slow.name], addresses)
        stack.callback(running.close)
        eventually(lambda: not refuses(running))
        eventually(lambda: running.describe("loads_slowly").get("workers"))
        running.signal(signal.SIGTERM)
        assert running.stop(5) == 0
        eventually(lambda: not running.reads)
        assert running.ready_line == ""


def quietly(running: Server, path: str) -> None:
    try:
        running.manage("POST", path)
    except (OSError, ValueError):
        return
    except Exception as error:  # the server may end in the middle of its answer
        assert "RemoteDisconnected" in repr(error) or "IncompleteRead" in repr(error)
