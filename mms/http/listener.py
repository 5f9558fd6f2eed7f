"""Listening sockets, and the data plane's server on one of them: its connections, their clock, its end."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path

from mms.errors import StartError
from mms.http.arrivals import Arrivals
from mms.http.connection import Connection, new_shedding
from mms.http.exchange import Application
from mms.http.limits import Limits
from mms.http.request import KnownHeads
from mms.http.response import ResponseHeads
from mms.ports import cannot_listen, check_unused

BACKLOG = 4096
TICK = 0.25
TICKS_A_SWEEP = 4
BACKLOG_TIME = 1.0  # seconds in which a listening socket that is given up is emptied of connections


def bind(address: str, *, group: int | None = None, shared: bool = False) -> socket.socket:
    """A listening socket on host:port or unix:/path, the latter for owner and `group`. Raises StartError.

    Further sockets can listen on the same host and port if all of them are `shared`.
    """
    if address.startswith("unix:"):
        return _bind_unix(Path(address.removeprefix("unix:")), group)
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        family, _, _, _, target = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise StartError(f"cannot listen on {address}: {error.strerror}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(target)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise cannot_listen(address, error) from None
    return sock


def _bind_unix(path: Path, group: int | None) -> socket.socket:
    check_unused(str(path))
    temporary = path.with_name(path.name[:8] + ".new")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        temporary.unlink(missing_ok=True)
        sock.bind(str(temporary))
        temporary.chmod(0o660)
        if group is not None:
            os.chown(temporary, -1, group)
        sock.listen(BACKLOG)
        temporary.rename(path)
    except OSError as error:
        sock.close()
        raise StartError(f"cannot listen on unix:{path}: {error.strerror}") from None
    return sock


class HttpServer:
    """Accepts the data plane's connections on one socket until it is drained."""

    def __init__(self, application: Application, limits: Limits, *, edge: bool) -> None:
        self._application = application
        self.limits = limits  # of connections that are made from now on
        self._edge = edge
        self._heads = ResponseHeads()
        self._known = KnownHeads()
        self.connections: set[Connection] = set()
        self.shedding = new_shedding(application, limits)
        self._arrivals = Arrivals(application)
        self._retired = False
        self._ticks = 0
        self._servers: list[asyncio.Server] = []
        self._timer: asyncio.TimerHandle | None = None

    async def start(self, sock: socket.socket) -> None:
        await self.listen(sock)
        self._tick()

    async def listen(self, sock: socket.socket) -> None:
        """Accept on this socket from now on, and soon no more on the one before; its connections stay."""
        loop = asyncio.get_running_loop()
        create = loop.create_unix_server if sock.family == socket.AF_UNIX else loop.create_server
        self._servers.append(await create(self._connect, sock=sock, backlog=BACKLOG))
        for before in self._servers[:-1]:
            self._servers.remove(before)
            loop.call_later(BACKLOG_TIME, before.close)

    def apply(self, limits: Limits) -> None:
        """Other limits from now on; those of a request's time and size for connections that are made from now on."""
        self.limits = limits
        self._known.max_body = limits.max_request_size
        self.forget_heads()
        self.shedding.apply(max_bytes=limits.max_bytes_in_flight, max_connections=limits.max_connections)

    async def retire(self, limit: float) -> None:
        """Leave new connections to another process that serves the same socket.

        An answer ends its connection. Those that idle stay open for `limit` seconds: a request may be on its way.
        """
        self.shut()
        self._retired = True
        self._step_changed()
        if waiting := [connection.retire() for connection in list(self.connections)]:
            await asyncio.wait(waiting, timeout=limit)

    def shut(self) -> None:
        """Accept nothing more."""
        for server in self._servers:
            server.close()

    async def drain(self, limit: float) -> int:
        """Accept nothing more, let requests in hand finish for `limit` seconds; returns how many were cut off."""
        self.shut()
        waiting = [connection.drain() for connection in list(self.connections)]
        if waiting:
            await asyncio.wait(waiting, timeout=limit)
        cut = len(self.connections)
        for connection in list(self.connections):
            connection.abort()
        if self._timer is not None:
            self._timer.cancel()
        return cut

    def _connect(self) -> Connection:
        return Connection(
            self._application,
            self.limits,
            self._heads,
            self._known,
            self.connections,
            edge=self._edge,
            shedding=self.shedding,
            arrivals=self._arrivals,
        )

    def _tick(self) -> None:
        # first: whatever fails below, the clock goes on
        self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)
        sweep = not self._ticks % TICKS_A_SWEEP
        self._ticks += 1
        if self.shedding.tick(len(self.connections)):
            self._step_changed()
        if sweep:
            self._heads.tick()
            now = time.monotonic()
            for connection in list(self.connections):
                connection.sweep(now)

    def _step_changed(self) -> None:
        """While something is shed or connections end, no request takes the short way of known heads."""
        self._known.shut = self._retired or self.shedding.step > 0
        self.forget_heads()

    def forget_heads(self) -> None:
        """Every next request is looked at as a whole, and what the application has noted on heads is let go of."""
        self._known.clear()
        for connection in self.connections:
            connection.forget_heads()
