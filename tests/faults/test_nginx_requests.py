"""What nginx makes of the requests that front ends disagree about: refused, or one request that all read alike (F92).

The real nginx with the real configuration, in front of the front end's own HTTP server, which keeps what it was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import h11
import pytest
from mms_nginx import Listener, Nginx, edge_user, find_nginx, render

from mms.errors import MMSError
from mms.http.connection import Connection
from mms.http.exchange import Exchange
from mms.http.limits import Limits
from mms.http.listener import HttpServer, bind
from mms.http.request import Head
from tests.odd_requests import ACCEPTED, AFTER, REFUSED
from tests.odd_requests import field as with_field
from tests.servers import free_ports, needs_nginx, scratch

pytestmark = needs_nginx
MAX_REQUEST_SIZE = 2 << 20
LIMITS = Limits(
    max_request_size=MAX_REQUEST_SIZE, max_connections=100, header_timeout=5, body_timeout=5, keepalive_timeout=75
)
WHOLE = 1 << 30
LONG = 10_000  # bytes: what is longer is not sent byte by byte
TIMEOUT = 10.0


@dataclass(frozen=True)
class Request:
    method: bytes
    target: bytes
    body: bytes = b""


PING = Request(b"GET", b"/ping")  # AFTER, as it arrives


def echo(body: bytes) -> Request:
    return Request(b"POST", b"/predictions/echo", body)


# What the front end alone refuses, and nginx makes right: what arrives then. What is in neither table, nginx refuses.
MADE_RIGHT = {
    "lf-after-request-line": PING,
    "lf-after-header": PING,
    "lf-everywhere": PING,
    "cr-cr-lf-after-header": PING,
    "chunk-lf-only": echo(b"abc"),  # refused from nginx 1.29.4 on
    "chunk-trailing-space": echo(b"abc"),
    "chunk-40-zeros": echo(b"abc"),
    "chunk-extensions-too-long": echo(b"abc"),
    "chunk-many-extensions": echo(b"x" * 200),
    "trailers-too-long": echo(b""),
    "trailer-length": echo(b"abc"),
    "trailer-coding": echo(b"abc"),
    "high-byte-in-name": echo(b""),
    "no-colon": echo(b""),
    "no-version": PING,
    "http-1.2": PING,
    "http-1.1000": PING,
    "two-spaces-before-target": PING,
    "two-spaces-after-target": PING,
    "three-leading-crlf": PING,
    "leading-lf": PING,
    "expect-unknown": echo(b"abc"),
}
LEFT_TO_THE_FRONT_END = {
    "control-in-value",
    "bell-in-value",
    "del-in-value",
    "type-twice",
    "method-unknown",
    "high-byte-in-target",
    "fragment",
    "headers-too-many",
}
ONLY_EMPTY_LINES = {"leading-crlf-without-end"}
REFUSED_BY_NGINX_ALONE = {"host-empty", "tabs-around-value"}


@dataclass
class Seen:
    """The front end's application: what it was asked, what was refused before, and the bytes of both."""

    requests: list[Request] = field(default_factory=list)
    refusals: list[MMSError] = field(default_factory=list)
    raw: bytes = b""

    def handle(self, exchanges: list[Exchange]) -> None:
        for exchange in exchanges:
            head = exchange.head
            self.requests.append(Request(head.method, head.target, b"".join(exchange.parts)))
            exchange.answer(200, b"content-type: text/plain\r\n", b"fine\n")

    def objection(self, head: Head, size: int) -> MMSError | None:
        return None

    def held(self) -> int:
        return 0

    def refused(self, error: MMSError) -> None:
        self.refusals.append(error)

    def forget(self) -> None:
        self.requests, self.refusals, self.raw = [], [], b""


class Listened(Connection):
    """Keeps the bytes, too."""

    __slots__ = ()
    seen: ClassVar[Seen]

    def data_received(self, data: bytes) -> None:
        self.seen.raw += data
        super().data_received(data)


class Recording(HttpServer):
    """Its connections are listened to."""

    def __init__(self, seen: Seen) -> None:
        super().__init__(seen, LIMITS, edge=True)
        Listened.seen = seen

    def _connect(self) -> Connection:
        connection = super()._connect()
        connection.__class__ = Listened
        return connection


class Edge:
    """nginx, and behind it the front end's HTTP server in a thread."""

    def __init__(self, folder: Path) -> None:
        self.seen = Seen()
        (self.port,) = free_ports(1)
        self._socket = folder / "front.sock"
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        user = edge_user()
        self._group = user[1] if user else None
        listener = Listener("inference", f"127.0.0.1:{self.port}", (self._socket,))
        text = render(
            [listener], directory=folder / "nginx", max_request_size=MAX_REQUEST_SIZE, user=user[0] if user else None,
            response_timeout=5.0, body_timeout=5.0, header_timeout=5.0, log_level="info",
        )  # fmt: skip
        self._nginx = Nginx(find_nginx("nginx") or "", folder / "nginx", text)

    def __enter__(self) -> Edge:
        self._thread.start()
        assert self._up.wait(5)
        self._nginx.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._nginx.stop(1.0)
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)
        self._loop.close()

    async def _serve(self) -> None:
        server = Recording(self.seen)
        await server.start(bind(f"unix:{self._socket}", group=self._group))
        self._up.set()
        await self._stop.wait()
        await server.drain(0)

    def talk(self, data: bytes, step: int) -> list[int]:
        """The statuses that a client gets who sends this and leaves when it is told that the connection ends."""
        self.seen.forget()
        received = bytearray()
        with (
            socket.create_connection(("127.0.0.1", self.port), TIMEOUT) as client,
            contextlib.suppress(ConnectionError),
        ):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(ConnectionError):
                for at in range(0, len(data), step):
                    client.sendall(data[at : at + step])
            while piece := client.recv(65536):
                received += piece
                if b"\r\nConnection: close\r\n" in received:
                    with contextlib.suppress(OSError):  # nginx may be gone, or wait for the rest of what it refused
                        client.shutdown(socket.SHUT_WR)
        assert b"<html" not in received
        return [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d+)", received, re.MULTILINE)]


def read_strictly(data: bytes) -> list[Request]:
    """The requests in what the front end was sent, by another parser; each has one Host and at most one length."""
    found = []
    while data:
        server = h11.Connection(h11.SERVER)
        server.receive_data(data)
        head = server.next_event()
        assert isinstance(head, h11.Request), head
        names = [bytes(name) for name, _ in head.headers]
        assert names.count(b"host") == 1 and b"transfer-encoding" not in names and names.count(b"content-length") <= 1
        body = b""
        while isinstance(event := server.next_event(), h11.Data):
            body += bytes(event.data)
        assert isinstance(event, h11.EndOfMessage), event
        found.append(Request(bytes(head.method), bytes(head.target), body))
        data = server.trailing_data[0]
    return found


@pytest.fixture(scope="module")
def edge() -> Iterator[Edge]:
    with scratch() as folder, Edge(folder) as running:
        yield running


def cases(table: Iterable[tuple[str, bytes]]) -> pytest.MarkDecorator:
    """Each whole and, unless it is long, byte by byte."""
    parameters = [
        pytest.param(data, step, name, id=f"{name}-{'bytewise' if step == 1 else 'whole'}")
        for name, data in table
        for step in (WHOLE, 1)
        if step == WHOLE or len(data) < LONG
    ]
    return pytest.mark.parametrize(("data", "step", "name"), parameters)


def assert_refused(statuses: list[int], step: int) -> None:
    """nginx does not wait for a client that goes on sending, whose kernel then throws the answer away."""
    assert all(400 <= status < 600 for status in statuses)
    assert len(statuses) == 1 or (step == 1 and not statuses)


@cases((name, data) for name, (data, _) in REFUSED.items())
def test_f92_what_the_front_end_refuses_nginx_refuses_or_makes_right(
    edge: Edge, data: bytes, step: int, name: str
) -> None:
    statuses = edge.talk(data + AFTER, step)
    seen = edge.seen
    if name in LEFT_TO_THE_FRONT_END:
        assert (seen.requests, [error.status for error in seen.refusals]) == ([PING], statuses[:1])
        assert statuses[0] in REFUSED[name][1] and statuses[1:] == [200]
    elif name in ONLY_EMPTY_LINES:
        assert (seen.requests, statuses) == ([PING], [200])
    elif name in MADE_RIGHT and seen.raw:  # another version of nginx may refuse it
        assert (seen.requests[0], seen.refusals) == (MADE_RIGHT[name], [])
        # HTTP/0.9 has neither a status nor a second request
        assert (seen.requests[1:], statuses) == (([], []) if name == "no-version" else ([PING], [200, 200]))
        assert read_strictly(seen.raw) == seen.requests
    else:
        assert seen.raw == b""
        assert_refused(statuses, step)


@cases((name, data) for name, (data, _) in ACCEPTED.items() if name not in REFUSED_BY_NGINX_ALONE)
def test_f92_what_the_front_end_accepts_arrives_as_one_request(edge: Edge, data: bytes, step: int, name: str) -> None:
    assert edge.talk(data + AFTER, step) == [200, 200]
    method = b"GET" if name == "get-with-body" else b"POST"
    query = b"?a=b?c&d=/e" if name == "query" else b""
    assert edge.seen.requests == [Request(method, b"/predictions/echo" + query, ACCEPTED[name][1]), PING]
    assert read_strictly(edge.seen.raw) == edge.seen.requests


@cases((name, ACCEPTED[name][0]) for name in sorted(REFUSED_BY_NGINX_ALONE))
def test_f92_what_nginx_alone_refuses_does_not_arrive(edge: Edge, data: bytes, step: int, name: str) -> None:
    assert_refused(edge.talk(data + AFTER, step), step)
    assert edge.seen.raw == b""


SMUGGLED = b"GET /predictions/other HTTP/1.1\r\nHost: a\r\n\r\n"
LENGTH = b"Content-Length: %d" % len(SMUGGLED)


@cases(
    {
        "h2c": with_field(b"Connection: Upgrade\r\nUpgrade: h2c\r\n" + LENGTH, SMUGGLED),
        "websocket": with_field(b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + LENGTH, SMUGGLED),
        "connection-names-length": with_field(b"Connection: Content-Length\r\n" + LENGTH, SMUGGLED),
        "keep-alive": with_field(b"Connection: keep-alive\r\n" + LENGTH, SMUGGLED),
    }.items()
)
def test_f92_what_a_client_says_of_its_connection_does_not_arrive(
    edge: Edge, data: bytes, step: int, name: str
) -> None:
    assert edge.talk(data + AFTER, step) == [200, 200]
    assert edge.seen.requests == [echo(SMUGGLED), PING]
    assert b"upgrade" not in edge.seen.raw.lower() and b"connection:" not in edge.seen.raw.lower()


def test_f92_nothing_arrives_after_connection_close(edge: Edge) -> None:
    assert edge.talk(with_field(b"Connection: close\r\nContent-Length: 3") + AFTER, WHOLE) == [200]
    assert edge.seen.requests == [echo(b"abc")]


def test_f92_pipelined_requests_arrive_one_by_one_and_in_order(edge: Edge) -> None:
    bodies = [b"%03d" % number for number in range(100)]
    data = b"".join(with_field(b"Content-Length: 3", body) for body in bodies)
    assert edge.talk(data + AFTER, WHOLE) == [200] * 101
    assert edge.seen.requests == [*map(echo, bodies), PING]
    assert read_strictly(edge.seen.raw) == edge.seen.requests


def test_f92_names_with_an_underscore_and_trailers_do_not_arrive(edge: Edge) -> None:
    end = b"0\r\nX-User: root\r\nX-Late: 1\r\n\r\n"
    assert (
        edge.talk(with_field(b"X_User: root\r\nX-User: me\r\nTransfer-Encoding: chunked", end) + AFTER, WHOLE)
        == [200] * 2
    )
    assert b"root" not in edge.seen.raw and b"X-User: me\r\n" in edge.seen.raw
