"""One request and the place of its answer, and the application that the requests go to. Data plane, front end."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from mms.errors import MMSError
from mms.http.reader import Part
from mms.http.request import Head
from mms.http.response import JOIN_BELOW, error_response, length_lines
from mms.http.streaming import Streaming
from mms.structs import quickly_set

if TYPE_CHECKING:
    from mms.http.connection import Connection

log = logging.getLogger("mms.http")

_ID = b"x-request-id: "

_BYTES = [b"%02x" % number for number in range(256)]
# request ids: random for the process, then a number that counts up; made in C, all but the end once for 256 of them
_beginnings = map(b"".join, itertools.product([os.urandom(6).hex().encode() + b"-"], *[_BYTES] * 5))
next_id = itertools.chain.from_iterable(
    map(b"".join, itertools.product([beginning], _BYTES)) for beginning in _beginnings
).__next__

Buffer = bytes | bytearray | memoryview


class Application(Protocol):
    """What the requests are handed to. Nothing here may block or raise."""

    def handle(self, exchanges: list[Exchange]) -> None:
        """Each of the requests that have arrived together is to be answered, now or later.

        Those that it has begun have their `work`, or their answer.
        """
        ...

    def objection(self, head: Head, size: int) -> MMSError | None:
        """What speaks against a request whose body, of `size` bytes as far as is known, is still to come; counted."""
        ...

    def refused(self, error: MMSError) -> None:
        """A request was answered with `error` before it was complete."""
        ...

    def held(self) -> int:
        """Bytes of the bodies that were handed over and are not answered yet."""
        ...


class Cancellable(Protocol):
    """The work behind an exchange, told when the client leaves."""

    def cancel(self) -> None: ...


@quickly_set
class Exchange(msgspec.Struct, eq=False):
    """One request and the place of its answer. A Struct: one is made per request, and its constructor runs in C."""

    connection: Connection
    head: Head
    keep_alive: bool
    request_id: bytes
    parts: list[Part]
    size: int
    arrived: float
    response: tuple[bytes, Buffer] | None = None
    work: Cancellable | None = None
    stream: Streaming | None = None

    def answer(self, status: int, head: bytes, body: Buffer) -> None:
        """Answer with `head` (complete header lines) and `body`; length, date and id are added here."""
        self.work = None  # it refers back to this exchange: without the cycle, both are freed without the collector
        connection = self.connection
        begin, size = connection.heads[status], len(body)
        if self.keep_alive and self.head.plain and status != 204:
            if size < JOIN_BELOW:
                connection.send(self, b"".join((begin, head, _ID, self.request_id, length_lines(size), body)), b"")
            else:
                connection.send(self, b"".join((begin, head, _ID, self.request_id, length_lines(size))), body)
        else:
            block = self._unusual(begin + head, status, len(body))
            connection.send(self, block, b"" if self.head.method == b"HEAD" else body)

    @staticmethod
    def answer_all(exchanges: Sequence[Exchange], status: int, head: bytes, bodies: Sequence[Buffer]) -> None:
        """As `answer` for each of at least one; never raises."""
        begin = exchanges[0].connection.heads[status] + head + _ID
        usual = JOIN_BELOW if status != 204 else 0
        lines, its_size = b"", -1
        for exchange, body in zip(exchanges, bodies, strict=True):
            size = len(body)
            try:
                if size < usual and exchange.keep_alive and exchange.head.plain:
                    if size != its_size:
                        lines, its_size = length_lines(size), size
                    exchange.work = None
                    exchange.connection.send(exchange, b"".join((begin, exchange.request_id, lines, body)), b"")
                else:
                    exchange.answer(status, head, body)
            except Exception:  # must not cost the others their answer
                log.exception("an answer could not be delivered")
                exchange.connection.abort()

    def _unusual(self, begin: bytes, status: int, size: int) -> bytes:
        """The head of an answer that ends the connection, has no body (RFC 9110, 15.3.5) or goes to an old client."""
        close = b"connection: keep-alive\r\n" if self.keep_alive else b"connection: close\r\n"
        length = b"content-length: %d\r\n" % size if status != 204 else b""
        return b"%bx-request-id: %b\r\n%b%b\r\n" % (begin, self.request_id, close, length)

    def fail(self, error: MMSError) -> None:
        self.answer(*error_response(error))

    def begin(self, status: int, head: bytes) -> Streaming:
        """The answer comes in chunks."""
        return Streaming(self, status, head)
