"""`GET /metrics` on its own listener. aiohttp."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from mms.api.management import errors_as_json


def application(registry: CollectorRegistry, refresh: Callable[[], Awaitable[None]]) -> web.Application:
    """The aiohttp application on the metrics listener; `refresh` reads, off the event loop, what may block."""

    async def metrics(request: web.Request) -> web.Response:
        await refresh()
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        response = web.Response(body=encode(registry), headers={"Content-Type": content_type})
        response.enable_compression()
        return response

    app = web.Application(middlewares=[errors_as_json])
    app.router.add_get("/metrics", metrics)
    return app
