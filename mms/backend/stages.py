"""How a batch passes through a handler, in both styles: a bad request fails alone. Runs in the worker process."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mms.backend.answers import Answer, answer, failure
from mms.errors import HandlerError, MMSError
from mms.handler import Context, Handler, PredictionError, Request

_now = time.perf_counter


class Stages(Protocol):
    """One loaded handler."""

    style: str

    def run(self, requests: list[Request]) -> list[Answer]:
        """One outcome per request, in order. Never raises."""
        ...

    def take_times(self) -> tuple[float, float, float]:
        """Seconds spent in preprocess, inference and postprocess since the last call (zeros in batch style)."""
        ...


class BatchStages:
    """`handle(data, context)`, as in MMS and TorchServe: a list of dicts in, a list of results out."""

    style = "batch"

    def __init__(self, handle: Callable[[Any, Context], Any], context: Context, *, isolate: bool, limit: int) -> None:
        self._handle = handle
        self._context = context
        self._isolate = isolate
        self._limit = limit

    def run(self, requests: list[Request]) -> list[Answer]:
        rows, good, outcomes = [], [], _Outcomes(requests)
        for index, request in enumerate(requests):
            try:
                rows.append(request.row())
                good.append(index)
            except MMSError as error:
                outcomes[index] = failure(error)
        if good:
            self._call(requests, rows, good, outcomes)
        return outcomes.all()

    def take_times(self) -> tuple[float, float, float]:
        return 0.0, 0.0, 0.0

    def _call(self, requests: list[Request], rows: list[Any], good: list[int], outcomes: _Outcomes) -> None:
        batch = [requests[index] for index in good] if len(good) < len(requests) else requests
        self._context.begin_batch(batch)
        try:
            results = self._handle(rows, self._context)
        except BaseException as error:
            if self._isolate and len(good) > 1:
                half = len(good) // 2
                self._call(requests, rows[:half], good[:half], outcomes)
                self._call(requests, rows[half:], good[half:], outcomes)
            else:
                _fail(outcomes, good, error, batch)
            return
        fault = _miscounted(results, len(good), "handle")
        if fault:
            _fail(outcomes, good, HandlerError(fault), batch)
            return
        for position, (index, result) in enumerate(zip(good, results, strict=True)):
            head = self._context.response_head(position)
            if head is None:
                outcomes[index] = _outcome(result, requests[index], self._limit)
            else:
                outcomes[index] = _outcome(
                    result, requests[index], self._limit, head.status, head.content_type, head.headers
                )


class RequestStages:
    """A Handler: preprocess and postprocess per request, inference per batch."""

    style = "request"

    def __init__(self, handler: Handler, context: Context, *, isolate: bool, limit: int) -> None:
        self._handler = handler
        self._context = context
        self._isolate = isolate
        self._limit = limit
        self._times = [0.0, 0.0, 0.0]

    def run(self, requests: list[Request]) -> list[Answer]:
        self._context.begin_batch(requests)
        outcomes = _Outcomes(requests)
        begun = _now()
        items, good = [], []
        for index, request in enumerate(requests):
            try:
                items.append(self._handler.preprocess(request))
                good.append(index)
            except BaseException as error:
                _fail(outcomes, [index], error, [request])
        prepared = _now()
        outputs = self._infer(items, good, requests, outcomes) if good else []
        inferred = _now()
        for index, output in outputs:
            try:
                result = self._handler.postprocess(output)
            except BaseException as error:
                _fail(outcomes, [index], error, [requests[index]])
            else:
                outcomes[index] = _outcome(result, requests[index], self._limit)
        times = self._times
        times[0] += prepared - begun
        times[1] += inferred - prepared
        times[2] += _now() - inferred
        return outcomes.all()

    def take_times(self) -> tuple[float, float, float]:
        preprocess, inference, postprocess = self._times
        self._times = [0.0, 0.0, 0.0]
        return preprocess, inference, postprocess

    def _infer(
        self, items: list[Any], good: list[int], requests: list[Request], outcomes: _Outcomes
    ) -> list[tuple[int, Any]]:
        try:
            outputs = self._handler.inference(self._handler.collate(items))
            fault = _miscounted(outputs, len(items), "inference")
            if fault:
                raise HandlerError(fault)
            return list(zip(good, outputs, strict=True))
        except BaseException as error:
            if self._isolate and len(good) > 1:
                half = len(good) // 2
                return self._infer(items[:half], good[:half], requests, outcomes) + self._infer(
                    items[half:], good[half:], requests, outcomes
                )
            _fail(outcomes, good, error, [requests[index] for index in good])
            return []


class _Outcomes(list[Answer | None]):
    """One place per request, to be filled in any order."""

    def __init__(self, requests: Sequence[Request]) -> None:
        super().__init__([None] * len(requests))

    def all(self) -> list[Answer]:
        return self  # type: ignore[return-value]  # every index is good or failed, so every place is filled


def _outcome(
    result: Any, request: Request, limit: int, status: int = 200, content_type: str = "", headers: Any = ()
) -> Answer:
    try:
        if isinstance(result, BaseException):
            return failure(_client_error(result, [request]))
        return answer(result, status, content_type, dict(headers), limit)
    except MMSError as error:
        return failure(error)


def _miscounted(results: Any, wanted: int, function: str) -> str:
    """What is wrong with the shape of a batch's results, or nothing."""
    if isinstance(results, list) or (function == "inference" and hasattr(results, "__len__") and not _is_text(results)):
        if len(results) == wanted:
            return ""
        return f"{function} returned {len(results)} results for {wanted} requests; one per request is needed"
    return f"{function} returned {type(results).__name__}; a list with one result per request ({wanted}) is needed"


def _is_text(value: Any) -> bool:
    return isinstance(value, str | bytes | bytearray | dict)


def _fail(outcomes: _Outcomes, indexes: list[int], error: BaseException, requests: Sequence[Request]) -> None:
    answered = failure(_client_error(error, requests))
    for index in indexes:
        outcomes[index] = answered


def _client_error(error: BaseException, requests: Sequence[Request]) -> MMSError | PredictionError:
    """What clients may read of an exception: all of ours and of PredictionError, of others only the class.

    The traceback goes to standard error, which is the model's log.
    """
    if isinstance(error, MMSError) and not isinstance(error, HandlerError):
        return error
    if isinstance(error, PredictionError):
        return error
    ids = ", ".join(request.id for request in requests)
    if isinstance(error, HandlerError):
        sys.stderr.write(f"requests {ids}: {error.message}\n")
        return error
    text = "".join(traceback.format_exception(error))
    sys.stderr.write(f"requests {ids}: the handler failed\n{text}")
    sys.stderr.flush()
    if isinstance(error, MemoryError):
        return HandlerError("out of memory", status=507)
    return HandlerError(f"the handler raised {type(error).__name__}; the traceback is in the model's log")
