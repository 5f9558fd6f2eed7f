"""What is said of outputs, and of what collate makes, that are not as many as the requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest

from mms.handler import Handler
from tests.unit.test_stages import Shout, bodies, run_requests, statuses


class Outputs(Handler):
    def __init__(self, outputs: Any) -> None:
        self.outputs = outputs

    def inference(self, batch: Any) -> Any:
        return self.outputs


class Lazy:
    def __iter__(self) -> Iterator[str]:
        return iter("ab")


@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        (["a"], "inference returned 1 results for 2 requests"),
        ("ab", "inference returned str"),
        ({"a": 1, "b": 2}, "inference returned dict"),
        ({"a", "b"}, "inference returned set"),
        (None, "inference returned NoneType"),
        (Lazy(), "inference returned Lazy"),
        (numpy.array(1.5), "inference returned a 0-d ndarray; a list with one result per request (2) is needed"),
        (numpy.float32(1.5), "inference returned a 0-d float32; a list"),
    ],
)
def test_outputs_of_the_wrong_shape_name_the_fault(outputs: Any, why: str) -> None:
    answers = run_requests(Outputs(outputs), "a", "b", isolate=False)
    assert statuses(answers) == [500, 500]
    assert all(why in body for body in bodies(answers))


def test_any_sequence_of_outputs_will_do() -> None:
    assert bodies(run_requests(Outputs(("a", "b")), "1", "2")) == ["a", "b"]


def test_a_collate_that_loses_an_item_is_named() -> None:
    class Loses(Shout):
        def collate(self, items: list[Any]) -> Any:
            return items[1:]

    answers = run_requests(Loses(), "a", "b", isolate=False)
    assert bodies(answers) == ["collate made a batch of 1 of 2 requests, and inference as many results"] * 2


@pytest.mark.parametrize("pack", [tuple, list, lambda parts: {"ids": parts[0], "mask": parts[1]}])
def test_a_collate_that_loses_an_item_of_a_padded_batch_is_named(pack: Callable[[Any], Any]) -> None:
    class Pads(Shout):
        def collate(self, items: list[Any]) -> Any:
            return pack((items[1:], [1] * len(items[1:])))

        def inference(self, batch: Any) -> Any:
            return [*(batch["ids"] if isinstance(batch, dict) else batch[0])]

    answers = run_requests(Pads(), "a", "b", "c", "d", isolate=False)
    assert bodies(answers) == ["collate made a batch of 3 of 4 requests, and inference as many results"] * 4


def test_a_collate_of_as_many_parts_as_inference_has_results_is_not_blamed() -> None:
    class Pads(Shout):
        def collate(self, items: list[Any]) -> Any:
            return items, [1] * len(items)

        def inference(self, batch: Any) -> Any:
            return batch

    answers = run_requests(Pads(), "a", "b", "c", isolate=False)
    assert bodies(answers) == ["inference returned 2 results for 3 requests; one per request is needed"] * 3


def test_only_the_request_that_collate_loses_fails() -> None:
    class Loses(Shout):
        def collate(self, items: list[Any]) -> Any:
            return [item for item in items if item != "b"]

    answers = run_requests(Loses(), "a", "b", "c")
    assert statuses(answers) == [200, 500, 200]
    assert bodies(answers)[1] == "collate made a batch of 0 of 1 requests, and inference as many results"


def test_a_collate_may_make_another_length_of_a_batch() -> None:
    class Flips(Shout):
        def collate(self, items: list[Any]) -> Any:
            return [text for item in items for text in (item, item[::-1])]

        def inference(self, batch: Any) -> Any:
            return ["".join(pair) for pair in zip(batch[::2], batch[1::2], strict=True)]

    assert bodies(run_requests(Flips(), "ab", "cd")) == ["abba", "cddc"]


def test_of_an_inference_that_fails_on_another_length_the_log_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    class Loses(Shout):
        def collate(self, items: list[Any]) -> Any:
            return numpy.zeros((len(items) - 1, 7))

        def inference(self, batch: Any) -> Any:
            return batch[2]

    assert statuses(run_requests(Loses(), "a", "b", isolate=False)) == [500, 500]
    assert "what collate made of 2 requests has length 1\n" in capsys.readouterr().err
