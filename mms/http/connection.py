"""One client's connection: bytes in, exchanges out, answers back in the order of the requests. Data plane, front end.

No task, no future and no logging per request: the parser calls back, a finished request goes to the application, and
whoever answers calls the exchange. Slow clients are in `patience`, large bodies in `largereads`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from time import monotonic
from typing import cast

from mms.errors import BadRequestError, MMSError
from mms.http.arrivals import Arrivals
from mms.http.exchange import Application, Buffer, Exchange, next_id
from mms.http.limits import (
    LARGE_BODY,
    LINGER_BODY_BYTES,
    LINGER_BYTES,
    LINGER_SECONDS,
    MAX_BACKLOG,
    MAX_PIPELINED,
    READ_ANYWAY,
    Limits,
)
from mms.http.patience import Patience
from mms.http.reader import Part, RequestReader
from mms.http.request import Head, KnownHeads
from mms.http.response import CONTINUE, ResponseHeads
from mms.http.shedding import Shedding

_HEAD_END = b"\r\n\r\n"
_RESET = struct.pack("ii", 1, 0)  # socket(7), SO_LINGER: on, for no time at all
_NO_HEAD = Head()


def new_shedding(application: Application, limits: Limits) -> Shedding:
    return Shedding(max_bytes=limits.max_bytes_in_flight, max_connections=limits.max_connections, held=application.held)


class Connection(Patience):
    """The front end's end of one connection. It has slots: there may be thousands."""

    __slots__ = ("_application", "_counted", "_drained", "_peers", "_refused", "heads")

    def __init__(
        self,
        application: Application,
        limits: Limits,
        heads: ResponseHeads,
        known: KnownHeads,
        peers: set[Connection],
        *,
        edge: bool,
        shedding: Shedding,
        arrivals: Arrivals,
    ) -> None:
        self.heads = heads
        self.shedding = shedding
        self.last_activity = 0.0
        self._application = application
        self._limits = limits
        self._known = known
        self._peers = peers
        self._edge = edge
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._reader = RequestReader(self, limits.max_request_size)
        self._last_head = _NO_HEAD  # a known one that this connection sent last ...
        self._last_raw = b""
        self._last_size = 0  # ... with a body of its length; 0 when the next bytes are to be looked at as a whole
        self._refused: tuple[Exchange, MMSError] | None = None  # to be answered behind the backlog
        self._arrivals = arrivals
        self._arrived = arrivals.exchanges
        self._alone: Exchange | None = None  # the usual case of one that waits for its answer, else:
        self._pending: deque[Exchange] = deque()
        self._backlog: deque[Exchange] = deque()
        self._drained: asyncio.Future[None] | None = None
        self._last = False  # no further request is read from this connection
        self._receiving: Head | None = None  # whose body is being read
        self._counted = 0  # bytes of it that are accounted for
        self._lingering = -1
        self._untaken = self._brought = self._kept = 0
        self._taken_at = self._brought_at = self._linger_until = 0.0
        self._write_paused = False
        self._read_paused = False
        self._reads_large = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.last_activity = monotonic()
        self._peers.add(self)
        if len(self._peers) > self.shedding.room:
            self._refuse(self.shedding.full())

    def connection_lost(self, error: Exception | None) -> None:
        self._peers.discard(self)
        self.shedding.slow.discard(self)
        self._last = True
        self._forget_requests()
        self._forget_body()
        self._reader.release()
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def eof_received(self) -> bool:
        self._last = True
        pending = self._in_line()
        if self._edge or any(exchange.stream is not None for exchange in pending):
            return False  # who takes chunks as they come has left: the next one, which would tell, may come late
        return bool(pending)  # a client may close its half and still read its answers

    def data_received(self, data: bytes) -> None:
        now = self.last_activity = monotonic()
        if self._last:
            self._drop(len(data))
            return
        if self._alone is not None or not (
            (len(data) == self._last_size and data.startswith(self._last_raw)) or self._recognizes(data)
        ):
            self._read(data, now)
            return
        head = self._last_head
        exchange = Exchange(self, head, True, next_id(), [data[len(self._last_raw) :]], head.length, now)
        self._alone = exchange
        if not self._arrived:
            self._loop.call_soon(self._arrivals.hand_over)
        self._arrived.append(exchange)

    def _recognizes(self, data: bytes) -> bool:
        """Whether this is a whole request with a head that is known, and no other waits for its answer; then the next
        one is expected to be like it.
        """
        if self._pending or not self._reader.idle:
            return False
        end = data.find(_HEAD_END) + len(_HEAD_END)
        known = self._known.get(data[:end])
        if known is None or len(data) - end != known.length:
            return False
        self._last_head, self._last_raw, self._last_size = known, data[:end], len(data)
        return True

    def _read(self, data: bytes, now: float) -> None:
        """Have the parser read."""
        reader = self._reader
        head, idle = reader.head, reader.idle
        self._last_size = 0
        reader.feed(data, now)
        if reader.refusal is not None:
            self._refuse(reader.refusal)
            return
        if self._backlog:
            end = data.find(_HEAD_END) + len(_HEAD_END) if idle else 0
            if end and len(data) - end == head.length and self._backlog[-1].head is head:
                self._known.remember(data[:end], head)
            self._admit()
        if reader.in_body and not self._last:
            self._receive(reader.head)

    # Sink

    def begun(self) -> MMSError | None:
        if len(self._backlog) >= MAX_BACKLOG:
            return BadRequestError(f"more than {MAX_BACKLOG} requests are pipelined")
        return None

    def complete(self, head: Head, parts: list[Part], size: int) -> bool:
        exchange = self._exchange(head, parts, size)
        if self._drained is not None or self.shedding.step:
            exchange.keep_alive = False
        if self._counted:
            self.shedding.hand_over(self._counted)
            self._counted = 0
        self._backlog.append(exchange)
        self._last = not exchange.keep_alive
        if size >= LARGE_BODY and not self._last:
            self._read_large(size)
        return exchange.keep_alive

    # answering

    def send(self, exchange: Exchange, head: bytes, body: Buffer) -> None:
        """Send the exchange's answer, and those behind it that waited for their turn."""
        if exchange is self._alone:
            self._alone = None
            if body:
                self._write(head, body)
            else:
                self._transport.write(head)  # if it is closing, nobody reads any more, and it drops this
            if self._last:
                self._finish()
            return
        pending = self._in_line()
        if not pending:
            return  # the client has gone, or was told goodbye
        if pending[0] is not exchange:
            exchange.response = head, body
            return
        pending.popleft()
        self._write(head, body)
        while exchange.keep_alive and pending:
            following = pending[0]
            if following.response is None:
                if following.stream is not None:
                    following.stream.take_turn()
                break
            exchange = pending.popleft()
            self._write(*following.response)
        if not exchange.keep_alive:
            self._finish()
        elif self._backlog or self._refused is not None:
            self._admit()
        elif self._last and not pending:
            self._finish()

    def send_part(self, exchange: Exchange, parts: list[bytes]) -> bool:
        """Send parts of the exchange's answer, if it is its turn; whether it is. Dropped when the client has gone."""
        pending = self._in_line()
        if pending and pending[0] is not exchange:
            return False
        if pending and not self._transport.is_closing():
            data = b"".join(parts)  # one object: many small ones may wait for a slow client
            if self._write_paused:
                self._untaken += len(data)
            self._transport.write(data)
            if self._unsent > self._limits.max_response_size:
                self.abort()
        return True

    def cut(self, exchange: Exchange) -> None:
        """End the connection in the middle of this answer, so that its client does not take it for whole."""
        self._last = True
        self._forget_requests()
        if exchange.head.version == "1.0":  # the end of the connection would be the answer's: only a reset tells
            sock = self._transport.get_extra_info("socket")
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._transport.abort()
        else:
            self._transport.close()

    def _write(self, head: bytes, body: Buffer) -> None:
        if self._transport.is_closing():
            return
        if body:
            self._transport.writelines([head, body])
        else:
            self._transport.write(head)

    def drain(self) -> asyncio.Future[None]:
        """The server stops: close when the requests in hand are answered; done when the last answer has left."""
        self._drained = self._loop.create_future()
        if self._reader.idle:
            self._last = True
            if pending := self._in_line():
                (self._backlog or pending)[-1].keep_alive = False
            else:
                self._transport.close()
        return self._drained

    def retire(self) -> asyncio.Future[None]:
        """Another process takes new connections: this one ends with its next answer, but if it idles, it may still ask.

        Done when it is gone. The caller sees to it that no head is known any more.
        """
        self._drained = self._loop.create_future()
        pending = self._in_line()
        if self._reader.idle and pending:
            self._last = True
            (self._backlog or pending)[-1].keep_alive = False
        return self._drained

    def abort(self) -> None:
        self._transport.abort()

    def owes(self, exchange: Exchange) -> bool:
        """Whether it waits for its answer, and its client for it."""
        return exchange in self._in_line() and exchange.response is None

    def forget_heads(self) -> None:
        """The next request is looked at as a whole, whatever was known."""
        self._last_head, self._last_size = _NO_HEAD, 0
        if not self._reader.in_body:
            self._receiving = None
        self._reader.head.meaning = None

    def _in_line(self) -> deque[Exchange]:
        """Those that wait for their answer, in order, where there may be several. None can be in the backlog unless
        there are.
        """
        if self._alone is not None:
            self._pending.append(self._alone)
            self._alone = None
            self._last_size = 0
        return self._pending

    def _receive(self, head: Head) -> None:
        """Part of a request has arrived whose body is still to come: refuse it now, or account for the body."""
        first, size = self._receiving is not head, self._reader.size
        self._receiving = head
        to_come = max(0, head.length - size) if first else 0
        if first and (head.expect or head.transfer_encoding or to_come > READ_ANYWAY):
            objection = self._application.objection(head, size + to_come)
            if objection is not None:
                self._turn_away(objection)
                return
        busy = self.shedding.read(size - self._counted, before=self._counted, to_come=to_come)
        if busy is not None:
            self._refuse(busy)
            return
        self._counted = size
        if first and head.expect and not size and not self._in_line():
            self._transport.write(CONTINUE)
        if size >= LARGE_BODY and self._reader.rest >= LARGE_BODY:
            self._read_large(head.length)

    def _forget_body(self) -> None:
        if self._counted:
            self.shedding.drop(self._counted)
            self._counted = 0

    def _admit(self) -> None:
        """Hand requests to the application, a bounded number at a time."""
        backlog, pending = self._backlog, self._in_line()
        while backlog and len(pending) < MAX_PIPELINED:
            if not self._arrived:
                self._loop.call_soon(self._arrivals.hand_over)
            pending.append(backlog[0])
            self._arrived.append(backlog.popleft())
        if self._refused is not None and not backlog:
            (exchange, error), self._refused = self._refused, None
            pending.append(exchange)
            exchange.fail(error)
        self._steer_reading()

    def _refuse(self, error: MMSError) -> None:
        self._application.refused(error)
        self._turn_away(error)

    def _turn_away(self, error: MMSError) -> None:
        """Answer what came before, then this error, then close without resetting the answer."""
        exchange = self._exchange(self._reader.head, [], 0)
        exchange.keep_alive = False
        self._refused = exchange, error
        self._last = True
        self._reader.forget()
        self._forget_body()
        self._admit()

    def _finish(self) -> None:
        """The last answer is written: close, but read a little first if the client may still be sending."""
        self._last = True
        self._forget_requests()
        if self._transport.is_closing() or self._lingering >= 0:
            return
        if self._drained is None and self._transport.can_write_eof():
            head = self._reader.head
            self._lingering = LINGER_BODY_BYTES if head.length or head.transfer_encoding else LINGER_BYTES
            self._taken_at = monotonic()
            self._linger_until = self._taken_at + LINGER_SECONDS
            self._transport.write_eof()
        else:
            self._transport.close()

    def _forget_requests(self) -> None:
        """No further answer leaves on this connection: what is still under way is not waited for."""
        for exchange in self._in_line():
            if exchange.work is not None:
                exchange.work.cancel()
                exchange.work = exchange.stream = None  # as in Exchange.answer
        if self._arrived:
            self._arrivals.forget(self)
        self._pending.clear()
        self._backlog.clear()
        self._refused = None

    def _exchange(self, head: Head, parts: list[Part], size: int) -> Exchange:
        return Exchange(self, head, head.keep_alive, head.request_id or next_id(), parts, size, self.last_activity)

    def _steer_reading(self) -> None:
        """Read only while there is room for what is read."""
        pause = self._write_paused or len(self._backlog) > 0
        if pause != self._read_paused and not self._transport.is_closing():
            self._read_paused = pause
            if pause:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()
