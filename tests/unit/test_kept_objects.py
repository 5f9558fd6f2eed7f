"""What a handler keeps, uses again or takes apart is its own matter: every request gets its own answer all the same."""

from __future__ import annotations

import weakref
from typing import Any

import pytest

from mms.backend.stages import BatchStages
from mms.handler import Context, Handler, Request
from tests.unit.test_stages import LIMIT, bodies, make_context, make_requests, run_batch, run_requests, statuses


class Text(Handler):
    """Items are texts; `inference` is the test's."""

    def preprocess(self, request: Request) -> Any:
        return request.text()

    def inference(self, batch: Any) -> Any:
        return batch


class OneDict(Text):
    def __init__(self) -> None:
        self.answer: dict[str, str] = {}

    def postprocess(self, output: Any) -> Any:
        self.answer["is"] = output
        return self.answer


def test_a_postprocess_that_returns_the_same_object_each_time() -> None:
    assert bodies(run_requests(OneDict(), "a", "b")) == ['{"is":"a"}', '{"is":"b"}']


class OneList(Text):
    def __init__(self) -> None:
        self.outputs: list[str] = []

    def inference(self, batch: Any) -> Any:
        self.outputs += batch
        return self.outputs

    def postprocess(self, output: Any) -> Any:
        self.outputs.clear()
        return output


def test_outputs_that_are_cleared_while_they_are_answered() -> None:
    handler = OneList()
    for _ in range(2):
        assert bodies(run_requests(handler, "a", "b", "c")) == ["a", "b", "c"]


class TakesApart(Text):
    """Changes its batch before it fails, where that has more than one item."""

    def __init__(self, how: str) -> None:
        self.how = how

    def inference(self, batch: Any) -> Any:
        if len(batch) > 1:
            getattr(batch, self.how)()
            raise ValueError
        return list(batch)


@pytest.mark.parametrize("how", ["reverse", "pop", "clear"])
def test_a_batch_that_is_changed_before_it_fails(how: str) -> None:
    assert bodies(run_requests(TakesApart(how), "a", "b", "c")) == ["a", "b", "c"]
    assert statuses(run_requests(TakesApart(how), "a", "b", "c", isolate=False)) == [500, 500, 500]


def take_out(data: Any, context: Context) -> Any:
    results = []
    while data:
        results.append(data.pop(0)["body"].upper())
    return results


def test_rows_that_are_taken_out_one_by_one() -> None:
    assert bodies(run_batch(take_out, make_requests("a", "b"))) == ["A", "B"]


@pytest.mark.parametrize("isolate", [True, False])
def test_rows_that_are_taken_out_before_the_batch_fails(isolate: bool) -> None:
    def fail(data: Any, context: Context) -> Any:
        return take_out(data, context) if len(data) == 1 else data.clear() or 1 / 0

    answers = run_batch(fail, make_requests("a", "b", "c"), isolate=isolate)
    assert statuses(answers) == ([200] * 3 if isolate else [500] * 3)


def test_a_list_of_results_that_is_used_again() -> None:
    kept: list[bytes] = []

    def handle(data: Any, context: Context) -> Any:
        kept[:] = [row["body"].encode() for row in data]
        return kept

    stages = BatchStages(handle, make_context(), isolate=False, limit=LIMIT)
    _, first = stages.run(make_requests("a", "b"))
    stages.run(make_requests("c"))
    assert first == [b"a", b"b"]


class Item:
    """Something that can be referred to weakly."""


class Items(Handler):
    def __init__(self) -> None:
        self.items: list[weakref.ref[Item]] = []
        self.alive: list[int] = []

    def preprocess(self, request: Request) -> Any:
        item = Item()
        self.items.append(weakref.ref(item))
        return item

    def inference(self, batch: Any) -> Any:
        return [b"x"] * len(batch)

    def postprocess(self, output: Any) -> Any:
        self.alive.append(sum(item() is not None for item in self.items))
        return output


def test_items_are_gone_when_the_answers_are_made() -> None:
    handler = Items()
    run_requests(handler, "a", "b")
    assert handler.alive == [0, 0]


class Failing(Text):
    def preprocess(self, request: Request) -> Any:
        raise ValueError(request.text())


def test_each_failed_preprocess_has_a_traceback_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert statuses(run_requests(Failing(), "a", "b")) == [500, 500]
    assert "During handling" not in capsys.readouterr().err


class Number:
    """An integer that is none of Python's, as those of numpy."""

    def __index__(self) -> int:
        return 1


def test_requests_are_counted_with_numbers_of_any_library() -> None:
    context = make_context()
    context.begin_batch(make_requests("a", "b"))
    number: Any = Number()
    assert context.get_request_id(number) == "id-2"
