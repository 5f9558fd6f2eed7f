"""Workers and the fork server are killed in every state: what clients see, and how fast it is over."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial

import psutil
import pytest

from tests.asking import fetch
from tests.conftest import MakeArchive, MakeGate
from tests.servers import Server, needs_nginx, processes_in, server
from tests.traffic import Answering, Traffic
from tests.waiting import eventually


@pytest.fixture(scope="module")
def running(make_archive: MakeArchive) -> Iterator[Server]:
    with server(
        make_archive("echo", min_workers=2),
        make_archive("echo", model_name="both", min_workers=2),
        make_archive("echo", model_name="forked", min_workers=2),
        make_archive("echo", model_name="together", min_workers=2),
        make_archive("gate"),
        make_archive("gate", model_name="batched", batch_size=8),
        make_archive("gate", model_name="once", retry=0),
        make_archive("poison"),
        make_archive("forks_a_helper"),
        make_archive("big"),
        make_archive("poison", model_name="frozen", response_timeout=0.3),
    ) as started:
        yield started


@pytest.fixture(scope="module")
def deadly(make_archive: MakeArchive) -> Iterator[Server]:
    """In the shared server these many deaths would delay the others."""
    poisons = [make_archive("poison", model_name=name) for name in ("abort", "exit", "again")]
    closes = [make_archive("closes_descriptors", model_name=name) for name in ("close", "garbage", "empty")]
    with server(*poisons, *closes) as started:
        yield started


def replaced(running: Server, model: str, count: int, *gone: int) -> bool:
    pids = running.workers(model)
    return len(pids) == count and not set(pids) & set(gone)


def is_running(pid: int) -> bool:
    """Whether it does anything; one that waits to be reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_f1_an_idle_worker_that_is_killed_is_replaced_at_once(running: Server) -> None:
    (pid,) = running.workers("poison")
    os.kill(pid, signal.SIGKILL)
    assert running.predict("poison", b"first after the kill").status == 200
    eventually(lambda: replaced(running, "poison", 1, pid), timeout=0.5)
    assert running.metric("mms_worker_restarts_total", model="poison", reason="signal 9 (SIGKILL)") == 1


def test_kill_under_load_loses_no_request_and_the_pool_is_whole_within_a_second(running: Server) -> None:
    with Traffic(running) as traffic:
        traffic.flows()
        for _ in range(3):
            pid = running.workers("echo")[0]
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            eventually(partial(replaced, running, "echo", 2, pid))
            assert time.monotonic() - killed < 1
            traffic.flows()
    assert traffic.failures == []
    assert traffic.slowest < 1


def test_all_workers_killed_under_load_lose_no_request(running: Server) -> None:
    with Traffic(running, model="both") as traffic:
        traffic.flows()
        before = running.workers("both")
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: replaced(running, "both", 2, *before), timeout=1)
        traffic.flows()
    assert traffic.failures == []


@needs_nginx
def test_kill_under_load_behind_nginx_loses_no_request(make_archive: MakeArchive) -> None:
    with server(make_archive("echo"), edge="nginx") as edged, Traffic(edged) as traffic:
        traffic.flows()
        (pid,) = edged.workers("echo")
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: replaced(edged, "echo", 1, pid), timeout=1)
        traffic.flows()
    assert traffic.failures == []


def test_f2_a_request_in_hand_is_run_once_more_and_answered(running: Server, make_gate: MakeGate) -> None:
    gate, answering = make_gate(), Answering()
    (pid,) = running.workers("gate")
    answering.send(running, "gate", gate.body)
    eventually(gate.begun)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(gate.begun()) == 2)
    gate.open()
    assert [reply.status for reply in answering.results()] == [200]
    first, second = gate.begun()
    assert first == pid != second
    assert running.metric("mms_retries_total", model="gate") == 1


def test_f3_the_jobs_of_a_killed_batch_are_run_again_each_alone(running: Server, make_gate: MakeGate) -> None:
    first, rest, answering = make_gate(), [make_gate() for _ in range(4)], Answering()
    (pid,) = running.workers("batched")
    answering.send(running, "batched", first.body)
    eventually(first.begun)
    for gate in rest:
        answering.send(running, "batched", gate.body)
    eventually(lambda: running.metric("mms_queue_depth", model="batched") == 4)
    first.open()
    eventually(lambda: all(gate.begun() for gate in rest))
    assert [gate.batches() for gate in rest] == [[4]] * 4
    for gate in rest:
        gate.open()
    os.kill(pid, signal.SIGSTOP)  # whatever it was about to answer, it does not now
    os.kill(pid, signal.SIGKILL)
    assert {reply.status for reply in answering.results()} == {200}
    assert all(gate.batches() in ([4], [4, 1]) for gate in rest)


def test_f4_an_answer_is_whole_although_workers_are_killed_while_they_send(running: Server) -> None:
    answering = Answering()
    for _ in range(8):
        answering.send(running, "big", b"8000000")
    killed: set[int] = set()
    for _ in range(2):
        pid = eventually(lambda: set(running.workers("big")) - killed).pop()
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)
    for reply in answering.results():
        assert reply.body == b"x" * 8_000_000 or reply.status in (500, 503), reply.status


@pytest.mark.parametrize(("name", "cause"), [("abort", "signal 6 (SIGABRT)"), ("exit", "exit code 0")])
def test_f6_a_poisonous_request_kills_exactly_two_workers(deadly: Server, name: str, cause: str) -> None:
    reply = deadly.predict(name, name.encode())
    assert (reply.status, reply.json()["type"]) == (500, "WorkerDiedException")
    assert f"died twice running this request ({cause})" in reply.message
    assert deadly.metric("mms_worker_restarts_total", model=name, reason=cause) == 2
    assert deadly.predict(name, b"good").body == b"good"
    assert deadly.describe(name)["state"] == "READY"


def test_f7_a_retry_lets_a_refused_request_try_again(deadly: Server) -> None:
    def cause() -> str:
        return deadly.predict("again", b"abort").message.partition(" running")[0]

    assert cause() == "the worker process died twice"
    assert cause().startswith("the same request has just crashed two")
    assert deadly.manage("POST", "/models/again/retry").status == 200
    assert cause() == "the worker process died twice"


def test_f8_with_retry_off_nothing_runs_twice(running: Server, make_gate: MakeGate) -> None:
    gate, answering = make_gate(), Answering()
    (pid,) = running.workers("once")
    answering.send(running, "once", gate.body)
    eventually(gate.begun)
    os.kill(pid, signal.SIGKILL)
    (reply,) = answering.results()
    assert (reply.status, reply.json()["type"]) == (503, "WorkerDiedException")
    assert "retry is off for this model" in reply.message
    assert gate.begun() == [pid]


def test_f12_a_stopped_worker_is_killed_and_replaced(running: Server) -> None:
    (pid,) = running.workers("frozen")
    reply = running.predict("frozen", b"freeze")
    assert reply.status == 504
    assert running.predict("frozen", b"next").status == 200
    assert not psutil.pid_exists(pid)


def test_f18_a_helper_that_outlives_its_worker_hides_no_death(running: Server) -> None:
    helper = running.predict("forks_a_helper").json()
    os.kill(helper["pid"], signal.SIGKILL)
    eventually(lambda: replaced(running, "forks_a_helper", 1, helper["pid"]), timeout=1)
    eventually(lambda: not is_running(helper["helper"]))


@pytest.mark.parametrize("name", ["close", "garbage", "empty"])
def test_f20_f33_a_worker_that_breaks_its_channel_is_killed(deadly: Server, name: str) -> None:
    (pid,) = deadly.workers(name)
    reply = deadly.predict(name, name.encode())
    assert (reply.status, reply.json()["type"]) == (500, "WorkerDiedException")
    assert "its channel" in reply.message
    eventually(lambda: replaced(deadly, name, 1, pid), timeout=2)
    assert deadly.predict(name, b"good").body == b"good"


def test_f36_the_fork_servers_death_is_no_workers_death(running: Server) -> None:
    before = running.workers("forked")
    with Traffic(running, model="forked") as traffic:
        running.kill_named("mms-forkserver")
        traffic.flows()
    assert traffic.failures == []
    assert running.workers("forked") == before
    os.kill(before[0], signal.SIGKILL)
    eventually(lambda: replaced(running, "forked", 2, before[0]), timeout=2)
    assert running.metric("mms_forkserver_restarts_total", reason="signal 9 (SIGKILL)") >= 1
    assert running.describe("forked")["forkServerDeaths"] >= 1
    lines = running.manage("GET", "/readyz").json()["restarts"]
    assert ("forkserver", "signal 9 (SIGKILL)") in [(line["level"], line["lastCause"]) for line in lines]
    assert "restarts" not in fetch(running.url, "GET", "/readyz").json(), "for the operator only"


def test_f38_the_fork_server_killed_together_with_a_worker(running: Server) -> None:
    before = running.workers("together")
    running.kill_named("mms-forkserver")
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert running.predict("together", b"x").status == 200
    eventually(lambda: replaced(running, "together", 2, *before), timeout=2)


def test_f10_a_model_that_keeps_dying_is_restarted_ever_more_slowly(make_archive: MakeArchive) -> None:
    with server(make_archive("poison", retry=0)) as dying:
        for _ in range(4):
            running_pid = eventually(lambda: dying.workers("poison"))[0]
            os.kill(running_pid, signal.SIGKILL)
            eventually(partial(replaced, dying, "poison", 1, running_pid))
        assert "replacing it in" in dying.output
        assert dying.predict("poison", b"good").status == 200


def test_no_process_is_left_over_by_all_these_deaths(running: Server) -> None:
    models = [model["modelName"] for model in running.manage("GET", "/models").json()["models"]]

    def only_those_of_now() -> bool:
        wanted = {pid for model in models for pid in running.workers(model)} | {running.pid}
        forkservers = {process.pid for process in running.named("mms-forkserver")}
        return len(forkservers) == 1 and {each.pid for each in processes_in(running.folder)} == wanted | forkservers

    eventually(only_those_of_now)


def test_f18_a_killed_helper_is_reaped(make_archive: MakeArchive) -> None:
    """The server is the subreaper: what it adopts it must wait for."""
    with server(make_archive("forks_a_helper")) as running:
        helper = running.predict("forks_a_helper").json()
        os.kill(helper["pid"], signal.SIGKILL)
        eventually(lambda: running.workers("forks_a_helper"))
        eventually(lambda: not psutil.pid_exists(helper["helper"]))


def test_f37_the_fork_server_killed_while_workers_start(make_archive: MakeArchive) -> None:
    """Each start that fails must discard the fork server that failed it, not its successor."""
    with server(make_archive("echo"), parallel_loads=4) as running:
        running.manage("PUT", "/models/echo?min_worker=4")
        running.kill_named("mms-forkserver")
        eventually(lambda: len(running.workers("echo")) == 4)


def test_requests_wait_while_the_first_worker_is_replaced_although_nobody_has_asked_for_the_state(
    make_archive: MakeArchive,
) -> None:
    with server(make_archive("echo"), workers=1) as running:
        running.kill_named("mms-echo")
        assert [running.predict("echo", b"x").status for _ in range(20)] == [200] * 20
