"""What a thread that runs batches has of its own: a CUDA stream, pinned memory, torch's modes. Worker process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

MAX_PINNED = 256 << 20  # bytes of one tensor; a larger one is copied without


def modes() -> Callable[[], None]:
    """Sets in another thread what a handler's `initialize` may have set for good in this one: no gradients."""
    torch = sys.modules.get("torch")
    if torch is None:
        return lambda: None
    return partial(torch.set_grad_enabled, torch.is_grad_enabled())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there is too little memory, of this machine or the GPU, for what raised it."""
    torch = sys.modules.get("torch")
    return isinstance(error, (MemoryError, getattr(torch, "OutOfMemoryError", MemoryError)))


def is_lost() -> bool:
    """Whether all that is asked of the GPU fails, as after a fault in a kernel: only a new process can use it again."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@dataclass(frozen=True, slots=True)
class Lane:
    """`move` brings the tensors of a batch to the device; `wait` waits for what was launched so far."""

    move: Callable[[Any], Any]
    wait: Callable[[], None]


class Staging:
    """Tensors on their way to the device, through pinned buffers that are kept: such copies run beside the kernels.

    `allocate` makes a tensor of so many bytes; `copied` waits for the copies out of the buffers.
    """

    def __init__(self, device: str, allocate: Callable[[int], Any], copied: Callable[[], None]) -> None:
        self._device = device
        self._allocate = allocate
        self._copied = copied
        self._buffers: list[Any] = []
        self._used = 0

    def move(self, batch: Any) -> Any:
        """The batch with each CPU tensor in it, in tuples, lists and dicts as well, on the device."""
        if self._used:
            self._copied()
        self._used = 0
        return self._move(batch)

    def _move(self, value: Any) -> Any:
        if isinstance(value, sys.modules["torch"].Tensor):
            return self._copy(value) if value.device.type == "cpu" and value.nbytes <= MAX_PINNED else value
        if type(value) in (tuple, list):
            return type(value)(map(self._move, value))
        if type(value) is dict:
            return {key: self._move(one) for key, one in value.items()}
        return value

    def _copy(self, tensor: Any) -> Any:
        place = self._used
        self._used += 1
        if place == len(self._buffers):
            self._buffers.append(self._allocate(tensor.nbytes))
        elif len(self._buffers[place]) < tensor.nbytes:
            self._buffers[place] = self._allocate(tensor.nbytes)
        staged = self._buffers[place][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        staged.copy_(tensor)
        return staged.to(self._device, non_blocking=True)


def lane(device: str) -> Lane:
    """Of this thread, and its current stream. Without a GPU, or without torch, batches stay where they are."""
    if not _uses_gpu(device):
        return Lane(lambda batch: batch, lambda: None)
    torch = sys.modules["torch"]
    done = torch.cuda.Event()

    def wait() -> None:
        """Only this stream's work is waited for: a device-wide synchronize would stop the other threads."""
        done.record()
        done.synchronize()

    return Lane(Staging(device, partial(torch.empty, dtype=torch.uint8, pin_memory=True), wait).move, wait)


@contextlib.contextmanager
def own_lane(device: str) -> Iterator[Lane]:
    """A context in which this thread's kernels go to a stream of its own, where there is a GPU."""
    if not _uses_gpu(device):
        yield lane(device)
        return
    torch = sys.modules["torch"]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))  # what `initialize` has launched there
    with torch.cuda.stream(stream):
        yield lane(device)


def _uses_gpu(device: str) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and device.startswith("cuda") and torch.cuda.is_available()
