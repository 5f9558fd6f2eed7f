"""All that the server listens with: the front ends on the port for predictions, and the operators' ports."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mms import fronts
from mms.addresses import LISTENERS, Addresses
from mms.api.predictions import InferenceApi
from mms.config import Config
from mms.edge import KEEPALIVE
from mms.fleet import Fleet
from mms.http.limits import Limits
from mms.http.listener import HttpServer
from mms.http.shedding import NO_CONNECTIONS
from mms.metrics import FrontEndFacts
from mms.models.readiness import Health, refusing
from mms.models.registry import ModelRegistry
from mms.models.served import part
from mms.operators import OperatorPorts
from mms.workers.environment import memory

if TYPE_CHECKING:
    from aiohttp import web


class Listeners:
    """They are bound by `bind`; clients are served from `start` on, operators from `serve` on.

    With an `edge`, clients come through nginx. `token` is what they must bring if it is not in a file, and `lost` is
    called when the further front ends cannot be kept running.
    """

    def __init__(
        self,
        config: Config,
        addresses: Addresses,
        registry: ModelRegistry,
        inference: InferenceApi,
        health: Health,
        *,
        edge: bool,
        token: str,
        lost: Callable[[], None],
    ) -> None:
        self._config = config
        self._addresses = addresses
        self._inference = inference
        self._edge = edge
        self._limits = _limits(config)
        self._http = HttpServer(inference, self._limits, edge=edge)
        self._operators = OperatorPorts()
        hello = fronts.Hello(
            front_ends=config.front_ends,
            edge=edge,
            limits=self._limits,
            token=token,
            token_file=str(config.inference_token_file or ""),
        )
        self.fleet = Fleet(
            config.front_ends,
            registry,
            hello,
            lambda: (health.health(), health.report(details=False)),
            lambda: (self._limits, self._config.log_level),
            lost,
        )
        self._sockets: list[socket.socket] = []
        self._behind_edge: Path | None = None
        self._listen: dict[str, Callable[[socket.socket], Coroutine[Any, Any, None]]] = {
            "inference": self._http.listen if edge else self._listen_everywhere,
            **{f"inference-{number}": partial(self.fleet.listen, number) for number in range(1, config.front_ends)},
            **{name: partial(self._operators.listen, name) for name in LISTENERS[1:]},
        }
        self._listening: set[asyncio.Task[None]] = set()

    def bind(self, behind_edge: Path | None, group: int | None) -> None:
        """As Addresses.listen."""
        self._behind_edge = behind_edge
        self._sockets = self._addresses.listen(behind_edge, group, shared=self.fleet.count > 1)

    async def start(self) -> None:
        """All front ends take connections. Raises StartError."""
        await self._http.start(self._sockets[0])
        self.fleet.start(self._addresses.further(self.fleet.count - 1, self._behind_edge))

    async def serve(self, applications: list[web.Application]) -> None:
        """Those of the management and the metrics port answer."""
        keepalive = KEEPALIVE if self._edge else self._config.keepalive_timeout
        for name, application, sock in zip(LISTENERS[1:], applications, self._sockets[1:], strict=True):
            await self._operators.serve(name, application, sock, keepalive)

    def tick(self) -> None:
        """Listen anew where a socket file was deleted, unless another server serves these sockets."""
        self._inference.renew_token()
        if not self._operators.listening:
            return
        for name, sock in self._addresses.bind_anew().items():
            listening = asyncio.create_task(self._listen[name](sock))
            self._listening.add(listening)
            listening.add_done_callback(self._listening.discard)

    async def apply(self, config: Config) -> None:
        """Other settings from now on, in all front ends."""
        self._config = config
        self._limits = _limits(config)
        self._http.apply(self._limits)
        await self.fleet.sync()

    def forget_versions(self) -> None:
        """A version was taken out of the registry."""
        self._inference.forget_routes()
        self._http.forget_heads()

    def obstacle(self) -> tuple[str, str]:
        """Why the first front end takes no connections: a word and a sentence; empty while it does."""
        if self._http.shedding.step == NO_CONNECTIONS:
            return refusing(self._http.shedding.full().message)
        return "", ""

    def facts(self) -> FrontEndFacts:
        """Of all front ends, for the metrics collector."""
        shedding = self._http.shedding
        return self.fleet.totals.front_ends(FrontEndFacts(len(self._http.connections), shedding.bytes, shedding.step))

    async def retire(self, limit: float) -> None:
        """Leave all sockets to another server; as HttpServer.retire."""
        await self._operators.shut()
        await self._http.retire(limit)

    async def drain(self, until: float) -> int:
        """As HttpServer.drain, in all front ends; `until` is on the monotonic clock."""
        self._http.shut()
        await self.fleet.shut()  # of all, before an answer ends its connection: the next must not come to another one
        limit = max(0.0, until - time.monotonic())
        return sum(await asyncio.gather(self._http.drain(limit), self.fleet.drain(limit)))

    async def close(self) -> None:
        """The further front ends end, and the last answers of operators' calls are sent."""
        await self.fleet.close()
        await self._operators.close()

    async def _listen_everywhere(self, sock: socket.socket) -> None:
        """All front ends share a Unix socket that clients know."""
        await self._http.listen(sock)
        for number in range(1, self.fleet.count):
            await self.fleet.listen(number, sock.dup())


def _limits(config: Config) -> Limits:
    """What each front end holds its clients to."""
    return Limits(
        max_request_size=config.max_request_size,
        max_connections=part(config.max_connections, config.front_ends),
        header_timeout=config.header_timeout,
        body_timeout=config.body_timeout,
        keepalive_timeout=config.keepalive_timeout,
        max_bytes_in_flight=part(config.max_bytes_in_flight or memory() // 4, config.front_ends),
        max_response_size=config.max_response_size,
    )
