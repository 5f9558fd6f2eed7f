"""Padding, buckets, capture and fallback of CUDA graphs, with arrays and a recorder that calls the network again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy
import pytest

from mms.backend.cuda import GraphedModule, Unfit, flatten, unflatten


class StandIn:
    """Replays by running the network once more into the arrays that the first run gave."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replayed = 0

    def buffer(self, leaf: Any, rows: int) -> Any:
        self.recorded.append(rows)
        return numpy.zeros((rows, *leaf.shape[1:]), dtype=leaf.dtype)

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        outputs = run()

        def repeat() -> None:
            self.replayed += 1
            for old, new in zip(flatten(outputs)[0], flatten(run())[0], strict=True):
                old[:] = new

        return repeat, outputs

    def copy(self, leaf: Any) -> Any:
        return leaf.copy()

    def in_turn(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def make(network: Any, *sizes: int) -> tuple[GraphedModule, StandIn, list[str]]:
    recorder, said = StandIn(), list[str]()
    return GraphedModule(network, sizes, recorder, said.append), recorder, said


def test_a_batch_is_padded_up_and_its_outputs_are_cut() -> None:
    seen = []

    def network(x: Any) -> Any:
        seen.append(len(x))
        return x * 2

    graphed, recorder, said = make(network, 1, 4, 8)
    for rows in (3, 4, 1, 2):
        x = numpy.arange(rows * 2.0).reshape(rows, 2)
        numpy.testing.assert_array_equal(graphed(x), x * 2)
    assert (set(seen), recorder.recorded, recorder.replayed, said) == ({1, 4}, [4, 1], 4, [])


def test_outputs_outlive_the_next_replay() -> None:
    graphed, _, _ = make(lambda x: x + 1, 2)
    first = graphed(numpy.zeros((2, 1)))
    graphed(numpy.full((2, 1), 5.0))
    assert first.tolist() == [[1.0], [1.0]]


def test_nested_inputs_and_outputs_keep_their_form() -> None:
    def network(pair: Any, *, mask: Any) -> Any:
        return {"sum": pair[0] + pair[1], "rest": (pair[0], [mask])}

    graphed, recorder, _ = make(network, 4)
    one, two, mask = numpy.ones((3, 2)), numpy.full((3, 2), 2.0), numpy.array([True, False, True])
    answer = graphed([one, two], mask=mask)
    assert answer["sum"].tolist() == [[3.0, 3.0]] * 3
    assert type(answer["rest"]) is tuple and answer["rest"][1][0].tolist() == [True, False, True]
    assert recorder.replayed == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((numpy.zeros((5, 1)),), "cuda_graphs: a batch of 5 is larger than the largest size, 4; such batches"),
        ((numpy.zeros((1, 1)), 3), "cuda_graphs: only tensors, and tuples, lists and dicts of them"),
        ((numpy.zeros((1, 1)), numpy.zeros((2, 1))), "cuda_graphs: the tensors have not one row per item"),
    ],
)
def test_what_does_not_fit_runs_without_after_one_warning(arguments: Any, said: str) -> None:
    graphed, recorder, warnings = make(lambda *words: words, 4)
    for _ in range(2):
        assert graphed(*arguments) == arguments
    assert recorder.replayed == 0 and len(warnings) == 1 and warnings[0].startswith(said)


def test_a_network_that_cannot_be_recorded_runs_without() -> None:
    class Waits(StandIn):
        def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            raise RuntimeError("operation not permitted when stream is capturing\nhint")

    said: list[str] = []
    graphed = GraphedModule(lambda x: x, (2,), Waits(), said.append)
    assert graphed(numpy.ones((1, 1))).tolist() == [[1.0]]
    assert said == [
        "cuda_graphs: a batch of 2 cannot be recorded: operation not permitted when stream is capturing; "
        "such batches run without"
    ]


def test_outputs_without_a_row_per_input_are_not_cut() -> None:
    graphed, _, said = make(lambda x: x.sum(axis=0), 4)
    assert graphed(numpy.ones((3, 2))).tolist() == [3.0, 3.0]
    assert "not one row per input" in said[0]


def test_nothing_is_recorded_after_the_warmup() -> None:
    graphed, recorder, said = make(lambda x: x, 2)
    graphed(numpy.zeros((2, 3)))
    graphed.seal()
    graphed(numpy.zeros((1, 3)))
    assert recorder.replayed == 2 and not said
    graphed(numpy.zeros((2, 4)))
    assert recorder.replayed == 2 and "were not in the warmup" in said[0]


def test_attributes_are_the_networks() -> None:
    class Network:
        training = False

    assert make(Network(), 1)[0].training is False


def test_flatten_and_unflatten_are_inverse() -> None:
    leaf = numpy.zeros(1)
    tree: Any = ({"a": [leaf, (leaf,)], "b": leaf}, [])
    leaves, form = flatten(tree)
    assert len(leaves) == 3 and unflatten(iter(leaves), form) == tree
    with pytest.raises(Unfit):
        flatten({"a": None})
