"""`python -m benchmarks.echo ADDRESS [--body]`: the least a Python HTTP server can do, httptools and uvloop, no worker.

Every whole request is answered with `ok`, or with its body.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from typing import cast

import httptools
import uvloop

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
ANSWER = HEAD % 2 + b"ok"


class Echo(asyncio.Protocol):
    """One connection that answers `ok`."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.parser = httptools.HttpRequestParser(self)
        self.body: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        self.body.clear()
        self.transport.write(ANSWER)


class BodyEcho(Echo):
    """One connection that answers with the body."""

    def on_message_complete(self) -> None:
        self.transport.writelines([HEAD % sum(map(len, self.body)), *self.body])
        self.body = []


async def serve(address: str, protocol: type[Echo]) -> None:
    """Listens on `unix:/path` or `host:port` until it is killed."""
    loop = asyncio.get_running_loop()
    if address.startswith("unix:"):
        server = await loop.create_unix_server(protocol, address.removeprefix("unix:"), backlog=4096)
    else:
        host, _, port = address.rpartition(":")
        server = await loop.create_server(protocol, host, int(port), backlog=4096)
    gc.freeze()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], BodyEcho if "--body" in sys.argv else Echo))
