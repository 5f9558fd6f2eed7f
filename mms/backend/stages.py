"""How a batch passes through a handler, in both styles: a bad request fails alone. Runs in the worker process."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import msgspec

from mms.backend import device
from mms.backend.answers import (
    PLAIN_BYTES,
    Answer,
    Answers,
    Streamed,
    answer,
    columns,
    failure,
    is_error_status,
    plain_bytes,
)
from mms.backend.lengths import miscount, miscount_of, tell_lengths
from mms.backend.streams import Steps, Stream
from mms.errors import HandlerError, MMSError
from mms.handler import Context, Handler, PredictionError, Request, Requests, Response
from mms.handler_metrics import Metrics
from mms.wire import Outcome

_now = time.perf_counter
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Stages(Protocol):
    """One loaded handler."""

    style: str
    streams: bool  # whether it has ever answered with a stream
    metrics: Metrics  # the handler's own

    @property
    def context(self) -> Context: ...

    @property
    def handler(self) -> Any:
        """The object that `initialize` was called on; None if the handler is a function."""
        ...

    def run(self, requests: Requests) -> Answers:
        """One answer per request, in order, or with `streams` a Stream that is to be driven. Never raises."""
        ...

    def take_times(self) -> tuple[float, float, float]:
        """Seconds spent in preprocess, inference and postprocess since the last call (zeros in batch style)."""
        ...

    def for_thread(self) -> Stages:
        """The same handler for a thread of its own."""
        ...


class BatchStages:
    """`handle(data, context)`, as in MMS and TorchServe: a list of dicts in, a list of results out."""

    style = "batch"

    @property
    def context(self) -> Context:
        return self._context

    @property
    def handler(self) -> Any:
        return getattr(self._handle, "__self__", None)

    def __init__(self, handle: Callable[[Any, Context], Any], context: Context, *, isolate: bool, limit: int) -> None:
        self.streams = False
        self._handle = handle
        self._context = context
        self.metrics = context.metrics
        self._isolate = isolate
        self._limit = limit

    def for_thread(self) -> BatchStages:
        return BatchStages(self._handle, self._context.for_thread(), isolate=self._isolate, limit=self._limit)

    def run(self, requests: Requests) -> Answers:
        try:
            data = requests.rows()
        except MMSError:
            return self._run_sound(requests)
        return self._call(requests, data)

    def _run_sound(self, requests: Requests) -> Answers:
        """As run, when a request cannot be decoded: it fails alone, the others make up the batch."""
        failed: dict[int, Answer] = {}
        rows, good = [], []
        for index, request in enumerate(requests):
            try:
                rows.append(request.row())
                good.append(request)
            except MMSError as error:
                failed[index] = failure(error)
        answers = zip(*self._call(Requests.made(good), rows), strict=True) if good else iter(())
        return columns([failed[index] if index in failed else next(answers) for index in range(len(requests))])

    def take_times(self) -> tuple[float, float, float]:
        return 0.0, 0.0, 0.0

    def _call(self, requests: Requests, rows: list[Any]) -> Answers:
        context = self._context
        context.begin_batch(requests)
        try:
            results = self._handle(rows[:], context)  # it may take them out one by one
        except BaseException as error:
            if not self._isolate or len(rows) == 1:
                return columns([failure(client_error(error, requests))] * len(rows))
        else:
            return self._answers(results, len(rows), requests)
        half = len(rows) // 2  # here, not above: what was raised keeps all that the batch has allocated
        one, other = self._call(requests[:half], rows[:half]), self._call(requests[half:], rows[half:])
        return one[0] + other[0], one[1] + other[1]

    def _answers(self, results: Any, count: int, requests: Requests) -> Answers:
        if not isinstance(results, list) or len(results) != count:
            failed = failure(client_error(HandlerError(miscount(results, count, "handle")), requests))
            return columns([failed] * count)
        if not self._context.responses:
            if (answers := plain_bytes(results, self._limit)) is not None:
                return answers
            try:
                return columns([answer(result, 200, "", _NO_HEADERS, self._limit) for result in results])
            except (MMSError, Streamed):
                pass
        return columns([self._answer(index, result, requests) for index, result in enumerate(results)])

    def _answer(self, index: int, result: Any, requests: Requests) -> Answer:
        head = self._context.responses.get(index)
        try:
            if head is None:
                return one_answer(result, requests[index], self._limit)
            return one_answer(result, requests[index], self._limit, head.status, head.content_type, head.headers)
        except Streamed as streamed:
            self.streams = True
            return stream(streamed.response, requests[index], self._limit)


class Prepared(msgspec.Struct, eq=False):
    """A request after `preprocess`: the item for the batch and its bucket, or the answer if it has failed."""

    request: Request
    item: Any
    bucket: Hashable = None
    answer: Answer | None = None


class RequestStages:
    """A Handler: preprocess and postprocess per request, inference per batch of one bucket.

    `move` brings what `collate` returns to the device.
    """

    style = "request"

    @property
    def context(self) -> Context:
        return self._context

    def __init__(self, handler: Handler, context: Context, *, isolate: bool, limit: int) -> None:
        self.streams = False
        self.handler = handler
        self._context = context
        self.metrics = context.metrics
        self._isolate = isolate
        self._limit = limit
        self._times = [0.0, 0.0, 0.0]
        self._one_bucket = getattr(handler.bucket_by, "__func__", None) is Handler.bucket_by
        self.move = device.lane("cpu").move

    def for_thread(self) -> RequestStages:
        return RequestStages(self.handler, self._context.for_thread(), isolate=self._isolate, limit=self._limit)

    def run(self, requests: Requests) -> Answers:
        self._context.begin_batch(requests)
        made = requests.all()
        begun = _now()
        items: list[Any] = []
        outputs: list[Any] = []
        prepared: list[Prepared] | None = None  # while all is well with all of them, none is looked at by itself
        if self._one_bucket:
            preprocess, failed = self.handler.preprocess, None
            try:
                for request in made:
                    items.append(preprocess(request))
            except BaseException as error:
                failed = failure(client_error(error, [made[len(items)]]))
            if failed is not None:
                prepared = list(map(Prepared, made, items))
                prepared.append(Prepared(made[len(items)], None, None, failed))
                prepared += map(self.prepare, made[len(prepared) :])
        else:
            prepared = list(map(self.prepare, made))
        ready = _now()
        if prepared is None:
            divide = False
            try:
                outputs, steps = self._outputs(items[:])
                if steps is not None:
                    prepared = list(map(Prepared, made, items))
                    self._take_steps(steps, prepared)
            except BaseException as error:
                prepared = list(map(Prepared, made, items))
                divide = not self._fail(prepared, error)
            items = []  # they may be large
            if prepared is not None and divide:
                self._divide(prepared)
        else:
            buckets: dict[Hashable, list[Prepared]] = {}
            for one in prepared:
                if one.answer is None:
                    buckets.setdefault(one.bucket, []).append(one)
            for batch in buckets.values():
                self.infer(batch)
        inferred = _now()
        answers = self._answers(outputs, made) if prepared is None else columns(list(map(self.finish, prepared)))
        times = self._times
        times[0] += ready - begun
        times[1] += inferred - ready
        times[2] += _now() - inferred
        return answers

    def take_times(self) -> tuple[float, float, float]:
        preprocess, inference, postprocess = self._times
        self._times = [0.0, 0.0, 0.0]
        return preprocess, inference, postprocess

    def prepare(self, request: Request) -> Prepared:
        """Never raises."""
        handler = self.handler
        try:
            item = handler.preprocess(request)
            if self._one_bucket:
                return Prepared(request, item)
            bucket = handler.bucket_by(item)
            try:
                hash(bucket)
            except TypeError:
                kind = type(bucket).__name__
                raise HandlerError(
                    f"bucket_by returned a {kind}, which has no hash; return a tuple, a number or a text"
                ) from None
        except BaseException as error:
            return Prepared(request, None, None, failure(client_error(error, [request])))
        return Prepared(request, item, bucket)

    def infer(self, batch: list[Prepared]) -> None:
        """Each item becomes its output; those that fail get their answer. Never raises."""
        try:
            outputs, steps = self._outputs([one.item for one in batch])
            if steps is not None:
                self._take_steps(steps, batch)
                return
            for one, output in zip(batch, outputs, strict=True):
                one.item = output
            return
        except BaseException as error:
            if self._fail(batch, error):
                return
        self._divide(batch)  # here, not above: what was raised keeps all that the batch has allocated

    def finish(self, one: Prepared) -> Answer:
        """The answer of a request that has its output, or has failed. Never raises."""
        if one.answer is not None:
            return one.answer
        try:
            result = self.handler.postprocess(one.item)
        except BaseException as error:
            return self._answer(error, one.request)
        return self._answer(result, one.request)

    def _outputs(self, items: list[Any]) -> tuple[list[Any], Iterator[Any] | None]:
        """What `inference` makes of a batch; nothing yet, and its steps, where it yields. Raises whatever fails."""
        count = len(items)
        collated = self.handler.collate(items)
        try:
            outputs = self.handler.inference(self.move(collated))
        except BaseException:
            tell_lengths(collated, count)
            raise
        if type(outputs) is list and len(outputs) == count:
            return outputs[:], None  # it is the handler's, which may keep it
        fault = miscount_of(collated, outputs, count)
        if not fault:
            return [output for _, output in zip(items, outputs, strict=True)], None
        if not hasattr(outputs, "__next__"):
            raise HandlerError(fault)
        return [], outputs

    def _fail(self, batch: list[Prepared], error: BaseException) -> bool:
        """All of a batch get the answer that they have failed, unless parts of it are to be tried; then False."""
        if self._isolate and len(batch) > 1:
            return False
        failed = failure(client_error(error, [one.request for one in batch]))
        for one in batch:
            one.answer = failed
        return True

    def _divide(self, batch: list[Prepared]) -> None:
        half = len(batch) // 2
        self.infer(batch[:half])
        self.infer(batch[half:])

    def _take_steps(self, outputs: Iterator[Any], batch: list[Prepared]) -> None:
        """`inference` yields: each item is answered with a stream. Raises as the first step does."""
        steps = Steps(outputs, len(batch), miscount)
        self.streams = True
        for one, part in zip(batch, steps.items(self.handler.postprocess), strict=True):
            one.answer = stream(Response(part), one.request, self._limit)

    def _answers(self, outputs: list[Any], requests: list[Request]) -> Answers:
        """Those of a batch that was well until now. Each is made before the next `postprocess`, which may use
        again what the last one has returned.
        """
        postprocess, limit = self.handler.postprocess, self._limit
        outcomes: list[Outcome] = []
        bodies: list[Any] = []
        for output, request in zip(outputs, requests, strict=True):
            try:
                body = postprocess(output)
            except BaseException as error:
                outcome, body = self._answer(error, request)
            else:
                if type(body) is bytes and len(body) <= limit:
                    outcome = PLAIN_BYTES
                else:
                    outcome, body = self._answer(body, request)
            outcomes.append(outcome)
            bodies.append(body)
        return outcomes, bodies

    def _answer(self, result: Any, request: Request) -> Answer:
        if type(result) is bytes and len(result) <= self._limit:
            return PLAIN_BYTES, result
        try:
            return one_answer(result, request, self._limit)
        except Streamed as streamed:
            self.streams = True
            return stream(streamed.response, request, self._limit)


def one_answer(
    result: Any,
    request: Request,
    limit: int,
    status: int = 200,
    content_type: str = "",
    headers: Mapping[str, str] = _NO_HEADERS,
) -> Answer:
    """The outcome of one request whose result may be an exception. Raises nothing but Streamed."""
    try:
        if isinstance(result, BaseException):
            return failure(client_error(result, [request]))
        return answer(result, status, content_type, headers, limit)
    except MMSError as error:
        return failure(client_error(error, [request]))


def stream(response: Response, request: Request, limit: int) -> Answer:
    """An answer whose body is an iterator of chunks."""
    fail = partial(_failed, request)
    return PLAIN_BYTES, Stream(response.body, request, response, limit, fail)


def _failed(request: Request, error: BaseException) -> Answer:
    return failure(client_error(error, [request]))


def client_error(error: BaseException, requests: Sequence[Request]) -> MMSError | PredictionError:
    """What clients may read of an exception: all of ours and of PredictionError, of others only the class.

    The traceback goes to standard error, which is the model's log.
    """
    if isinstance(error, PredictionError) and not is_error_status(error.status):
        fault = f"the handler set status {error.status!r} in a PredictionError; it must be a number from 400 to 599"
        error = HandlerError(fault)
    if isinstance(error, PredictionError) or (isinstance(error, MMSError) and not isinstance(error, HandlerError)):
        return error
    ids = ", ".join(request.id for request in requests)
    if isinstance(error, HandlerError):
        sys.stderr.write(f"requests {ids}: {error.message}\n")
        return error
    text = "".join(traceback.format_exception(error))
    sys.stderr.write(f"requests {ids}: the handler failed\n{text}")
    sys.stderr.flush()
    if isinstance(error, RuntimeError) and device.is_lost():
        sys.stderr.write("the GPU does nothing any more for this process, which ends\n")
        sys.stderr.flush()
        os._exit(70)  # EX_SOFTWARE: each further request would fail as well
    if device.is_out_of_memory(error):
        return HandlerError("out of memory", status=507)
    return HandlerError(f"the handler raised {type(error).__name__}; the traceback is in the model's log")
