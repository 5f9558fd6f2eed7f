"""One copy of the weights on a GPU: an owner lends them to workers, which put them into networks of their own.

An owner is a process like a worker's that has loaded, and serves nothing. No process that uses CUDA can be forked, so
its workers load as ever, and replace the parameters and buffers of their networks afterwards.
"""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mms import wire
from mms.backend.handles import Opener, export
from mms.backend.prepare import warn
from mms.backend.stages import Stages
from mms.errors import ModelLoadError


class Slot(NamedTuple):
    """A parameter or buffer, and where it hangs."""

    name: str
    module: Any
    key: str
    tensor: Any


def serve(channel: socket.socket, stages: Stages) -> int:
    """The life of an owner that has loaded: say what it lends, until the server closes the channel."""
    channel.sendall(
        wire.pack(wire.LOADED, wire.Preloaded([], len(os.listdir("/proc/self/task")), offer(stages.handler)))
    )
    while channel.recv(1):
        pass
    return 0


def offer(handler: Any) -> wire.Weights:
    """All parameters and buffers of its networks, tied ones once; or why they cannot be lent: all are, or none is."""
    places: dict[int, int] = {}
    storages: list[Any] = []
    tensors: dict[tuple[Any, ...], wire.SharedTensor] = {}
    try:
        for slot in slots(handler):
            tensor = _plain(slot)
            storage = tensor.untyped_storage()
            place = places.setdefault(storage._cdata, len(storages))
            if place == len(storages):
                storages.append(storage)
            shape, stride, dtype = list(tensor.shape), list(tensor.stride()), str(tensor.dtype).removeprefix("torch.")
            key = place, tensor.storage_offset(), *shape, *stride, dtype
            if key not in tensors:
                tensors[key] = wire.SharedTensor([], place, dtype, shape, stride, tensor.storage_offset())
            tensors[key].names.append(slot.name)
        if not tensors:
            raise ValueError("the handler holds no torch.nn.Module with weights in its attributes")
        return wire.Weights(export(storages), list(tensors.values()))
    except Exception as error:  # of torch's insides and the driver's: expandable segments, containers, sandboxes
        return wire.Weights([], [], _reason(error))


class Borrowed:
    """What an owner lends to this worker; without, nothing happens.

    `fault` says why it could not be used; then the worker keeps what its handler has loaded.
    """

    def __init__(self, lent: wire.Weights | None) -> None:
        self.size = 0  # bytes in use
        self.fault = ""
        self._lent = lent
        self._relied_on = False
        self._tensors: dict[str, Any] | None = None

    def are_lent(self) -> bool:
        """Whether the owner's memory is at hand; the handler has asked, and may leave its weights unread."""
        self._relied_on = self._open()
        return self._relied_on

    def put(self, handler: Any) -> None:
        """Replace all that the handler's networks hold, and give the memory back that it was in.

        Raises ModelLoadError when it does not fit, and the handler has relied on it.
        """
        if self._lent is None:
            return
        if self._open() and self._replace(list(slots(handler))):
            self.size = self._lent.size
            gc.collect()
            if sys.modules["torch"].cuda.is_initialized():
                sys.modules["torch"].cuda.empty_cache()
        elif self._relied_on:
            raise ModelLoadError(f"the weights that share_weights lends do not fit: {self.fault}")
        else:
            warn(f"share_weights: this worker keeps a copy of its own: {self.fault}")
        self._tensors = None

    def _open(self) -> bool:
        if self._lent is not None and self._tensors is None and not self.fault:
            try:
                self._tensors = _open(self._lent)
            except Exception as error:  # as in `offer`
                self.fault = _reason(error)
        return self._tensors is not None

    def _misfit(self, found: list[Slot]) -> str:
        assert self._tensors is not None
        names = {slot.name for slot in found}
        for name in sorted(names ^ self._tensors.keys()):
            return f"{name} is only in the {'worker' if name in names else 'owner'}"
        for slot in found:
            ours, theirs = _form(slot.tensor), _form(self._tensors[slot.name])
            if ours[:2] != theirs[:2] or (ours != theirs and not self._relied_on):
                return f"{slot.name} is {_words(ours)} in the worker, {_words(theirs)} in the owner"
        return ""

    def _replace(self, found: list[Slot]) -> bool:
        """`setattr`, as load_state_dict(assign=True) does it: some modules keep track of their weights with that."""
        assert self._tensors is not None
        self.fault = self._misfit(found)
        if self.fault:
            return False
        parameter = sys.modules["torch"].nn.Parameter
        parameters: dict[tuple[int, bool], Any] = {}
        for slot in found:
            tensor = self._tensors[slot.name]
            if isinstance(slot.tensor, parameter):
                key = id(tensor), slot.tensor.requires_grad
                if key not in parameters:
                    parameters[key] = parameter(tensor, requires_grad=slot.tensor.requires_grad)
                tensor = parameters[key]
            setattr(slot.module, slot.key, tensor)
        return True


def slots(handler: Any) -> Iterator[Slot]:
    """Of the networks in the handler's attributes, and in lists, tuples and dicts there; each module once."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    seen: set[Any] = set()
    for name, network in _networks("", getattr(handler, "__dict__", {}), torch.nn.Module):
        for path, module in network.named_modules(seen, name):
            for held in (module._parameters, module._buffers):
                for key, tensor in held.items():
                    if tensor is not None:
                        yield Slot(f"{path}.{key}", module, key, tensor)


def _networks(name: str, value: Any, kind: type, depth: int = 3) -> Iterator[tuple[str, Any]]:
    if isinstance(value, kind):
        yield name, value
    elif depth and type(value) in (dict, list, tuple):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _networks(f"{name}.{key}" if name else str(key), one, kind, depth - 1)


def _plain(slot: Slot) -> Any:
    """Its tensor. Raises ValueError when that is more than numbers in a storage."""
    torch, tensor = sys.modules["torch"], slot.tensor
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{slot.name} is no plain tensor ({type(tensor).__name__}, {tensor.layout})")
    return tensor


def _open(lent: wire.Weights) -> dict[str, Any]:
    """The owner's tensors by all their names."""
    torch = importlib.import_module("torch")  # the handler may not have been imported yet
    find: Callable[[wire.SharedStorage], Any] = Opener().open
    storages = [find(storage) for storage in lent.storages]
    tensors: dict[str, Any] = {}
    for one in lent.tensors:
        storage = storages[one.storage]
        empty = torch.empty(0, dtype=getattr(torch, one.dtype), device=storage.device)
        tensors |= dict.fromkeys(one.names, empty.set_(storage, one.offset, tuple(one.shape), tuple(one.stride)))
    return tensors


def _form(tensor: Any) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _words(form: tuple[Any, ...]) -> str:
    return f"{str(form[1]).removeprefix('torch.')} {list(form[0])} on {form[2]}"


def _reason(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
