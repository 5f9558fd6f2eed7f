"""Who may use the management API: its `Host`, its `Origin` and its token, checked before anything else. aiohttp.

Whoever registers a model runs code here. `Host` stops a page that has its own name resolve to this machine (DNS
rebinding), `Origin` one that sends requests across sites, the token everybody else.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

from aiohttp import web

from mms.errors import ForbiddenError, UnauthorizedError
from mms.token import Token

_Next = Callable[[web.Request], Awaitable[web.StreamResponse]]
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Guard:
    """The rules of one listener. `hosts` are names that it is called by beside its own address."""

    def __init__(self, address: str, hosts: Sequence[str], token: Token | None) -> None:
        self._token = token
        self._hosts = {host.lower() for host in hosts}
        self._own, self._port, self._everywhere = "localhost", 0, False
        if not address.startswith("unix:"):
            host, _, port = address.rpartition(":")
            self._own, self._port = host.strip("[]").lower(), int(port)
            self._everywhere = self._own in ("*", "0.0.0.0", "::", "")

    @web.middleware
    async def middleware(self, request: web.Request, handler: _Next) -> web.StreamResponse:
        self._check_host(request.headers.getall("Host", []))
        self._check_origin(request.headers.getall("Origin", []))
        if self._token is not None:
            given = [value.encode("utf-8", "surrogateescape") for value in request.headers.getall("Authorization", [])]
            if not self._token.admits(given):
                raise UnauthorizedError("the management API needs its token: Authorization: Bearer TOKEN")
        return await handler(request)

    def _check_host(self, given: list[str]) -> None:
        host = _hostname(given[0]) if len(given) == 1 else ""
        if not self._is_ours(host):
            raise ForbiddenError(
                f"the Host header names {host[:200] or 'no host'!r}, which this management API is not called; "
                "add the name to management_hosts"
            )

    def _check_origin(self, given: list[str]) -> None:
        for origin in given:
            try:
                parts = urlsplit(origin)
                host, port = (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
            except ValueError:
                host, port = "", 0
            if not (host in self._hosts or (self._is_ours(host) and port and port == self._port)):
                raise ForbiddenError(
                    "a page of another site sent this request (Origin); add its host to management_hosts to allow it"
                )

    def _is_ours(self, host: str) -> bool:
        if not host:
            return False
        if host in self._hosts or host in (self._own, "localhost"):
            return True
        try:
            number = ipaddress.ip_address(host)
        except ValueError:
            return False
        # a number cannot be made to resolve to something else
        return number.is_loopback or self._everywhere


def _hostname(value: str) -> str:
    try:
        parts = urlsplit(f"//{value}")
        return (parts.hostname or "").lower() if parts.netloc == value and "@" not in value else ""
    except ValueError:
        return ""
