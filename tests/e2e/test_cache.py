"""The cache of answers on a running server, with a handler that notes each execution and answers when told."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from tests.asking import ask, connect
from tests.conftest import MakeArchive, MakeGate
from tests.servers import Server, server
from tests.traffic import Answering
from tests.waiting import eventually

RESET = b"\1\0\0\0\0\0\0\0"  # struct linger: close with RST
CACHE = {"size": "1MiB", "ttl_s": 600}


@pytest.fixture(scope="module")
def running(make_archive: MakeArchive) -> Iterator[Server]:
    with server(
        make_archive("gate", cache={**CACHE, "headers": ["X-Tenant"]}),
        make_archive("crashes_on_predict", cache=CACHE),
        make_archive("gate", model_name="plain"),
        make_archive("streams", cache=CACHE),
        spare=(make_archive("gate", model_name="other", cache=CACHE),),
    ) as started:
        yield started


def results(running: Server, result: str, model: str = "gate") -> float:
    return running.metric("mms_cache_requests_total", model=model, result=result)


def test_a_hit_costs_no_execution_and_is_marked(running: Server, make_gate: MakeGate) -> None:
    gate = make_gate()
    gate.open()
    before = running.metric("mms_batch_size_count", model="gate")
    first = running.predict("gate", gate.body)
    second = running.predict("gate", gate.body, x_request_id="mine")
    assert "x-mms-cache" not in first.headers
    assert (second.status, second.body, second.headers["x-mms-cache"]) == (200, first.body, "hit")
    assert second.headers["content-type"] == first.headers["content-type"]
    assert second.headers["x-request-id"] == "mine" != first.headers["x-request-id"]
    assert len(gate.begun()) == 1 and running.metric("mms_batch_size_count", model="gate") == before + 1


def test_a_hundred_identical_requests_in_flight_run_once(running: Server, make_gate: MakeGate) -> None:
    gate, answering, joined = make_gate(), Answering(), results(running, "joined")
    for number in range(100):
        answering.send(running, "gate", gate.body, x_request_id=f"r{number}")
    eventually(lambda: results(running, "joined") == joined + 99)
    eventually(gate.begun)
    gate.open()
    replies = answering.results()
    assert {(reply.status, reply.body) for reply in replies} == {(200, replies[0].body)}
    assert [reply.headers["x-request-id"] for reply in replies] == [f"r{number}" for number in range(100)]
    assert sorted(reply.headers.get("x-mms-cache", "") for reply in replies) == ["", *["joined"] * 99]
    assert len(gate.begun()) == 1


def test_identical_requests_on_one_connection_are_joined(running: Server, make_gate: MakeGate) -> None:
    gate, joined = make_gate(), results(running, "joined")
    connection = connect(running.url)
    connection.connect()
    request = b"POST /predictions/gate HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (
        len(gate.body),
        gate.body,
    )
    connection.sock.sendall(request * 3)
    eventually(lambda: results(running, "joined") == joined + 2)
    gate.open()
    received = b""
    while received.count(b"HTTP/1.1 200") < 3 or len(received.rpartition(b"\r\n\r\n")[2]) == 0:
        received += connection.sock.recv(1 << 16)
    connection.close()
    assert received.count(b"x-mms-cache: joined") == 2 and len(gate.begun()) == 1


def test_the_job_goes_on_when_its_first_client_leaves(running: Server, make_gate: MakeGate) -> None:
    gate, answering, joined = make_gate(), Answering(), results(running, "joined")
    cancelled = running.metric("mms_requests_cancelled_total", model="gate")
    leader = connect(running.url)
    leader.request("POST", "/predictions/gate", gate.body)
    eventually(gate.begun)
    answering.send(running, "gate", gate.body)
    eventually(lambda: results(running, "joined") == joined + 1)
    leader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    leader.close()
    eventually(lambda: running.metric("mms_requests_cancelled_total", model="gate") == cancelled + 1)
    gate.open()
    (reply,) = answering.results()
    assert (reply.status, reply.headers["x-mms-cache"], len(gate.begun())) == (200, "joined", 1)


def test_a_worker_that_dies_is_retried_once_for_all(running: Server, make_gate: MakeGate) -> None:
    gate, answering, joined = make_gate(), Answering(), results(running, "joined")
    for _ in range(5):
        answering.send(running, "gate", gate.body)
    eventually(lambda: results(running, "joined") == joined + 4)
    (pid,) = eventually(gate.begun)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(gate.begun()) == 2)
    gate.open()
    assert [reply.status for reply in answering.results()] == [200] * 5
    assert len(gate.begun()) == 2


def test_a_failure_is_not_kept(running: Server) -> None:
    for _ in range(2):
        reply = running.predict("crashes_on_predict", b"x")
        assert reply.status >= 400 and "x-mms-cache" not in reply.headers
    assert results(running, "miss", "crashes_on_predict") == 2


def test_a_stream_is_joined_and_not_kept(running: Server, make_gate: MakeGate) -> None:
    gate, answering = make_gate(), Answering()
    body = json.dumps([{"gate": gate.body.decode()}, "first ", "last"]).encode()
    answering.send(running, "streams", body)
    eventually(gate.begun)
    answering.send(running, "streams", body)
    eventually(lambda: results(running, "joined", "streams") == 1)
    gate.open()
    first, second = answering.results()
    assert first.body == second.body == b"first last" and second.headers["x-mms-cache"] == "joined"
    assert running.describe("streams")["cache"]["answers"] == 0 and len(gate.begun()) == 1


def test_s24_headers_count_where_the_setting_names_them(running: Server, make_gate: MakeGate) -> None:
    gate = make_gate()
    gate.open()
    running.predict("gate", gate.body, x_tenant="a")
    assert running.predict("gate", gate.body, x_tenant="a", accept="*/*").headers["x-mms-cache"] == "hit"
    assert "x-mms-cache" not in running.predict("gate", gate.body, x_tenant="b").headers


def test_the_description_shows_the_setting_and_the_fill(running: Server, make_gate: MakeGate) -> None:
    gate = make_gate()
    gate.open()
    before = running.describe("gate")["cache"]
    running.predict("gate", gate.body)
    after = running.describe("gate")["cache"]
    assert (after["size"], after["ttl"], after["headers"]) == (1 << 20, 600.0, ["x-tenant"])
    assert after["answers"] == before["answers"] + 1 and after["bytes"] > before["bytes"]
    assert running.metric("mms_cache_bytes", model="gate") == after["bytes"]
    assert "cache" not in running.describe("plain")


def test_a_cache_is_cleared_by_a_call(running: Server, make_gate: MakeGate) -> None:
    gate = make_gate()
    gate.open()
    running.predict("gate", gate.body)
    kept = running.describe("gate")["cache"]["answers"]
    reply = running.manage("DELETE", "/models/gate/1.0/cache")
    assert reply.json() == {"status": f'Cache of model "gate" Version: 1.0 cleared, answers: {kept}'}
    assert "x-mms-cache" not in running.predict("gate", gate.body).headers
    assert len(gate.begun()) == 2
    none = running.manage("DELETE", "/models/plain/1.0/cache")
    assert (none.status, none.message) == (404, "model plain 1.0 has no cache; its setting cache is off")


def test_s24_a_cache_goes_with_its_version(running: Server, make_gate: MakeGate) -> None:
    gate = make_gate()
    gate.open()
    for _ in range(2):
        assert running.manage("POST", "/models?url=other-1.0.mar").status == 200
        connection = connect(running.url)
        assert "x-mms-cache" not in ask(connection, "POST", "/predictions/other", gate.body).headers
        assert ask(connection, "POST", "/predictions/other", gate.body).headers["x-mms-cache"] == "hit"
        connection.close()
        assert running.manage("DELETE", "/models/other").status == 200
    assert len(gate.begun()) == 2


def test_the_setting_of_the_registration_wins(running: Server) -> None:
    assert running.manage("POST", "/models?url=other-1.0.mar&initial_workers=0&cache=off").status == 200
    assert "cache" not in running.describe("other")
    assert running.manage("DELETE", "/models/other").status == 200
    wrong = running.manage("POST", "/models?url=other-1.0.mar&cache=64MiB")
    assert wrong.status == 400
    assert wrong.message.startswith('request: cache = \'64MiB\': a mapping is needed, such as {"size": "64MiB"')
