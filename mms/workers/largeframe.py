"""The rest of a large frame, read into one buffer: without a copy of each piece, and of all of them at the end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mms.workers.worker import Worker

LARGE = 512 << 10  # bytes still to come for which it is worth it
LARGEST = 256 << 20  # bytes: memory for more is taken as they come, not on a worker's word


class LargeFrame(asyncio.BufferedProtocol):
    """Takes the place of a worker's protocol until the frame is there, then hands it over and steps back."""

    def __init__(self, owner: Worker, transport: asyncio.Transport, begun: bytes, size: int) -> None:
        self._owner = owner
        self._transport = transport
        self._frame = bytearray(size)
        self._frame[: len(begun)] = begun
        self._view = memoryview(self._frame)[len(begun) :]
        _use(transport, self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        self._view = self._view[nbytes:]
        if not self._view:
            _use(self._transport, self._owner)
            self._owner.data_received(self._frame)

    def connection_lost(self, error: Exception | None) -> None:
        self._owner.connection_lost(error)


def _use(transport: asyncio.Transport, protocol: asyncio.BaseProtocol) -> None:
    """uvloop looks at the kind of a protocol when it begins to read."""
    transport.pause_reading()
    transport.set_protocol(protocol)
    transport.resume_reading()
