"""Requests through the real nginx to a tiny upstream on a Unix socket."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from pathlib import Path

import pytest
from mms_nginx import Listener

from tests.processes.nginx.edges import (
    MAX_REQUEST_SIZE,
    Edge,
    Upstream,
)
from tests.servers import free_ports, needs_nginx
from tests.waiting import eventually

pytestmark = [needs_nginx, pytest.mark.timeout(30)]


def test_passes_a_request_on_unchanged(edge: Edge) -> None:
    status, seen, _ = edge.request("POST", "/predictions/a%2Fb//c?q=1&r=%20", b"body", X_Request_Id="mine")
    assert status == 200
    assert seen["line"] == "POST /predictions/a%2Fb//c?q=1&r=%20 HTTP/1.1"
    assert seen["sha256"] == hashlib.sha256(b"body").hexdigest()
    assert {"Host: 127.0.0.1", "X-Request-Id: mine", "X-Forwarded-Proto: http"} <= set(seen["headers"])
    assert "X-Forwarded-For: 127.0.0.1" in seen["headers"]
    assert not [header for header in seen["headers"] if header.startswith("Connection")]


def test_big_and_chunked_bodies(edge: Edge) -> None:
    body = os.urandom(10 << 20)
    assert edge.request("POST", "/", body)[1]["sha256"] == hashlib.sha256(body).hexdigest()
    pieces = [body[start : start + 70_001] for start in range(0, 1 << 20, 70_001)]
    connection = edge.connect()
    with contextlib.closing(connection):
        connection.request("POST", "/", iter(pieces), encode_chunked=True)
        assert json.loads(connection.getresponse().read())["sha256"] == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_a_worker_whose_connection_another_has_taken_does_not_wait_for_the_next(edge: Edge) -> None:
    """Accepting must not block; that two workers wake up for one connection cannot be brought about at will."""
    assert [os.get_blocking(sock.fileno()) for sock in edge.nginx.sockets.values()] == [False]


def test_upstream_connections_are_reused(edge: Edge, upstream: Upstream) -> None:
    before = upstream.connections
    connection = edge.connect()
    with contextlib.closing(connection):
        for _ in range(50):
            connection.request("POST", "/", b"x")
            assert connection.getresponse().read()
    assert upstream.connections - before == 1


def test_streams_chunk_by_chunk(edge: Edge, upstream: Upstream) -> None:
    connection = edge.connect()
    with contextlib.closing(connection):
        connection.request("POST", "/stream", b"")
        answer = connection.getresponse()
        assert answer.read1() == b"first"
        upstream.let_stream_go_on()
        assert answer.read() == b"second"


@pytest.mark.parametrize("status", [404, 413, 502])
def test_upstream_errors_pass_untouched(edge: Edge, status: int) -> None:
    code, body, _ = edge.request("GET", f"/{status}")
    assert (code, body["from"]) == (status, "upstream")


def test_too_large_is_json(edge: Edge, upstream: Upstream) -> None:
    length = f"Content-Length: {MAX_REQUEST_SIZE + 1}\r\n"
    status, body = edge.raw(f"POST /predictions/m HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{length}\r\n".encode())
    assert status == "413"
    assert (body["code"], body["type"]) == (413, "RequestEntityTooLargeException")
    assert str(MAX_REQUEST_SIZE) in body["message"]
    assert upstream.lines == []


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 9000 + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: aaaaaaaaaaaaaaaa\r\n" * 3000 + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /../../etc HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"TRACE / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 405),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET /.mms/400 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 404),
    ],
    ids=[
        "long line",
        "long header",
        "many headers",
        "no host",
        "garbage",
        "above the root",
        "trace",
        "te",
        "2.0",
        "internal",
    ],
)
def test_refusals_are_json(edge: Edge, upstream: Upstream, request_bytes: bytes, status: int) -> None:
    code, body = edge.raw(request_bytes)
    assert code == str(status)
    assert body["code"] == status and body["type"].endswith("Exception") and body["message"]
    assert upstream.lines == []


def test_no_front_end_is_json_502(directory: Path) -> None:
    with Edge(directory) as edge:
        status, body, content_type = edge.request("POST", "/predictions/m", b"x")
    assert (status, body["code"], body["type"]) == (502, 502, "BadGatewayException")
    assert content_type == "application/json"


def test_a_post_is_never_sent_twice(edge: Edge, upstream: Upstream) -> None:
    assert edge.request("POST", "/", b"x")[0] == 200
    assert edge.request("POST", "/die", b"x")[0] == 502
    assert [line for line in upstream.lines if "/die" in line] == ["POST /die HTTP/1.1"]


def test_management_is_not_reachable_through_inference(directory: Path, upstream: Upstream) -> None:
    port = free_ports(1)[0]
    with Upstream(directory / "management.sock") as behind:
        other = Listener("management", f"127.0.0.1:{port}", (directory / "management.sock",))
        with Edge(directory, other) as edge:
            for host in ("management", f"127.0.0.1:{port}", "mms_management"):
                assert edge.request("GET", "/models", Host=host)[0] == 200
            line = f"GET http://127.0.0.1:{port}/models HTTP/1.1"
            assert edge.raw(f"{line}\r\nHost: management\r\nConnection: close\r\n\r\n".encode())[0] == "200"
            assert behind.lines == []


def test_listens_on_a_unix_socket_and_on_ipv6(directory: Path, upstream: Upstream) -> None:
    port = free_ports(1)[0]
    public = directory / "public.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(public))
    stale.close()
    others = (
        Listener("management", f"unix:{public}", (upstream.path,)),
        Listener("metrics", f"[::1]:{port}", (upstream.path,)),
    )
    with Edge(directory, *others):
        for family, target in ((socket.AF_UNIX, str(public)), (socket.AF_INET6, ("::1", port))):
            with socket.socket(family) as client:
                client.connect(target)
                client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                assert client.recv(100).startswith(b"HTTP/1.1 200")
    assert not public.exists()


def test_access_log_is_json_without_the_query(edge: Edge) -> None:
    edge.request("POST", "/predictions/m?token=secret", b"hidden", Authorization="hidden")
    edge.raw(b"nonsense\r\n\r\n")
    eventually(lambda: len(edge.access_log()) == 2)
    # it logs a request after its answer: two in a row may change places
    first, second = sorted(edge.access_log(), key=lambda entry: int(entry["status"]))
    assert (first["method"], first["path"], first["status"]) == ("POST", "/predictions/m", 200)
    assert (first["listener"], first["request_id"], first["client"]) == ("inference", "abc-7", "127.0.0.1")
    assert second["status"] == 400
    assert not {"secret", "hidden"} & set((edge.directory / "access.log").read_text().replace("=", " ").split())


def test_an_access_log_that_was_moved_away_is_opened_anew(edge: Edge) -> None:
    log = edge.directory / "access.log"
    log.rename(log.with_suffix(".1"))
    edge.nginx.reopen()
    eventually(log.exists)
    eventually(lambda: edge.request("GET", "/after") and log.read_text())


def test_error_log_does_not_quote_requests(edge: Edge, capfd: pytest.CaptureFixture[str]) -> None:
    edge.request("POST", "/die?token=secret", os.urandom(1 << 20))
    assert "secret" not in capfd.readouterr().err
