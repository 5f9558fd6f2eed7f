"""The ports for operators, management and metrics: aiohttp, where comfort counts. Front end's process."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from mms.http.listener import BACKLOG_TIME

if TYPE_CHECKING:
    from aiohttp import web

LAST_ANSWERS = 2.0  # seconds for answers of the management API at the end of a stop


class OperatorPorts:
    """Listens once `serve` is called."""

    def __init__(self) -> None:
        self._runners: dict[str, web.AppRunner] = {}

    @property
    def listening(self) -> bool:
        return bool(self._runners)

    async def serve(self, name: str, application: web.Application, sock: socket.socket, keepalive: float) -> None:
        from aiohttp import web

        from mms.api.management import http_log

        runner = web.AppRunner(
            application,
            logger=http_log,
            access_log=None,
            handle_signals=False,
            keepalive_timeout=keepalive,
            shutdown_timeout=LAST_ANSWERS,
        )
        await runner.setup()
        self._runners[name] = runner
        await web.SockSite(runner, sock).start()

    async def listen(self, name: str, sock: socket.socket) -> None:
        """As HttpServer.listen."""
        from aiohttp import web

        runner = self._runners[name]
        before = set(runner.sites)
        await web.SockSite(runner, sock).start()
        await asyncio.sleep(BACKLOG_TIME)
        for site in before & set(runner.sites):
            await site.stop()

    async def shut(self) -> None:
        """Accept nothing more."""
        for site in [site for runner in self._runners.values() for site in runner.sites]:
            await site.stop()

    async def close(self) -> None:
        for runner in self._runners.values():
            await runner.cleanup()
