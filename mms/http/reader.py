"""One client's bytes, cut into requests, each judged before it is served: the incoming half of a connection."""

from __future__ import annotations

import asyncio
from typing import Protocol

import httptools

from mms.errors import BadRequestError, MMSError, RequestTooLargeError, ServiceUnavailableError
from mms.http import request as verdicts
from mms.http.limits import CHUNK_FRAMING, MAX_CHUNK_DIGITS, MAX_CHUNK_EXTRA, MAX_HEAD, MAX_LEADING, MAX_LINE
from mms.http.request import Head

_HEAD_END = b"\r\n\r\n"
_MANY, _SMALL = 256, 1024  # parts of a chunked body, and bytes in one

Part = bytes | memoryview  # of a body


class Sink(Protocol):
    """Who takes the requests."""

    def begun(self) -> MMSError | None:
        """A request has begun; what speaks against it."""
        ...

    def complete(self, head: Head, parts: list[Part], size: int) -> bool:
        """Here is a request; returns whether another may follow on this connection."""
        ...


class SizeLines:
    """Follows a chunked body from size to size: to see where it may end, which no chunk's data can make believe, and to
    count digits, of which the parser takes any number of zeros.

    It judges nothing else: on a line that is no size it stops, and the parser refuses it.
    """

    def __init__(self) -> None:
        self._line = b""  # the beginning of one
        self._skip = 0  # bytes of data, and its CRLF, before the next one
        self.ended = False  # the last chunk's line was read

    def follow(self, data: bytes, at: int) -> int:
        """The bytes that come next, to the end of the last chunk's line; returns how far, or -1 when a size has too
        many digits.
        """
        stop = len(data)
        while at < stop and not self.ended:
            if self._skip:
                step = min(self._skip, stop - at)
                self._skip -= step
                at += step
                continue
            end = data.find(b"\n", at)
            self._line += data[at : min(end if end >= 0 else stop, at + MAX_CHUNK_DIGITS + 2)]
            digits = self._line.partition(b";")[0].rstrip(b"\r")
            if len(digits) > MAX_CHUNK_DIGITS:
                return -1
            if end < 0:
                return stop
            self._line = b""
            at = end + 1
            try:
                size = int(digits, 16) if digits.isalnum() else 0  # no sign: it would lead back, and round and round
            except ValueError:
                size = 0
            self.ended = not size  # what follows are trailers
            self._skip = size + 2
        return at


class RequestReader:
    """Around httptools, which is more tolerant than a server may be and knows no limits.

    After `refusal` is set nothing more is read.
    """

    def __init__(self, sink: Sink, max_body: int) -> None:
        self.head = Head()  # of the request that is being read
        self.in_head = True
        self.between = True  # the parser stands between two requests
        self.held = b""  # the beginning of a request line
        self.begun = 0.0  # when the first byte of the request's head arrived
        self.refusal: MMSError | None = None
        self._sink = sink
        self._max_body = max_body
        self._parser = httptools.HttpRequestParser(self)
        self._now = 0.0
        self._done = False
        self._raw_head = 0
        self._parts: list[Part] = []
        self._size = 0
        self._joined = self._joined_size = 0  # parts, and bytes in them, of a chunked body that were looked at by _join
        self._chunked_raw = 0
        self._size_lines: SizeLines | None = None  # of a chunked body
        self._tail = b""  # the last bytes fed, while an empty line is looked for

    @property
    def idle(self) -> bool:
        """Whether no request has begun to arrive."""
        return self.between and not self.held

    @property
    def in_body(self) -> bool:
        """Whether a request's head is complete and its body is not."""
        return not self.between and not self.in_head

    @property
    def size(self) -> int:
        """Bytes of the body that have arrived."""
        return self._size

    @property
    def rest(self) -> int:
        """Bytes that are still to come of a body whose length is known."""
        return self.head.length - self._size if self.in_body and not self.head.transfer_encoding else 0

    def take(self, part: memoryview, more: int, now: float) -> None:
        """`more` bytes of a body of known length have come, at the end of `part`; the parser is not shown them."""
        if len(part) > more:
            self._parts[-1] = part
        else:
            self._parts.append(part)
        self._size += more
        self._now = now
        if self._size == self.head.length:
            self._parser = httptools.HttpRequestParser(self)
            self.on_message_complete()

    def forget(self) -> None:
        """Nothing more is read: let go of what there is."""
        self.refusal = None
        self.between = True
        self.held = b""
        self._done = True
        self._parts = []

    def release(self) -> None:
        """It is never fed again. Without these cycles it is freed at once: memory that waits for the collector is cut
        up by what is allocated meanwhile, and a server with many short connections grew by it.
        """
        self.forget()
        del self._parser, self._sink

    def feed(self, data: bytes, now: float) -> None:
        """Feed the parser one piece of one message at a time, so that every request line is judged."""
        if self.held:
            data, self.held = self.held + data, b""
        elif self.between:
            self.begun = now
        self._now = now
        at, view = 0, memoryview(data)
        while at < len(data) and self.refusal is None and not self._done:
            if self.between:
                at = self._begin(data, at)
                if at < 0:
                    return
            stop = self._piece(data, at)
            self._count(stop - at)
            if self.refusal is None:
                self._feed(view[at:stop])
            at = stop

    def _begin(self, data: bytes, at: int) -> int:
        """Where the request that begins at `at` really begins, once its line is whole and right; else -1."""
        start = at
        while start < len(data) and data[start] in b"\r\n" and start - at <= MAX_LEADING:
            start += 1
        leading = start - at
        if leading > MAX_LEADING or not (b"\r\n" * MAX_LEADING).startswith(data[at:start]):
            return self._cannot_begin(BadRequestError("only empty lines (CR LF) may stand before the request line"))
        end = data.find(b"\r\n", start)
        if start < len(data) and end >= 0 and not leading % 2:
            refusal = verdicts.judge_line(data[start:end])
            return start if refusal is None else self._cannot_begin(refusal)
        if leading % 2 and start < len(data):
            return self._cannot_begin(BadRequestError("a lone CR before the request line"))
        if data.find(b"\n", start) >= 0 or data.startswith(b"PRI ", start):
            return self._cannot_begin(BadRequestError("the request line does not end with CR LF"))
        if len(data) - start > MAX_LINE:
            return self._cannot_begin(verdicts.too_long())
        self.held = data[at:]
        return -1

    def _cannot_begin(self, refusal: MMSError) -> int:
        self.refusal = refusal
        return -1

    def _piece(self, data: bytes, at: int) -> int:
        """Where the bytes end that may be parsed without running into the next request."""
        if self.in_head or self.head.transfer_encoding:
            begin = at if self.in_head else self._last_line(data, at)  # both end with an empty line
            tail = self._tail if begin == at else b""
            end = (tail + data[at : at + 3]).find(_HEAD_END) if tail else -1
            if end >= 0:
                stop = at + end + 4 - len(tail)
            else:
                end = data.find(_HEAD_END, begin)
                stop = end + 4 if end >= 0 else len(data)
            self._tail = (self._tail + data[max(at, stop - 3) : stop])[-3:]
            return stop
        rest = self.head.length - self._size
        return min(len(data), at + rest) if rest > 0 else len(data)

    def _last_line(self, data: bytes, at: int) -> int:
        """Where the CRLF is, from `at` on, that ends the line of a chunked body's last chunk; else the end."""
        if self._size_lines is None:
            self._size_lines = SizeLines()
        elif self._size_lines.ended:
            return at
        reached = self._size_lines.follow(data, at)
        if reached < 0:
            self.refusal = BadRequestError(f"a chunk's size has more than {MAX_CHUNK_DIGITS} digits")
        return max(at, reached - 2) if self._size_lines.ended else len(data)

    def _count(self, size: int) -> None:
        if self.in_head:
            self._raw_head += size
            if self._raw_head > MAX_HEAD:
                self.refusal = verdicts.too_large()
        elif self.head.transfer_encoding:
            self._chunked_raw += size
            if self._chunked_raw - self._size > MAX_CHUNK_EXTRA + size:
                self.refusal = BadRequestError("the chunked body has too many extensions or trailers")

    def _feed(self, piece: memoryview) -> None:
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            self.refusal = self.refusal or BadRequestError("this server does not change protocols")
        except httptools.HttpParserError as error:
            cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
            if isinstance(cause, MemoryError):
                self._parts = []
                self.refusal = self.refusal or ServiceUnavailableError("no memory for this request")
            elif cause is not None:
                asyncio.get_running_loop().call_exception_handler(
                    {"message": "a parser callback failed", "exception": cause}
                )
            self.refusal = self.refusal or BadRequestError(f"not HTTP/1.1: {str(error) or 'malformed request'}")

    # httptools callbacks: they never raise

    def on_message_begin(self) -> None:
        self.between = False
        self.refusal = self.refusal or self._sink.begun()

    def on_url(self, url: bytes) -> None:
        self.head.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.in_head:
            self.head.add(name, value)

    def on_headers_complete(self) -> None:
        self.in_head = False
        self._tail = b""
        head, parser = self.head, self._parser
        head.method = parser.get_method()
        head.version = parser.get_http_version()
        head.keep_alive = parser.should_keep_alive()
        head.upgrade = parser.should_upgrade()
        head.plain = head.version == "1.1" and head.method != b"HEAD"
        if self.refusal is not None:
            return
        self.refusal = verdicts.judge_head(head)
        if self.refusal is None and head.length > self._max_body:
            self.refusal = self._too_large()

    def on_body(self, body: bytes) -> None:
        if self.refusal is None:
            self._size += len(body)
            if self._size > self._max_body:
                self.refusal = self._too_large()
                self._parts = []
            else:
                self._parts.append(body)

    def on_chunk_header(self) -> None:
        self._chunked_raw -= CHUNK_FRAMING
        if len(self._parts) - self._joined >= _MANY:
            self._join()

    def on_message_complete(self) -> None:
        self.between = True
        self.begun = self._now
        if self.head.transfer_encoding and self._chunked_raw - self._size > MAX_CHUNK_EXTRA:
            self.refusal = self.refusal or BadRequestError("the chunked body has too many extensions or trailers")
        if self.refusal is None:
            self._done = not self._sink.complete(self.head, self._parts, self._size)
            self.head = Head()
            self.in_head = True
            self._raw_head = 0
            if self._size_lines is not None:
                self._size_lines = None
                self._chunked_raw = self._joined = self._joined_size = 0
            self._tail = b""
            self._parts = []
            self._size = 0

    def _join(self) -> None:
        """Of many small parts make one: each is an object, which takes many times the memory of a few bytes."""
        if self._size - self._joined_size < _MANY * _SMALL:
            self._parts[self._joined :] = [b"".join(self._parts[self._joined :])]
        self._joined, self._joined_size = len(self._parts), self._size

    def _too_large(self) -> MMSError:
        return RequestTooLargeError(f"the request body is over max_request_size ({self._max_body} bytes)")
