"""Deadlines, priorities and a latency objective as clients see them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import pytest

from tests.asking import fetch
from tests.conftest import MakeArchive, MakeGate
from tests.servers import Server, server
from tests.traffic import Answering
from tests.waiting import eventually


@pytest.fixture(scope="module")
def running(make_archive: MakeArchive) -> Iterator[Server]:
    with server(
        make_archive("gate"),
        make_archive("gate", model_name="prompt", request_timeout=0.1),
        make_archive("gate", model_name="levels", priority_levels=2, queue_size=3, batch_size=2),
        make_archive(
            "gate",
            model_name="default",
            latency_objective_ms=60,
            default_output={"label": "unknown"},
            default_on_miss=True,
            queue_size=1,
        ),
        make_archive("sleeps", latency_objective_ms=40),
        make_archive("sleeps", model_name="hopeless", latency_objective_ms=2),
    ) as started:
        yield started


@pytest.mark.parametrize("where", ["waiting", "at a worker"])
def test_a_client_gets_its_answer_at_its_deadline(running: Server, make_gate: MakeGate, where: str) -> None:
    first, late, answering = make_gate(), make_gate(), Answering()
    if where == "waiting":
        answering.send(running, "gate", first.body)
        eventually(first.begun)
    begun = time.monotonic()
    reply = running.predict("gate", late.body, x_request_timeout_ms="120")
    assert (reply.status, reply.message) == (504, "no answer within the request's timeout of 120 ms")
    assert 0.12 <= time.monotonic() - begun < 1.0
    assert bool(late.begun()) == (where == "at a worker")
    for gate in (first, late):
        gate.open()
    answering.results()
    assert running.predict("gate", late.body).status == 200


def test_a_model_may_set_a_timeout_for_all(running: Server, make_gate: MakeGate) -> None:
    gate = make_gate()
    assert running.predict("prompt", gate.body).message == "no answer within the request's timeout of 100 ms"
    gate.open()


@pytest.mark.parametrize(("name", "value"), [("x_request_timeout_ms", "soon"), ("x_request_priority", "high")])
def test_a_header_that_is_no_number_is_told(running: Server, name: str, value: str) -> None:
    for _ in range(2):  # the second time the head is known
        reply = running.predict("gate", b"", **{name: value})
        assert reply.status == 400 and f"the header {name.replace('_', '-')} is '{value}'" in reply.message
    counted = running.metric("mms_errors_total", model="gate", cause="BadRequestException")
    early = running.predict("gate", b"x", expect="100-continue", **{name: value})
    assert early.status == 400
    assert running.metric("mms_errors_total", model="gate", cause="BadRequestException") == counted + 1


def test_in_a_queue_full_of_low_priority_a_high_one_waits_for_one_batch(running: Server, make_gate: MakeGate) -> None:
    gates, high, answering = [make_gate() for _ in range(4)], make_gate(), Answering()
    answering.send(running, "levels", gates[0].body, x_request_priority="2")
    eventually(gates[0].begun)
    for depth, gate in enumerate(gates[1:], 1):
        answering.send(running, "levels", gate.body)
        eventually(partial(_waits, running, depth))
    answering.send(running, "levels", high.body, x_request_priority="1")
    eventually(lambda: running.metric("mms_errors_total", model="levels", cause="TooManyRequestsException") == 1)
    gates[0].open()
    eventually(high.begun)
    assert not gates[2].begun() and not gates[3].begun(), "it shares the next batch with one other"
    for gate in (high, *gates):
        gate.open()
    replies = answering.results()
    assert [reply.status for reply in replies] == [200, 200, 200, 429, 200]
    assert "a request of higher priority took this one's place" in replies[3].message


def test_who_misses_the_objective_gets_the_default_at_once_and_it_shows(running: Server, make_gate: MakeGate) -> None:
    gates, answering = [make_gate() for _ in range(3)], Answering()
    before = running.metric("mms_default_outputs_total", model="default")
    begun = time.monotonic()
    late = running.predict("default", gates[0].body)
    assert time.monotonic() - begun < 1.0
    assert (late.status, late.json()) == (200, {"label": "unknown"})
    assert late.headers["x-mms-default"] == "objective-missed"
    answering.send(running, "default", gates[1].body)
    eventually(lambda: running.metric("mms_default_outputs_total", model="default") >= before + 2)
    for gate in gates:
        gate.open()
    answering.results()
    assert running.metric("mms_errors_total", model="default") == 0
    eventually(lambda: running.predict("default", gates[2].body).headers.get("x-mms-default") is None)


def test_the_batch_limit_follows_the_objective_and_is_shown(running: Server) -> None:
    answering = Answering()
    for _ in range(12):
        answering.send(running, "sleeps", b"x")
    assert 200 in {reply.status for reply in answering.results()}
    described = running.describe("sleeps")
    limit = described["workers"][0]["batchLimit"]
    assert limit >= 2 and running.metric("mms_worker_batch_limit", model="sleeps") == limit
    assert described["latencyObjective"] == {"objectiveMs": 40, "attainable": True, "defaultOnMiss": False}


def test_an_objective_below_one_requests_own_time_is_told(running: Server) -> None:
    for _ in range(4):
        running.predict("hopeless", b"x")
    described = running.describe("hopeless")
    assert described["latencyObjective"]["attainable"] is False
    assert described["workers"][0]["batchLimit"] == 1
    eventually(lambda: "longer than latency_objective_ms: the objective cannot be kept, and" in running.output)


def test_settings_are_checked_and_shown_at_registration(running: Server) -> None:
    described = running.describe("levels")
    assert (described["priorityLevels"], described["defaultPriority"]) == (2, 2)
    assert described["queueOrder"] == "fifo" and running.describe("gate")["queueOrder"] == "adaptive"
    reply = fetch(running.management, "PUT", "/models/levels?preferred_batch_sizes=2,9")
    assert reply.status == 400 and "preferred_batch_sizes has 9, but batch_size is 2" in reply.message
    assert fetch(running.management, "PUT", "/models/levels?preferred_batch_sizes=2").status == 200
    fixed = fetch(running.management, "PUT", "/models/levels?priority_levels=3")
    assert (fixed.status, fixed.message) == (400, "priority_levels can only be set when the model is registered")
    assert running.describe("levels")["preferredBatchSizes"] == [2]


def _waits(running: Server, depth: int) -> bool:
    return running.metric("mms_queue_depth", model="levels") == depth
