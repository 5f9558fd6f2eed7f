"""Faults inside the front end: catalogue, section 2.3 (signals, starts and stops: tests/e2e)."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from mms.archive import ModelArchive
from mms.config import Config
from mms.errors import MMSError
from mms.http.exchange import Exchange
from mms.http.limits import Limits
from mms.http.listener import HttpServer
from mms.http.request import Head
from mms.model_settings import ModelSettings
from mms.models.version import ModelVersion
from mms.server import ModelServer
from tests.conftest import MakeArchive
from tests.unit.http_client import Transport

LIMITS = Limits(max_request_size=1000, max_connections=10, header_timeout=5, body_timeout=5, keepalive_timeout=5)
GET = b"GET /%b HTTP/1.1\r\nHost: a\r\n%b\r\n"


class Faulty:
    """An application with a bug: some requests raise what no application may."""

    def handle(self, exchanges: list[Exchange]) -> None:
        for exchange in exchanges:
            if exchange.head.target == b"/bug":
                raise RuntimeError("a bug")
            exchange.answer(200, b"content-type: text/plain\r\n", b"fine")

    def objection(self, head: Head, size: int) -> MMSError | None:
        return None

    def held(self) -> int:
        return 0

    def refused(self, error: MMSError) -> None:
        pass


def test_f51_a_bug_ends_the_connection_that_met_it_and_no_other() -> None:
    async def run() -> tuple[bytes, bytes, list[str]]:
        faults: list[str] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: faults.append(str(context.get("exception")))
        )
        server = HttpServer(Faulty(), LIMITS, edge=False)
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        await server.start(listener)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        other_reader, other = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET % (b"bug", b""))
        met = await asyncio.wait_for(reader.read(), 5)
        other.write(GET % (b"fine", b"Connection: close\r\n"))
        answer = await asyncio.wait_for(other_reader.read(), 5)
        for stream in (writer, other):
            stream.close()
        await server.drain(1)
        return met, answer, faults

    met, answer, faults = asyncio.run(run())
    assert not met.startswith(b"HTTP/1.1 200")
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"fine")
    assert faults == ["a bug"]


def test_f51_a_bug_costs_requests_that_came_in_the_same_turn_nothing(make_archive: MakeArchive, tmp_path: Path) -> None:
    def bug() -> tuple[int, object]:
        raise RuntimeError("a bug")

    async def run() -> list[Transport]:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        server = ModelServer(Config(run_dir=tmp_path / "run", cache_dir=tmp_path / "cache"), print, fresh=True)
        server._inference._own["/bug"] = bug
        server._registry.add(ModelVersion("m", "1.0", ModelArchive.open(make_archive("echo")), ModelSettings()))
        transports = []
        for target in b"predictions/m", b"bug", b"livez":
            transports.append(Transport())
            connection = server._listeners._http._connect()
            connection.connection_made(transports[-1])
            connection.data_received(GET % (target, b""))
        await asyncio.sleep(0)
        return transports

    before, met, behind = asyncio.run(run())
    assert before.sent.startswith(b"HTTP/1.1 503")
    assert met.aborted and not met.sent
    assert behind.sent.startswith(b"HTTP/1.1 200")
