"""Streams in the worker: which results are streams, what their chunks become, rounds, ends, cancelling. No process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from mms import sharedpage, wire
from mms.backend.answers import Answers, Body
from mms.backend.stages import BatchStages, RequestStages, Stages
from mms.backend.streams import Stream, Streams
from mms.handler import Context, Handler, PredictionError, Request, Requests, Response
from tests.unit.test_stages import LIMIT, make_context

Handle = Callable[[Any, Context], Any]


def request(accept: str = "") -> Request:
    headers = wire.encode([b"Accept", accept.encode()] if accept else [])
    facts = wire.RequestFactsView("text/plain", "", b"", False, msgspec.Raw(headers))
    return Request(facts, b"id", bytearray(b"x"), LIMIT)


class Server:
    """What a batch's streams send: `rounds` are the frames, as lists of chunks by job or ends by job."""

    gone = False

    def __init__(self) -> None:
        self.page = bytearray(sharedpage.PAGE)
        self.beats = 0
        self.heads: dict[int, bytes] = {}
        self.chunks: list[dict[int, bytes]] = []
        self.ends: dict[int, tuple[int, str, bytes]] = {}
        self.batches: list[list[wire.BatchTimes]] = []
        self.after: Callable[[], None] = lambda: None

    def run(self, stages: Stages, *requests: Request) -> Server:
        answers = stages.run(Requests.made(list(requests)))
        ids = range(1, len(requests) + 1)
        times = wire.BatchTimes(len(requests), 0.0, 0.0, 0.0, 0.0, 0.0)
        Streams(self, self.page, self._beat).run(ids, answers, lambda: times)
        return self

    def cancel(self, *jobs: int) -> None:
        """As WorkerProcess.cancel."""
        for job in jobs:
            sharedpage.write_cancelled(self.page, job)

    def body(self, job: int = 1) -> bytes:
        return b"".join(chunks.get(job, b"") for chunks in self.chunks)

    def _beat(self) -> None:
        self.beats += 1

    def write(self, kind: int, head: object, payloads: list[Body], size: int) -> None:
        assert kind == wire.STREAM and isinstance(head, wire.Chunks)
        assert (size, head.sizes) == (sum(map(len, payloads)), list(map(len, payloads)))
        self.chunks.append(dict(zip(head.ids, map(bytes, payloads), strict=True)))
        self.heads |= {job: outcome.head for job, outcome in head.first.items()}
        self.after()

    def reply(self, ids: Sequence[int], answers: Answers, batches: list[wire.BatchTimes]) -> None:
        for job, outcome, body in zip(ids, *answers, strict=True):
            self.ends[job] = outcome.status, outcome.error, bytes(body)
        self.batches.append(batches)
        self.after()


def batch(handle: Handle) -> BatchStages:
    return BatchStages(handle, make_context(), isolate=False, limit=LIMIT)


def requests(handler: Handler) -> RequestStages:
    return RequestStages(handler, make_context(), isolate=True, limit=LIMIT)


def only(*chunks: Any, **response: Any) -> Handle:
    """A handler that streams these chunks for every request."""

    def handle(data: Any, context: Context) -> Any:
        return [Response((chunk for chunk in chunks), **response) if response else iter(chunks) for _ in data]

    return handle


def streams(answers: Answers) -> list[bool]:
    return [isinstance(body, Stream) for body in answers[1]]


def test_iterators_are_streams_and_nothing_else_is() -> None:
    stages = batch(lambda data, context: ["text", [1], {"a": 1}, (n for n in "ab"), iter(["x"])])
    assert streams(stages.run(Requests.made([request() for _ in range(5)]))) == [False, False, False, True, True]
    assert stages.streams


def test_a_handler_that_never_streams_is_known_by_that() -> None:
    stages = batch(lambda data, context: ["text"])
    stages.run(Requests.made([request()]))
    assert not stages.streams


def test_one_chunk_of_each_per_round_in_one_frame() -> None:
    served = Server().run(batch(lambda data, context: [iter("abc"), "whole", iter("x")]), *[request()] * 3)
    assert served.chunks == [{1: b"a", 3: b"x"}, {1: b"b"}, {1: b"c"}]
    assert served.ends == {1: (200, "", b""), 2: (200, "", b"whole"), 3: (200, "", b"")}
    assert list(served.ends) == [2, 3, 1]
    assert served.beats == 4


def test_the_times_of_a_batch_come_with_its_last_end() -> None:
    served = Server().run(batch(lambda data, context: [iter("abc"), "whole", iter("x")]), *[request()] * 3)
    assert [[times.jobs for times in batches] for batches in served.batches] == [[], [], [3]]


@pytest.mark.parametrize(
    ("chunks", "accept", "response", "kind", "body"),
    [
        ((b"a", "b", {"c": 1}), "", {}, b"application/octet-stream", b'ab{"c":1}'),
        (("a", b"b"), "", {}, b"text/plain; charset=utf-8", b"ab"),
        (({"a": 1}, "b", 2), "", {}, b"application/x-ndjson", b'{"a":1}\n"b"\n2\n'),
        (("a", "b"), "", {"content_type": "audio/wav"}, b"audio/wav", b"ab"),
        (("a", "b"), "", {"headers": {"Content-Type": "audio/wav"}}, b"audio/wav", b"ab"),
        (("a\nb\r\nc",), "text/event-stream", {}, b"text/event-stream", b"data: a\ndata: b\ndata: c\n\n"),
        (({"a": 1}, b"\xff"), "a/b, Text/Event-Stream;q=1", {}, b"text/event-stream",
         'data: {"a":1}\n\ndata: \ufffd\n\n'.encode()),
        (("id: 1\ndata: a\n\n",), "text/event-stream", {"content_type": "text/event-stream"}, b"text/event-stream",
         b"id: 1\ndata: a\n\n"),
    ],
)  # fmt: skip
def test_what_chunks_become(
    chunks: tuple[Any, ...], accept: str, response: dict[str, Any], kind: bytes, body: bytes
) -> None:
    served = Server().run(batch(only(*chunks, **response)), request(accept))
    assert (served.heads[1], served.body()) == (b"content-type: " + kind + b"\r\n", body)


def test_the_first_chunk_may_be_a_response() -> None:
    first = Response("a", status=201, headers={"x-a": "b"})
    served = Server().run(batch(only(first, Response("b"))), request())
    assert served.heads[1] == b"content-type: text/plain; charset=utf-8\r\nx-a: b\r\n"
    assert (served.body(), served.ends[1][0]) == (b"ab", 201)


def test_what_the_context_was_told_counts_for_a_stream() -> None:
    def handle(data: Any, context: Context) -> Any:
        context.set_response_content_type(0, "text/csv")
        return [iter(["a"])]

    assert Server().run(batch(handle), request()).heads[1] == b"content-type: text/csv\r\n"


def test_nothing_yet_sends_nothing_but_counts_as_life() -> None:
    served = Server().run(batch(only(None, None, "a", None)), request())
    assert (served.chunks, served.beats) == ([{1: b"a"}], 5)


def test_a_generator_without_a_chunk_is_an_empty_answer() -> None:
    served = Server().run(batch(only()), request())
    assert (served.chunks, served.ends) == ([], {1: (200, "", b"")})


def raising(error: BaseException) -> Iterator[str]:
    yield "a"
    raise error


@pytest.mark.parametrize(
    ("chunks", "end"),
    [
        (lambda: raising(ValueError("secret")),
         (500, "HandlerException", b"the handler raised ValueError; the traceback is in the model's log")),
        (lambda: raising(SystemExit()),
         (500, "HandlerException", b"the handler raised SystemExit; the traceback is in the model's log")),
        (lambda: raising(PredictionError("no more", 422)), (422, "PredictionException", b"no more")),
        (lambda: iter(["a", PredictionError("no more", 422)]), (422, "PredictionException", b"no more")),
        (lambda: iter(["a", iter("b")]),
         (500, "HandlerException", b"a chunk of the handler's answer is an iterator itself")),
        (lambda: iter(["a", "b" * (LIMIT + 1)]),
         (500, "HandlerException", b"a chunk of 1001 bytes is over max_response_size (1000 bytes)")),
    ],
)  # fmt: skip
def test_a_stream_that_fails_ends_with_its_error_and_its_neighbour_does_not(
    chunks: Callable[[], Iterator[Any]], end: tuple[int, str, bytes]
) -> None:
    served = Server().run(batch(lambda data, context: [chunks(), iter("xyz")]), request(), request())
    assert served.ends == {1: end, 2: (200, "", b"")}
    assert (served.body(1), served.body(2)) == (b"a", b"xyz")


@pytest.mark.parametrize("status", [204, 304, 99])
def test_a_status_that_no_stream_can_have_is_an_error(status: int) -> None:
    served = Server().run(batch(only("a", status=status)), request())
    assert (served.chunks, served.ends[1][:2]) == ([], (500, "HandlerException"))


def closing(closed: list[str], name: str) -> Iterator[str]:
    try:
        while True:
            yield name
    finally:
        closed.append(name)


def test_a_cancelled_stream_is_closed_and_finished_and_others_go_on() -> None:
    closed: list[str] = []
    served = Server()
    served.after = lambda: served.cancel(1) if len(served.chunks) == 2 else None
    stages = batch(lambda data, context: [closing(closed, "a"), iter("wxyz")])
    served.run(stages, request(), request())
    assert closed == ["a"]
    assert (served.body(1), served.body(2)) == (b"aa", b"wxyz")
    assert set(served.ends) == {1, 2}


def test_more_cancelled_than_the_ring_holds_leaves_the_last_ones() -> None:
    closed: list[str] = []
    served = Server()
    served.after = lambda: served.cancel(*range(1000, 1300), 1) if len(served.chunks) == 1 else None
    served.run(batch(lambda data, context: [closing(closed, "a")]), request())
    assert closed == ["a"]


def test_a_generator_that_fails_while_it_is_closed_costs_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    def stubborn() -> Iterator[str]:
        try:
            yield "a"
        finally:
            raise ValueError("oh")

    served = Server()
    served.after = lambda: served.cancel(1) if served.chunks else None
    served.run(batch(lambda data, context: [stubborn()]), request())
    assert served.ends == {1: (200, "", b"")}
    assert "closing its generator failed" in capfd.readouterr().err


# request style


class Steps(Handler):
    """Yields the given steps; postprocess notes its outputs, and raises for an exception."""

    def __init__(self, *steps: Any) -> None:
        self.steps = steps
        self.closed = 0
        self.calls = 0

    def inference(self, batch: Any) -> Any:
        self.calls += 1
        try:
            for step in self.steps:
                if isinstance(step, BaseException):
                    raise step
                yield step[: len(batch)] if isinstance(step, list) else step
        finally:
            self.closed += 1

    def postprocess(self, output: Any) -> Any:
        if isinstance(output, Exception):
            raise output
        return output


def test_a_step_of_inference_is_one_chunk_for_each_item() -> None:
    served = Server().run(requests(Steps(["a", "x"], ["b", None], [None, "y"])), request(), request())
    assert served.chunks == [{1: b"a", 2: b"x"}, {1: b"b"}, {2: b"y"}]
    assert set(served.ends) == {1, 2}


def test_inference_is_closed_when_nobody_waits_any_more() -> None:
    handler = Steps(*[["a", "x"]] * 1000)
    served = Server()
    served.after = lambda: served.cancel({1: 1, 3: 2}.get(len(served.chunks), 0))
    served.run(requests(handler), request(), request())
    assert (served.body(1), served.body(2), handler.closed) == (b"a", b"xxx", 1)


def test_an_output_that_postprocess_refuses_ends_its_stream_alone() -> None:
    handler = Steps(["a", "x"], [PredictionError("no", 422), "y"])
    served = Server().run(requests(handler), request(), request())
    assert served.ends == {1: (422, "PredictionException", b"no"), 2: (200, "", b"")}
    assert served.body(2) == b"xy"


def test_inference_that_raises_midway_ends_all_its_streams() -> None:
    served = Server().run(requests(Steps(["a", "x"], ValueError("oh"))), request(), request())
    assert [end[:2] for end in served.ends.values()] == [(500, "HandlerException")] * 2


@pytest.mark.parametrize("step", [["a"], "ab", 5])
def test_a_step_of_the_wrong_shape_is_named(step: Any) -> None:
    served = Server().run(requests(Steps(["a", "x"], step)), request(), request())
    assert all(b"a step of inference returned" in end[2] for end in served.ends.values())


def test_a_first_step_that_fails_is_run_again_in_halves() -> None:
    handler = Steps(ValueError("oh"))
    served = Server().run(requests(handler), request(), request())
    assert (handler.calls, handler.closed) == (3, 3)
    assert [end[:2] for end in served.ends.values()] == [(500, "HandlerException")] * 2


def test_postprocess_may_be_a_generator() -> None:
    class Spells(Handler):
        def inference(self, batch: Any) -> Any:
            return ["ab", "xy"]

        def postprocess(self, output: Any) -> Any:
            yield from output

    served = Server().run(requests(Spells()), request(), request())
    assert served.chunks == [{1: b"a", 2: b"x"}, {1: b"b", 2: b"y"}]
