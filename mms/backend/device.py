"""A thread that runs batches gets a CUDA stream of its own. Runs in the worker process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any


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
