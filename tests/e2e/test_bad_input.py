"""Odd and hostile bytes at the inference port without nginx: one wanted verdict each, whole and byte by byte (F92).

The cases are those that front ends are known to disagree about. A refusal answers what came before it, is JSON, says
`Connection: close` and closes; an accepted request leaves the connection in step, which the next request shows.
"""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from tests.asking import digest
from tests.conftest import MakeArchive, MakeGate
from tests.gates import Gate
from tests.odd_requests import ACCEPTED, AFTER, REFUSED, Answer, answers, chunks, field, length
from tests.servers import Server, needs_nginx, server
from tests.waiting import eventually

TIMEOUT = 10.0  # nginx lingers up to 5 s on a refused body
REGISTRATION = b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
RESET = b"\1\0\0\0\0\0\0\0"  # struct linger: close with RST


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
def test_f92_s8_refused(direct: Server, name: str) -> None:
    data, statuses = REFUSED[name]
    assert_refused(talk(direct, data), statuses)


@pytest.mark.parametrize("name", cases("bytewise"))
def test_f92_s8_refused_byte_by_byte(direct: Server, name: str) -> None:
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
def test_f92_s8_accepted(direct: Server, name: str, bytewise: bool) -> None:
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


@pytest.mark.parametrize(
    "data",
    [
        b"GET /models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer \x01\r\n\r\n",
        b"GET /models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /models HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        REGISTRATION + b"Content-Length: 9\r\n\r\n{",
        REGISTRATION + b"Content-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
    ],
    ids=["header", "hosts", "long", "half", "gzip"],
)
def test_s16_what_is_no_request_at_the_other_ports_leaves_no_trace_in_the_log(direct: Server, data: bytes) -> None:
    before = len(direct.output)
    for place in (direct.management, direct.metrics):
        host, _, port = place.rpartition(":")
        with socket.create_connection((host, int(port)), TIMEOUT) as sock:
            send(sock, data)
            with contextlib.suppress(OSError):  # refused and closed already
                sock.shutdown(socket.SHUT_WR)
            receive(sock)
    assert direct.manage("GET", "/models").status == 200
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


def test_s9_a_body_over_the_limit_is_413_although_it_is_sent_whole(make_archive: MakeArchive) -> None:
    """Without nginx: the refusal must not be lost because the client is still sending."""
    with server(make_archive("echo"), max_request_size="2MiB") as running:
        for _ in range(20):
            assert running.predict("echo", b"x" * ((2 << 20) + 1)).status == 413
