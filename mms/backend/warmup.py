"""The warm-up: a model's samples in each batch size, through the handler's own stages, before READY. Worker process."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from mms import wire
from mms.backend.lengths import miscount, miscount_of
from mms.backend.stages import RequestStages, Stages
from mms.backend.streams import Stream
from mms.errors import ModelLoadError
from mms.handler import Request, Requests
from mms.samples import WarmupSample


def warm_up(stages: Stages, load: wire.Load) -> None:
    """Run them all; nothing of it is counted. Raises ModelLoadError that names the sample that fails, whose traceback
    is in the model's log.
    """
    for sample in load.preparation.warmup:
        for size in load.preparation.batch_sizes:
            for _ in range(sample.count):
                fault = _run_file(stages, load, sample, size) if sample.file else _run_shape(stages, sample, size)
                if fault:
                    raise ModelLoadError(f"warmup sample {sample.name} failed in a batch of {size}: {fault}")
    stages.take_times()
    stages.metrics.take()


def _run_file(stages: Stages, load: wire.Load, sample: WarmupSample, size: int) -> str:
    """What went wrong, or nothing."""
    try:
        body = (stages.context.model_dir / sample.file).read_bytes()
    except OSError as error:
        return f"the archive's file cannot be read: {error.strerror}"
    facts = wire.RequestFactsView(sample.content_type, "", b"", False, wire.EMPTY_HEADERS)
    limit = load.max_request_size
    requests = [Request(facts, b"warmup-%d" % number, bytearray(body), limit) for number in range(1, size + 1)]
    for outcome, answer in zip(*stages.run(Requests.made(requests)), strict=True):
        if isinstance(answer, Stream):
            outcome, answer = answer.drain(len)
        if outcome.error or outcome.status >= 400:
            said = str(bytes(answer), "utf-8", "replace") if outcome.error else ""
            return f"it is answered with {outcome.status}{': ' if said else ''}{said}"
    return ""


def _run_shape(stages: Stages, sample: WarmupSample, size: int) -> str:
    if not isinstance(stages, RequestStages):
        return "a shape needs a request-style handler; give a file"
    try:
        batch = stages.move(stages.handler.collate([_item(sample) for _ in range(size)]))
        outputs = stages.handler.inference(batch)
        if not isinstance(outputs, Iterator):
            return miscount_of(batch, outputs, size)
        faults = [miscount(step, size, "a step of inference") for step in outputs]
        return next(filter(None, faults), "")
    except Exception as error:
        traceback.print_exc()
        return f"the handler raised {type(error).__name__}: {error}"


def _item(sample: WarmupSample) -> Any:
    """Zeros: a tensor where the handler has imported torch, else an array."""
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        return torch.zeros(sample.shape, dtype=getattr(torch, sample.dtype))
    numpy = importlib.import_module("numpy")
    if sample.dtype == "bfloat16":
        raise ModelLoadError("bfloat16 needs a handler that imports torch")
    return numpy.zeros(sample.shape, dtype=sample.dtype)
