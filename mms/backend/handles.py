"""Memory that other processes can map: of a GPU by CUDA IPC, of the CPU as a file. In owners and their workers.

What is opened is valid while its owner lives. Of the CPU's memory, a page that is written to is copied; a GPU's is one
for all.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mms import wire

_ALIGNED = 64  # bytes, as torch's own allocator aligns
_SHARED_MEMORY = Path("/dev/shm")


def export(storages: Sequence[Any]) -> list[wire.SharedStorage]:
    """By what others find these storages, for as long as this process lives. Raises whatever torch does."""
    torch = sys.modules["torch"]
    kinds = [storage.device.type for storage in storages]
    if "cuda" in kinds:
        torch.cuda.synchronize()  # what is still being computed has no event to wait for
    file = _File(sum(_aligned(storage.nbytes()) for storage in storages if storage.device.type == "cpu"))
    shared = [_export_cuda(storage) if kind == "cuda" else file.add(storage)
              for kind, storage in zip(kinds, storages, strict=True)]  # fmt: skip
    for name in {storage.counter.decode() for storage in shared if storage.counter}:
        with contextlib.suppress(OSError):  # nobody counts: the owner lends for life, and is killed in the end
            (_SHARED_MEMORY / name.lstrip("/")).unlink()
    return shared


class Opener:
    """Finds the storages of one owner."""

    def __init__(self) -> None:
        self._maps: dict[bytes, mmap.mmap] = {}

    def open(self, shared: wire.SharedStorage) -> Any:
        """Raises whatever torch does, and OSError."""
        torch = sys.modules["torch"]
        if not shared.size:
            return torch.UntypedStorage(0, device=shared.device)
        if shared.device == "cuda":
            return _open_cuda(torch, shared)
        view = self._maps.get(shared.handle)
        if view is None:
            with open(shared.handle, "rb") as file:
                view = self._maps[shared.handle] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return _at(torch, view, shared.offset, shared.size)


def _export_cuda(storage: Any) -> wire.SharedStorage:
    """As torch.multiprocessing does it, but once for all who will open it, and without its events."""
    _, handle, size, offset, counter, counter_offset, _, _ = storage._share_cuda_()
    return wire.SharedStorage("cuda", handle or b"", size, offset, counter or b"", counter_offset)


def _open_cuda(torch: Any, shared: wire.SharedStorage) -> Any:
    torch.cuda.init()  # a handler may ask before it uses the GPU; without, torch crashes the process
    counter = shared.counter, shared.counter_offset
    return torch.UntypedStorage._new_shared_cuda(0, shared.handle, shared.size, shared.offset, *counter, b"", False)


class _File:
    """Storages of the CPU, one behind the other; in memory, but not in /dev/shm, which may be small."""

    def __init__(self, size: int) -> None:
        self._end = 0
        if size:
            self._fd = os.memfd_create("mms-weights")  # stays open: it is how others get at it
            os.ftruncate(self._fd, size)
            self._view = mmap.mmap(self._fd, size)

    def add(self, storage: Any) -> wire.SharedStorage:
        size = storage.nbytes()
        if storage.device.type != "cpu":
            raise ValueError(f"memory of {storage.device.type} cannot be shared")
        if not size:
            return wire.SharedStorage("cpu", b"", 0, 0)
        begin, self._end = self._end, self._end + _aligned(size)
        _at(sys.modules["torch"], self._view, begin, size).copy_(storage)
        return wire.SharedStorage("cpu", b"/proc/%d/fd/%d" % (os.getpid(), self._fd), size, begin)


def _at(torch: Any, view: mmap.mmap, offset: int, size: int) -> Any:
    return torch.frombuffer(view, dtype=torch.uint8, count=size, offset=offset).untyped_storage()


def _aligned(size: int) -> int:
    return -size % _ALIGNED + size
