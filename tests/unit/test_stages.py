"""A batch on its way through a handler, in both styles: order, isolation, halves, wrong results, exceptions."""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mms import wire
from mms.backend.answers import Answers
from mms.backend.stages import BatchStages, RequestStages
from mms.errors import BadRequestError
from mms.handler import Context, Handler, PredictionError, Request, Requests, Response

LIMIT = 1000
Reply = tuple[int, bytes, bytes, str]  # status, header block, body, error
UNUSUAL = (SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, ValueError, RecursionError)


def make_context() -> Context:
    return Context(wire.Load("cat", "1.0", "/m", "h", {}, {}, 8, "auto", None, 1, LIMIT, LIMIT), "cpu")


def make_requests(*bodies: str, content_type: str = "text/plain") -> Requests:
    requests = [
        Request(
            wire.RequestFactsView(content_type, "", b"", False, wire.EMPTY_HEADERS),
            b"id-%d" % number,
            bytearray(body.encode()),
            LIMIT,
        )
        for number, body in enumerate(bodies, 1)
    ]
    return Requests.made(requests)


def replies(answers: Answers) -> list[Reply]:
    return [(outcome.status, outcome.head, bytes(body), outcome.error) for outcome, body in zip(*answers, strict=True)]


def run_batch(handle: Callable[[Any, Context], Any], requests: Requests, *, isolate: bool = False) -> list[Reply]:
    return replies(BatchStages(handle, make_context(), isolate=isolate, limit=LIMIT).run(requests))


def run_requests(handler: Handler, *bodies: str, isolate: bool = True) -> list[Reply]:
    return replies(RequestStages(handler, make_context(), isolate=isolate, limit=LIMIT).run(make_requests(*bodies)))


def statuses(answers: list[Reply]) -> list[int]:
    return [answer[0] for answer in answers]


def bodies(answers: list[Reply]) -> list[str]:
    return [str(answer[2], "utf-8") for answer in answers]


def upper(data: Any, context: Context) -> Any:
    return [row["body"].upper() for row in data]


# batch style


def test_a_batch_is_answered_in_order() -> None:
    answers = run_batch(upper, make_requests("a", "b", "c"))
    assert statuses(answers) == [200] * 3 and bodies(answers) == ["A", "B", "C"]


def test_results_of_every_kind_in_one_batch() -> None:
    answers = run_batch(lambda data, context: [b"x", "x", {"x": 1}, None], make_requests("a", "b", "c", "d"))
    assert bodies(answers) == ["x", "x", '{"x":1}', "null"]


def test_a_request_that_cannot_be_decoded_fails_alone_before_the_handler() -> None:
    seen = []

    def handle(data: Any, context: Context) -> Any:
        seen.append((len(data), len(context.requests), context.get_request_id(1)))
        return [row["body"] for row in data]

    answers = run_batch(handle, make_requests("1", "{", "3", content_type="application/json"))
    assert statuses(answers) == [200, 400, 200] and bodies(answers)[::2] == ["1", "3"]
    assert answers[1][3] == "BadRequestException" and "not valid JSON" in bodies(answers)[1]
    assert seen == [(2, 2, "id-3")]


def test_a_batch_of_nothing_but_broken_requests_does_not_reach_the_handler() -> None:
    def handle(data: Any, context: Context) -> Any:
        raise AssertionError("called")

    assert statuses(run_batch(handle, make_requests("{", "{", content_type="application/json"))) == [400, 400]


def test_what_the_handler_sets_belongs_to_its_request() -> None:
    def handle(data: Any, context: Context) -> Any:
        context.set_response_status(code=202, idx=1)
        context.set_response_content_type(2, "a/b")
        context.set_response_header(2, "x-a", "1")
        return ["a", "b", "c"]

    answers = run_batch(handle, make_requests("a", "b", "c"))
    assert statuses(answers) == [200, 202, 200]
    assert answers[2][1] == b"content-type: a/b\r\nx-a: 1\r\n"


def test_a_returned_error_is_the_outcome_of_one_request() -> None:
    answers = run_batch(lambda data, context: ["a", PredictionError("no cat", 422), "c"], make_requests("a", "b", "c"))
    assert statuses(answers) == [200, 422, 200]
    assert answers[1][2:] == (b"no cat", "PredictionException")


def test_an_answer_that_cannot_be_sent_fails_alone() -> None:
    answers = run_batch(lambda data, context: ["a", object(), "x" * (LIMIT + 1)], make_requests("a", "b", "c"))
    assert statuses(answers) == [200, 500, 500]
    assert "returned object" in bodies(answers)[1] and "max_response_size" in bodies(answers)[2]


def test_a_status_or_header_that_cannot_be_sent_fails_alone() -> None:
    def handle(data: Any, context: Context) -> Any:
        context.set_response_status(code=42, idx=0)
        context.set_response_header(1, "x", "a\r\nb")
        return ["a", "b", "c"]

    assert statuses(run_batch(handle, make_requests("a", "b", "c"))) == [500, 500, 200]


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (["a"], "returned 1 results for 2 requests"),
        (["a", "b", "c"], "returned 3 results for 2 requests"),
        ([], "returned 0 results"),
        ("ab", "returned str; a list"),
        (("a", "b"), "returned tuple; a list"),
        ({"a": 1, "b": 2}, "returned dict; a list"),
        (None, "returned NoneType; a list"),
    ],
)
def test_a_result_of_the_wrong_shape_names_the_fault(result: Any, why: str) -> None:
    answers = run_batch(lambda data, context: result, make_requests("a", "b"))
    assert statuses(answers) == [500, 500]
    assert all(why in body for body in bodies(answers))


@pytest.mark.parametrize("error", UNUSUAL)
def test_any_exception_fails_the_batch_and_shows_only_its_class(
    error: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    def handle(data: Any, context: Context) -> Any:
        raise error("secret")

    answers = run_batch(handle, make_requests("a", "b"))
    assert statuses(answers) == [500, 500]
    assert bodies(answers) == [f"the handler raised {error.__name__}; the traceback is in the model's log"] * 2
    log = capsys.readouterr().err
    assert "id-1, id-2" in log and "secret" in log and "Traceback" in log


def test_out_of_memory_is_507() -> None:
    def handle(data: Any, context: Context) -> Any:
        raise MemoryError

    assert run_batch(handle, make_requests("a")) == [(507, b"", b"out of memory", "HandlerException")]


def test_f107_out_of_memory_on_the_gpu_is_507(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = SimpleNamespace(
        OutOfMemoryError=type("OutOfMemoryError", (RuntimeError,), {}),
        cuda=SimpleNamespace(is_initialized=lambda: True, synchronize=lambda: None),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)

    def handle(data: Any, context: Context) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    assert run_batch(handle, make_requests("a")) == [(507, b"", b"out of memory", "HandlerException")]


@pytest.mark.parametrize("style", ["batch", "request"])
def test_f107_a_batch_that_failed_holds_no_memory_while_its_halves_run(style: str) -> None:
    class Tensor:
        """What a batch allocates."""

    tensors: list[weakref.ref[Tensor]] = []

    def run(batch: list[Any]) -> list[Any]:
        assert not any(tensor() for tensor in tensors)
        tensor = Tensor()
        tensors.append(weakref.ref(tensor))
        if len(batch) > 1:
            raise MemoryError
        return batch

    class Large(Handler):
        def preprocess(self, request: Request) -> Any:
            return request.body

        def inference(self, batch: Any) -> Any:
            return run(batch)

    if style == "request":
        answers = run_requests(Large(), "a", "b", "c")
    else:
        answers = run_batch(
            lambda data, context: [str(row) for row in run(data)], make_requests("a", "b"), isolate=True
        )
    assert set(statuses(answers)) == {200}


def test_a_prediction_error_for_the_batch_is_everybodys() -> None:
    def handle(data: Any, context: Context) -> Any:
        raise PredictionError("try again", 503)

    assert statuses(run_batch(handle, make_requests("a", "b"))) == [503, 503]


def guilty(data: Any, context: Context) -> Any:
    if any(row["body"] == "bad" for row in data):
        raise ValueError
    return [f"{row['body']} {context.get_request_id(index)}" for index, row in enumerate(data)]


def test_without_isolation_the_batch_fails_together() -> None:
    assert statuses(run_batch(guilty, make_requests("a", "bad", "c"))) == [500] * 3


@pytest.mark.parametrize("bad", [{0}, {3}, {6}, {0, 6}, {2, 3}, set(range(7))])
def test_with_isolation_only_the_guilty_fail(bad: set[int]) -> None:
    texts = ["bad" if index in bad else f"t{index}" for index in range(7)]
    answers = run_batch(guilty, make_requests(*texts), isolate=True)
    assert statuses(answers) == [500 if index in bad else 200 for index in range(7)]
    good = [body for index, body in enumerate(bodies(answers)) if index not in bad]
    assert good == [f"t{index} id-{index + 1}" for index in range(7) if index not in bad]


def test_the_times_of_the_batch_style_are_not_divided() -> None:
    stages = BatchStages(upper, make_context(), isolate=False, limit=LIMIT)
    stages.run(make_requests("a"))
    assert stages.take_times() == (0.0, 0.0, 0.0)


# request style


class Shout(Handler):
    """Fails where its input says so; counts what it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def preprocess(self, request: Request) -> Any:
        text = request.text()
        if text == "bad-pre":
            raise PredictionError("not wanted", 422)
        if text == "exit-pre":
            raise SystemExit
        return text

    def inference(self, batch: Any) -> Any:
        self.batches.append(list(batch))
        if "bad-inference" in batch:
            raise ValueError("secret")
        return [text.upper() for text in batch]

    def postprocess(self, output: Any) -> Any:
        if output == "BAD-POST":
            raise KeyError(output)
        if output == "OWN":
            return Response("own", status=201, headers={"x-a": "1"})
        if output == "ERROR":
            return PredictionError("returned", 409)
        return output


def test_requests_pass_all_stages_in_order() -> None:
    handler = Shout()
    assert bodies(run_requests(handler, "a", "b", "c")) == ["A", "B", "C"]
    assert handler.batches == [["a", "b", "c"]]


def test_a_request_that_fails_before_or_after_the_batch_fails_alone() -> None:
    handler = Shout()
    answers = run_requests(handler, "a", "bad-pre", "exit-pre", "bad-post", "own", "error", "z")
    assert statuses(answers) == [200, 422, 500, 500, 201, 409, 200]
    assert answers[1][2:] == (b"not wanted", "PredictionException")
    assert "SystemExit" in bodies(answers)[2] and "KeyError" in bodies(answers)[3]
    assert answers[4][1].endswith(b"x-a: 1\r\n")
    assert handler.batches == [["a", "bad-post", "own", "error", "z"]]


def test_when_every_request_fails_in_preprocess_there_is_no_batch() -> None:
    handler = Shout()
    assert statuses(run_requests(handler, "bad-pre", "bad-pre")) == [422, 422]
    assert handler.batches == []


def test_a_failed_batch_is_run_again_in_halves_to_find_the_guilty() -> None:
    handler = Shout()
    answers = run_requests(handler, "a", "b", "bad-inference", "d")
    assert statuses(answers) == [200, 200, 500, 200] and bodies(answers)[3] == "D"
    assert handler.batches == [
        ["a", "b", "bad-inference", "d"], ["a", "b"], ["bad-inference", "d"], ["bad-inference"], ["d"],
    ]  # fmt: skip


def test_halves_can_be_switched_off() -> None:
    handler = Shout()
    assert statuses(run_requests(handler, "a", "bad-inference", isolate=False)) == [500, 500]
    assert len(handler.batches) == 1


def test_a_batch_that_cannot_be_collated_fails_its_requests() -> None:
    class Uneven(Shout):
        def collate(self, items: list[Any]) -> Any:
            if len({len(item) for item in items}) > 1:
                raise ValueError("uneven")
            return items

    assert statuses(run_requests(Uneven(), "a", "bb")) == [200, 200], "each alone is even"
    assert statuses(run_requests(Uneven(), "a", "bb", isolate=False)) == [500, 500]


def test_an_error_of_ours_passes_through_with_its_status() -> None:
    class Strict(Handler):
        def preprocess(self, request: Request) -> Any:
            return request.json()

        def inference(self, batch: Any) -> Any:
            raise BadRequestError("too sparse")

    answers = run_requests(Strict(), "{", "1")
    assert [answer[3] for answer in answers] == ["BadRequestException"] * 2
    assert bodies(answers)[1] == "too sparse"


def test_the_times_of_the_stages_are_told_once() -> None:
    stages = RequestStages(Shout(), make_context(), isolate=True, limit=LIMIT)
    stages.run(make_requests("a"))
    assert all(seconds > 0 for seconds in stages.take_times())
    assert stages.take_times() == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("status", [99, 200, 600, "400", None])
def test_a_prediction_error_with_a_status_that_is_no_error_is_the_handlers_fault(
    status: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    why = f"the handler set status {status!r} in a PredictionError; it must be a number from 400 to 599"
    answers = run_batch(lambda data, context: ["a", PredictionError("sorry", status)], make_requests("a", "b"))
    assert statuses(answers) == [200, 500]
    assert answers[1][2:] == (why.encode(), "HandlerException")
    assert f"requests id-2: {why}" in capsys.readouterr().err


def test_a_bucket_without_a_hash_is_named() -> None:
    class Buckets(Handler):
        def bucket_by(self, item: Any) -> Any:
            return [len(item)] if item == b"b" else len(item)

        def inference(self, batch: Any) -> Any:
            return batch

    answers = run_requests(Buckets(), "a", "b", "a")
    assert statuses(answers) == [200, 500, 200]
    assert b"bucket_by returned a list, which has no hash; return a tuple, a number or a text" in answers[1][2]
