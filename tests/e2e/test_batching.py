"""How requests meet in batches and what becomes of those that wait, with a handler that answers when told."""

from __future__ import annotations

import contextlib
import http.client
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import MakeArchive, MakeGate
from tests.servers import Server, server
from tests.traffic import Answering
from tests.waiting import eventually

CONNECTIONS = 32
SYSTEM_CALLS = 2.4  # reads and writes of the front end per request, at 32 requests a turn; 2.1 to 2.2 were measured


@pytest.fixture(scope="module")
def running(make_archive: MakeArchive) -> Iterator[Server]:
    with server(
        make_archive("gate", batch_size=4),
        make_archive("gate", model_name="single"),
        make_archive("gate", model_name="small", queue_size=2),
        make_archive("gate", model_name="impatient", queue_timeout=0.2),
        make_archive("gate", model_name="limited", response_timeout=0.3),
        make_archive("gate", model_name="pair", min_workers=2),
        make_archive("echo", batch_size=8, max_batch_delay=1000),
        make_archive("echo", model_name="quick", batch_size=8),
    ) as started:
        yield started


def queued(running: Server, model: str) -> float:
    return running.metric("mms_queue_depth", model=model)


def test_a_batch_grows_while_the_worker_is_busy(running: Server, make_gate: MakeGate) -> None:
    first, rest, answering = make_gate(), [make_gate() for _ in range(5)], Answering()
    answering.send(running, "gate", first.body)
    eventually(first.begun)
    for gate in rest:
        answering.send(running, "gate", gate.body)
    eventually(lambda: queued(running, "gate") == 5)
    for gate in (first, *rest):
        gate.open()
    assert {reply.status for reply in answering.results()} == {200}
    assert first.batches() == [1]
    assert sorted(gate.batches()[0] for gate in rest) == [1, 4, 4, 4, 4]


def test_without_batching_each_request_is_a_batch(running: Server, make_gate: MakeGate) -> None:
    gates, answering = [make_gate() for _ in range(5)], Answering()
    for gate in gates:
        answering.send(running, "single", gate.body)
    eventually(lambda: queued(running, "single") == 4)
    for gate in gates:
        gate.open()
    answering.results()
    assert [gate.batches() for gate in gates] == [[1]] * 5


def test_a_full_batch_does_not_wait_for_the_delay(running: Server) -> None:
    answering, begun = Answering(), time.monotonic()
    for _ in range(8):
        answering.send(running, "echo", b"x")
    assert {reply.json()["batch"] for reply in answering.results()} == {8}
    assert time.monotonic() - begun < 1


def test_a_lonely_request_waits_for_the_delay_and_no_longer(running: Server) -> None:
    begun = time.monotonic()
    reply = running.predict("echo", b"x")
    waited = time.monotonic() - begun
    assert reply.json()["batch"] == 1
    assert 1 <= waited < 1.5


def test_without_delay_an_idle_worker_takes_what_is_there(running: Server) -> None:
    begun = time.monotonic()
    assert running.predict("quick", b"x").json()["batch"] == 1
    assert time.monotonic() - begun < 0.5


def test_a_full_queue_refuses_at_once(running: Server, make_gate: MakeGate) -> None:
    gates, answering = [make_gate() for _ in range(3)], Answering()
    answering.send(running, "small", gates[0].body)
    eventually(gates[0].begun)
    for gate in gates[1:]:
        answering.send(running, "small", gate.body)
    eventually(lambda: queued(running, "small") == 2)
    refused = running.predict("small", b"")
    assert (refused.status, refused.json()["type"]) == (429, "TooManyRequestsException")
    assert refused.message == "the queue is full: 2 requests wait; try again later"
    assert int(refused.headers["retry-after"]) >= 1
    for gate in gates:
        gate.open()
    assert [reply.status for reply in answering.results()] == [200] * 3


def test_a_request_that_waits_too_long_gets_504_and_never_runs(running: Server, make_gate: MakeGate) -> None:
    first, second, answering = make_gate(), make_gate(), Answering()
    answering.send(running, "impatient", first.body)
    eventually(first.begun)
    late = running.predict("impatient", second.body)
    assert (late.status, late.message) == (504, "no worker was free within queue_timeout (0.2 s)")
    first.open()
    assert [reply.status for reply in answering.results()] == [200]
    assert second.begun() == []


def test_f12_a_batch_over_its_time_is_answered_504_and_its_worker_replaced(
    running: Server, make_gate: MakeGate
) -> None:
    stuck, fine, answering = make_gate(), make_gate(), Answering()
    (before,) = running.workers("limited")
    answering.send(running, "limited", stuck.body)
    eventually(stuck.begun)
    fine.open()
    answering.send(running, "limited", fine.body)
    late, good = answering.results()
    assert (late.status, late.message) == (504, "the handler did not answer within response_timeout (0.3 s)")
    assert good.status == 200
    assert stuck.begun() == [before], "a batch that took too long is not run again"
    assert fine.begun() != [before]
    assert running.metric("mms_worker_restarts_total", model="limited", reason="response_timeout") == 1


def test_two_workers_share_the_load(running: Server, make_gate: MakeGate) -> None:
    gates, answering = [make_gate(), make_gate()], Answering()
    for gate in gates:
        answering.send(running, "pair", gate.body)
        eventually(gate.begun)
    for gate in gates:
        gate.open()
    assert len({reply.body for reply in answering.results()}) == 2


def reads_and_writes(pid: int) -> int:
    """System calls of these kinds that the process has made."""
    counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(counts["syscr"]) + int(counts["syscw"])


def test_requests_that_arrive_together_share_all_system_calls_but_their_own_two(running: Server) -> None:
    host, _, port = running.url.partition(":")
    request = f"POST /predictions/quick HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2\r\n\r\nhi".encode()
    rounds, process = 4, psutil.Process(running.pid)

    def ask_all() -> None:
        running.signal(signal.SIGSTOP)
        try:
            eventually(lambda: process.status() == psutil.STATUS_STOPPED)
            for client in clients:
                client.sendall(request)
        finally:
            running.signal(signal.SIGCONT)
        for client in clients:
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert answer.status == 200 and answer.read()

    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(CONNECTIONS)]
        ask_all()
        before = reads_and_writes(running.pid)
        for _ in range(rounds):
            ask_all()
        assert (reads_and_writes(running.pid) - before) / rounds / CONNECTIONS <= SYSTEM_CALLS
