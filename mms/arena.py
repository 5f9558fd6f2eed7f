"""The memory in which large bodies pass between the server and a worker: requests in one half, answers in the other.

The sender of a half copies bodies into blocks that are free, the receiver frees them. A map with a byte per block says
which are taken; the sender alone takes, the receiver alone frees, so there is neither a lock nor a message about it.
What finds no room goes through the socket. The memory is one worker's: what that does to it harms nobody else, and it
ends with the worker, or with the last answer that is on its way to a client.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import mmap
import os
import struct
from collections.abc import Sequence
from typing import Any

from mms.errors import FrameError

BLOCK = 64 << 10
BLOCKS = 512  # of each half
_HALF = BLOCK * BLOCKS
SIZE = BLOCK + 2 * _HALF  # the maps are in the first block
KEPT_SECONDS = 5.0  # for which memory that nobody uses is kept
WHERE = struct.Struct("<Q")  # where a run of bodies begins

_Buffer = bytes | bytearray | memoryview


class Half:
    """One direction, as both of its ends see it."""

    def __init__(self, memory: mmap.mmap, number: int) -> None:
        self.used = False  # since somebody last looked
        self._memory = memory
        self._map = number * BLOCKS
        self._begin = BLOCK + number * _HALF

    @property
    def free(self) -> bool:
        """Whether nothing is in it."""
        return self._memory.find(b"\1", self._map, self._map + BLOCKS) < 0

    def put(self, parts: Sequence[_Buffer], size: int) -> bytes | None:
        """Copy the parts, of `size` bytes in all, in a row. Returns where they are; None if there is no room for them.

        Of the sender's threads only one at a time.
        """
        count = -(-size // BLOCK)
        memory = self._memory
        block = memory.find(bytes(count), self._map, self._map + BLOCKS) if count <= BLOCKS else -1
        if block < 0:
            return None
        self.used = True
        memory[block : block + count] = b"\1" * count
        begin = at = self._begin + (block - self._map) * BLOCK
        for part in parts:
            end = at + len(part)
            memory[at:end] = part
            at = end
        return WHERE.pack(begin)

    def take(self, where: _Buffer, sizes: Sequence[int]) -> list[bytearray]:
        """Bodies of these sizes, copied out; their blocks are free again. Raises FrameError."""
        size = sum(sizes)
        block, at = self._find(where, size)
        bodies = []
        with memoryview(self._memory) as view:
            for length in sizes:
                with view[at : at + length] as body:
                    bodies.append(bytearray(body))
                at += length
        self.give_back(block, -(-size // BLOCK))
        return bodies

    def lend(self, where: _Buffer, size: int) -> memoryview:
        """The bodies as they lie there; their blocks are free when the last view of them is gone. Raises FrameError."""
        block, at = self._find(where, size)
        self.used = True
        lent = _lent(-(-size // BLOCK)).from_buffer(self._memory, at)
        lent.half, lent.block = self, block
        return memoryview(lent).cast("B")[:size]

    def give_back(self, block: int, count: int) -> None:
        """These blocks may be taken again."""
        self._memory[block : block + count] = bytes(count)

    def _find(self, where: _Buffer, size: int) -> tuple[int, int]:
        """The first block of a run of bodies, as its place in the map, and where it begins."""
        (at,) = WHERE.unpack(where) if len(where) == WHERE.size else (0,)
        block, rest = divmod(at - self._begin, BLOCK)
        if rest or block < 0 or size <= 0 or block * BLOCK + size > _HALF:
            raise FrameError(f"{size} bytes of bodies at {at}, which is outside of the memory for them")
        return self._map + block, at


class Arena:
    """Both halves, on one side or the other."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.requests = Half(self._memory, 0)
        self.answers = Half(self._memory, 1)
        self._unused_since = 0.0  # 0 while there is nothing to give back

    def tidy(self, now: float) -> None:
        """Called a few times a second by the server, while the worker has nothing in hand: gives memory back to the
        system that was not used for KEPT_SECONDS.
        """
        halves = (self.requests, self.answers)
        if any([half.used for half in halves]):
            self.requests.used = self.answers.used = False
            self._unused_since = now
        elif self._unused_since and now - self._unused_since > KEPT_SECONDS and all([half.free for half in halves]):
            self._unused_since = 0.0
            self._memory.madvise(mmap.MADV_REMOVE, BLOCK, 2 * _HALF)

    def close(self) -> None:
        """The worker has ended."""
        with contextlib.suppress(BufferError):  # answers of it are on their way: it goes with the last of them
            self._memory.close()


def create(page: int) -> int:
    """The descriptor of a file in memory for an arena and, behind it, `page` bytes more; none of it is there yet."""
    file = os.memfd_create("mms-worker", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, SIZE + page)
    # a page that is cut off would be the end of who touches it next
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return file


def attach(file: int) -> tuple[Arena, mmap.mmap]:
    """The arena of such a file, and what is behind it. The descriptor may be closed then."""
    page = mmap.mmap(file, os.fstat(file).st_size - SIZE, offset=SIZE)
    return Arena(mmap.mmap(file, SIZE)), page


@functools.cache
def _lent(count: int) -> Any:
    """The type of a run of so many blocks that is freed with its object; there are BLOCKS of them at most."""
    return type("Lent", (ctypes.Array,), {"_type_": ctypes.c_ubyte, "_length_": count * BLOCK, "__del__": _free})


def _free(lent: Any) -> None:
    lent.half.give_back(lent.block, lent._length_ // BLOCK)
