"""An answer that comes in chunks: its head and framing, and how it ends. Data plane, front end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mms.errors import MMSError
from mms.http.response import error_response

if TYPE_CHECKING:
    from mms.http.exchange import Buffer, Exchange

_EVENTS = b"content-type: text/event-stream\r\n"
_LAST = b"0\r\n\r\n"


class Streaming:
    """The answer of one exchange, in chunks: `chunk` for each, then `answer` or `fail` once.

    Until it is its turn on the connection, or if nothing has left yet, all is kept: then a failure is a plain error.
    """

    def __init__(self, exchange: Exchange, status: int, head: bytes) -> None:
        self._exchange = exchange
        self._events = _EVENTS in head
        self._chunked = exchange.head.version != "1.0"
        self._left = False  # part of it has been handed to the transport
        self._over = False
        if not self._chunked:
            exchange.keep_alive = False  # the end of the connection is the only end that such a client knows
        self._kept = [_head(exchange, status, head, chunked=self._chunked)]
        self._size = 0  # of what is kept, as the connection was told
        exchange.stream = self
        if exchange.head.method == b"HEAD":
            work = exchange.work
            self.answer(status, head, b"")
            if work is not None:
                work.cancel()

    def chunk(self, data: bytes) -> None:
        """Send, or keep, the next chunk."""
        if self._over:
            return
        size = len(data)
        if size:
            self._kept.append(b"%x\r\n%b\r\n" % (size, data) if self._chunked else data)
        if not self.take_turn():
            self._size += size
            self._exchange.connection.keep(size)

    def take_turn(self) -> bool:
        """What was kept is sent if all answers before it are: whether it is."""
        connection = self._exchange.connection
        if not connection.send_part(self._exchange, self._kept):
            return False
        self._left = True
        self._forget()
        return True

    def answer(self, status: int, head: bytes, body: Buffer) -> None:
        """The answer is whole: what is told here was told before."""
        last = b"".join(self._kept)
        if self._exchange.head.method != b"HEAD" and self._chunked:
            last += _LAST
        self._end()
        self._exchange.connection.send(self._exchange, last, b"")

    def fail(self, error: MMSError) -> None:
        """It cannot be completed: who reads events is told so, any other client sees the connection end within it."""
        if not self._left:
            self._end()
            self._exchange.fail(error)
        elif self._events:
            status, head, body = error_response(error)
            self.chunk(b"event: error\ndata: %b\n\n" % body.strip())
            self.answer(status, head, b"")
        else:
            self._end()
            self._exchange.connection.cut(self._exchange)

    def _end(self) -> None:
        self._over = True
        self._exchange.stream = self._exchange.work = None
        self._forget()

    def _forget(self) -> None:
        self._kept = []
        if self._size:
            self._exchange.connection.keep(-self._size)
            self._size = 0


def _head(exchange: Exchange, status: int, head: bytes, *, chunked: bool) -> bytes:
    lines = [exchange.connection.heads[status], head, b"x-request-id: %b\r\n" % exchange.request_id]
    if chunked:
        lines.append(b"transfer-encoding: chunked\r\n")
    for line in (b"x-accel-buffering: no\r\n", b"cache-control: no-cache\r\n"):  # for nginx, and for what is before it
        if line.partition(b" ")[0] not in head:
            lines.append(line)
    if not exchange.keep_alive:
        lines.append(b"connection: close\r\n")
    return b"".join((*lines, b"\r\n"))
