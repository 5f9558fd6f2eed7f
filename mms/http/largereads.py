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
HEAD = 2 << 10  # for one that is not known yet
_HEAD_END = b"\r\n\r\n"


class LargeReads(asyncio.BufferedProtocol):
    """Takes a connection's place at its transport while that sends large bodies."""

    def __init__(self, connection: Connection, reader: RequestReader, body: int) -> None:
        self._connection = connection
        self._reader = reader
        self._usual = body + HEAD  # bytes of a request of this connection
        self._piece = bytearray()
        self._from = 0  # where in it a body begins
        self._filled = 0  # how far it has come; 0 for the next read to get another

    def get_buffer(self, sizehint: int) -> bytearray | memoryview:
        if self._filled:
            return memoryview(self._piece)[self._filled :]
        reader, wanted = self._reader, self._usual
        if not reader.between:
            wanted = min(reader.rest, max(LEAST, reader.size)) or wanted
        self._piece = buffer(min(MOST, wanted + 1))  # a read that leaves room was the last one for now
        self._from = 0
        return self._piece

    def buffer_updated(self, nbytes: int) -> None:
        piece, begin = self._piece, self._filled
        if not begin and self._connection.take_request(piece, nbytes):
            return
        end = begin + nbytes
        rest = self._reader.rest
        if not rest:
            head = piece.find(_HEAD_END, 0, end) + len(_HEAD_END)
            if head < len(_HEAD_END) or 2 * end < len(piece):
                self._leave(piece, 0, end)
                return
            self._connection.take_head(bytes(memoryview(piece)[:head]))
            rest = self._reader.rest
            if rest < LARGE_BODY:
                self._leave(piece, head, end)
                return
            self._from = begin = head
            self._usual = head + rest
        more = min(end - begin, rest)
        self._filled = end if more < rest and end < len(piece) else 0
        self._connection.take_body(memoryview(piece)[self._from : begin + more], more)
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
        self._filled = 0
        self._connection.step_back(bytes(memoryview(piece)[at:end]))


def read_by(transport: asyncio.Transport, protocol: asyncio.BaseProtocol, *, paused: bool) -> None:
    """uvloop looks at the kind of a protocol when it begins to read."""
    if not paused:
        transport.pause_reading()
    transport.set_protocol(protocol)
    if not paused:
        transport.resume_reading()
