"""How a batch gets to the device, through buffers that are kept; ordinary memory stands in for pinned memory."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from mms.backend.device import MAX_PINNED, Staging, modes, own_lane

torch: Any = None


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """By the tests that run, not by each process that collects them all: torch takes seconds."""
    global torch
    torch = pytest.importorskip("torch")


class Steps:
    """What a Staging has asked for."""

    def __init__(self) -> None:
        self.allocated: list[int] = []
        self.waits = 0
        self.staging = Staging("meta", self.allocate, self.wait)

    def allocate(self, size: int) -> object:
        self.allocated.append(size)
        return torch.empty(size, dtype=torch.uint8)

    def wait(self) -> None:
        self.waits += 1


def test_every_tensor_of_a_batch_is_moved_and_all_else_stays() -> None:
    steps = Steps()
    labels = ["a", "b"]
    batch = (torch.ones(2, 3), labels, {"mask": torch.zeros(2, dtype=torch.bool)}, [torch.ones(1, dtype=torch.int64)])
    moved = steps.staging.move(batch)
    assert moved[1] == labels
    found = [moved[0], moved[2]["mask"], moved[3][0]]
    assert {tensor.device.type for tensor in found} == {"meta"}
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in found] == [
        ((2, 3), torch.float32),
        ((2,), torch.bool),
        ((1,), torch.int64),
    ]


def test_values_pass_through_the_buffer() -> None:
    staging = Staging("cpu", lambda size: torch.empty(size, dtype=torch.uint8), lambda: None)
    tensor = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    assert torch.equal(staging.move(tensor), tensor)
    assert torch.equal(staging.move(tensor.t()), tensor.t())


def test_buffers_are_kept_and_grow_and_are_not_filled_before_they_are_copied() -> None:
    steps = Steps()
    steps.staging.move(torch.ones(4))
    assert (steps.allocated, steps.waits) == ([16], 0)
    steps.staging.move(torch.ones(2))
    assert (steps.allocated, steps.waits) == ([16], 1)
    steps.staging.move([torch.ones(8), torch.ones(1)])
    assert (steps.allocated, steps.waits) == ([16, 32, 4], 2)


def test_what_is_on_the_device_or_too_large_stays() -> None:
    steps = Steps()
    there = torch.ones(2, device="meta")
    large = torch.empty(MAX_PINNED + 1, dtype=torch.uint8)
    assert steps.staging.move(there) is there and steps.staging.move(large) is large
    assert not steps.allocated and not steps.waits


def test_on_the_cpu_a_batch_stays_as_it_is() -> None:
    batch = [torch.ones(2)]
    with own_lane("cpu") as lane:
        assert lane.move(batch) is batch
        lane.wait()


def test_a_thread_computes_gradients_only_where_the_one_that_loaded_does() -> None:
    seen: list[bool] = []

    def run() -> None:
        begin()
        seen.append(torch.is_grad_enabled())

    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            begin = modes()
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
    assert seen == [False, True]
