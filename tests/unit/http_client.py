"""The other ends of a connection: a fake transport, an application that echoes, a client that sends. No sockets."""

from __future__ import annotations

import asyncio
import atexit
import json
from dataclasses import dataclass, field

from mms.errors import MMSError, NotFoundError, QueueFullError
from mms.http.connection import Connection
from mms.http.exchange import Exchange
from mms.http.limits import Limits
from mms.http.listener import HttpServer
from mms.http.request import Head

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


def head_of(target: bytes, *lines: bytes) -> bytes:
    return b"\r\n".join((b"POST %b HTTP/1.1" % target, b"Host: x", *lines, b"", b""))


def last(client: Client) -> float:
    return client.connection.last_activity
