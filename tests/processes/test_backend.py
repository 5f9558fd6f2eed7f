"""A worker without a server: frames in, frames out. In a thread and as a process, same assertions."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import msgspec
import pytest

from mms import sharedpage, wire
from tests.asking import digest
from tests.conftest import MakeGate
from tests.processes.conftest import HEADERS, Start
from tests.waiting import eventually


@pytest.mark.parametrize(("name", "style"), [("echo", "request"), ("rows", "batch")])
def test_it_says_ready_and_its_style(start: Start, name: str, style: str) -> None:
    ready = start(name).ready()
    assert ready.style == style
    assert 0 <= ready.load_seconds < 10


def test_jobs_are_answered_in_batches_of_the_given_size(start: Start) -> None:
    backend = start("echo")
    backend.ready()
    bodies = [b"%d" % number for number in range(7)]
    answers = [json.loads(body) for _, body in backend.predict(*bodies, batch_size=3)]
    assert [answer["sha256"] for answer in answers] == [digest(body) for body in bodies]
    assert [answer["batch"] for answer in answers] == [3, 3, 3, 3, 3, 3, 1]
    assert answers[0]["headers"] == {"x-asked": "this"}
    assert answers[0]["id"] == "id-1"


@pytest.mark.parametrize("size", [0, 1, 100_000, 1 << 20])
def test_bodies_and_answers_of_many_sizes(start: Start, size: int) -> None:
    backend = start("poison")
    backend.ready()
    body = os.urandom(size)
    for result, answer in backend.predict(body, body):
        assert (result.status, digest(answer)) == (200, digest(body))


def test_each_front_end_has_memory_of_its_own_for_large_bodies(start: Start) -> None:
    backend = start("poison", shared=True)
    backend.ready()
    other = backend.lend()
    for front_end in other, backend, other:
        body = os.urandom(300_000)
        ((_, answer),) = front_end.predict(body)
        assert digest(answer) == digest(body)
    other.close()


def test_f47_a_front_end_that_ends_amid_a_stream_owes_nothing(start: Start, make_gate: MakeGate) -> None:
    """Or the worker would be ended because of what it does no more."""
    backend, gate = start("streams", shared=True), make_gate()
    backend.ready()
    other = backend.lend()
    other.send(json.dumps(["one", {"gate": gate.body.decode()}, "two", "three"]).encode())
    eventually(gate.begun)
    assert sharedpage.PROGRESS.unpack_from(other.progress)[2]
    other.close()
    gate.open()
    backend.predict(b"{}")
    assert not sharedpage.PROGRESS.unpack_from(other.progress)[2]


def test_times_are_reported_for_each_batch(start: Start) -> None:
    backend = start("echo")
    backend.ready()
    backend.send(b"a", b"b", b"c", batch_size=2)
    batches: list[wire.BatchTimes] = []
    while sum(batch.jobs for batch in batches) < 3:
        batches += backend.frame()[1].batches
    assert [batch.jobs for batch in batches] == [2, 1]
    for batch in batches:
        assert batch.preprocess + batch.inference + batch.postprocess <= batch.handler


def test_progress_counts_jobs_as_they_begin(start: Start) -> None:
    backend = start("echo")
    backend.ready()
    assert sharedpage.PROGRESS.unpack_from(backend.progress) == (0, 0, 0.0)
    backend.predict(b"a", b"b")
    assert sharedpage.PROGRESS.unpack_from(backend.progress) == (2, 2, 0.0)
    backend.predict(b"c")
    assert sharedpage.PROGRESS.unpack_from(backend.progress) == (3, 3, 0.0)


def test_progress_tells_finished_from_begun_while_a_batch_runs(start: Start, make_gate: MakeGate) -> None:
    backend, first, second = start("gate"), make_gate(), make_gate()
    backend.ready()
    first.open()
    ids = backend.send(first.body, second.body, batch_size=1)
    eventually(second.begun)
    finished, begun, begun_at = sharedpage.PROGRESS.unpack_from(backend.progress)
    assert (finished, begun) == (1, 2)
    assert 0 < begun_at <= time.monotonic()
    second.open()
    assert set(backend.results(2)) == set(ids)


def test_the_time_of_a_stream_counts_anew_with_each_chunk(start: Start, make_gate: MakeGate) -> None:
    backend, first, second = start("streams"), make_gate(), make_gate()
    backend.ready()
    gates = [{"gate": gate.body.decode()} for gate in (first, second)]
    backend.send(json.dumps("whole").encode(), json.dumps(["a", gates[0], "b", gates[1]]).encode(), batch_size=2)
    kind, whole, _ = backend.frame()
    assert (kind, whole.ids, whole.batches, whole.bodies) == (wire.RESULT, [1], [], [b"whole"])
    kind, chunks, body = backend.frame()
    assert (kind, chunks.ids, list(chunks.first), body) == (wire.STREAM, [2], [2], b"a")
    eventually(first.begun)
    finished, begun, begun_at = sharedpage.PROGRESS.unpack_from(backend.progress)
    assert (finished, begun) == (0, 2)
    first.open()
    kind, chunks, body = backend.frame()
    assert (kind, chunks.first, body) == (wire.STREAM, {}, b"b")
    eventually(second.begun)
    assert begun_at < sharedpage.PROGRESS.unpack_from(backend.progress)[2] <= time.monotonic()
    second.open()
    kind, end, _ = backend.frame()
    assert (kind, end.ids, end.bodies, [times.jobs for times in end.batches]) == (wire.RESULT, [2], [b""], [2])
    assert backend.predict(b'"next"')[0][1] == b"next"
    assert sharedpage.PROGRESS.unpack_from(backend.progress) == (3, 3, 0.0)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stream_without_chunks_ends_with_its_front_end(start: Start, tmp_path: Path, threads: int) -> None:
    backend, note = start("streams", shared=True, threads=threads), tmp_path / "note"
    backend.ready()
    other = backend.lend()
    other.send(json.dumps([{"note": str(note)}, "a", {"nothing": 10_000}]).encode())
    assert other.frame()[2] == b"a"
    other.close()
    eventually(note.exists)
    assert backend.predict(b'"next"')[0][1] == b"next"


def test_a_worker_that_waits_for_the_rest_of_a_frame_says_so_to_other_front_ends(start: Start) -> None:
    backend = start("poison", shared=True)
    backend.ready()
    other = backend.lend()
    facts = wire.RequestFacts("", "", b"", False, [])
    frame = wire.pack(wire.PREDICT, wire.Predict(1, [1], [1], [b"id-1"], [facts], []), 1)
    other.raw(frame)
    eventually(lambda: sharedpage.read_busy(backend.progress))
    other.raw(b"x")
    assert other.results(1)[1][1] == b"x"
    eventually(lambda: not sharedpage.read_busy(backend.progress))
    other.close()


def test_f9_a_handler_that_does_not_load_is_reported_with_its_traceback(start: Start) -> None:
    backend = start("crashes_on_load")
    kind, failed, _ = backend.frame()
    assert kind == wire.FAILED
    assert failed.message == "RuntimeError: the weights are missing"
    assert "in initialize" in failed.traceback
    assert backend.ended()


def test_a_handler_that_is_not_there_is_named(start: Start) -> None:
    backend = start("echo", handler="echo:Nothing")
    assert backend.frame()[1].message == "echo defines no class or function Nothing; it defines: Echo"
    assert backend.ended()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong_count", "handle returned 3 results for 2 requests"),
        ("not_a_list", "handle returned str; a list with one result per request (2)"),
        ("crashes_on_predict", "the handler raised ValueError"),
    ],
)
def test_f29_a_wrong_answer_fails_its_batch_only(start: Start, name: str, words: str) -> None:
    backend = start(name)
    backend.ready()
    for _ in range(2):
        for result, message in backend.predict(b"a", b"b"):
            assert (result.status, result.error) == (500, "HandlerException")
            assert words in message.decode()


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "CancelledError"])
def test_f24_exceptions_that_end_processes_do_not(start: Start, name: str) -> None:
    backend = start("raises")
    backend.ready()
    ((result, _),) = backend.predict(name.encode())
    assert (result.status, result.error) == (500, "HandlerException")
    ((result, answer),) = backend.predict(b"")
    assert (result.status, answer) == (200, b"")


def test_a_bad_job_fails_alone_in_its_batch(start: Start) -> None:
    backend = start("request_style")
    backend.ready()
    bodies = (b"one", b"preprocess", b"two", b"inference", b"postprocess", b"three")
    assert [result.status for result, _ in backend.predict(*bodies)] == [203, 422, 203, 500, 400, 203]


@pytest.mark.parametrize(("isolate", "statuses"), [("true", [200, 500, 200, 418]), ("auto", [500, 500, 500, 500])])
def test_batch_style_is_isolated_only_when_it_is_asked_for(start: Start, isolate: str, statuses: list[int]) -> None:
    backend = start("fails_one", isolate_errors=isolate)
    backend.ready()
    answers = backend.predict(b"one", b"bad", b"two", b"unlucky")
    assert [result.status for result, _ in answers] == statuses


def test_a_body_that_cannot_be_decoded_fails_alone(start: Start) -> None:
    backend = start("rows")
    backend.ready()
    answers = backend.predict(b"1", b"{", b"2", content_type="application/json")
    assert [result.status for result, _ in answers] == [200, 400, 200]
    assert answers[2][1] == b"{'body': 2}"


def test_a_body_that_cannot_be_unpacked_fails_alone(start: Start) -> None:
    backend = start("echo")
    backend.ready()
    ids = backend.send(b"not packed", encoding="gzip") + backend.send(b"plain")
    results = backend.results(2)
    assert [results[number][0].status for number in ids] == [400, 200]


def test_a_job_may_set_status_type_and_headers(start: Start) -> None:
    backend = start("status_and_headers")
    backend.ready()
    for number, (result, body) in enumerate(backend.predict(b"a", b"b"), 1):
        assert (result.status, body) == (201, b"hello")
        assert b"content-type: text/x-greeting\r\n" in result.head
        assert b"x-request: id-%d\r\n" % number in result.head
        assert b"x-seen: this\r\n" in result.head


def test_it_leaves_on_stop_and_at_the_end_of_its_channel(start: Start) -> None:
    first = start("echo")
    first.ready()
    first.stop()
    assert first.ended()
    second = start("rows")
    second.ready()
    second.close()


def test_what_follows_in_the_channel_waits_for_its_turn(start: Start) -> None:
    backend = start("echo")
    backend.ready()
    ids = [number for index in range(50) for number in backend.send(b"%d" % index)]
    assert set(backend.results(50)) == set(ids)


@pytest.mark.parametrize("start", ["process"], indirect=True)
@pytest.mark.parametrize(
    "junk",
    [b"this is no frame, whatever it is", wire.pack(wire.READY, None), b"MM\x02" + bytes(13)],
    ids=["text", "kind", "version"],
)
def test_f33_garbage_ends_the_worker(start: Start, junk: bytes) -> None:
    backend = start("echo")
    backend.ready()
    backend.raw(junk)
    assert backend.ended()


def test_the_facts_of_a_job_read_as_they_were_written() -> None:
    facts = wire.RequestFacts("b", "", b"", False, HEADERS)
    view = wire.decode(wire.PredictView, wire.encode(wire.Predict(1, [1], [0], [b"a"], [facts], []))).facts[0]
    assert wire.decode_headers(view.headers) == HEADERS
    assert isinstance(view.headers, msgspec.Raw)


def test_what_the_handler_measures_goes_before_the_answers_once_per_frame_and_only_then(start: Start) -> None:
    backend = start("measures")
    kind, head, _ = backend.frame()
    assert (kind, [series.name for series in head.series]) == (wire.MEASURED, ["ModelSize_bytes"])
    backend.ready()
    backend.send(b"cat", b"dog", b"cat", batch_size=3)
    kind, head, _ = backend.frame()
    assert kind == wire.MEASURED
    assert {(series.name, series.labels): series.value for series in head.series} == {
        ("Seen", ("Animal", "cat")): 2,
        ("Seen", ("Animal", "dog")): 1,
        ("Look_seconds", ()): pytest.approx(0.012),
        ("Length_bytes", ("Field", "body")): 9,
    }
    assert len(backend.results(3)) == 3
    quiet = start("rows")
    quiet.ready()
    quiet.send(b"x")
    assert quiet.frame()[0] == wire.RESULT
