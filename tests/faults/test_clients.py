"""Clients that are slow, silent, greedy or hostile: catalogue, section 2.6 (F92 and most of its like: tests/e2e)."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
from collections.abc import Iterator

import psutil
import pytest

from tests.asking import CLIENT_TIMEOUT
from tests.conftest import MakeArchive, MakeGate
from tests.servers import Server, needs_nginx, server
from tests.traffic import Answering
from tests.waiting import eventually

LIMIT = 2 << 20
SLOW = 100
SILENT = 1000
PER_CONNECTION = 64 << 10
HEAD = b"POST /predictions/%b HTTP/1.1\r\nHost: a\r\n%b\r\n\r\n"
CHUNKED = HEAD % (b"echo", b"Transfer-Encoding: chunked")


@pytest.fixture(scope="module")
def running(make_archive: MakeArchive) -> Iterator[Server]:
    """With short limits for slow clients."""
    archives = make_archive("echo"), make_archive("account"), make_archive("rows"), make_archive("big")
    with server(
        *archives, max_request_size="2MiB", header_timeout=0.5, body_timeout=0.5, keepalive_timeout=0.5
    ) as started:
        yield started


def address(port: str) -> tuple[str, int]:
    host, _, number = port.rpartition(":")
    return host, int(number)


def memory(running: Server) -> int:
    return int(psutil.Process(running.pid).memory_info().rss)


@contextlib.contextmanager
def connections(running: Server, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(address(running.url), CLIENT_TIMEOUT)) for _ in range(count)
        ]


def ended(sock: socket.socket) -> bytes:
    """All that comes until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            received += data
    return received


@pytest.mark.parametrize(
    "begun",
    [b"GET /ping HTT", HEAD % (b"echo", b"Content-Length: 1000") + b"x", CHUNKED + b"3e8\r\na"],
    ids=["headers", "body", "chunk"],
)
def test_f84_slow_clients_are_closed_at_the_limit_and_cost_little(running: Server, begun: bytes) -> None:
    before = memory(running)
    with connections(running, SLOW) as socks:
        over = threading.Event()

        def drip() -> None:
            while not over.wait(0.1):
                for sock in socks:
                    with contextlib.suppress(OSError):
                        sock.send(b"x")

        for sock in socks:
            sock.sendall(begun)
        dripping = threading.Thread(target=drip)
        dripping.start()
        assert running.predict("echo", b"x").status == 200
        assert (memory(running) - before) / SLOW < PER_CONNECTION
        statuses = {ended(sock)[:12] for sock in socks}
        over.set()
        dripping.join()
    assert statuses == {b"HTTP/1.1 408"}


@pytest.mark.slow
def test_f84_a_client_that_does_not_read_its_answers_is_cut(running: Server) -> None:
    request = HEAD % (b"echo", b"Content-Length: 0\r\nX-Long: " + b"x" * 7000)
    with connections(running, 1) as (sock,):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(0.2)
        with contextlib.suppress(OSError):
            while True:
                sock.sendall(request)
        eventually(lambda: running.metric("mms_connections") == 0)
    assert running.predict("echo", b"x").status == 200


@pytest.mark.slow
def test_f84_a_client_that_reads_steadily_gets_all_of_a_large_answer(running: Server) -> None:
    """It takes several times body_timeout."""
    pause, size = threading.Event(), 24 << 20
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 << 10)
        sock.settimeout(CLIENT_TIMEOUT)
        sock.connect(address(running.url))
        number = b"%d" % size
        sock.sendall(HEAD % (b"big", b"Connection: close\r\nContent-Length: %d" % len(number)) + number)
        received = 0
        while data := sock.recv(256 << 10):
            received += len(data)
            pause.wait(0.03)
    assert received > size


def test_f84_a_refused_connection_is_not_held_open_by_sending_on(running: Server) -> None:
    with connections(running, 1) as (sock,):
        sock.sendall(b"garbage\r\n\r\n")
        assert ended(sock).startswith(b"HTTP/1.1 400")

        def over() -> bool:
            with contextlib.suppress(OSError):
                sock.send(b"x")
            return running.metric("mms_connections") == 0

        eventually(over)


def test_f85_silent_connections_cost_next_to_nothing_and_are_closed(running: Server) -> None:
    before, main = memory(running), psutil.Process(running.pid)
    with connections(running, SILENT) as socks:
        used = main.cpu_times().user
        assert running.predict("echo", b"x").status == 200
        assert (memory(running) - before) / SILENT < PER_CONNECTION
        for sock in socks:
            assert ended(sock) == b""
        assert main.cpu_times().user - used < 1
    eventually(lambda: running.metric("mms_connections") == 0)


@needs_nginx
def test_f86_behind_nginx_a_client_that_closes_its_half_has_left(
    make_archive: MakeArchive, make_gate: MakeGate
) -> None:
    gate = make_gate()
    with server(make_archive("gate"), edge="nginx") as behind:
        with connections(behind, 1) as (sock,):
            sock.sendall(HEAD % (b"gate", b"Content-Length: %d" % len(gate.body)) + gate.body)
            eventually(gate.begun)
            sock.shutdown(socket.SHUT_WR)
            assert ended(sock) == b""
        eventually(lambda: behind.metric("mms_requests_cancelled_total", model="gate") == 1)
        gate.open()


def endless(piece: bytes) -> Iterator[bytes]:
    while True:
        yield piece * (1 + (65536 // len(piece)))


HUGE = {
    "a body of 1 GiB": (HEAD % (b"echo", b"Content-Length: 1073741824"), b"x", 413),
    "a chunk of 1 GiB": (CHUNKED + b"40000000\r\n", b"x", 413),
    "chunks without end": (CHUNKED, b"1000\r\n" + b"x" * 4096 + b"\r\n", 413),
    "a million headers": (b"GET / HTTP/1.1\r\nHost: a\r\n", b"A: b\r\n", 431),
    "a header without end": (b"GET / HTTP/1.1\r\nHost: a\r\nA: ", b"x", 431),
    "a line without end": (b"GET /", b"x", 414),
    "a chunk extension without end": (CHUNKED + b"3;", b"x", 400),
    "zeros before a chunk size": (CHUNKED, b"0", 400),
    "trailers without end": (CHUNKED + b"0\r\n", b"A: b\r\n", 400),
    "empty lines without end": (b"", b"\r\n", 400),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_f93_what_has_no_end_is_refused_early(running: Server, name: str) -> None:
    """The memory may grow by what the limit allows, no more, although the client never stops."""
    begun, piece, status = HUGE[name]
    before = memory(running)
    with connections(running, 1) as (sock,):
        sock.sendall(begun)
        sock.settimeout(0.2)
        sent = 0
        with contextlib.suppress(OSError):
            for data in endless(piece):
                sent += sock.send(data)
                assert sent < 200 << 20
        sock.settimeout(CLIENT_TIMEOUT)
        answer = ended(sock)
    assert answer.startswith(b"HTTP/1.1 %d" % status) or not answer, answer[:100]
    assert memory(running) - before < LIMIT + (6 << 20)


def test_f93_a_body_in_chunks_of_one_byte_is_read(running: Server) -> None:
    with connections(running, 1) as (sock,):
        sock.sendall(CHUNKED + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [
        (gzip.compress(bytes(LIMIT + 1)), "gzip", 413),
        (gzip.compress(bytes(100 << 20), 1), "gzip", 413),
        (gzip.compress(gzip.compress(bytes(100 << 20), 1)), "gzip, gzip", 400),
    ],
    ids=["just over", "bomb", "double"],
)
def test_f94_a_packed_body_is_bounded_by_what_it_unpacks_to(
    running: Server, body: bytes, encoding: str, status: int
) -> None:
    (pid,) = running.workers("account")
    before = psutil.Process(pid).memory_info().rss
    reply = running.predict("account", body, Content_Encoding=encoding)
    assert reply.status == status
    assert psutil.Process(pid).memory_info().rss - before < 4 * LIMIT
    assert running.workers("account") == [pid]


FORM = "multipart/form-data; boundary=XX"
PART = b'--XX\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n'
MULTIPART = {
    "many parts": PART * (LIMIT // len(PART) - 1) + b"--XX--\r\n",
    "long name": PART.replace(b'"a"', b'"' + b"a" * 1_000_000 + b'"') + b"--XX--\r\n",
    "no end": PART * 10,
    "boundaries only": b"--XX\r\n" * 300_000,
    "quotes": PART.replace(b'"a"', b'"' + b"\\" * 1_000_000) + b"--XX--\r\n",
}


@pytest.mark.parametrize("name", MULTIPART)
def test_f95_a_hostile_form_is_refused_at_once(running: Server, name: str) -> None:
    (pid,) = running.workers("rows")
    used = sum(psutil.Process(pid).cpu_times()[:2])
    assert running.predict("rows", MULTIPART[name], Content_Type=FORM).status == 400
    assert sum(psutil.Process(pid).cpu_times()[:2]) - used < 1
    assert running.workers("rows") == [pid]


JSON = {
    "deep lists": (b"[" * 100_000, 400),
    "deep objects": (b'{"a":' * 100_000, 400),
    "closed deep lists": (b"[" * 100_000 + b"]" * 100_000, 400),
    "long number": (b"1" * 1_900_000, 400),
    "long fraction": (b"0." + b"1" * 1_900_000, 200),
    "huge exponent": (b"1e999999999", 400),
    "keys twice": (b'{"a": 1, "a": 2}', 200),
    "half a surrogate": (b'"\\ud800"', 400),
    "many keys": (json.dumps({f"k{number}": 0 for number in range(100_000)}).encode(), 200),
}


@pytest.mark.parametrize("name", JSON)
def test_f96_hostile_json_is_read_or_refused_at_once(running: Server, name: str) -> None:
    body, status = JSON[name]
    (pid,) = running.workers("account")
    used = sum(psutil.Process(pid).cpu_times()[:2])
    assert running.predict("account", body, Content_Type="application/json").status == status
    assert sum(psutil.Process(pid).cpu_times()[:2]) - used < 1
    assert running.workers("account") == [pid]


HELLO = b"\x16\x03\x01\x00\xc5\x01\x00\x00\xc1\x03\x03" + bytes(range(186))
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.mark.parametrize("port", ["url", "management", "metrics"])
@pytest.mark.parametrize("data", [HELLO, PREFACE], ids=["TLS", "HTTP/2"])
def test_f98_other_protocols_are_refused_and_closed(either: Server, port: str, data: bytes) -> None:
    with socket.create_connection(address(getattr(either, port)), CLIENT_TIMEOUT) as sock:
        sock.sendall(data + b"\r\n\r\n")
        answer = ended(sock)
    assert answer == b"" or answer.split(b" ")[1] in (b"400", b"505"), answer
    assert b"Traceback" not in answer
    answering = Answering()
    answering.send(either, "echo", b"x")
    assert [reply.status for reply in answering.results()] == [200]
