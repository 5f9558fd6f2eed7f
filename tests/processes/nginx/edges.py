"""nginx as it runs before the front end, and a tiny upstream on a Unix socket behind it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import socket
import threading
from pathlib import Path
from typing import Any

from mms_nginx import Listener, Nginx, edge_user, find_nginx, render

from tests.servers import free_ports

PROGRAM = find_nginx("nginx") or ""
MAX_REQUEST_SIZE = 16 << 20


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
