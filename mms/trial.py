"""`mms check`: one archive in one real worker process, without a server around it."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path

from mms import wire
from mms.client import guess_type
from mms.config import Config
from mms.controlplane import ControlPlane
from mms.dataplane import DataPlane
from mms.errors import MMSError, ModelNotFoundError
from mms.models.registry import ModelRegistry
from mms.models.store import ModelStore
from mms.rundir import CacheDirectory
from mms.server import prepare_process

GRACE = 5.0


class _Caller:
    """Turns the job's one outcome into a future."""

    def __init__(self, outcome: asyncio.Future[str]) -> None:
        self._outcome = outcome

    def answer(self, status: int, head: bytes, body: bytes | memoryview) -> None:
        self._outcome.set_result(f"{status}\n{head.decode('latin-1')}\n{str(body, 'utf-8', 'backslashreplace')}")

    def fail(self, error: MMSError) -> None:
        self._outcome.set_exception(error)


def run_trial(archive: Path, request: Path | None, content_type: str) -> str:
    """Load the archive, run it on the file `request`, and say how that went. Raises MMSError."""
    if not archive.exists():
        raise ModelNotFoundError(f"{archive} does not exist")
    if request is not None and not request.is_file():
        raise MMSError(f"{request} is not a file")
    with tempfile.TemporaryDirectory(prefix="mms-check-") as folder:
        return asyncio.run(_try(archive.absolute(), request, content_type, Path(folder)))


async def _try(archive: Path, request: Path | None, content_type: str, folder: Path) -> str:
    prepare_process()
    config = Config(model_store=archive.parent, run_dir=folder, workers=1)
    cache = CacheDirectory(folder)
    cache.acquire(None)
    control = ControlPlane(config, ModelRegistry(), ModelStore(config.model_store), cache)
    begun = time.monotonic()
    try:
        version = await control.register(archive.name, changes={"min_workers": 1})
        loaded = f"{version.label} loads in {time.monotonic() - begun:.2f} s"
        if request is None:
            return loaded
        body = request.read_bytes()  # noqa: ASYNC240  # nothing else runs here
        outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        kind = content_type or guess_type(request)
        facts = wire.RequestFacts(kind, "", b"", False, [])
        request_id, now = b"check-%d" % os.getpid(), time.monotonic()
        DataPlane(control.registry).predict(version, facts, request_id, [body], len(body), _Caller(outcome), now)
        return f"{loaded}\n{await outcome}"
    finally:
        await control.close(GRACE)
        cache.release()
