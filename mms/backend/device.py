"""What threads of a worker have of their own in torch: a CUDA stream each, and modes. Runs in the worker process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any


def modes() -> Callable[[], None]:
    """Sets in another thread what a handler's `initialize` may have set for good in this one: no gradients."""
    torch = sys.modules.get("torch")
    if torch is None:
        return lambda: None
    return partial(torch.set_grad_enabled, torch.is_grad_enabled())


@contextlib.contextmanager
def _nothing() -> Any:
    yield lambda: None


def own_stream(device: str) -> contextlib.AbstractContextManager[Callable[[], None]]:
    """A context in which this thread's kernels go to a stream of its own; its value waits for those launched so far.

    Without a GPU, or without torch, there is nothing to wait for.
    """
    return _cuda_stream(device) if device.startswith("cuda") and "torch" in sys.modules else _nothing()


@contextlib.contextmanager
def _cuda_stream(device: str) -> Any:
    import torch

    stream = torch.cuda.Stream(device)
    done = torch.cuda.Event()

    def wait() -> None:
        """Only this stream's work is waited for: a device-wide synchronize would stop the other threads."""
        done.record(stream)
        done.synchronize()

    with torch.cuda.stream(stream):
        yield wait
