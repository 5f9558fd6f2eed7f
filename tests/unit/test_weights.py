"""What an owner lends and a borrower puts in place, on the CPU; between processes: tests/processes/test_owners.py."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mms import wire
from mms.backend import handles
from mms.backend.weights import Borrowed, offer, slots
from mms.errors import ModelLoadError

torch: Any = None


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """By the tests that run, not by each process that collects them all: torch takes seconds."""
    global torch
    torch = pytest.importorskip("torch")


def network(value: float = 0.0) -> Any:
    """Layers with a tied weight, a view, a buffer that is not saved, an integer and an empty one."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 6, bias=False)).eval()
    net[2].weight = net[0].weight
    net.register_buffer("part", torch.full((2, 6), value)[1:], persistent=False)
    net.register_buffer("count", torch.tensor(int(value)))
    net.register_buffer("none", torch.empty(0))
    for tensor in (net[0].weight, net[0].bias, net[1].running_mean):
        torch.nn.init.constant_(tensor, value)
    return net


def handler(value: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(model=network(value), labels=["a"], more={"heads": [torch.nn.Linear(2, 1)]})


@pytest.fixture
def lent() -> Iterator[tuple[wire.Weights, Callable[[], None]]]:
    """The weights of a handler, and what its owner's death does to them: nobody can open them any more."""
    with contextlib.ExitStack() as stack:
        weights = offer(handler(7.0))
        stack.callback(os.close, int(weights.storages[0].handle.rpartition(b"/")[2]))
        yield weights, stack.close


Lent = tuple[wire.Weights, Callable[[], None]]


def test_a_worker_computes_with_the_weights_of_the_owner_also_when_it_has_died(lent: Lent) -> None:
    weights, end = lent
    ours, inputs = handler(), torch.ones(3, 6)
    borrowed = Borrowed(weights)
    assert not weights.fault
    borrowed.put(ours)
    end()
    assert borrowed.size == weights.size > 0 and not borrowed.fault
    assert torch.equal(ours.model(inputs), network(7.0)(inputs))
    assert (ours.model.part == 7).all() and ours.model.count == 7 and "part" not in ours.model.state_dict()


def test_tied_tensors_are_lent_once_and_tied_again(lent: Lent) -> None:
    weights, _ = lent
    ours = handler()
    Borrowed(weights).put(ours)
    assert ours.model[0].weight is ours.model[2].weight and isinstance(ours.model[0].weight, torch.nn.Parameter)
    (tied,) = (tensor.names for tensor in weights.tensors if len(tensor.names) > 1)
    assert tied == ["model.0.weight", "model.2.weight"]
    assert {tensor.names[0].partition(".")[0] for tensor in weights.tensors} == {"model", "more"}


def test_what_a_worker_writes_into_weights_on_the_cpu_is_its_own(lent: Lent) -> None:
    first, second = handler(), handler()
    for each in (first, second):
        Borrowed(lent[0]).put(each)
    first.model[0].bias.data.fill_(1)
    assert (first.model[0].bias == 1).all() and (second.model[0].bias == 7).all()


def test_a_handler_that_knows_can_leave_its_weights_on_the_meta_device(lent: Lent) -> None:
    borrowed = Borrowed(lent[0])
    assert borrowed.are_lent()
    with torch.device("meta"):
        ours = handler()
    ours.model.count = torch.zeros((), dtype=torch.int64, device="meta")
    borrowed.put(ours)
    assert {slot.tensor.device.type for slot in slots(ours)} == {"cpu"}


def test_weights_that_do_not_fit_are_left_and_one_line_says_why(lent: Lent, capsys: pytest.CaptureFixture[str]) -> None:
    there = "float32 [6, 6] on cpu in the owner"
    for spoil, said in (
        (lambda net: net.register_buffer("new", torch.ones(1)), "model.new is only in the worker"),
        (lambda net: delattr(net, "count"), "model.count is only in the owner"),
        (lambda net: net[0].double(), f"model.0.weight is float64 [6, 6] on cpu in the worker, {there}"),
        (lambda net: net[0].to("meta"), f"model.0.weight is float32 [6, 6] on meta in the worker, {there}"),
    ):
        ours, borrowed = handler(1.0), Borrowed(lent[0])
        spoil(ours.model)
        weight = ours.model[0].weight
        borrowed.put(ours)
        assert borrowed.fault == said and not borrowed.size and ours.model[0].weight is weight
        said = f"warning: share_weights: this worker keeps a copy of its own: {said}\n"
        assert capsys.readouterr().err == said


def test_a_handler_that_relied_on_weights_that_do_not_fit_is_a_load_error(lent: Lent) -> None:
    borrowed = Borrowed(lent[0])
    assert borrowed.are_lent()
    with pytest.raises(ModelLoadError, match=r"do not fit: model\.0\.bias is only in the owner"):
        borrowed.put(SimpleNamespace(model=torch.nn.Linear(1, 1)))


def test_a_worker_whose_owner_has_died_before_keeps_its_own(lent: Lent, capsys: pytest.CaptureFixture[str]) -> None:
    weights, end = lent
    end()
    ours, borrowed = handler(1.0), Borrowed(weights)
    assert not borrowed.are_lent()
    borrowed.put(ours)
    assert (ours.model[0].weight == 1).all()
    assert "keeps a copy of its own: FileNotFoundError: " in capsys.readouterr().err


def test_what_cannot_be_lent_is_said_and_nothing_of_it_is() -> None:
    nothing = SimpleNamespace(weights=torch.ones(3))
    assert offer(nothing).fault == "the handler holds no torch.nn.Module with weights in its attributes"
    assert offer(None).fault == offer(nothing).fault
    odd = handler()
    odd.model.register_buffer("odd", torch.ones(2, 2).to_sparse())
    assert offer(odd) == wire.Weights([], [], "model.odd is no plain tensor (Tensor, torch.sparse_coo)")
    odd.model.odd = torch.ones(1, device="meta")
    assert offer(odd).fault == "memory of meta cannot be shared"


class Cuda:
    """Stands for the storages of a GPU: by the calls of torch they are made known and found."""

    device = SimpleNamespace(type="cuda")

    def nbytes(self) -> int:
        return 8

    def _share_cuda_(self) -> tuple[Any, ...]:
        return 0, b"h" * 66, 8, 512, b"/mms-no-counter", 3, b"event", True


def test_memory_of_a_gpu_is_found_by_what_torch_says_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[Any, ...]] = []
    synchronized: list[bool] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synchronized.append(True))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", lambda *handle: found.append(handle), raising=False)
    shared = handles.export([Cuda()])
    assert shared == [wire.SharedStorage("cuda", b"h" * 66, 8, 512, b"/mms-no-counter", 3)] and synchronized
    handles.Opener().open(shared[0])
    assert found == [(0, b"h" * 66, 8, 512, b"/mms-no-counter", 3, b"", False)]


def test_a_driver_that_refuses_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: invalid argument\nCUDA kernel errors might be asynchronous")

    monkeypatch.setattr(handles, "export", refuse)
    monkeypatch.setattr("mms.backend.weights.export", refuse)
    assert offer(handler()).fault == "RuntimeError: CUDA error: invalid argument"
    monkeypatch.setattr(torch.cuda, "init", refuse)
    borrowed = Borrowed(wire.Weights([wire.SharedStorage("cuda", b"h", 8, 0)], []))
    assert not borrowed.are_lent() and borrowed.fault == "RuntimeError: CUDA error: invalid argument"
