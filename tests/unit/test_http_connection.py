"""A connection with a fake transport and a tiny application: framing, limits, refusals, order, endings. No sockets."""

from __future__ import annotations

import asyncio
import atexit
import json
import sys
from dataclasses import dataclass, field, replace

import pytest

from mms.errors import BadRequestError, MMSError, NotFoundError, QueueFullError
from mms.http.connection import Connection
from mms.http.exchange import Exchange
from mms.http.limits import (
    LEAST_READ,
    LINGER_BODY_BYTES,
    LINGER_BYTES,
    MAX_FIELDS,
    MAX_HEAD,
    MAX_LINE,
    MAX_PIPELINED,
    Limits,
)
from mms.http.listener import HttpServer
from mms.http.request import Head
from mms.http.response import error_response
from mms.wire import RequestFacts
from mms.workers.job import Job

LIMITS = Limits(max_request_size=100_000, max_connections=3, header_timeout=10, body_timeout=60, keepalive_timeout=75)
GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
LOOP = asyncio.new_event_loop()
atexit.register(LOOP.close)


class Transport(asyncio.Transport):
    """Keeps what is written and what is asked of it."""

    def __init__(self, *, half_close: bool = True) -> None:
        super().__init__()
        self.sent = b""
        self.writes = 0
        self.unsent = 0
        self.reading = True
        self.ended = False
        self.closed = False
        self.aborted = False
        self._half_close = half_close
        self._protocol: asyncio.BaseProtocol = asyncio.Protocol()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert not self.reading  # uvloop would go on as before
        self._protocol = protocol

    def receive(self, data: bytes) -> None:
        """As the event loop hands it over."""
        while data and isinstance(self._protocol, asyncio.BufferedProtocol):
            with memoryview(self._protocol.get_buffer(-1)) as room:
                count = min(len(room), len(data))
                room[:count] = data[:count]
            self._protocol.buffer_updated(count)
            data = data[count:]
        if data:
            assert isinstance(self._protocol, asyncio.Protocol)
            self._protocol.data_received(data)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.ended and not self.closed, "written after the end"
        self.sent += bytes(data)
        self.writes += 1

    def writelines(self, list_of_data: object) -> None:
        assert isinstance(list_of_data, list)
        self.write(b"".join(list_of_data))

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return self._half_close

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return self.unsent


@dataclass
class Work:
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Application:
    """Echoes method, target and body: at once, or when the test says so."""

    at_once: bool = True
    exchanges: list[Exchange] = field(default_factory=list)
    refusals: list[MMSError] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    asked: list[tuple[bytes, int]] = field(default_factory=list)
    bytes: int = 0

    def handle(self, exchanges: list[Exchange]) -> None:
        self.exchanges += exchanges
        for exchange in exchanges:
            if exchange.head.target == b"/missing":
                exchange.fail(NotFoundError("no such path"))
            elif self.at_once:
                self.answer(exchange)
            else:
                exchange.work = Work()
                self.works.append(exchange.work)

    def objection(self, head: Head, size: int) -> MMSError | None:
        self.asked.append((head.target, size))
        return QueueFullError("full", retry_after=3) if head.target == b"/full" else None

    def held(self) -> int:
        return self.bytes

    def refused(self, error: MMSError) -> None:
        self.refusals.append(error)

    def answer(self, exchange: Exchange, status: int = 200) -> None:
        head = exchange.head
        text = b" ".join((head.method, head.target, b"".join(exchange.parts)))
        exchange.answer(status, b"content-type: text/plain\r\n", text)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def message(self) -> str:
        return str(json.loads(self.body)["message"])


def turn(connection: Connection) -> None:
    """What the event loop does when all is read."""
    while connection._arrivals.exchanges:
        LOOP.run_until_complete(asyncio.sleep(0))


@dataclass
class Client:
    application: Application
    connection: Connection
    transport: Transport

    def send(self, data: bytes, *, step: int = 0) -> None:
        """In pieces of `step` bytes, as long as somebody reads."""
        for at in range(0, len(data), step or len(data)):
            if not self.transport.closed:
                self.transport.receive(data[at : at + (step or len(data))])
                turn(self.connection)

    def answer(self, exchange: Exchange) -> None:
        self.application.answer(exchange)
        turn(self.connection)

    def answers(self, *, bodies: bool = True) -> list[Answer]:
        """Everything received so far, which must be whole answers."""
        rest, found = self.transport.sent, []
        while rest:
            block, _, rest = rest.partition(b"\r\n\r\n")
            line, *lines = block.decode("latin-1").split("\r\n")
            version, status = line.split(" ")[:2]
            assert version == "HTTP/1.1"
            headers = dict(one.lower().split(": ", 1) for one in lines)
            assert len(headers) == len(lines), "a header twice"
            size = int(headers.get("content-length", "0")) if bodies else 0
            assert len(rest) >= size
            found.append(Answer(int(status), headers, rest[:size]))
            rest = rest[size:]
        return found

    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers()]


def connect(
    *, at_once: bool = True, edge: bool = False, half_close: bool = True, server: HttpServer | None = None
) -> Client:
    application = Application(at_once)
    server = server or HttpServer(application, LIMITS, edge=edge)

    async def make() -> Connection:
        return server._connect()

    connection = LOOP.run_until_complete(make())
    transport = Transport(half_close=half_close)
    transport.pause_reading()
    transport.set_protocol(connection)
    transport.resume_reading()
    connection.connection_made(transport)
    return Client(application, connection, transport)


def post(body: bytes, *lines: bytes, target: bytes = b"/p", version: bytes = b"1.1") -> bytes:
    head = b"".join(line + b"\r\n" for line in lines)
    return b"POST %b HTTP/%b\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b" % (target, version, head, len(body), body)


def chunked(*chunks: bytes, lines: bytes = b"") -> bytes:
    """A chunked request with its chunks as they are written."""
    return b"POST /c HTTP/1.1\r\nHost: x\r\n" + lines + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(chunks)


# what is accepted

ACCEPTED = {
    "get": (GET, b"GET /a "),
    "body": (post(b"hello"), b"POST /p hello"),
    "empty body": (post(b""), b"POST /p "),
    "get with body": (b"GET /a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi", b"GET /a hi"),
    "length with zeros": (b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 0003\r\n\r\nabc", b"POST /p abc"),
    "length with space": (b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 3 \r\n\r\nabc", b"POST /p abc"),
    "chunked": (chunked(b"3\r\nabc\r\n", b"2\r\nde\r\n", b"0\r\n\r\n"), b"POST /c abcde"),
    "chunk extension": (chunked(b'3;a=b;c="d"\r\nabc\r\n', b"0\r\n\r\n"), b"POST /c abc"),
    "trailer": (chunked(b"3\r\nabc\r\n", b"0\r\nX-T: 1\r\n\r\n"), b"POST /c abc"),
    "absolute form": (b"GET http://y/a?b HTTP/1.1\r\nHost: x\r\n\r\n", b"GET http://y/a?b "),
    "options of all": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", b"OPTIONS * "),
    "empty lines before": (b"\r\n\r\n" + GET, b"GET /a "),
    "high bytes in a value": (b"GET /a HTTP/1.1\r\nHost: x\r\nX: \xe4\xff\r\n\r\n", b"GET /a "),
    "1.0 without host": (b"GET /a HTTP/1.0\r\n\r\n", b"GET /a "),
    "query": (b"GET /a?b=c&d HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /a?b=c&d "),
}


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_the_line_of_the_next_request_is_judged_wherever_the_head_before_it_was_cut(cut: int) -> None:
    """Found by `make fuzz`: the rest of the empty line, the body and a request without a version came in one piece."""
    first, client = post(b"abc"), connect()
    at = first.index(b"\r\n\r\n") + cut
    client.send(first[:at])
    client.send(first[at:] + b"POST /pHTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.statuses() == [200, 400]


@pytest.mark.parametrize("step", [0, 1, 7], ids=["whole", "bytes", "sevens"])
@pytest.mark.parametrize("name", ACCEPTED)
def test_good_requests_are_served(name: str, step: int) -> None:
    request, echo = ACCEPTED[name]
    client = connect()
    client.send(request, step=step)
    (answer,) = client.answers()
    assert (answer.status, answer.body) == (200, echo)


@pytest.mark.parametrize("name", ACCEPTED)
def test_good_requests_are_served_again_on_the_same_connection(name: str) -> None:
    request, echo = ACCEPTED[name]
    if b"HTTP/1.0" in request:
        request = request.replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n")
    client = connect()
    for _ in range(3):
        client.send(request)
    client.send(GET)
    assert [answer.body for answer in client.answers()] == [echo] * 3 + [b"GET /a "]


# what is refused (reliability.md, appendix A)


@pytest.mark.parametrize("before", [b"\n", b"\r\r\n", b"\r\n" * 20], ids=repr)
def test_what_may_stand_before_a_request_line_is_said(before: bytes) -> None:
    client = connect()
    client.send(before + GET)
    (answer,) = client.answers()
    assert answer.status == 400 and b'"only empty lines (CR LF) may stand before the request line"' in answer.body


LENGTH = b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: "
CODING = b"POST /p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: "
REFUSED = {
    "length then coding": (LENGTH + b"3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "coding then length": (CODING + b"chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400),
    "two lengths": (LENGTH + b"3\r\nContent-Length: 4\r\n\r\nabcd", 400),
    "the same length twice": (LENGTH + b"3\r\nContent-Length: 3\r\n\r\nabc", 400),
    "length list": (LENGTH + b"3, 3\r\n\r\nabc", 400),
    "length with plus": (LENGTH + b"+3\r\n\r\nabc", 400),
    "negative length": (LENGTH + b"-1\r\n\r\n", 400),
    "hexadecimal length": (LENGTH + b"0x3\r\n\r\nabc", 400),
    "length in two": (LENGTH + b"3 3\r\n\r\nabc", 400),
    "no length": (LENGTH + b"\r\n\r\n", 400),
    "length with underscore": (LENGTH + b"1_0\r\n\r\n", 400),
    "length 2^64": (LENGTH + b"18446744073709551616\r\n\r\n", 400),
    "length 2^64-1": (LENGTH + b"18446744073709551615\r\n\r\n", 413),
    "xchunked": (CODING + b"xchunked\r\n\r\n0\r\n\r\n", 400),
    "identity": (CODING + b"identity\r\n\r\n", 400),
    "chunked, identity": (CODING + b"chunked, identity\r\n\r\n0\r\n\r\n", 400),
    "chunked, chunked": (CODING + b"chunked, chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked twice": (CODING + b"chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked;q=1": (CODING + b"chunked;q=1\r\n\r\n0\r\n\r\n", 400),
    "vertical tab before chunked": (CODING + b"\x0bchunked\r\n\r\n0\r\n\r\n", 400),
    "space before colon": (CODING.replace(b"ng: ", b"ng : ") + b"chunked\r\n\r\n0\r\n\r\n", 400),
    "folded coding": (CODING + b"\r\n chunked\r\n\r\n0\r\n\r\n", 400),
    "identity, chunked": (CODING + b"identity, chunked\r\n\r\n0\r\n\r\n", 501),
    "gzip, chunked": (CODING + b"gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "coding in 1.0": (CODING.replace(b"1.1", b"1.0") + b"chunked\r\n\r\n0\r\n\r\n", 400),
    "bare LF after the line": (b"GET /a HTTP/1.1\nHost: x\r\n\r\n", 400),
    "bare LF after a header": (b"GET /a HTTP/1.1\r\nHost: x\n\r\n", 400),
    "bare CR": (b"GET /a HTTP/1.1\r\nHost: x\rX: y\r\n\r\n", 400),
    "CR CR LF": (b"GET /a HTTP/1.1\r\r\nHost: x\r\n\r\n", 400),
    "folded header": (b"GET /a HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n", 400),
    "leading space": (b"GET /a HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    "chunk line with LF": (chunked(b"3\nabc\r\n0\r\n\r\n"), 400),
    "chunk size and space": (chunked(b"3 \r\nabc\r\n0\r\n\r\n"), 400),
    "chunk 0x3": (chunked(b"0x3\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk +3": (chunked(b"+3\r\nabc\r\n0\r\n\r\n"), 400),
    "empty chunk size": (chunked(b"\r\nabc\r\n0\r\n\r\n"), 400),
    "17 digits of chunk size": (chunked(b"00000000000000003\r\nabc\r\n0\r\n\r\n"), 400),
    "17 digits of a later chunk's size": (chunked(b"3;a\r\nabc\r\n" + b"0" * 16 + b"1;b\r\na\r\n0\r\n\r\n"), 400),
    "40 digits of last chunk": (chunked(b"3\r\nabc\r\n" + b"0" * 40 + b"\r\n\r\n"), 400),
    "chunk overflow": (chunked(b"fffffffffffffffff\r\nabc"), 400),
    "huge chunk": (chunked(b"ffffffff\r\n" + b"x" * 100_001), 413),
    "chunk without end": (chunked(b"3\r\nabcX0\r\n\r\n"), 400),
    "chunk spill": (chunked(b"3\r\nabcde\r\n0\r\n\r\n"), 400),
    "CR in extension": (chunked(b"3;a\rb\r\nabc\r\n0\r\n\r\n"), 400),
    "LF in extension": (chunked(b"3;a\nb\r\nabc\r\n0\r\n\r\n"), 400),
    "trailer Content-Length": (chunked(b"0\r\nContent-Length: 3\r\n\r\n"), 400),
    "trailer Transfer-Encoding": (chunked(b"0\r\nTransfer-Encoding: chunked\r\n\r\n"), 400),
    "no host": (b"GET /a HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /a HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
    "two hosts in 1.0": (b"GET /a HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    "no host name": (b"GET /a HTTP/1.1\r\nHost: a b<>\r\n\r\n", 400),
    "NUL in value": (b"GET /a HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n", 400),
    "control in value": (b"GET /a HTTP/1.1\r\nHost: x\r\nX: a\x01b\r\n\r\n", 400),
    "DEL in value": (b"GET /a HTTP/1.1\r\nHost: x\r\nX: a\x7fb\r\n\r\n", 400),
    "high byte in name": (b"GET /a HTTP/1.1\r\nHost: x\r\nX\xe4: a\r\n\r\n", 400),
    "NUL in name": (b"GET /a HTTP/1.1\r\nHost: x\r\nX\0: a\r\n\r\n", 400),
    "empty name": (b"GET /a HTTP/1.1\r\nHost: x\r\n: a\r\n\r\n", 400),
    "space in name": (b"GET /a HTTP/1.1\r\nHost: x\r\nX Y: a\r\n\r\n", 400),
    "no colon": (b"GET /a HTTP/1.1\r\nHost: x\r\nfoo\r\n\r\n", 400),
    "no version": (b"GET /a\r\nHost: x\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /a HTTP/0.9\r\nHost: x\r\n\r\n", 400),
    "HTTP/2.0": (b"GET /a HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    "HTTP/1.2": (b"GET /a HTTP/1.2\r\nHost: x\r\n\r\n", 400),
    "http/1.1": (b"GET /a http/1.1\r\nHost: x\r\n\r\n", 400),
    "ICE": (b"SOURCE /a ICE/1.0\r\nHost: x\r\n\r\n", 400),
    "RTSP": (b"OPTIONS * RTSP/1.0\r\nHost: x\r\n\r\n", 400),
    "lower-case method": (b"get /a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "unknown method": (b"FETCH /a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "two spaces": (b"GET  /a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "tab in target": (b"GET /a\tb HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "space in target": (b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "control in target": (b"GET /a\x01 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "high byte in target": (b"GET /\xe4 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "fragment": (b"GET /a#b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "authority form": (b"GET y:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "GET *": (b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "CONNECT": (b"CONNECT y:80 HTTP/1.1\r\nHost: x\r\n\r\nraw", 400),
    "upgrade to h2c": (post(b"abc", b"Connection: Upgrade", b"Upgrade: h2c"), 400),
    "upgrade to websocket": (post(b"abc", b"Connection: Upgrade", b"Upgrade: websocket"), 400),
    "leading CRLFs": (b"\r\n" * 40 + GET, 400),
    "leading LF": (b"\n" + GET, 400),
    "unknown expectation": (post(b"abc", b"Expect: a-miracle"), 417),
    "garbage": (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
}


@pytest.mark.parametrize("step", [0, 1], ids=["whole", "bytes"])
@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_refused_and_the_connection_ends(name: str, step: int) -> None:
    request, status = REFUSED[name]
    client = connect()
    client.send(request, step=step)
    assert client.statuses() == [status]
    (answer,) = client.answers()
    assert answer.headers["connection"] == "close"
    assert json.loads(answer.body)["code"] == status and answer.message
    assert client.transport.ended
    assert not client.application.exchanges, "refused, and handed to the application all the same"


ENDLESS = {
    "zeros before chunk size": (chunked(b"0" * 60_000 + b"3\r\nabc\r\n0\r\n\r\n"), 400),
    "endless chunk extension": (chunked(b"3;" + b"a" * 60_000 + b"\r\nabc\r\n0\r\n\r\n"), 400),
    "endless trailers": (chunked(b"0\r\n", b"X: y\r\n" * 15_000, b"\r\n"), 400),
}
# Between two requests of one read, the parser hides what a request line looked like; nobody else reads the stream.
HIDDEN = {"leading CRLFs", "leading LF", "two spaces", "RTSP", "ICE"}


@pytest.mark.parametrize("step", [1, 1 << 10, 1 << 14])
@pytest.mark.parametrize("name", ENDLESS)
def test_what_a_chunked_body_may_hold_beside_its_data_is_bounded(name: str, step: int) -> None:
    request, status = ENDLESS[name]
    client = connect()
    client.send(request, step=step)
    assert client.statuses() == [status] and client.transport.ended


@pytest.mark.parametrize("step", [0, 1], ids=["whole", "bytes"])
def test_the_preface_of_http2_is_refused(step: int) -> None:
    client = connect()
    client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", step=step)
    assert client.statuses() in ([400], [505]) and client.transport.ended


@pytest.mark.parametrize("step", [0, 1], ids=["whole", "bytes"])
@pytest.mark.parametrize("name", [name for name in REFUSED if name not in HIDDEN])
def test_a_good_request_before_a_bad_one_is_answered_first(name: str, step: int) -> None:
    request, status = REFUSED[name]
    client = connect(at_once=False)
    client.send(GET + request, step=step)
    assert client.statuses() == []
    (exchange,) = client.application.exchanges
    client.answer(exchange)
    assert client.statuses() == [200, status]
    assert client.transport.ended


@pytest.mark.parametrize("count", [1, MAX_PIPELINED, MAX_PIPELINED + 4])
def test_all_good_requests_before_a_bad_one_are_answered(count: int) -> None:
    client = connect(at_once=False)
    client.send(GET * count + b"garbage\r\n\r\n")
    while any(exchange.response is None for exchange in client.application.exchanges):
        todo = [exchange for exchange in client.application.exchanges if exchange.response is None]
        answered = len(client.answers())
        client.answer(todo[answered] if answered < len(todo) else todo[-1])
        if len(client.answers()) == answered:
            break
    assert client.statuses() == [200] * count + [400]


# limits


def test_a_body_over_the_limit_is_refused_before_it_arrives() -> None:
    client = connect()
    client.send(b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 100001\r\n\r\n")
    assert client.statuses() == [413]
    assert "100000 bytes" in client.answers()[0].message


def test_a_body_of_the_limit_is_served() -> None:
    client = connect()
    client.send(post(b"x" * 100_000), step=1 << 16)
    assert client.statuses() == [200]


def test_a_chunked_body_over_the_limit_is_refused_where_it_passes_it() -> None:
    client = connect()
    client.send(chunked(b"186a0\r\n", b"x" * 100_000, b"\r\n"))
    assert client.statuses() == []
    client.send(b"1\r\nx")
    assert client.statuses() == [413]


def test_a_large_chunked_body_of_small_chunks_is_served() -> None:
    client = connect()
    client.send(chunked(b"1\r\nx\r\n" * 20_000, b"0\r\n\r\n"), step=1 << 16)
    assert client.statuses() == [200]


@pytest.mark.parametrize("step", [0, 1 << 10])
def test_a_request_line_over_the_limit_is_414(step: int) -> None:
    client = connect()
    client.send(b"GET /" + b"a" * MAX_LINE + b" HTTP/1.1\r\nHost: x\r\n\r\n", step=step)
    assert client.statuses() == [414]


@pytest.mark.parametrize("step", [0, 1 << 10])
@pytest.mark.parametrize(
    "lines",
    [b"X: " + b"a" * MAX_HEAD + b"\r\n", b"X: y\r\n" * (MAX_FIELDS + 1), b"X-Long: abcdefghij\r\n" * 2000],
    ids=["long", "many", "both"],
)
def test_headers_over_the_limit_are_431(lines: bytes, step: int) -> None:
    client = connect()
    client.send(b"GET /a HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n", step=step)
    assert client.statuses() == [431]


def test_headers_at_the_limit_are_served() -> None:
    client = connect()
    client.send(b"GET /a HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * (MAX_FIELDS - 1) + b"\r\n")
    assert client.statuses() == [200]


def test_a_long_body_does_not_count_against_the_head_of_the_next_request() -> None:
    client = connect()
    client.send(post(b"x" * (MAX_HEAD + 100)) + b"GET /a HTTP/1.1\r\nHo")
    client.send(b"st: x\r\n\r\n")
    assert client.statuses() == [200, 200]


def test_a_long_body_does_not_count_against_the_chunks_of_the_next_request() -> None:
    client = connect()
    second = chunked(b"3\r\nabc\r\n", b"0\r\n\r\n")
    client.send(post(b"x" * 90_000) + second[:-3])
    client.send(second[-3:])
    assert client.statuses() == [200, 200]


def test_one_connection_too_many_is_told_so() -> None:
    application = Application()
    server = HttpServer(application, LIMITS, edge=False)
    clients = [connect(server=server) for _ in range(LIMITS.max_connections + 1)]
    assert [client.statuses() for client in clients] == [[], [], [], [503]]
    clients[0].connection.connection_lost(None)
    assert connect(server=server).statuses() == [503], "the refused one still counts until it has gone"
    clients[3].connection.connection_lost(None)


# answers


def test_an_answer_has_length_date_and_id() -> None:
    client = connect()
    client.send(GET)
    (answer,) = client.answers()
    assert set(answer.headers) == {"date", "content-type", "x-request-id", "content-length"}
    assert answer.headers["content-length"] == "7"


@pytest.mark.parametrize(
    ("sent", "kept"), [(b"a.B_c-1", True), (b"x" * 128, True), (b"x" * 129, False), (b"a b", False), (b"\xe4", False)]
)
def test_a_valid_request_id_is_kept(sent: bytes, kept: bool) -> None:
    client = connect()
    client.send(b"GET /a HTTP/1.1\r\nHost: x\r\nX-Request-Id: " + sent + b"\r\n\r\n")
    shown = client.answers()[0].headers["x-request-id"]
    assert (shown == sent.decode("latin-1").lower()) is kept and shown


def test_made_up_ids_differ() -> None:
    client = connect()
    client.send(GET * 3)
    assert len({answer.headers["x-request-id"] for answer in client.answers()}) == 3


def test_the_applications_refusal_leaves_the_connection_open() -> None:
    client = connect()
    client.send(b"GET /missing HTTP/1.1\r\nHost: x\r\n\r\n" + GET)
    assert client.statuses() == [404, 200] and not client.transport.ended


def test_head_is_answered_without_its_body() -> None:
    client = connect()
    client.send(b"HEAD /a HTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.transport.sent.endswith(b"content-length: 8\r\n\r\n")


def test_204_has_neither_length_nor_body() -> None:
    client = connect(at_once=False)
    client.send(GET)
    client.application.exchanges[0].answer(204, b"", b"")
    assert b"content-length" not in client.transport.sent and client.transport.sent.endswith(b"\r\n\r\n")
    client.send(GET)
    client.answer(client.application.exchanges[1])
    assert client.statuses() == [204, 200]


def test_a_large_answer_is_whole() -> None:
    client = connect(at_once=False)
    client.send(GET)
    client.application.exchanges[0].answer(200, b"", b"x" * 300_000)
    assert client.answers()[0].body == b"x" * 300_000


def test_a_request_knows_its_headers_but_those_with_underscores() -> None:
    client = connect(at_once=False)
    client.send(b"GET /a HTTP/1.1\r\nHost: x\r\nTransfer_Encoding: chunked\r\nX-A: 1\r\n\r\n")
    assert client.application.exchanges[0].head.headers == [b"Host", b"x", b"X-A", b"1"]


def test_trailers_are_not_headers() -> None:
    client = connect(at_once=False)
    client.send(chunked(b"0\r\nX-T: 1\r\n\r\n"))
    assert b"X-T" not in client.application.exchanges[0].head.headers


# order


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
def test_answers_leave_in_the_order_of_the_requests(order: tuple[int, ...]) -> None:
    client = connect(at_once=False)
    client.send(b"".join(GET.replace(b"/a", b"/%d" % number) for number in range(3)))
    for number in order:
        client.answer(client.application.exchanges[number])
    assert [answer.body for answer in client.answers()] == [b"GET /0 ", b"GET /1 ", b"GET /2 "]


def test_a_connection_has_a_bounded_number_of_requests_in_hand() -> None:
    client = connect(at_once=False)
    client.send(GET * (MAX_PIPELINED + 2))
    assert len(client.application.exchanges) == MAX_PIPELINED and not client.transport.reading
    client.answer(client.application.exchanges[0])
    assert len(client.application.exchanges) == MAX_PIPELINED + 1
    client.answer(client.application.exchanges[1])
    assert client.transport.reading


@pytest.mark.parametrize("path", [b"/a", b"/missing"])
def test_a_thousand_pipelined_requests_are_answered(path: bytes) -> None:
    client = connect()
    client.send(GET.replace(b"/a", path) * 1000)
    assert len(client.answers()) == 1000


def test_too_many_pipelined_requests_are_refused() -> None:
    client = connect(at_once=False)
    client.send(GET * 5000)
    assert len(client.application.exchanges) == MAX_PIPELINED
    assert [error.status for error in client.application.refusals] == [400]


# keep-alive


@pytest.mark.parametrize(
    ("version", "connection", "open_after"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"keep-alive", True),
        (b"1.1", b"close", False),
        (b"1.1", b"Close", False),
        (b"1.0", b"", False),
        (b"1.0", b"keep-alive", True),
        (b"1.0", b"close", False),
    ],
)
@pytest.mark.parametrize("body", [b"", b"abc"])
def test_the_connection_stays_open_where_the_client_says_so(
    version: bytes, connection: bytes, open_after: bool, body: bytes
) -> None:
    client = connect()
    client.send(post(body, *([b"Connection: " + connection] if connection else ()), version=version))
    (answer,) = client.answers()
    assert client.transport.ended is not open_after
    assert (answer.headers.get("connection") == "close") is not open_after
    if open_after:
        client.send(GET)
        assert client.statuses() == [200, 200]


def test_what_follows_a_request_that_closes_is_not_served() -> None:
    client = connect()
    client.send(post(b"a", b"Connection: close") + GET)
    assert client.statuses() == [200] and client.transport.ended


def test_without_half_close_the_connection_is_closed() -> None:
    client = connect(half_close=False)
    client.send(post(b"a", b"Connection: close"))
    assert client.transport.closed and not client.transport.aborted


def test_after_its_last_answer_a_connection_reads_a_little_then_ends() -> None:
    client = connect()
    client.send(b"garbage\r\n\r\n")
    client.send(b"x" * LINGER_BYTES)
    assert not client.transport.closed
    client.send(b"x")
    assert client.transport.aborted and client.statuses() == [400]


def test_of_a_refused_body_more_is_read_before_the_connection_ends() -> None:
    client = connect()
    client.send(head_of(b"/a", b"Content-Length: 100000000"))
    client.send(b"x" * LINGER_BODY_BYTES)
    assert not client.transport.closed and client.statuses() == [413]
    client.send(b"x")
    assert client.transport.aborted


# Expect


def test_a_client_that_asks_is_told_to_continue_once() -> None:
    client = connect()
    request = post(b"abc", b"Expect: 100-continue")
    client.send(request[:-3])
    assert client.transport.sent == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.transport.sent = b""
    client.send(b"abc")
    assert client.statuses() == [200]


def test_a_client_that_asks_with_a_body_over_the_limit_is_refused() -> None:
    client = connect()
    client.send(b"POST /p HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 100001\r\n\r\n")
    assert client.statuses() == [413]


def test_nobody_is_told_to_continue_before_earlier_answers() -> None:
    client = connect(at_once=False)
    client.send(GET + post(b"abc", b"Expect: 100-continue"))
    for exchange in list(client.application.exchanges):
        client.answer(exchange)
    assert client.statuses() == [200, 200]


# refusals before the body


def head_of(target: bytes, *lines: bytes) -> bytes:
    return b"\r\n".join((b"POST %b HTTP/1.1" % target, b"Host: x", *lines, b"", b""))


@pytest.mark.parametrize(
    "lines",
    [
        (b"Content-Length: 90000",),
        (b"Transfer-Encoding: chunked",),
        (b"Content-Length: 3", b"Expect: 100-continue"),
    ],
    ids=["long", "chunked", "asks"],
)
@pytest.mark.parametrize("step", [0, 1])
def test_a_body_that_is_not_wanted_is_refused_before_it_arrives(lines: tuple[bytes, ...], step: int) -> None:
    client = connect()
    client.send(head_of(b"/full", *lines), step=step)
    (answer,) = client.answers()
    assert (answer.status, answer.headers["retry-after"], answer.headers["connection"]) == (429, "3", "close")
    assert client.transport.ended and not client.application.exchanges and not client.application.refusals
    client.send(b"x" * 1000)
    assert client.statuses() == [429]


def test_a_body_of_which_little_is_missing_is_read_and_the_connection_kept() -> None:
    client = connect()
    client.send(head_of(b"/full", b"Content-Length: 60000") + b"x" * 10)
    assert client.statuses() == [] and not client.application.asked
    client.send(b"x" * 59_990 + GET)
    assert client.statuses() == [200, 200]


def test_a_body_that_is_there_already_is_not_asked_about() -> None:
    client = connect()
    client.send(head_of(b"/full", b"Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\n\r\n")
    assert client.statuses() == [200] and not client.application.asked


def test_a_request_is_asked_about_once_behind_those_before_it() -> None:
    client = connect(at_once=False)
    client.send(GET + head_of(b"/full", b"Content-Length: 90000") + b"x")
    assert client.statuses() == [] and client.application.asked == [(b"/full", 90_000)]
    client.answer(client.application.exchanges[0])
    assert client.statuses() == [200, 429] and client.transport.ended


# shedding


def shedding_server(application: Application, *, max_bytes: int) -> HttpServer:
    return HttpServer(application, replace(LIMITS, max_bytes_in_flight=max_bytes), edge=False)


def tick(server: HttpServer) -> None:
    if server.shedding.tick(len(server.connections)):
        server._step_changed()


def test_a_body_for_which_there_is_no_room_beside_others_is_refused() -> None:
    application = Application()
    server = shedding_server(application, max_bytes=100_000)
    first, second = connect(server=server), connect(server=server)
    first.send(head_of(b"/a", b"Content-Length: 61000") + b"x" * 60_000)
    second.send(head_of(b"/a", b"Content-Length: 40000") + b"x")
    assert (first.statuses(), second.statuses()) == ([], [429]) and second.transport.ended
    assert server.shedding.bytes == 60_000
    first.send(b"x" * 1000)
    assert first.statuses() == [200]
    tick(server)
    assert server.shedding.bytes == 0


def test_a_chunked_body_counts_as_it_comes() -> None:
    application = Application()
    server = shedding_server(application, max_bytes=100_000)
    first, second = connect(server=server), connect(server=server)
    first.send(head_of(b"/a", b"Content-Length: 61000") + b"x" * 60_000)
    second.send(head_of(b"/a", b"Transfer-Encoding: chunked") + b"8000\r\n" + b"x" * 20_000)
    assert second.statuses() == [] and server.shedding.bytes == 80_000
    second.send(b"x" * 12_000)
    assert second.statuses() == [429] and server.shedding.bytes == 60_000


@pytest.mark.parametrize("ends", ["lost", "refused"])
def test_a_body_that_never_comes_no_longer_counts(ends: str) -> None:
    application = Application()
    server = shedding_server(application, max_bytes=100_000)
    client = connect(server=server)
    client.send(head_of(b"/a", b"Content-Length: 60000") + b"x" * 100)
    assert server.shedding.bytes == 100
    if ends == "lost":
        client.connection.connection_lost(None)
    else:
        client.connection.sweep(last(client) + 61)
        assert client.statuses() == [408]
    assert server.shedding.bytes == 0


def test_at_the_first_step_answers_close_their_connections_and_later_no_more() -> None:
    application = Application()
    server = shedding_server(application, max_bytes=100_000)
    tick(server)
    one, two = connect(server=server), connect(server=server)
    for client in (one, one, two):
        client.send(GET)
    application.bytes = 85_000
    tick(server)
    for client in (one, two):
        client.send(GET)
        assert client.answers()[-1].headers["connection"] == "close" and client.transport.ended
        client.connection.connection_lost(None)
    application.bytes = 0
    tick(server)
    client = connect(server=server)
    client.send(GET)
    client.send(GET)
    assert client.statuses() == [200, 200] and not client.transport.ended


def test_while_something_is_shed_idle_connections_are_closed_soon() -> None:
    application = Application()
    server = shedding_server(application, max_bytes=100_000)
    client = connect(server=server)
    application.bytes = 85_000
    tick(server)
    client.connection.sweep(last(client) + 2)
    assert client.transport.closed


def test_at_the_last_step_connections_are_refused() -> None:
    application = Application()
    server = shedding_server(application, max_bytes=100_000)
    application.bytes = 96_000
    tick(server)
    client = connect(server=server)
    assert [answer.message for answer in client.answers()] == [
        "the server has no file descriptors or memory left for more connections"
    ]


# silence


def last(client: Client) -> float:
    return client.connection.last_activity


@pytest.mark.parametrize("begun", [b"GET /a", b"GET /a HTTP/1.1\r\nHost:", b"\r\n"])
def test_a_head_that_does_not_arrive_is_408(begun: bytes) -> None:
    client = connect()
    client.send(begun)
    client.connection.sweep(last(client) + 9)
    assert client.statuses() == []
    client.connection.sweep(last(client) + 11)
    assert client.statuses() == [408] and client.transport.ended


def test_a_body_that_does_not_arrive_is_408() -> None:
    client = connect()
    client.send(post(b"abc")[:-1])
    client.connection.sweep(last(client) + 59)
    assert client.statuses() == []
    client.connection.sweep(last(client) + 61)
    assert client.statuses() == [408]


def drip(client: Client, monkeypatch: pytest.MonkeyPatch, body: bytes, step: int) -> None:
    """So many bytes every 9 seconds, until the server says something."""
    now = last(client)
    for at in range(0, len(body), step):
        now += 9
        monkeypatch.setattr("mms.http.connection.monotonic", lambda now=now: now)
        client.send(body[at : at + step])
        client.connection.sweep(now)
        if client.transport.sent:
            break


def test_a_body_that_drips_in_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect()
    head, _, body = post(b"a" * 1000).partition(b"\r\n\r\n")
    client.send(head + b"\r\n\r\n")
    drip(client, monkeypatch, body, 1)
    assert client.statuses() == [408]
    assert "brought less than 64 KiB of its body within 60 s" in client.answers()[0].body.decode()


def test_a_large_body_that_comes_steadily_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(server=HttpServer(Application(True), replace(LIMITS, max_request_size=1 << 20), edge=False))
    head, _, body = post(b"a" * 300_000).partition(b"\r\n\r\n")
    client.send(head + b"\r\n\r\n")
    drip(client, monkeypatch, body, 12_000)  # 64 KiB in 54 s
    assert client.statuses() == [200]


def test_a_body_has_its_time_from_when_the_request_before_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(at_once=False)
    client.send(GET + post(b"abc")[:-1])
    client.connection.sweep(last(client) + 100)
    client.answer(client.application.exchanges[0])
    client.connection.sweep(last(client) + 150)
    assert client.statuses() == [200]
    client.connection.sweep(last(client) + 161)
    assert client.statuses() == [200, 408]


def test_a_body_is_not_late_because_of_what_the_client_had_to_read_first(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect()
    client.send(post(b"abc")[:-1])
    client.connection.pause_writing()
    later = last(client) + 100
    monkeypatch.setattr("mms.http.connection.monotonic", lambda: later)
    client.connection.resume_writing()
    client.connection.sweep(last(client) + 59)
    assert client.statuses() == []


def test_a_connection_that_closes_is_cut_in_the_end_though_it_was_not_read_any_more() -> None:
    client = connect(at_once=False)
    client.send(GET * 20)
    assert not client.transport.reading
    client.connection.cut(client.application.exchanges[0])
    client.connection.sweep(last(client) + 136)
    assert client.transport.aborted


def test_a_head_that_drips_in_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect()
    now = last(client)
    for byte in GET[:-1]:
        now += 9
        monkeypatch.setattr("mms.http.connection.monotonic", lambda now=now: now)
        client.send(bytes([byte]))
        client.connection.sweep(now)
        if client.transport.sent:
            break
    assert client.statuses() == [408]


def test_an_idle_connection_is_closed_quietly() -> None:
    client = connect()
    client.send(GET)
    client.connection.sweep(last(client) + 74)
    assert not client.transport.closed
    client.connection.sweep(last(client) + 76)
    assert client.transport.closed and client.statuses() == [200]


def test_behind_the_edge_idle_connections_stay_open() -> None:
    client = connect(edge=True)
    client.connection.sweep(last(client) + 10_000)
    assert not client.transport.closed


def test_a_client_that_waits_for_its_answer_is_not_silent() -> None:
    client = connect(at_once=False)
    client.send(GET)
    client.connection.sweep(last(client) + 10_000)
    assert client.statuses() == [] and not client.transport.closed


def test_a_client_that_does_not_read_is_cut() -> None:
    client = connect(at_once=False)
    client.send(GET)
    client.connection.pause_writing()
    assert not client.transport.reading
    client.connection.sweep(last(client) + 61)
    assert client.transport.aborted


def test_a_client_may_take_its_time_to_read_what_took_long_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(at_once=False)
    client.send(GET)
    answered = last(client) + 100
    monkeypatch.setattr("mms.http.connection.monotonic", lambda: answered)
    client.connection.pause_writing()
    client.connection.sweep(answered + 59)
    assert not client.transport.aborted


@pytest.mark.parametrize("ends", [b"", b"Connection: close"], ids=["stays", "closes"])
@pytest.mark.parametrize(("step", "aborted"), [(LEAST_READ, False), (LEAST_READ // 70, True)], ids=["steady", "drips"])
def test_a_client_that_reads_steadily_is_not_cut_and_one_that_drips_is(ends: bytes, step: int, aborted: bool) -> None:
    client = connect()
    client.send(post(b"a", *([ends] if ends else [])))
    client.transport.unsent = 100 << 20
    client.connection.pause_writing()
    for second in range(1, 200):
        client.transport.unsent -= step
        client.connection.sweep(last(client) + second)
    assert client.transport.aborted is aborted


def test_the_rest_of_a_last_answer_may_be_read_for_longer_than_a_connection_lingers() -> None:
    client = connect()
    client.send(post(b"a", b"Connection: close"))
    client.transport.unsent = 1000
    client.connection.sweep(last(client) + 59)
    client.transport.unsent = 0
    client.connection.sweep(last(client) + 59.9)
    assert not client.transport.aborted
    client.connection.sweep(last(client) + 61)
    assert client.transport.aborted


def test_a_client_that_never_takes_the_rest_is_cut_after_its_connection_was_closed() -> None:
    client = connect()
    client.send(GET)
    client.transport.unsent = 1000
    client.connection.sweep(last(client) + 76)
    client.connection.sweep(last(client) + 134)
    assert client.transport.closed and not client.transport.aborted
    client.connection.sweep(last(client) + 136)
    assert client.transport.aborted


def test_a_client_that_reads_again_is_read_again() -> None:
    client = connect()
    client.connection.pause_writing()
    client.connection.resume_writing()
    assert client.transport.reading


def test_a_connection_that_lingers_is_cut_after_a_second() -> None:
    client = connect()
    client.send(b"garbage\r\n\r\n")
    client.connection.sweep(last(client) + 2)
    assert client.transport.aborted


def test_a_client_that_goes_on_sending_does_not_make_its_connection_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect()
    client.send(b"garbage\r\n\r\n")
    later = last(client) + 2
    monkeypatch.setattr("mms.http.connection.monotonic", lambda: later)
    client.send(b"x")
    client.connection.sweep(later)
    assert client.transport.aborted


# endings


def test_requests_that_arrive_in_one_turn_go_to_the_application_together() -> None:
    application = Application()
    server = HttpServer(application, LIMITS, edge=False)
    clients = [connect(server=server) for _ in range(3)]
    for client in clients:
        client.connection.data_received(GET)
    assert not application.exchanges
    turn(clients[0].connection)
    assert [exchange.connection for exchange in application.exchanges] == [client.connection for client in clients]
    assert [client.statuses() for client in clients] == [[200]] * 3


def test_a_client_that_leaves_within_the_turn_is_not_worked_for() -> None:
    application = Application()
    server = HttpServer(application, LIMITS, edge=False)
    one, other = connect(server=server), connect(server=server)
    for client in (one, other):
        client.connection.data_received(GET)
    one.connection.connection_lost(None)
    turn(other.connection)
    assert [exchange.connection for exchange in application.exchanges] == [other.connection]


def test_a_fault_of_the_application_leaves_nobody_waiting() -> None:
    class Faulty(Application):
        def handle(self, exchanges: list[Exchange]) -> None:
            super().handle(exchanges[:1])
            raise RuntimeError("of ours")

    server = HttpServer(Faulty(), LIMITS, edge=False)
    one, other = connect(server=server), connect(server=server)
    for client in (one, other):
        client.connection.data_received(GET)
    turn(one.connection)
    assert one.statuses() == [200] and not one.transport.closed
    assert other.transport.aborted


def test_when_the_client_leaves_its_work_is_cancelled() -> None:
    client = connect(at_once=False)
    client.send(GET * 2)
    client.answer(client.application.exchanges[1])
    client.connection.connection_lost(None)
    assert client.application.works[0].cancelled and not client.application.works[1].cancelled
    client.answer(client.application.exchanges[0])
    assert client.transport.sent == b""


def test_a_client_that_closes_its_half_still_gets_its_answers() -> None:
    client = connect(at_once=False)
    client.send(GET * 2)
    assert client.connection.eof_received()
    for exchange in list(client.application.exchanges):
        client.answer(exchange)
    assert client.statuses() == [200, 200] and client.transport.ended


@pytest.mark.parametrize(("data", "edge"), [(b"", False), (b"GET /a", False), (GET, True)])
def test_the_end_of_the_stream_is_goodbye_when_nothing_is_owed_or_nginx_says_it(data: bytes, edge: bool) -> None:
    client = connect(at_once=False, edge=edge)
    if data:
        client.send(data)
    assert not client.connection.eof_received()


def test_draining_closes_an_idle_connection_at_once() -> None:
    client = connect()
    client.send(GET)
    client.connection.drain()
    assert client.transport.closed


def test_draining_waits_for_the_requests_in_hand_and_says_close() -> None:
    client = connect(at_once=False)
    client.send(GET * 2)
    drained = client.connection.drain()
    assert not client.transport.closed
    for exchange in list(client.application.exchanges):
        client.answer(exchange)
    first, second = client.answers()
    assert "connection" not in first.headers and second.headers["connection"] == "close"
    assert client.transport.closed and not drained.done(), "the answers may still be on their way"
    client.connection.connection_lost(None)
    assert drained.done()


def test_draining_waits_for_a_request_that_is_arriving() -> None:
    client = connect()
    client.send(GET[:-2])
    client.connection.drain()
    assert not client.transport.closed
    client.send(GET[-2:])
    assert client.answers()[0].headers["connection"] == "close" and client.transport.closed


def test_draining_twice_changes_nothing() -> None:
    client = connect(at_once=False)
    client.send(GET)
    client.connection.drain()
    client.connection.drain()
    client.answer(client.application.exchanges[0])
    assert client.statuses() == [200]


def test_an_error_that_names_a_file_that_is_not_utf8_is_told() -> None:
    _, _, body = error_response(BadRequestError("cannot load \udcff"))
    assert body == b'{"code":400,"type":"BadRequestException","message":"cannot load ?"}\n'


def test_an_error_of_the_application_is_told_as_json() -> None:
    client = connect(at_once=False)
    client.send(GET)
    client.application.exchanges[0].fail(MMSError("it broke", status=507))
    (answer,) = client.answers()
    assert answer.status == 507
    assert json.loads(answer.body) == {"code": 507, "type": "InternalServerException", "message": "it broke"}


def test_the_parser_of_a_connection_that_has_ended_is_freed_without_the_collector() -> None:
    client = connect()
    client.send(GET)
    parser = client.connection._reader._parser
    client.connection.connection_lost(None)
    assert sys.getrefcount(parser) == 2  # this function's and its own argument


@pytest.mark.parametrize("streams", [False, True])
def test_a_request_whose_client_has_left_is_freed_without_the_collector(streams: bool) -> None:
    client = connect(at_once=False)
    client.send(GET)
    exchange = client.application.exchanges.pop()
    facts = RequestFacts("", "", b"", False, [])
    exchange.work = job = Job(1, facts, b"", exchange.parts, 0, exchange, 0.0)
    if streams:
        job.caller = exchange.begin(200, b"content-type: text/plain\r\n")
        job.caller.chunk(b"a")
    client.connection.connection_lost(None)
    assert job.settled and exchange.stream is None
    assert sys.getrefcount(job) == 2
