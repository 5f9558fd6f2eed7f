"""CUDA graphs: a network's kernels for some batch sizes, recorded in the warm-up and launched at once. Worker process.

A batch is padded up to the next recorded size and its outputs are cut. Everything that needs a GPU is in `CudaGraphs`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

WARM_CALLS = 3  # before a capture: libraries choose their kernels and allocate in the first ones


class Recorder(Protocol):
    """What records and replays, and the memory that it does that in."""

    def buffer(self, leaf: Any, rows: int) -> Any:
        """A tensor of its own like `leaf` with that many rows, of zeros."""

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What repeats `run`, and the outputs that each repetition fills."""

    def copy(self, leaf: Any) -> Any: ...

    def in_turn(self) -> AbstractContextManager[None]:
        """Held from filling the inputs to copying the outputs: both are shared by all threads."""


class Unfit(Exception):
    """These inputs or outputs cannot be replayed; the text says why."""


class GraphedModule:
    """A network in its handler's attribute: calls that were recorded are replayed, others run as ever."""

    def __init__(self, module: Any, sizes: tuple[int, ...], recorder: Recorder, warn: Callable[[str], None]) -> None:
        self._module = module
        self._sizes = sizes
        self._recorder = recorder
        self._warn = warn
        self._recordings: dict[Hashable, Recording] = {}
        self._recording = True
        self._warned = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            leaves, form = flatten((args, kwargs))
            rows = _rows(leaves)
            return self._find(leaves, form, rows).replay(leaves, rows)
        except Unfit as error:
            if not self._warned:
                self._warned = True
                self._warn(f"cuda_graphs: {error}; such batches run without")
        return self._module(*args, **kwargs)

    def seal(self) -> None:
        """The warm-up is over: nothing more is recorded."""
        self._recording = False

    def _find(self, leaves: list[Any], form: Hashable, rows: int) -> Recording:
        place = bisect_left(self._sizes, rows)
        if place == len(self._sizes):
            raise Unfit(f"a batch of {rows} is larger than the largest size, {self._sizes[-1]}")
        size = self._sizes[place]
        key = size, form, tuple((tuple(leaf.shape[1:]), leaf.dtype, leaf.device) for leaf in leaves)
        recording = self._recordings.get(key)
        if recording is None:
            if not self._recording:
                raise Unfit(f"inputs of shape {[tuple(leaf.shape) for leaf in leaves]} were not in the warmup")
            with self._recorder.in_turn():
                recording = self._recordings[key] = Recording(self._module, leaves, form, size, self._recorder)
        return recording


class Recording:
    """One network at one batch size, with its static inputs and outputs."""

    def __init__(self, module: Any, leaves: list[Any], form: Hashable, size: int, recorder: Recorder) -> None:
        self._recorder = recorder
        self._inputs = [recorder.buffer(leaf, size) for leaf in leaves]
        args, kwargs = unflatten(iter(self._inputs), form)
        try:
            self._repeat, outputs = recorder.record(lambda: module(*args, **kwargs))
        except RuntimeError as error:  # what a capture forbids: waiting for the GPU, other streams
            reason = str(error).partition("\n")[0]
            raise Unfit(f"a batch of {size} cannot be recorded: {reason}") from None
        self._outputs, self._form = flatten(outputs)
        if _rows(self._outputs) != size:
            raise Unfit("the network's outputs have not one row per input")

    def replay(self, leaves: list[Any], rows: int) -> Any:
        with self._recorder.in_turn():
            for buffer, leaf in zip(self._inputs, leaves, strict=True):
                buffer[:rows] = leaf
            self._repeat()
            return unflatten(iter([self._recorder.copy(leaf[:rows]) for leaf in self._outputs]), self._form)


class CudaGraphs:
    """The Recorder of a GPU."""

    def __init__(self) -> None:
        self._torch = sys.modules["torch"]
        self._pool = self._torch.cuda.graph_pool_handle()
        self._turn = threading.Lock()
        self._done = self._torch.cuda.Event()

    def buffer(self, leaf: Any, rows: int) -> Any:
        with self._torch.inference_mode(False):  # such tensors could not be written to outside of it
            return self._torch.zeros((rows, *leaf.shape[1:]), dtype=leaf.dtype, device=leaf.device)

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        torch = self._torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad():
            with torch.cuda.stream(stream):
                for _ in range(WARM_CALLS):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = run()
        return graph.replay, outputs

    def copy(self, leaf: Any) -> Any:
        return leaf.clone()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Threads take turns to enqueue, and each one's stream waits for the GPU to have done the one before."""
        with self._turn:
            stream = self._torch.cuda.current_stream()
            stream.wait_event(self._done)
            yield
            self._done.record(stream)


def flatten(tree: Any) -> tuple[list[Any], Hashable]:
    """The tensors in nested tuples, lists and dicts, and the form they were in. Raises Unfit for anything else."""
    if type(tree) in (tuple, list, dict):
        leaves: list[Any] = []
        forms = []
        for branch in tree.values() if isinstance(tree, dict) else tree:
            more, form = flatten(branch)
            leaves += more
            forms.append(form)
        return leaves, (type(tree), tuple(tree) if isinstance(tree, dict) else (), tuple(forms))
    if not hasattr(tree, "shape") or not hasattr(tree, "dtype"):
        raise Unfit(f"only tensors, and tuples, lists and dicts of them, can be recorded, not {type(tree).__name__}")
    return [tree], None


def unflatten(leaves: Iterator[Any], form: Any) -> Any:
    """The inverse of `flatten`."""
    if form is None:
        return next(leaves)
    kind, keys, forms = form
    branches = [unflatten(leaves, each) for each in forms]
    return dict(zip(keys, branches, strict=True)) if kind is dict else kind(branches)


def _rows(leaves: list[Any]) -> int:
    """How many rows they have, all the same. Raises Unfit."""
    rows = {int(leaf.shape[0]) if len(leaf.shape) else 0 for leaf in leaves}
    if len(rows) != 1 or 0 in rows:
        raise Unfit("the tensors have not one row per item of the batch")
    return rows.pop()
