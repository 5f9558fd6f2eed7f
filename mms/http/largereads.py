"""Large bodies, read into the memory in which they stay: neither the event loop nor the parser copies them.

Data plane, front end. A body whose length is known needs no parser, and of a connection that sends large ones head and
body are read together. What is only promised takes no memory: a read gets as much room as was sent before.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mms.allocator import buffer
from mms.http.limits import LARGE_BODY

if TYPE_CHECKING:
    from mms.http.connection import Connection
    from mms.http.reader import RequestReader

LEAST, MOST = 16 << 10, 256 << 10  # room for one read
_HEAD_END = b"\r\n\r\n"


class LargeReads(asyncio.BufferedProtocol):
    """Takes a connection's place at its transport while that sends large bodies."""

    def __init__(self, connection: Connection, reader: RequestReader, usual: int) -> None:
        self._connection = connection
        self._reader = reader
        self._usual = usual  # bytes of a request of this connection
        self._piece = bytearray()
        self._from = self._filled = 0  # where in it a body begins, and how far it has come

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._filled == len(self._piece):
            rest = self._reader.rest
            wanted = min(rest, max(LEAST, self._reader.size)) if rest else self._usual
            self._piece = buffer(min(MOST, wanted + 1))  # a read that leaves room was the last one for now
            self._from = self._filled = 0
        return memoryview(self._piece)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        piece, begin, end = self._piece, self._filled, self._filled + nbytes
        self._filled = end
        if not self._reader.rest:
            head = piece.find(_HEAD_END, 0, end) + len(_HEAD_END)
            if head < len(_HEAD_END) or 2 * end < len(piece):
                self._leave(piece, 0, end)
                return
            self._connection.take_head(bytes(memoryview(piece)[:head]))
            if self._reader.rest < LARGE_BODY:
                self._leave(piece, head, end)
                return
            self._from = begin = head
            self._usual = head + self._reader.rest
        rest = self._reader.rest
        more = min(end - begin, rest)
        part = memoryview(piece)[self._from : begin + more]
        if more == rest:
            self._piece, self._filled = bytearray(), 0  # it goes with the body
        self._connection.take_body(part, more)
        if begin + more < end:
            self._leave(piece, begin + more, end)

    def connection_lost(self, error: Exception | None) -> None:
        self._connection.connection_lost(error)

    def eof_received(self) -> bool:
        return self._connection.eof_received()

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    def _leave(self, piece: bytearray, at: int, end: int) -> None:
        """What was read there is for the parser."""
        self._piece, self._filled = bytearray(), 0
        self._connection.step_back(bytes(memoryview(piece)[at:end]))


def read_by(transport: asyncio.Transport, protocol: asyncio.BaseProtocol, *, paused: bool) -> None:
    """uvloop looks at the kind of a protocol when it begins to read."""
    if not paused:
        transport.pause_reading()
    transport.set_protocol(protocol)
    if not paused:
        transport.resume_reading()
