"""Answers that come in chunks: nothing is held back, what breaks is cut, what has begun is never repeated (row F5)."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mms_nginx.find import find_nginx

from tests.asking import CLIENT_TIMEOUT, connect
from tests.conftest import MakeArchive, MakeGate
from tests.gates import Gate
from tests.servers import Server, environment, server
from tests.traffic import Answering
from tests.waiting import eventually

CUT = http.client.IncompleteRead, ConnectionError


@pytest.fixture(scope="module")
def archives(make_archive: MakeArchive) -> tuple[Path, ...]:
    return (
        make_archive("streams"),
        make_archive("streams", model_name="few", batch_size=4, max_batch_delay=5000),
        make_archive("streams", model_name="hurried", response_timeout=0.5),
        make_archive("streams_requests", batch_size=2, max_batch_delay=5000),
        make_archive("streams", model_name="wide", threads=2, response_timeout=0.5),
        make_archive(
            "streams_requests", model_name="overlaps", batch_size=2, max_batch_delay=5000, preprocess_threads=2
        ),
    )


@pytest.fixture(scope="module")
def plain(archives: tuple[Path, ...]) -> Iterator[Server]:
    with server(*archives, max_response_size="1MiB") as running:
        yield running


@pytest.fixture(scope="module")
def behind(archives: tuple[Path, ...]) -> Iterator[Server]:
    if find_nginx("nginx") is None:
        pytest.skip("nginx is not installed")
    with server(*archives, edge="nginx") as running:
        yield running


@pytest.fixture(params=["plain", "behind"])
def both(request: pytest.FixtureRequest) -> Server:
    """The same test without and with nginx."""
    running: Server = request.getfixturevalue(request.param)
    return running


@contextlib.contextmanager
def stream(running: Server, *steps: Any, model: str = "streams", **headers: str) -> Iterator[http.client.HTTPResponse]:
    """The answer as far as it has come: read1() gives its next chunks."""
    connection = connect(running.url)
    try:
        connection.request("POST", f"/predictions/{model}", json.dumps(steps).encode(), headers)
        yield connection.getresponse()
    finally:
        connection.close()


def raw(running: Server, request: bytes) -> socket.socket:
    host, _, port = running.url.rpartition(":")
    sock = socket.create_connection((host, int(port)), CLIENT_TIMEOUT)
    sock.sendall(request)
    return sock


def request_of(*steps: Any, version: str = "1.1") -> bytes:
    body = json.dumps(steps).encode()
    head = f"POST /predictions/streams HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def wait_for(gate: Gate) -> dict[str, str]:
    """A step that ends when the gate is opened."""
    return {"gate": gate.body.decode()}


def test_chunks_are_not_held_back(both: Server, make_gate: MakeGate) -> None:
    first, second = make_gate(), make_gate()
    with stream(both, "one", wait_for(first), "two", wait_for(second), "three") as answer:
        assert answer.status == 200
        assert answer.headers["transfer-encoding"] == "chunked"
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.read1() == b"one"
        first.open()
        assert answer.read1() == b"two"
        second.open()
        assert answer.read() == b"three"


def test_the_connection_is_kept_after_a_stream(both: Server) -> None:
    connection = connect(both.url)
    try:
        for _ in range(2):
            connection.request("POST", "/predictions/streams", json.dumps(["a", "b"]).encode())
            assert connection.getresponse().read() == b"ab"
            sock = connection.sock
        assert connection.sock is sock is not None
    finally:
        connection.close()


def test_the_head_names_the_request_and_forbids_caches(plain: Server) -> None:
    with stream(plain, "a", **{"x-request-id": "mine"}) as answer:
        assert answer.headers["x-request-id"] == "mine"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize(
    ("chunks", "kind", "body"),
    [
        ([{"bytes": "ab"}, "c"], "application/octet-stream", b"abc"),
        ([{"echo": {"a": 1}}, {"echo": [2]}], "application/x-ndjson", b'{"a":1}\n[2]\n'),
        ([], "application/octet-stream", b""),
    ],
)
def test_the_first_chunk_chooses_the_type(plain: Server, chunks: list[Any], kind: str, body: bytes) -> None:
    with stream(plain, *chunks) as answer:
        assert (answer.headers["content-type"], answer.read()) == (kind, body)


def test_events_for_those_who_ask(both: Server) -> None:
    with stream(both, "one\ntwo", {"echo": {"a": 1}}, accept="text/event-stream") as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.read() == b'data: one\ndata: two\n\ndata: {"a":1}\n\n'


def test_a_generator_that_raises_midway_is_cut(both: Server) -> None:
    before = both.metric("mms_requests_total", model="streams", code="500")
    with stream(both, "one", {"raise": "oh"}, "two") as answer, pytest.raises(http.client.IncompleteRead) as caught:
        answer.read()
    assert caught.value.partial == b"one"
    assert both.metric("mms_requests_total", model="streams", code="500") == before + 1
    assert both.metric("mms_errors_total", model="streams", cause="HandlerException") >= 1


def test_events_end_with_an_error_event(both: Server) -> None:
    with stream(both, "one", {"raise": "oh"}, accept="text/event-stream") as answer:
        one, error, rest = answer.read().decode().split("\n\n")
    assert (one, rest) == ("data: one", "")
    name, data = error.split("\n")
    assert name == "event: error"
    told = json.loads(data.removeprefix("data: "))
    assert told["code"] == 500 and told["type"] == "HandlerException" and "ValueError" in told["message"]


def test_a_generator_that_raises_first_is_a_plain_error(both: Server) -> None:
    with stream(both, {"raise": "oh"}, "one") as answer:
        assert answer.status == 500
        assert json.loads(answer.read())["type"] == "HandlerException"


def test_a_chunk_over_max_response_size_is_cut(plain: Server) -> None:
    with stream(plain, "one", "x" * (1 << 20) + "y") as answer, pytest.raises(http.client.IncompleteRead):
        answer.read()


def test_a_client_that_leaves_closes_the_generator(both: Server, tmp_path: Path) -> None:
    note, workers = tmp_path / "note", both.workers("streams")
    cancelled = both.metric("mms_requests_cancelled_total", model="streams")
    with stream(both, {"note": str(note)}, "one", {"nothing": 1_000_000}) as answer:
        assert answer.read1() == b"one"
        assert not note.exists()
        answer.close()
    eventually(note.exists)
    assert note.read_text() == "closed\n"
    assert both.metric("mms_requests_cancelled_total", model="streams") == cancelled + 1
    with stream(both, "next") as answer:
        assert answer.read() == b"next"
    assert both.workers("streams") == workers


def test_f5_a_killed_worker_cuts_the_stream_which_is_not_repeated(both: Server, make_gate: MakeGate) -> None:
    gate, cut = make_gate(), both.metric("mms_streams_cut_total", model="streams")
    with stream(both, "one", wait_for(gate), "two") as answer:
        assert answer.read1() == b"one"
        os.kill(eventually(gate.begun)[0], signal.SIGKILL)
        with pytest.raises(CUT):
            answer.read()
    gate.open()
    with stream(both, "next") as answer:
        assert answer.read() == b"next"
    assert len(gate.begun()) == 1
    assert both.metric("mms_streams_cut_total", model="streams") == cut + 1


def test_f5_a_killed_worker_ends_events_with_an_error_event(plain: Server, make_gate: MakeGate) -> None:
    gate = make_gate()
    with stream(plain, "one", wait_for(gate), accept="text/event-stream") as answer:
        assert answer.read1() == b"data: one\n\n"
        os.kill(eventually(gate.begun)[0], signal.SIGKILL)
        assert b"event: error\ndata: " in answer.read()
    gate.open()


def test_f5_neighbours_of_a_cut_stream_are_run_again(plain: Server, make_gate: MakeGate) -> None:
    begun, others = make_gate(), Answering()
    with contextlib.ExitStack() as stack:
        whole = json.dumps("whole").encode()
        later = json.dumps([{"nothing": 3}, wait_for(begun), "later"]).encode()
        for body in (whole, whole, later):
            others.send(plain, "few", body)
        eventually(lambda: plain.metric("mms_queue_depth", model="few") == 3)
        answer = stack.enter_context(stream(plain, "one", {"nothing": 50}, "two", model="few"))
        assert answer.read1() == b"one"
        os.kill(eventually(begun.begun)[0], signal.SIGKILL)
        with pytest.raises(CUT):
            answer.read()
    begun.open()
    assert [reply.body for reply in others.results()] == [b"whole", b"whole", b"later"]


def test_a_batch_with_streams_is_counted_as_one(behind: Server) -> None:
    answering, bodies = Answering(), [json.dumps(steps).encode() for steps in ("whole", ["a"], ["b", "c"], ["d"])]
    for body in bodies:
        answering.send(behind, "few", body)
    assert [reply.body for reply in answering.results()] == [b"whole", b"a", b"bc", b"d"]
    names = ("mms_batch_size_sum", "mms_batch_size_count", "mms_handler_duration_seconds_count")
    assert [behind.metric(name, model="few") for name in names] == [4, 1, 1]
    names = ("mms_requests_total", "mms_request_duration_seconds_count", "mms_queue_duration_seconds_count")
    assert [behind.metric(name, model="few") for name in names] == [4, 4, 4]


def test_a_step_that_takes_too_long_is_cut_but_many_steps_are_not(plain: Server, make_gate: MakeGate) -> None:
    with stream(plain, *["a", {"nothing": 20}] * 4, model="hurried") as answer:  # in all, longer than its limit
        assert answer.read() == b"aaaa"
    gate = make_gate()
    with (
        stream(plain, "one", wait_for(gate), "two", model="hurried") as answer,
        pytest.raises(CUT),
    ):
        answer.read()
    gate.open()
    assert plain.metric("mms_errors_total", model="hurried", cause="DeadlineExceededException") == 1


def test_pipelined_requests_around_a_stream_are_answered_in_order(plain: Server, make_gate: MakeGate) -> None:
    gate = make_gate()
    with raw(
        plain,
        request_of("a", wait_for(gate), "b")
        + request_of("c", "d")
        + b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ) as sock:
        eventually(gate.begun)
        gate.open()
        received = b""
        while data := sock.recv(65536):
            received += data
    answers = received.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert [answer.partition(b"\r\n\r\n")[2] for answer in answers] == [
        b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n",
        b"1\r\nc\r\n1\r\nd\r\n0\r\n\r\n",
        b'{"status":"alive"}\n',
    ]


def test_an_http_1_0_client_gets_all_until_the_end(plain: Server) -> None:
    with raw(plain, request_of("a", "b", version="1.0")) as sock:
        received = b""
        while data := sock.recv(65536):
            received += data
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head and b"connection: close" in head
    assert body == b"ab"


def test_an_http_1_0_client_sees_a_cut_as_a_reset(plain: Server) -> None:
    with raw(plain, request_of("a", {"raise": "oh"}, version="1.0")) as sock, pytest.raises(ConnectionResetError):
        while sock.recv(65536):
            pass


def test_a_client_that_does_not_read_is_cut(plain: Server, tmp_path: Path) -> None:
    note = tmp_path / "note"
    endless = {"repeat": "x" * 100_000, "times": 1_000_000}
    with raw(plain, request_of({"note": str(note)}, endless)):
        eventually(note.exists, 10)


@pytest.mark.parametrize("model", ["streams_requests", "overlaps"])
def test_request_style_yields_for_the_whole_batch(both: Server, model: str) -> None:
    answering = Answering()
    for body in (b"a b c", b"d"):
        answering.send(both, model, body, content_type="text/plain")
    one, two = answering.results()
    assert (one.body, two.body) == (b"ABC", b"D")
    assert one.headers["x-kind"] == "words"


@pytest.mark.parametrize("model", ["streams_requests", "overlaps"])
def test_request_style_an_item_refused_in_postprocess_fails_alone(plain: Server, model: str) -> None:
    answering = Answering()
    for body in (b"a b", b"refuse x"):
        answering.send(plain, model, body, content_type="text/plain")
    one, two = answering.results()
    assert (one.status, one.body) == (200, b"AB")
    assert (two.status, two.message) == (422, "not this word")


@pytest.mark.parametrize("model", ["streams_requests", "overlaps"])
def test_request_style_a_bad_first_step_fails_alone(plain: Server, model: str) -> None:
    answering = Answering()
    for body in (b"a b", b"raise"):
        answering.send(plain, model, body, content_type="text/plain")
    one, two = answering.results()
    assert (one.status, one.body) == (200, b"AB")
    assert two.status == 500


def test_a_worker_with_threads_drives_as_many_streams_at_a_time(plain: Server, make_gate: MakeGate) -> None:
    one, two = make_gate(), make_gate()
    with (
        stream(plain, "a", {"nothing": 10}, wait_for(one), "b", model="wide") as first,
        stream(plain, "c", {"nothing": 10}, wait_for(two), "d", model="wide") as second,
    ):
        assert (first.read1(), second.read1()) == (b"a", b"c")
        assert eventually(one.begun) == eventually(two.begun)
        two.open()
        one.open()
        assert (first.read(), second.read()) == (b"b", b"d")


def test_response_timeout_counts_per_chunk_in_each_thread(plain: Server, make_gate: MakeGate) -> None:
    gate = make_gate()
    with stream(plain, *["a", {"nothing": 20}] * 4, model="wide") as answer:
        assert answer.read() == b"aaaa"
    with stream(plain, "one", wait_for(gate), "two", model="wide") as answer, pytest.raises(CUT):
        answer.read()
    gate.open()
    assert plain.metric("mms_errors_total", model="wide", cause="DeadlineExceededException") == 1


def test_a_client_that_leaves_frees_its_thread(plain: Server, tmp_path: Path) -> None:
    note = tmp_path / "note"
    with stream(plain, {"note": str(note)}, "one", {"nothing": 1_000_000}, model="wide") as answer:
        assert answer.read1() == b"one"
    eventually(note.exists)


def test_a_stop_waits_for_streams_until_drain_timeout(make_archive: MakeArchive, make_gate: MakeGate) -> None:
    held, freed = make_gate(), make_gate()
    with server(make_archive("streams", min_workers=2), drain_timeout=0.5, drain_delay=0) as running:
        with stream(running, "one", wait_for(held)) as one, stream(running, "two", wait_for(freed), "end") as two:
            assert (one.read1(), two.read1()) == (b"one", b"two")
            running.signal(signal.SIGTERM)
            freed.open()
            assert two.read() == b"end"
            with pytest.raises(CUT):
                one.read()
        held.open()


def test_the_command_line_prints_chunks_as_they_come(plain: Server, make_gate: MakeGate, tmp_path: Path) -> None:
    gate, request = make_gate(), tmp_path / "request.bin"
    request.write_text(json.dumps(["one\n", wait_for(gate), "two\n", {"raise": "oh"}]))
    words = [sys.executable, "-P", "-m", "mms.cli", "predict", "streams", str(request), "--run-dir", str(plain.run_dir)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"one\n"
        gate.open()
        shown, error = command.communicate(timeout=CLIENT_TIMEOUT)
    assert (command.returncode, shown) == (1, b"two\n")
    assert b"the answer was cut off before its end" in error


def test_streams_are_counted(behind: Server) -> None:
    names = ("mms_streams_total", "mms_stream_chunks_total", "mms_first_chunk_seconds_count")
    before = [behind.metric(name, model="streams") for name in names]
    with stream(behind, "a", "b", "c") as answer:
        answer.read()
    after = [behind.metric(name, model="streams") for name in names]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 3, 1]
