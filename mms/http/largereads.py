"""Large bodies, read into the memory in which they stay: neither the event loop nor the parser copies them.

Data plane, front end. A body whose length is known needs no parser, and of a connection that sends large ones head and
body are read together. What is only promised takes no memory: a read gets as much room as was sent before.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from time import monotonic
from typing import TYPE_CHECKING

from mms.allocator import buffer
from mms.errors import ServiceUnavailableError
from mms.http.limits import LARGE_BODY

if TYPE_CHECKING:
    from collections import deque

    from mms.errors import MMSError
    from mms.http.arrivals import Arrivals
    from mms.http.exchange import Exchange
    from mms.http.reader import Part, RequestReader
    from mms.http.request import Head, KnownHeads

LEAST, MOST = 16 << 10, 256 << 10  # room for one read
HEAD = 2 << 10  # for one that is not known yet
_HEAD_END = b"\r\n\r\n"
_NOTHING = bytearray()  # in place of memory that belongs to a request: a connection that idles must not keep it
_SPARE = bytearray(LEAST)  # of all connections: for a read that gets no memory of its own


class LargeReads(asyncio.BufferedProtocol):
    """Takes a connection's place at its transport while that sends large bodies."""

    def __init__(self, connection: LargeBodies, reader: RequestReader, body: int) -> None:
        self._connection = connection
        self._reader = reader
        self._usual = body + HEAD  # bytes of a request of this connection
        self._piece = _NOTHING
        self._from = 0  # where in it a body begins
        self._filled = 0  # how far it has come; 0 for the next read to get another

    def get_buffer(self, sizehint: int) -> bytearray | memoryview:
        if self._filled:
            return memoryview(self._piece)[self._filled :]
        reader, wanted = self._reader, self._usual
        if not reader.between:
            wanted = min(reader.rest, max(LEAST, reader.size)) or wanted
        try:
            self._piece = buffer(min(MOST, wanted + 1))  # a read that leaves room was the last one for now
        except MemoryError:  # an event loop that got it would end the connection without a word
            self._piece = _SPARE
        self._from = 0
        return self._piece

    def buffer_updated(self, nbytes: int) -> None:
        piece, begin = self._piece, self._filled
        if piece is _SPARE:
            if self._reader.rest:
                self._connection.refuse_body()
            self._leave(piece, 0, nbytes)
            return
        if not begin and self._connection.take_request(piece, nbytes):
            self._piece = _NOTHING
            return
        end = begin + nbytes
        rest = self._reader.rest
        if not rest:
            head = piece.find(_HEAD_END, begin, end) + len(_HEAD_END)
            # a body that was refused, a request whose beginning the parser has or that is not read, or no large one
            if begin or not self._connection.may_begin or head < len(_HEAD_END) or 2 * end < len(piece):
                self._leave(piece, begin, end)
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
        if not self._filled:
            self._piece = _NOTHING
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


class LargeBodies(asyncio.Protocol):
    """What a connection does about large bodies; a base class, as it is the connection that reads, in either way."""

    __slots__ = (
        "_alone", "_arrivals", "_arrived", "_backlog", "_known", "_last", "_last_head", "_last_raw", "_last_size",
        "_loop", "_pending", "_read_paused", "_reader", "_reads_large", "_receiving", "_transport", "last_activity",
    )  # fmt: skip

    last_activity: float
    _alone: Exchange | None
    _arrivals: Arrivals
    _arrived: list[Exchange]
    _backlog: deque[Exchange]
    _known: KnownHeads
    _last: bool
    _last_head: Head
    _last_raw: bytes
    _last_size: int
    _loop: asyncio.AbstractEventLoop
    _pending: deque[Exchange]
    _read_paused: bool
    _reader: RequestReader
    _reads_large: bool
    _receiving: Head | None
    _transport: asyncio.Transport

    def take_request(self, data: bytearray, size: int) -> bool:
        """A whole request, if that is what these bytes are, and it says the same as the one before."""
        raw, head = self._last_raw, self._last_head
        end = len(raw)
        if (
            size != self._last_size
            or self._alone is not None
            or self._pending
            or self._last
            or not self._reader.idle
            or not data.startswith(raw)
        ):
            return False
        self.last_activity = monotonic()
        exchange = self._exchange(head, [memoryview(data)[end:size]], head.length)
        self._alone = exchange
        if not self._arrived:
            self._loop.call_soon(self._arrivals.hand_over)
        self._arrived.append(exchange)
        return True

    @property
    def may_begin(self) -> bool:
        """Whether what comes next is the beginning of a request, which is wanted."""
        return self._reader.idle and not self._last

    def take_head(self, raw: bytes) -> None:
        """The head of a request, perhaps."""
        reader = self._reader
        now = self.last_activity = monotonic()
        reader.feed(raw, now)
        if reader.refusal is not None:
            self._refuse(reader.refusal)
        elif self._backlog:
            self._admit()
        elif reader.rest >= LARGE_BODY and self._known.may_come_again(raw, reader.head):
            self._last_raw, self._last_head, self._last_size = raw, reader.head, len(raw) + reader.head.length

    def take_body(self, part: memoryview, more: int) -> None:
        """`more` bytes of a body have come, at the end of `part`."""
        now = self.last_activity = monotonic()
        self._reader.take(part, more, now)
        if self._reader.in_body:
            self._receive(self._reader.head)
        else:
            self._receiving = None
            self._admit()

    def refuse_body(self) -> None:
        """There is no memory for what is to come of it."""
        self._refuse(ServiceUnavailableError("no memory for this request"))

    def step_back(self, data: bytes) -> None:
        """Read as usual again, beginning with this."""
        self._reads_large = False
        self._last_size = 0
        if not self._transport.is_closing():
            _read_by(self._transport, self, paused=self._read_paused)
        if data:  # nothing would be taken for a request like none
            self.data_received(data)

    def _read_large(self, body: int) -> None:
        if not (self._reads_large or self._transport.is_closing()):
            self._reads_large = True
            self._last_size = 0
            _read_by(self._transport, LargeReads(self, self._reader, body), paused=self._read_paused)

    @abstractmethod
    def eof_received(self) -> bool: ...

    @abstractmethod
    def _exchange(self, head: Head, parts: list[Part], size: int) -> Exchange: ...

    @abstractmethod
    def _refuse(self, error: MMSError) -> None: ...

    @abstractmethod
    def _receive(self, head: Head) -> None: ...

    @abstractmethod
    def _admit(self) -> None: ...


def _read_by(transport: asyncio.Transport, protocol: asyncio.BaseProtocol, *, paused: bool) -> None:
    """uvloop looks at the kind of a protocol when it begins to read."""
    if not paused:
        transport.pause_reading()
    transport.set_protocol(protocol)
    if not paused:
        transport.resume_reading()
