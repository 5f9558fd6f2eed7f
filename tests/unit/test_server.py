"""What a server keeps of models that are gone."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from mms.archive import ModelArchive
from mms.config import Config
from mms.model_settings import ModelSettings
from mms.models.version import ModelVersion
from mms.server import ModelServer
from tests.conftest import MakeArchive
from tests.unit.http_client import Transport, post


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_f105_what_a_version_was_asked_does_not_keep_it_when_it_is_gone(
    make_archive: MakeArchive, tmp_path: Path, no_collector: None
) -> None:
    async def scenario() -> None:
        config = Config(model_store=tmp_path, run_dir=tmp_path / "run", cache_dir=tmp_path / "cache")
        server = ModelServer(config, print, fresh=True)
        version = ModelVersion("m", "1.0", ModelArchive.open(make_archive("echo")), ModelSettings())
        server._registry.add(version)
        http = server._listeners._http
        connection, in_pieces = http._connect(), http._connect()
        for each in connection, in_pieces:
            each.connection_made(Transport())
        request = post(b"x", target=b"/predictions/m")
        for _ in range(2):
            connection.data_received(request)
        for piece in request[:-1], request[-1:]:
            in_pieces.data_received(piece)
        assert len(http._known) == 1
        server._registry.remove(version)
        gone = weakref.ref(version)
        del version
        assert gone() is None

    asyncio.run(scenario())
