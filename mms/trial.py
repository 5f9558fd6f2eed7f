"""`mms check`: one archive in one real worker process, without a server around it."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path

from mms import wire
from mms.client import read_request
from mms.config import Config
from mms.controlplane import ControlPlane
from mms.errors import MMSError, ModelNotFoundError
from mms.http.response import error_response
from mms.models.registry import ModelRegistry
from mms.models.store import ModelStore
from mms.rundir import CacheDirectory
from mms.workers.job import Job
from mms.workers.process import prepare_process

GRACE = 5.0


class _Caller:
    """Turns the job's one outcome into a future."""

    def __init__(self, outcome: asyncio.Future[tuple[int, str]]) -> None:
        self._outcome = outcome
        self._chunks: list[bytes] = []

    def answer(self, status: int, head: bytes, body: bytes | memoryview) -> None:
        text = str(b"".join((*self._chunks, body)), "utf-8", "backslashreplace")
        self._outcome.set_result((status, f"{status}\n{head.decode('latin-1')}\n{text}"))

    def begin(self, status: int, head: bytes) -> _Caller:
        return self

    def chunk(self, data: bytes) -> None:
        self._chunks.append(data)

    def fail(self, error: MMSError) -> None:
        # the handler, or a decoder, refuses this request: that is an answer
        if error.status < 500 or error.type == "PredictionException":
            self.answer(*error_response(error))
        else:
            self._outcome.set_exception(error)


def run_trial(archive: Path, request: Path | None, content_type: str) -> tuple[int, str]:
    """Load the archive, run it on the file `request`: the status, and how that went as a text. Raises MMSError."""
    if not archive.exists():
        raise ModelNotFoundError(f"{archive} does not exist")
    job = None
    if request is not None:
        body, guessed = read_request(request)
        job = body, content_type or guessed
    with tempfile.TemporaryDirectory(prefix="mms-check-") as folder:
        return asyncio.run(_try(archive.absolute(), job, Path(folder)))


async def _try(archive: Path, job: tuple[bytes, str] | None, folder: Path) -> tuple[int, str]:
    prepare_process()
    config = Config(model_store=archive.parent, run_dir=folder, workers=1)
    cache = CacheDirectory(folder)
    cache.acquire(None)
    control = ControlPlane(config, ModelRegistry(), ModelStore(config.model_store), cache, boot_tries=1)
    begun = time.monotonic()
    try:
        version = await control.register(archive.name, changes={"min_workers": 1})
        loaded = f"{version.label} loads in {time.monotonic() - begun:.2f} s"
        if job is None:
            return 200, loaded
        body, kind = job
        outcome: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        facts = wire.RequestFacts(kind, "", b"", False, [])
        request_id, now = b"check-%d" % os.getpid(), time.monotonic()
        version.submit(Job(1, facts, request_id, [body], len(body), _Caller(outcome), now))
        status, answer = await outcome
        return status, f"{loaded}\n{answer}"
    finally:
        await control.close(GRACE)
        cache.release()
