"""The edge with the real nginx in front of a tiny upstream on a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mms_nginx import Listener, Nginx, edge_user, find_nginx, render

from mms.errors import StartError
from tests.servers import free_ports
from tests.waiting import eventually

PROGRAM = find_nginx("nginx") or ""
MAX_REQUEST_SIZE = 16 << 20

pytestmark = [pytest.mark.skipif(not PROGRAM, reason="nginx is not installed"), pytest.mark.timeout(30)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Upstream:
    """Answers with what it was sent, on a Unix socket, in a thread; counts its connections and keeps request lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connections = 0
        self.lines: list[str] = []
        self.release = asyncio.Event()
        self.loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Upstream:
        self._thread.start()
        assert self._ready.wait(5)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)

    def let_stream_go_on(self) -> None:
        self.loop.call_soon_threadsafe(self.release.set)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_unix_server(self._connection, self.path, backlog=1024)
        self.path.chmod(0o666)
        self._ready.set()
        await self._stop.wait()
        server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        self._writers.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:-2])
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                await self._answer(writer, head[0], head[1:-2], body, number)
        self._writers.discard(writer)
        writer.close()

    async def _answer(
        self, writer: asyncio.StreamWriter, line: str, headers: list[str], body: bytes, number: int
    ) -> None:
        self.lines.append(line)
        path = line.split()[1]
        if path == "/stream":
            await self._stream(writer)
        elif path == "/die":
            writer.close()
        else:
            seen = {"line": line, "headers": headers, "sha256": hashlib.sha256(body).hexdigest(), "connection": number}
            status = path[1:] if path in ("/404", "/413", "/502") else "200"
            self._send(writer, status, json.dumps({"from": "upstream", **seen}).encode())

    def _send(self, writer: asyncio.StreamWriter, status: str, body: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\nX-Request-Id: abc-7\r\nX-Accel-Redirect: /.mms/414\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    async def _stream(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Accel-Buffering: no\r\n\r\n5\r\nfirst\r\n")
        await self.release.wait()
        writer.write(b"6\r\nsecond\r\n0\r\n\r\n")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A run directory that nginx's unprivileged workers can enter, with a path short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="mms-nginx-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def upstream(directory: Path) -> Iterator[Upstream]:
    with Upstream(directory / "front.sock") as running:
        yield running


def configuration(directory: Path, *listeners: Listener, log_level: str = "info") -> str:
    user = edge_user()
    return render(
        listeners,
        directory=directory / "nginx",
        max_request_size=MAX_REQUEST_SIZE,
        user=user[0] if user else None,
        response_timeout=10.0,
        body_timeout=5.0,
        header_timeout=5.0,
        log_level=log_level,
        access_log=directory / "access.log",
    )


class Edge:
    """A running nginx and its inference port."""

    def __init__(self, directory: Path, *others: Listener) -> None:
        self.port = free_ports(1)[0]
        self.directory = directory
        self.inference = Listener("inference", f"127.0.0.1:{self.port}", (directory / "front.sock",))
        self.text = configuration(directory, self.inference, *others)
        self.nginx = Nginx(PROGRAM, directory / "nginx", self.text)

    def __enter__(self) -> Edge:
        self.nginx.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.nginx.stop(1.0)
        assert can_bind(self.port)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, str]:
        """Status, decoded body, content type."""
        connection = self.connect()
        with contextlib.closing(connection):
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), answer.headers["Content-Type"]

    def raw(self, data: bytes) -> tuple[str, Any]:
        """The status and the decoded body that a client which sends these bytes gets."""
        with socket.create_connection(("127.0.0.1", self.port), 10) as client:
            client.sendall(data)
            answer = http.client.HTTPResponse(client)
            answer.begin()
            return str(answer.status), json.loads(answer.read())  # not all until the end: nginx lingers for seconds

    def access_log(self) -> list[Any]:
        return [json.loads(line) for line in (self.directory / "access.log").read_text().splitlines()]


@pytest.fixture
def edge(directory: Path, upstream: Upstream) -> Iterator[Edge]:
    with Edge(directory) as running:
        yield running


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


def test_port_in_use_is_named_in_one_line(directory: Path, upstream: Upstream) -> None:
    edge = Edge(directory)
    with socket.create_server(("127.0.0.1", edge.port)), pytest.raises(StartError) as caught:
        edge.nginx.start()
    assert f"127.0.0.1:{edge.port}" in caught.value.message and "\n" not in caught.value.message
    assert edge.nginx.pid == 0


def test_unix_address_in_use(directory: Path, upstream: Upstream) -> None:
    public = Listener("inference", f"unix:{upstream.path}", (upstream.path,))
    with pytest.raises(StartError, match=r"\(pid \d+\) listens there; stop it, or choose"):
        Nginx(PROGRAM, directory / "nginx", configuration(directory, public)).start()
    eventually(lambda: upstream.connections)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("events {} nonsense on;", 'unknown directive "nonsense"'),
        ("events {} http { server { listen 127.0.0.1:1; ", "unexpected end of file"),
    ],
)
def test_check_gives_the_reason_in_one_line(directory: Path, text: str, reason: str) -> None:
    with pytest.raises(StartError) as caught:
        Nginx(PROGRAM, directory / "nginx", text).check()
    assert reason in caught.value.message and "\n" not in caught.value.message


def test_one_address_for_two_listeners_is_refused(directory: Path) -> None:
    edge = Edge(directory)
    twin = Listener("management", edge.inference.address, edge.inference.upstream)
    with pytest.raises(StartError, match="duplicate"):
        Nginx(PROGRAM, directory / "nginx", configuration(directory, edge.inference, twin)).check()


def test_missing_program(directory: Path) -> None:
    assert find_nginx("no-such-nginx") is None
    with pytest.raises(StartError, match="No such file"):
        Nginx("/no-such-nginx", directory / "nginx", "").check()


def test_workers_do_not_run_as_root(edge: Edge) -> None:
    def owners() -> set[int]:
        return {Path(f"/proc/{pid}").stat().st_uid for pid in workers(edge.nginx.pid)}

    eventually(lambda: owners() and 0 not in owners())


def test_refused_reload_keeps_the_old_configuration(edge: Edge) -> None:
    before = workers(edge.nginx.pid)
    with pytest.raises(StartError, match="unknown directive"):
        edge.nginx.reload(edge.text + "nonsense on;")
    assert workers(edge.nginx.pid) == before
    assert (edge.directory / "nginx/nginx.conf").read_text() == edge.text
    assert edge.request("GET", "/")[0] == 200


def test_reload_to_a_port_in_use_is_refused(edge: Edge, upstream: Upstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        text = configuration(edge.directory, edge.inference, Listener("metrics", address, (upstream.path,)))
        with pytest.raises(StartError, match=address):
            edge.nginx.reload(text)
    assert (edge.directory / "nginx/nginx.conf").read_text() == edge.text
    assert edge.request("GET", "/")[0] == 200


def test_reload_takes_effect(edge: Edge, upstream: Upstream) -> None:
    port = free_ports(1)[0]
    metrics = Listener("metrics", f"127.0.0.1:{port}", (upstream.path,))
    edge.nginx.reload(configuration(edge.directory, edge.inference, metrics))
    with socket.create_connection(("127.0.0.1", port), 5) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_reloads_under_load_lose_nothing(edge: Edge) -> None:
    statuses: list[int] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            statuses.append(edge.request("POST", "/", b"x")[0])

    def reached(number: int) -> bool:
        return len(statuses) >= number

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        enough = len(statuses) + 50
        edge.nginx.reload(edge.text)
        eventually(partial(reached, enough))
    over.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200} and len(statuses) >= 250


def test_a_request_in_hand_is_answered_before_the_stop(edge: Edge, upstream: Upstream) -> None:
    connection = edge.connect()
    with contextlib.closing(connection):
        connection.request("POST", "/stream", b"")
        answer = connection.getresponse()
        assert answer.read1() == b"first"
        stopping = threading.Thread(target=edge.nginx.stop, args=(10.0,))
        stopping.start()
        eventually(lambda: can_bind(edge.port))
        upstream.let_stream_go_on()
        assert answer.read() == b"second"
        stopping.join()
    assert edge.nginx.exit_code() == 0


def test_stop_does_not_wait_for_ever(edge: Edge, upstream: Upstream) -> None:
    connection = edge.connect()
    with contextlib.closing(connection):
        connection.request("POST", "/stream", b"")
        assert connection.getresponse().read1() == b"first"
        began = time.monotonic()
        edge.nginx.stop(0.2)
    assert 0.2 <= time.monotonic() - began < 3


def test_stop_leaves_nothing(directory: Path, upstream: Upstream) -> None:
    with Edge(directory) as edge:
        pids = [edge.nginx.pid, *workers(edge.nginx.pid)]
        descriptor = edge.nginx.pidfd
        assert len(pids) > 1 and edge.nginx.exit_code() is None
    assert not any(map(alive, pids))
    assert edge.nginx.exit_code() == 0
    assert not Path(f"/proc/self/fd/{descriptor}").exists() and edge.nginx.pidfd == -1
    assert not (directory / "nginx/nginx.pid").exists()


def test_a_killed_master_is_noticed_and_its_workers_end(directory: Path, upstream: Upstream) -> None:
    with Edge(directory) as edge:
        pids = workers(edge.nginx.pid)
        os.kill(edge.nginx.pid, signal.SIGKILL)
        assert eventually(edge.nginx.exit_code) == -signal.SIGKILL
        assert not any(map(alive, pids))
        edge.nginx.stop(1.0)
        edge.nginx.start()
        assert edge.request("GET", "/")[0] == 200


CHILD = """
import sys
from pathlib import Path
from mms_nginx import Nginx

directory = Path(sys.argv[2])
nginx = Nginx(sys.argv[1], directory, (directory / "text").read_text())
nginx.start()
print(nginx.pid, flush=True)
sys.stdin.read()
"""


def test_ends_with_its_parent(directory: Path, upstream: Upstream) -> None:
    edge = Edge(directory)
    (directory / "nginx").mkdir()
    (directory / "nginx/text").write_text(edge.text)
    command = [sys.executable, "-c", CHILD, PROGRAM, str(directory / "nginx")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        master = int(parent.stdout.readline())
        pids = [master, *workers(master)]
        assert edge.request("GET", "/")[0] == 200
        parent.kill()
    eventually(lambda: not any(map(alive, pids)))
    assert can_bind(edge.port)
