"""Several front ends: what is changed reaches all, what dies costs nobody an answer, what is counted is added up."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.asking import Reply, ask, connect, fetch
from tests.conftest import MakeArchive, MakeGate
from tests.servers import Server, needs_nginx, server
from tests.traffic import Traffic
from tests.waiting import eventually

CONNECTIONS = 20  # new ones: that all of them reach the same front end happens once in 500,000 times


@pytest.fixture(scope="module")
def two(make_archive: MakeArchive) -> Iterator[Server]:
    """A server with two front ends and a worker that both use; tests leave it as it is."""
    models = ("rows", "spare", "1.0"), ("echo", "echo", "2.0"), ("gate", "slow", "1.0")
    spare = tuple(make_archive(name, model_name=model, version=version) for name, model, version in models)
    with server(make_archive("echo", batch_size=4), spare=spare, front_ends=2, stop_grace=0.3) as running:
        yield running


def ask_all(running: Server, model: str, body: bytes = b"x") -> list[Reply]:
    return [running.predict(model, body) for _ in range(CONNECTIONS)]


def statuses(replies: list[Reply]) -> set[int]:
    return {reply.status for reply in replies}


def front_ends(replies: list[Reply]) -> Counter[str]:
    """How many each has answered, by what it puts before its request ids."""
    return Counter(reply.headers["x-request-id"].partition("-")[0] for reply in replies)


class FrontEnd:
    """Makes requests to one of them, each on a connection of its own."""

    def __init__(self, running: Server, find: Callable[[], psutil.Process]) -> None:
        self._running = running
        self._find = find
        self._connections: list[http.client.HTTPConnection] = []

    def __call__(self, model: str, body: bytes, priority: int = 1) -> None:
        """Send one, without waiting for its answer."""
        process = self._find()
        while True:
            connection = connect(self._running.url)
            assert ask(connection, "GET", "/ping").status == 200
            port = connection.sock.getsockname()[1]
            if any(one.raddr and one.raddr.port == port for one in process.net_connections()):
                break
            connection.close()
        connection.request("POST", f"/predictions/{model}", body, {"x-request-priority": str(priority)})
        self._connections.append(connection)

    def statuses(self) -> set[int]:
        """Of all answers."""
        return {connection.getresponse().status for connection in self._connections}

    def close(self) -> None:
        """Also of what is not answered: then the client has left."""
        for connection in self._connections:
            if connection.sock is not None:
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()


@pytest.fixture
def first(two: Server) -> Iterator[FrontEnd]:
    made = FrontEnd(two, lambda: psutil.Process(two.pid))
    yield made
    made.close()


@pytest.fixture
def second(two: Server) -> Iterator[FrontEnd]:
    made = FrontEnd(two, lambda: two.named("mms-frontend")[0])
    yield made
    made.close()


def test_all_of_them_answer_and_what_they_have_counted_is_added_up(two: Server) -> None:
    before = two.metric("mms_requests_total", model="echo", code="200")
    unknown = two.metric("mms_requests_total", model="unknown", code="404")
    replies = ask_all(two, "echo")
    assert statuses(replies) == {200}
    assert len(front_ends(replies)) == 2
    assert len({reply.json()["pid"] for reply in replies}) == 1  # they share the worker
    assert two.metric("mms_requests_total", model="echo", code="200") == before + CONNECTIONS
    assert two.metric("mms_request_duration_seconds_count", model="echo") == before + CONNECTIONS
    ask_all(two, "nobody")
    assert two.metric("mms_requests_total", model="unknown", code="404") == unknown + CONNECTIONS


def test_a_management_call_answers_when_all_of_them_know(two: Server) -> None:
    assert two.manage("POST", "/models?url=spare-1.0.mar").status == 200
    assert statuses(ask_all(two, "spare", b"[]")) == {200}
    assert two.manage("PUT", "/models/spare?min_worker=0&synchronous=true").status == 200
    assert statuses(ask_all(two, "spare", b"[]")) == {503}
    assert two.manage("DELETE", "/models/spare").status == 200
    assert statuses(ask_all(two, "spare", b"[]")) == {404}


def test_another_default_version_is_known_to_all_of_them(two: Server) -> None:
    assert two.manage("POST", "/models?url=echo-2.0.mar").status == 200
    first = two.describe("echo/1.0")["workers"][0]["pid"]
    second = two.describe("echo/2.0")["workers"][0]["pid"]
    try:
        for version, pid in (("2.0", second), ("1.0", first)):
            assert two.manage("PUT", f"/models/echo/{version}/set-default").status == 200
            assert {reply.json()["pid"] for reply in ask_all(two, "echo")} == {pid}
    finally:
        assert two.manage("DELETE", "/models/echo/2.0").status == 200


@pytest.mark.parametrize("setting", ["cache={}", "latency_objective_ms=5"])
def test_what_several_front_ends_cannot_do_is_refused(two: Server, setting: str) -> None:
    reply = two.manage("POST", f"/models?url=spare-1.0.mar&initial_workers=1&{setting}")
    assert reply.status == 400
    name = setting.partition("=")[0]
    assert reply.message.startswith(
        f"spare-1.0.mar: with several front ends (front_ends), a model must do without {name}: "
    )


def test_a_worker_of_several_threads_answers_all_of_them(two: Server) -> None:
    assert two.manage("POST", "/models?url=echo-2.0.mar&threads=2&preprocess_threads=1").status == 200
    replies = ask_all(two, "echo/2.0")
    assert statuses(replies) == {200} and len(front_ends(replies)) == 2
    assert two.manage("DELETE", "/models/echo/2.0").status == 200


def test_workers_follow_the_work_at_the_second_one(two: Server, make_gate: MakeGate, second: FrontEnd) -> None:
    """There only: its first request brings the first worker, and that the next one waits brings another."""
    how = "min_workers=0&max_workers=2&load_on_request=true&scale_up_after=0.1"
    assert two.manage("POST", f"/models?url=slow-1.0.mar&{how}").status == 200
    gates = [make_gate() for _ in range(2)]
    for gate in gates:
        second("slow", gate.body)
        eventually(gate.begun)
        assert len(two.workers("slow")) == gates.index(gate) + 1
    for gate in gates:
        gate.open()
    assert second.statuses() == {200}
    assert two.manage("DELETE", "/models/slow").status == 200


def test_a_request_goes_to_a_worker_that_no_front_end_uses(
    two: Server, make_gate: MakeGate, first: FrontEnd, second: FrontEnd
) -> None:
    assert two.manage("POST", "/models?url=slow-1.0.mar&initial_workers=2").status == 200
    gates = [make_gate() for _ in range(2)]
    for ask_one, gate in zip((first, second), gates, strict=True):
        ask_one("slow", gate.body)
        eventually(gate.begun)
    for gate in gates:
        gate.open()
    assert first.statuses() == second.statuses() == {200}
    assert two.manage("DELETE", "/models/slow").status == 200


def test_an_unload_does_not_wait_for_what_nobody_waits_for(two: Server, make_gate: MakeGate, second: FrontEnd) -> None:
    gate = make_gate()
    assert two.manage("POST", "/models?url=slow-1.0.mar").status == 200
    second("slow", gate.body)
    eventually(gate.begun)
    second.close()
    eventually(lambda: two.metric("mms_requests_cancelled_total", model="slow") == 1)
    assert two.manage("DELETE", "/models/slow").status == 200  # else as long as the gate stays shut


def test_priorities_hold_at_the_second_one(two: Server, make_gate: MakeGate, second: FrontEnd) -> None:
    assert two.manage("POST", "/models?url=slow-1.0.mar&priority_levels=2&priority_queue_sizes=2,4").status == 200
    assert two.describe("slow")["priorityQueueSizes"] == [2, 4]
    held, low, high = (make_gate() for _ in range(3))
    second("slow", held.body)
    eventually(held.begun)
    second("slow", low.body, priority=2)
    second("slow", high.body, priority=1)
    eventually(lambda: two.metric("mms_queue_depth", model="slow") == 2)
    held.open()
    eventually(high.begun)
    assert not low.begun()
    high.open()
    low.open()
    assert second.statuses() == {200}
    assert two.manage("DELETE", "/models/slow").status == 200


def test_f1_a_killed_worker_costs_no_answer_at_any_front_end(two: Server) -> None:
    with Traffic(two) as traffic:
        traffic.flows(50)
        (worker,) = two.workers("echo")
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: worker not in two.workers("echo"))
        traffic.flows(50)
    assert not traffic.failures


def test_f3_a_batch_of_one_front_end_that_dies_is_no_try_of_what_another_has_sent(
    two: Server, make_gate: MakeGate, first: FrontEnd, second: FrontEnd
) -> None:
    assert two.manage("POST", "/models?url=slow-1.0.mar&retry=0").status == 200
    begun, sent = make_gate(), make_gate()
    second("slow", begun.body)
    eventually(begun.begun)
    first("slow", sent.body)
    eventually(lambda: two.metric("mms_requests_in_flight", model="slow") == 2)
    sent.open()
    os.kill(begun.begun()[0], signal.SIGKILL)
    assert second.statuses() == {503}
    assert first.statuses() == {200}
    assert two.manage("DELETE", "/models/slow").status == 200


def test_a_worker_that_is_overdue_at_any_front_end_is_replaced(two: Server, make_gate: MakeGate) -> None:
    assert two.manage("POST", "/models?url=slow-1.0.mar&response_timeout=0.2").status == 200
    replies = [fetch(two.url, "POST", "/predictions/slow", make_gate().body) for _ in range(2)]
    assert statuses(replies) == {504}
    eventually(lambda: two.metric("mms_worker_restarts_total", model="slow", reason="response_timeout") == 2)
    assert two.manage("DELETE", "/models/slow").status == 200


def test_f47_a_killed_front_end_comes_back_and_what_it_has_counted_stays(
    two: Server, make_gate: MakeGate, first: FrontEnd
) -> None:
    gate = make_gate()
    assert two.manage("POST", "/models?url=slow-1.0.mar").status == 200
    first("slow", gate.body)
    eventually(gate.begun)
    counted = two.metric("mms_requests_total", model="echo", code="200")
    (front_end,) = two.named("mms-frontend")
    with Traffic(two, reconnects=2) as traffic:
        traffic.flows(20)
        front_end.kill()
        eventually(lambda: [one for one in two.named("mms-frontend") if one.pid != front_end.pid])
        traffic.flows(50)
    assert not traffic.failures
    assert len(front_ends(ask_all(two, "echo"))) == 2
    assert two.metric("mms_requests_total", model="echo", code="200") > counted
    assert two.metric("mms_frontend_restarts_total", reason="signal 9 (SIGKILL)") == 1
    assert two.manage("GET", "/readyz").json()["restarts"][0]["level"] == "frontend"
    assert fetch(two.url, "GET", "/readyz").status == 200
    gate.open()
    assert first.statuses() == {200}  # in hand at the first one all the time
    assert two.manage("DELETE", "/models/slow").status == 200


@needs_nginx
def test_a_stop_lets_all_of_them_finish(make_archive: MakeArchive, make_gate: MakeGate) -> None:
    gate, replies = make_gate(), list[Reply]()
    with server(make_archive("gate", batch_size=CONNECTIONS), front_ends=2, edge="nginx") as running:
        threads = [
            threading.Thread(target=lambda: replies.append(running.predict("gate", gate.body)))
            for _ in range(CONNECTIONS)
        ]
        for thread in threads:
            thread.start()
        in_hand = "mms_requests_in_flight", "mms_queue_depth"
        eventually(lambda: sum(running.metric(name, model="gate") for name in in_hand) == CONNECTIONS)
        running.signal(signal.SIGTERM)
        gate.open()
        for thread in threads:
            thread.join()
        assert statuses(replies) == {200} and len(replies) == CONNECTIONS
        assert len(front_ends(replies)) == 2
