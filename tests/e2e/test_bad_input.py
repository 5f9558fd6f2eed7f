"""Odd and hostile bytes at the inference port without nginx: one wanted verdict each, whole and byte by byte (F92).

The cases are those that front ends are known to disagree about. A refusal answers what came before it, is JSON, says
`Connection: close` and closes; an accepted request leaves the connection in step, which the next request shows.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from dataclasses import dataclass
from typing import Any

import h11
import pytest

from tests.conftest import Gate, MakeArchive, MakeGate, Server, digest, eventually, needs_nginx, server

POST = b"POST /predictions/echo HTTP/1.1\r\n"
HOST = b"Host: a\r\n"
CHUNKED = POST + HOST + b"Transfer-Encoding: chunked\r\n"
AFTER = b"GET /ping HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
TIMEOUT = 10.0  # nginx lingers up to 5 s on a refused body
RESET = b"\1\0\0\0\0\0\0\0"  # struct linger: close with RST


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def field(line: bytes, body: bytes = b"abc") -> bytes:
    """A request with one more header line; its length is given unless the line does."""
    return POST + HOST + line + b"\r\n\r\n" + body


def length(value: bytes, body: bytes = b"abc") -> bytes:
    return field(b"Content-Length:" + value, body)


def coding(value: bytes, body: bytes = b"3\r\nabc\r\n0\r\n\r\n") -> bytes:
    return field(b"Transfer-Encoding:" + value, body)


def chunks(body: bytes) -> bytes:
    return CHUNKED + b"\r\n" + body


def line(text: bytes) -> bytes:
    return text + b"\r\nHost: a\r\n\r\n"


END = b"0\r\n\r\n"

REFUSED: dict[str, tuple[bytes, set[int]]] = {
    "length-then-chunked": (field(b"Content-Length: 3\r\nTransfer-Encoding: chunked", b"3\r\nabc\r\n" + END), {400}),
    "chunked-then-length": (field(b"Transfer-Encoding: chunked\r\nContent-Length: 3", b"3\r\nabc\r\n" + END), {400}),
    "length-twice-same": (field(b"Content-Length: 3\r\nContent-Length: 3"), {400}),
    "length-twice-different": (field(b"Content-Length: 3\r\nContent-Length: 4"), {400}),
    "length-list": (length(b" 3, 3"), {400}),
    "length-plus": (length(b" +3"), {400}),
    "length-minus": (length(b" -1"), {400}),
    "length-hex": (length(b" 0x3"), {400}),
    "length-space-inside": (length(b" 3 3"), {400}),
    "length-empty": (length(b""), {400}),
    "length-blank": (length(b"  "), {400}),
    "length-underscore": (length(b" 1_0"), {400}),
    "length-2^64": (length(b" 18446744073709551616"), {400}),
    "length-2^64-1": (length(b" 18446744073709551615"), {413}),
    "length-over-limit": (length(b" 2097153"), {413}),
    "coding-xchunked": (coding(b" xchunked"), {400, 501}),
    "coding-identity": (coding(b" identity"), {400, 501}),
    "coding-chunked-identity": (coding(b" chunked, identity"), {400}),
    "coding-chunked-chunked": (coding(b" chunked, chunked"), {400}),
    "coding-twice": (field(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b"3\r\nabc\r\n" + END), {400}),
    "coding-parameter": (coding(b" chunked;q=1"), {400, 501}),
    "coding-vertical-tab": (coding(b" \x0bchunked"), {400}),
    "coding-space-before-colon": (field(b"Transfer-Encoding : chunked", b"3\r\nabc\r\n" + END), {400}),
    "coding-folded": (coding(b"\r\n chunked"), {400}),
    "coding-identity-chunked": (coding(b" identity, chunked"), {501}),
    "coding-gzip-chunked": (coding(b" gzip, chunked"), {501}),
    "coding-in-http-1.0": (CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r\n3\r\nabc\r\n" + END, {400}),
    "lf-after-request-line": (b"GET /ping HTTP/1.1\nHost: a\r\n\r\n", {400}),
    "lf-after-header": (b"GET /ping HTTP/1.1\r\nHost: a\n\r\n", {400}),
    "lf-everywhere": (b"GET /ping HTTP/1.1\nHost: a\n\n", {400}),
    "cr-after-request-line": (b"GET /ping HTTP/1.1\rHost: a\r\n\r\n", {400}),
    "cr-in-header": (b"GET /ping HTTP/1.1\r\nHost: a\rX: b\r\n\r\n", {400}),
    "cr-cr-lf": (b"GET /ping HTTP/1.1\r\r\nHost: a\r\n\r\n", {400}),
    "cr-cr-lf-after-header": (b"GET /ping HTTP/1.1\r\nHost: a\r\r\n\r\n", {400}),
    "folded-header": (b"GET /ping HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n", {400}),
    "space-before-first-header": (b"GET /ping HTTP/1.1\r\n Host: a\r\n\r\n", {400}),
    "chunk-lf-only": (chunks(b"3\nabc\r\n" + END), {400}),
    "chunk-trailing-space": (chunks(b"3 \r\nabc\r\n" + END), {400}),
    "chunk-0x": (chunks(b"0x3\r\nabc\r\n" + END), {400}),
    "chunk-plus": (chunks(b"+3\r\nabc\r\n" + END), {400}),
    "chunk-empty": (chunks(b"\r\nabc\r\n" + END), {400}),
    "chunk-overflow": (chunks(b"10000000000000003\r\nabc\r\n" + END), {400}),
    "chunk-over-limit": (chunks(b"200001\r\n" + b"x" * 0x200001), {413}),
    "chunk-no-crlf-after-data": (chunks(b"3\r\nabc" + END), {400}),
    "chunk-two-bytes-more": (chunks(b"3\r\nabcde\r\n" + END), {400}),
    "chunk-cr-in-extension": (chunks(b"3;a\rb\r\nabc\r\n" + END), {400}),
    "chunk-lf-in-extension": (chunks(b"3;a\nb\r\nabc\r\n" + END), {400}),
    "chunk-40-zeros": (chunks(b"0" * 40 + b"3\r\nabc\r\n" + END), {400}),
    "chunk-extensions-too-long": (chunks(b"3;" + b"a" * 100_000 + b"\r\nabc\r\n" + END), {400}),
    "chunk-many-extensions": (chunks((b"1;" + b"a" * 500 + b"\r\nx\r\n") * 200 + END), {400}),
    "trailers-too-long": (chunks(b"0\r\n" + b"X: y\r\n" * 20_000 + b"\r\n"), {400}),
    "trailer-length": (chunks(b"3\r\nabc\r\n0\r\nContent-Length: 3\r\n\r\n"), {400}),
    "trailer-coding": (chunks(b"3\r\nabc\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n"), {400}),
    "host-missing": (b"GET /ping HTTP/1.1\r\n\r\n", {400}),
    "host-twice": (b"GET /ping HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", {400}),
    "host-nonsense": (b"GET /ping HTTP/1.1\r\nHost: a b<>\r\n\r\n", {400}),
    "nul-in-value": (field(b"X: a\0b", b""), {400}),
    "control-in-value": (field(b"X: a\x01b", b""), {400}),
    "del-in-value": (field(b"X: a\x7fb", b""), {400}),
    "high-byte-in-name": (field(b"X\xe4: a", b""), {400}),
    "nul-in-name": (field(b"X\0: a", b""), {400}),
    "empty-name": (field(b": a", b""), {400}),
    "space-in-name": (field(b"X Y: a", b""), {400}),
    "no-colon": (field(b"foo", b""), {400}),
    "no-version": (line(b"GET /ping"), {400}),
    "http-0.9": (line(b"GET /ping HTTP/0.9"), {400}),
    "http-2.0": (line(b"GET /ping HTTP/2.0"), {505}),
    "http-1.2": (line(b"GET /ping HTTP/1.2"), {400, 505}),
    "http-lower-case": (line(b"GET /ping http/1.1"), {400}),
    "ice": (line(b"SOURCE / ICE/1.0"), {400}),
    "rtsp": (line(b"OPTIONS * RTSP/1.0"), {400}),
    "http-2-preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 505}),
    "method-lower-case": (line(b"get /ping HTTP/1.1"), {400}),
    "method-unknown": (line(b"BREW /ping HTTP/1.1"), {400, 501}),
    "two-spaces-before-target": (line(b"GET  /ping HTTP/1.1"), {400}),
    "two-spaces-after-target": (line(b"GET /ping  HTTP/1.1"), {400}),
    "tab-in-request-line": (line(b"GET\t/ping HTTP/1.1"), {400}),
    "space-in-target": (line(b"GET /pi ng HTTP/1.1"), {400}),
    "control-in-target": (line(b"GET /pi\x01ng HTTP/1.1"), {400}),
    "high-byte-in-target": (line(b"GET /pi\xe4ng HTTP/1.1"), {400}),
    "fragment": (line(b"GET /ping#x HTTP/1.1"), {400}),
    "authority-form": (line(b"GET a:80 HTTP/1.1"), {400}),
    "star-with-get": (line(b"GET * HTTP/1.1"), {400}),
    "connect": (line(b"CONNECT a:80 HTTP/1.1"), {400, 405}),
    "three-leading-crlf": (b"\r\n\r\n\r\n" + line(b"GET /ping HTTP/1.1"), {400}),
    "leading-crlf-without-end": (b"\r\n" * 5000, {400}),
    "leading-lf": (b"\n" + line(b"GET /ping HTTP/1.1"), {400}),
    "expect-unknown": (field(b"Expect: 200-maybe\r\nContent-Length: 3"), {417}),
    "target-too-long": (line(b"GET /" + b"a" * 9000 + b" HTTP/1.1"), {414}),
    "request-line-without-end": (b"GET /" + b"a" * 20_000, {414}),
    "headers-too-long": (field(b"X: " + b"a" * 40_000, b""), {431}),
    "headers-too-many": (field(b"\r\n".join(b"X%d: a" % number for number in range(200)), b""), {431}),
    "not-http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n", {400}),
}  # fmt: skip

# sha256 of the body that the handler must see
ACCEPTED: dict[str, tuple[bytes, bytes]] = {
    "length-leading-zeros": (length(b" 0003"), b"abc"),
    "length-trailing-space": (length(b" 3 "), b"abc"),
    "length-no-space": (length(b"3"), b"abc"),
    "coding-upper-case": (coding(b" CHUNKED"), b"abc"),
    "underscore-coding": (field(b"Transfer_Encoding: chunked\r\nContent-Length: 3"), b"abc"),
    "chunk-extension": (chunks(b"3;name=value\r\nabc\r\n" + END), b"abc"),
    "chunk-quoted-extension": (chunks(b'3;name="a b"\r\nabc\r\n' + END), b"abc"),
    "chunk-16-digits": (chunks(b"0000000000000003\r\nabc\r\n" + END), b"abc"),
    "chunk-upper-hex": (chunks(b"A\r\n0123456789\r\n" + END), b"0123456789"),
    "chunk-lower-hex": (chunks(b"a\r\n0123456789\r\n" + END), b"0123456789"),
    "chunks-of-one-byte": (chunks(b"1\r\nx\r\n" * 300 + END), b"x" * 300),
    "trailers": (chunks(b"3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n"), b"abc"),
    "high-bytes-in-value": (field(b"X: \xe4\xff\r\nContent-Length: 3"), b"abc"),
    "empty-value": (field(b"X:\r\nContent-Length: 3"), b"abc"),
    "absolute-form": (length(b" 3").replace(b"/pre", b"http://else.where/pre"), b"abc"),
    "one-leading-crlf": (b"\r\n" + length(b" 3"), b"abc"),
    "two-leading-crlf": (b"\r\n\r\n" + length(b" 3"), b"abc"),
    "get-with-body": (length(b" 3").replace(b"POST", b"GET", 1), b"abc"),
    "host-with-port": (length(b" 3").replace(b"Host: a", b"Host: a.b-c:80"), b"abc"),
    "host-ipv6": (length(b" 3").replace(b"Host: a", b"Host: [::1]:80"), b"abc"),
    "host-empty": (length(b" 3").replace(b"Host: a", b"Host:"), b"abc"),
    "header-of-8000": (field(b"X: " + b"a" * 8000 + b"\r\nContent-Length: 3"), b"abc"),
}  # fmt: skip


def cases(kind: str) -> list[str]:
    return [name for name, (data, _) in REFUSED.items() if kind == "whole" or len(data) < 50_000]


def address(running: Server) -> tuple[str, int]:
    host, _, port = running.url.rpartition(":")
    return host, int(port)


def send(sock: socket.socket, data: bytes, *, bytewise: bool = False) -> None:
    """All of it; a server that has refused already may close before it has seen the end."""
    with contextlib.suppress(ConnectionError):
        if not bytewise:
            sock.sendall(data)
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for index in range(len(data)):
            sock.send(data[index : index + 1])


def receive(sock: socket.socket) -> bytes:
    """All there is until the server closes."""
    received = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            received += data
    return bytes(received)


def answers(data: bytes, *, methods: tuple[bytes, ...] = ()) -> list[Answer]:
    """The answers in `data`, read by a strict parser; fails when there is anything else in it."""
    found: list[Answer] = []
    while data:
        method = methods[len(found)] if len(found) < len(methods) else b"GET"
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        body, head = b"", None
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            assert event is not h11.NEED_DATA, f"cut: {data!r}"
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
        assert head is not None
        headers = {bytes(name).decode(): bytes(value).decode() for name, value in head.headers}
        found.append(Answer(head.status_code, headers, body))
        data = client.trailing_data[0]
    return found


def talk(running: Server, data: bytes, *, bytewise: bool = False, methods: tuple[bytes, ...] = ()) -> list[Answer]:
    """Every answer until the server closes, which it must."""
    with socket.create_connection(address(running), TIMEOUT) as sock:
        send(sock, data, bytewise=bytewise)
        return answers(receive(sock), methods=methods)


def assert_refused(found: list[Answer], statuses: set[int]) -> None:
    assert len(found) == 1, found
    (refusal,) = found
    assert refusal.status in statuses, refusal
    assert refusal.json()["code"] == refusal.status
    assert refusal.json()["message"]
    assert refusal.headers["connection"] == "close"


@pytest.mark.parametrize("name", cases("whole"))
def test_f92_refused(direct: Server, name: str) -> None:
    data, statuses = REFUSED[name]
    assert_refused(talk(direct, data), statuses)


@pytest.mark.parametrize("name", cases("bytewise"))
def test_f92_refused_byte_by_byte(direct: Server, name: str) -> None:
    data, statuses = REFUSED[name]
    assert_refused(talk(direct, data, bytewise=True), statuses)


@pytest.mark.parametrize("name", cases("after"))
def test_f90_refused_after_a_good_request(direct: Server, name: str) -> None:
    """The good request is answered first, then the bad one is refused."""
    data, statuses = REFUSED[name]
    found = talk(direct, length(b" 4", b"good") + data)
    assert [found[0].status, found[0].json()["sha256"]] == [200, digest(b"good")]
    assert_refused(found[1:], statuses)


@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "bytewise"])
@pytest.mark.parametrize("name", ACCEPTED)
def test_f92_accepted(direct: Server, name: str, bytewise: bool) -> None:
    data, body = ACCEPTED[name]
    first, second = talk(direct, data + AFTER, bytewise=bytewise)
    assert (first.status, first.json()["sha256"]) == (200, digest(body))
    assert (second.status, second.json()) == (200, {"status": "Healthy"})


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "bytewise"])
def test_f92_an_upgrade_is_refused_or_served_without_it(direct: Server, protocol: bytes, bytewise: bool) -> None:
    """Never a body that is skipped and then read as a request."""
    smuggled = b"GET /predictions/echo HTTP/1.1\r\nHost: a\r\n\r\n"
    data = field(b"Connection: Upgrade\r\nUpgrade: %b\r\nContent-Length: %d" % (protocol, len(smuggled)), smuggled)
    found = talk(direct, data + AFTER, bytewise=bytewise)
    if found[0].status == 200:
        assert found[0].json()["sha256"] == digest(smuggled)
        assert len(found) == 2
    else:
        assert_refused(found, {400})


def test_f92_headers_with_an_underscore_and_trailers_do_not_reach_the_handler(direct: Server) -> None:
    data = field(b"X_User: root\r\nX-User: me\r\nTransfer-Encoding: chunked", b"0\r\nX-User: root\r\nX-Late: 1\r\n\r\n")
    headers = talk(direct, data + AFTER)[0].json()["headers"]
    assert headers["x-user"] == "me"
    assert not {"x_user", "x-late"} & headers.keys()


def test_nothing_is_answered_after_connection_close(direct: Server) -> None:
    found = talk(direct, field(b"Connection: close\r\nContent-Length: 3") + AFTER)
    assert [answer.status for answer in found] == [200]
    assert found[0].headers["connection"] == "close"


def test_http_1_0_closes_after_its_answer(direct: Server) -> None:
    found = talk(direct, b"GET /ping HTTP/1.0\r\n\r\n")
    assert [answer.status for answer in found] == [200]


@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "bytewise"])
def test_a_head_request_gets_no_body(direct: Server, bytewise: bool) -> None:
    data = b"HEAD /ping HTTP/1.1\r\nHost: a\r\n\r\n" + AFTER
    first, second = talk(direct, data, bytewise=bytewise, methods=(b"HEAD",))
    assert (first.status, first.body) == (200, b"")
    assert int(first.headers["content-length"]) == len(second.body)


def test_f91_continue_is_said_only_when_the_body_is_wanted(direct: Server) -> None:
    with socket.create_connection(address(direct), TIMEOUT) as sock:
        sock.sendall(field(b"Expect: 100-continue\r\nContent-Length: 3\r\nConnection: close", b""))
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"abc")
        (answer,) = answers(receive(sock))
    assert answer.json()["sha256"] == digest(b"abc")


def test_f91_a_body_that_is_too_large_is_refused_before_it_is_sent(direct: Server) -> None:
    assert_refused(talk(direct, field(b"Expect: 100-continue\r\nContent-Length: 9999999", b"")), {413})


def test_f89_pipelined_requests_are_answered_in_order(direct: Server) -> None:
    bodies = [b"%d" % number for number in range(1000)]
    requests = b"".join(length(b" %d" % len(body), body) for body in bodies)
    with socket.create_connection(address(direct), TIMEOUT) as sock:
        sender = threading.Thread(target=send, args=(sock, requests + AFTER))
        sender.start()
        found = answers(receive(sock))
        sender.join()
    assert [answer.json()["sha256"] for answer in found[:-1]] == [digest(body) for body in bodies]
    assert found[-1].json() == {"status": "Healthy"}


def test_f86_a_client_may_close_its_half_and_read_its_answer(direct: Server) -> None:
    with socket.create_connection(address(direct), TIMEOUT) as sock:
        sock.sendall(length(b" 3") * 3)
        sock.shutdown(socket.SHUT_WR)
        found = answers(receive(sock))
    assert [answer.json()["sha256"] for answer in found] == [digest(b"abc")] * 3


def test_half_a_request_and_then_the_end_is_no_request(direct: Server) -> None:
    before = direct.metric("mms_requests_total", model="echo")
    with socket.create_connection(address(direct), TIMEOUT) as sock:
        sock.sendall(length(b" 3", b"ab"))
        sock.shutdown(socket.SHUT_WR)
        assert not [answer for answer in answers(receive(sock)) if answer.status == 200]
    assert direct.metric("mms_requests_total", model="echo") == before


def test_f88_a_reset_connection_leaves_no_trace_in_the_log(direct: Server) -> None:
    before = len(direct.output)
    for _ in range(20):
        sock = socket.create_connection(address(direct), TIMEOUT)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        sock.sendall(length(b" 3") * 10)
        sock.close()
    eventually(lambda: direct.metric("mms_connections") == 0)
    assert direct.output[before:] == ""


@pytest.mark.parametrize("edge", ["none", pytest.param("nginx", marks=needs_nginx)])
def test_f87_an_abandoned_request_that_waits_never_runs(
    make_archive: MakeArchive, make_gate: MakeGate, edge: str
) -> None:
    """Without nginx the client resets: its plain end of stream may mean that it still reads its answer (F86)."""
    first, second, third = (make_gate() for _ in range(3))
    with server(make_archive("gate"), edge=edge) as running, contextlib.ExitStack() as stack:
        stack.callback(first.open)
        runs = stack.enter_context(leave_open(running, first))
        eventually(first.begun)
        waits = stack.enter_context(leave_open(running, second))
        eventually(lambda: running.metric("mms_queue_depth", model="gate") == 1)
        for sock in (waits, runs):
            if edge == "none":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            sock.close()
        eventually(lambda: running.metric("mms_queue_depth", model="gate") == 0)
        eventually(lambda: running.metric("mms_requests_cancelled_total", model="gate") == 2)
        first.open()
        third.open()
        assert running.predict("gate", third.body).status == 200
        assert (len(first.begun()), len(second.begun()), len(third.begun())) == (1, 0, 1)


def leave_open(running: Server, gate: Gate) -> socket.socket:
    sock = socket.create_connection(address(running), TIMEOUT)
    sock.sendall(length(b" %d" % len(gate.body), gate.body).replace(b"/echo", b"/gate"))
    return sock


def test_a_slow_client_is_told_and_closed_and_others_are_served(make_archive: MakeArchive) -> None:
    with server(make_archive("echo"), header_timeout=0.3, body_timeout=0.3) as running:
        begun = [b"", b"GET /pi", length(b" 3", b"a"), chunks(b"3\r\na")]
        socks = [socket.create_connection(address(running), TIMEOUT) for _ in begun]
        for sock, data in zip(socks, begun, strict=True):
            sock.sendall(data)
        assert running.predict("echo", b"x").status == 200
        for sock in socks[1:]:
            assert_refused(answers(receive(sock)), {408})
        for sock in socks:
            sock.close()


def test_more_connections_than_allowed_are_refused_in_words(make_archive: MakeArchive) -> None:
    with server(make_archive("echo"), max_connections=4) as running, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection(address(running), TIMEOUT)) for _ in range(5)]
        assert_refused(answers(receive(socks.pop())), {503})
        for sock in socks:
            sock.sendall(AFTER)
            assert [answer.status for answer in answers(receive(sock))] == [200]


@needs_nginx
@pytest.mark.parametrize(
    "name", [name for name in REFUSED if name.startswith(("length-", "coding-", "host-", "nul-", "star-"))]
)
def test_f92_refused_through_nginx(edged: Server, name: str) -> None:
    """nginx refuses it or makes it right; the handler never sees two requests in one."""
    before = edged.metric("mms_requests_total", model="echo")
    data, _ = REFUSED[name]
    received = b""
    with socket.create_connection(address(edged), TIMEOUT) as sock:
        send(sock, data)
        sock.shutdown(socket.SHUT_WR)
        received = receive(sock)
    statuses = [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d+)", received, re.MULTILINE)]
    assert len(statuses) <= 1
    assert all(400 <= status < 600 for status in statuses), received
    assert edged.metric("mms_requests_total", model="echo") == before
    assert b"<html" not in received


def test_a_body_over_the_limit_is_413_although_it_is_sent_whole(make_archive: MakeArchive) -> None:
    """Without nginx: the refusal must not be lost because the client is still sending."""
    with server(make_archive("echo"), max_request_size="2MiB") as running:
        for _ in range(20):
            assert running.predict("echo", b"x" * ((2 << 20) + 1)).status == 413
