"""What a worker does between loading and READY, in real workers: warm-up, compiling."""

from __future__ import annotations

from pathlib import Path

import pytest
import uvloop

from mms import wire
from mms.errors import ModelLoadError
from mms.samples import WarmupSample
from tests.processes.pools import Serve, serve, subreaper

__all__ = ["serve", "subreaper"]

TEXT = WarmupSample(file="MAR-INF/MANIFEST.json", content_type="text/plain", count=2)


def test_the_warmup_has_run_when_a_worker_is_ready(serve: Serve) -> None:
    pytest.importorskip("numpy")

    async def scenario() -> None:
        wanted = wire.Preparation((TEXT, WarmupSample(shape=(2, 3), dtype="int16")), (1, 4))
        async with serve("warms_up", workers=2, preparation=wanted) as served:
            seen = b'["text",1],["text",1],["text",4],["text",4],["int16[2, 3]",1],["int16[2, 3]",4],["text",1]'
            assert [await served.submit(b"a"), await served.submit(b"b")][0] == b"[" + seen + b"]"

    uvloop.run(scenario())


def test_a_warmup_sample_that_fails_is_a_load_error_with_its_name(serve: Serve, tmp_path: Path) -> None:
    pytest.importorskip("numpy")

    async def scenario() -> None:
        wanted = wire.Preparation((WarmupSample(shape=(2,), dtype="int8"),), (4,))
        async with serve("warms_up", workers=0, preparation=wanted) as served:
            with pytest.raises(ModelLoadError) as raised:
                await served.scale(1)
            said = "warmup sample int8 [2] failed in a batch of 4: the handler raised ValueError: no bytes, please"
            assert raised.value.message == f"the handler of m 1 failed to load: {said}"

    uvloop.run(scenario())
