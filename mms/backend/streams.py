"""Answers that come in chunks: what generators of handlers yield, and how a batch of them is driven. Worker process."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from mms import sharedpage, wire
from mms.backend.answers import Answer, Answers, Body, Streamed, answer, body_of, columns, json_of
from mms.errors import HandlerError
from mms.handler import Request, Response
from mms.wire import Outcome

EVENTS = "text/event-stream"
_LINES = "application/x-ndjson"
_BODILESS = (204, 304)


class Replies(Protocol):
    """Where frames go (Channel)."""

    @property
    def gone(self) -> bool:
        """Whether nobody is there to read them."""
        ...

    def reply(self, ids: list[int], answers: Answers, batches: list[wire.BatchTimes]) -> None: ...

    def write(self, kind: int, head: object, payloads: list[Body], size: int) -> None: ...


class Stream:
    """One request's answer that comes in chunks."""

    __slots__ = ("_chunks", "_encode", "_fail", "_limit", "_request", "_response", "outcome")

    def __init__(
        self,
        chunks: Iterator[Any],
        request: Request,
        response: Response,
        limit: int,
        fail: Callable[[BaseException], Answer],
    ) -> None:
        """`response` is what the handler has set for the answer; `fail` makes an outcome of what was raised."""
        self.outcome: Outcome | None = None  # once the first chunk is made, or it is known that there is none
        self._chunks = chunks
        self._request = request
        self._response = response
        self._limit = limit
        self._fail = fail
        self._encode: Callable[[Any], Body] = _as_is

    def step(self) -> Body | None:
        """The next chunk, None when there is none yet. Raises StopIteration at the end, and whatever fails."""
        value = next(self._chunks)
        if value is None:
            return None
        if isinstance(value, BaseException):
            raise value
        if self.outcome is None:
            self._begin(value)
        if isinstance(value, Response):
            value = value.body
        try:
            chunk = self._encode(value)
        except Streamed:
            raise HandlerError("a chunk of the handler's answer is an iterator itself") from None
        if len(chunk) > self._limit:
            raise HandlerError(f"a chunk of {len(chunk)} bytes is over max_response_size ({self._limit} bytes)")
        return chunk

    def end(self, error: BaseException | None = None) -> Answer:
        """Its outcome: that of `error`, or else of what was sent until now. Lets the generator clean up."""
        self.close()
        if error is not None:
            return self._fail(error)
        try:
            if self.outcome is None:
                self._begin(b"")
        except HandlerError as refused:
            return self._fail(refused)
        assert self.outcome is not None
        return self.outcome, b""

    def drain(self, take: Callable[[Body], object]) -> Answer:
        """Run it to its end by itself, each chunk to `take`; returns how it ended."""
        while True:
            try:
                chunk = self.step()
            except StopIteration:
                return self.end()
            except BaseException as error:
                return self.end(error)
            take(chunk or b"")

    def close(self) -> None:
        """Let the generator clean up. Never raises."""
        close = getattr(self._chunks, "close", None)
        if close is not None:
            try:
                close()
            except BaseException:
                text = traceback.format_exc()
                sys.stderr.write(f"request {self._request.id}: closing its generator failed\n{text}")

    def _begin(self, first: Any) -> None:
        """Status, headers and form of the chunks, by what the handler has set, the client accepts and comes first."""
        response = self._response
        status, kind, headers = response.status, response.content_type, dict(response.headers)
        if isinstance(first, Response):
            status, kind = first.status, first.content_type or kind
            headers |= first.headers
            first = first.body
        for name in [name for name in headers if isinstance(name, str) and name.lower() == "content-type"]:
            kind = headers.pop(name)
        if status in _BODILESS:
            raise HandlerError(f"the handler set status {status} for a stream; such an answer has no body")
        text = isinstance(first, str)
        if kind != EVENTS and _accepts_events(self._request):
            kind = EVENTS
            self._encode = _event
        elif not text and not isinstance(first, bytes | bytearray | memoryview):
            kind = kind or _LINES
            self._encode = _line
        self.outcome = answer("" if text else b"", status, kind, headers, 0)[0]


class Steps:
    """An `inference` that yields: per step one output per item, which the items' streams take in turn."""

    def __init__(self, generator: Iterator[Any], count: int, check: Callable[[Any, int, str], str]) -> None:
        """Takes the first step at once. Raises what `inference` raises, or HandlerError by `check`, as for a list."""
        self._generator = generator
        self._count = count
        self._check = check
        self._live = count
        self._outputs: Any = ()
        self._end: BaseException | None = None
        self.taken = 0
        self.advance()
        if self._end is not None and not isinstance(self._end, StopIteration):
            self._close()
            raise self._end

    def items(self, postprocess: Callable[[Any], Any]) -> list[Item]:
        return [Item(self, place, postprocess) for place in range(self._count)]

    def advance(self) -> None:
        """The next step of all items; one that has failed or ended stays so."""
        try:
            self._outputs = next(self._generator)
            fault = self._check(self._outputs, self._count, "a step of inference")
            if fault:
                raise HandlerError(fault)
        except BaseException as error:
            self._end = error
        self.taken += 1

    def output(self, place: int, step: int) -> Any:
        if step == self.taken:
            self.advance()
        if self._end is not None:
            raise self._end
        return self._outputs[place]

    def leave(self) -> None:
        """One item needs no more; the last one closes the generator."""
        self._live -= 1
        if not self._live:
            self._close()

    def _close(self) -> None:
        close = getattr(self._generator, "close", None)
        if close is not None:
            close()


class Item:
    """One item's part of an `inference` that yields. An iterator with `close`, like a generator."""

    def __init__(self, steps: Steps, place: int, postprocess: Callable[[Any], Any]) -> None:
        self._steps: Steps | None = steps
        self._place = place
        self._postprocess = postprocess
        self._step = 0

    def __iter__(self) -> Item:
        return self

    def __next__(self) -> Any:
        if self._steps is None:
            raise StopIteration
        self._step += 1
        output = self._steps.output(self._place, self._step - 1)
        return None if output is None else self._postprocess(output)

    def close(self) -> None:
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.leave()


class Streams:
    """Drives the streams of a batch round robin: one chunk of each that is live per round, one frame per round.

    `beat` is called before each round: the time limit of an answer counts anew.
    """

    def __init__(self, channel: Replies, page: Any, beat: Callable[[], object]) -> None:
        self._channel = channel
        self._cancelled = sharedpage.Cancelled(page)
        self._beat = beat

    def run(self, ids: Sequence[int], answers: Answers, times: Callable[[], wire.BatchTimes]) -> None:
        """Send all answers of a batch: those that are whole at once, the streams as they come.

        Returns when the last has ended. `times` is asked for the times of the whole batch then.
        """
        live: dict[int, Stream] = {}
        ended: list[tuple[int, Answer]] = []
        for id, outcome, body in zip(ids, *answers, strict=True):
            if type(body) is Stream:
                live[id] = body
            else:
                ended.append((id, (outcome, body)))
        try:
            self._finish(ended, [])
            self._drive(live, times)
        finally:
            for stream in live.values():  # of a front end that has gone
                stream.close()

    def _drive(self, live: dict[int, Stream], times: Callable[[], wire.BatchTimes]) -> None:
        while live:
            self._beat()
            ended = self._close_cancelled(live)
            chunks: list[tuple[int, Body]] = []
            first: dict[int, Outcome] = {}
            for id, stream in live.items():
                begun = stream.outcome is not None
                try:
                    chunk = stream.step()
                except StopIteration:
                    ended.append((id, stream.end()))
                except BaseException as error:
                    ended.append((id, stream.end(error)))
                else:
                    if chunk is not None:
                        chunks.append((id, chunk))
                        if not begun and stream.outcome is not None:
                            first[id] = stream.outcome
            for id, _ in ended:
                live.pop(id, None)
            if chunks:
                bodies = [chunk for _, chunk in chunks]
                sizes = list(map(len, bodies))
                head = wire.Chunks([id for id, _ in chunks], sizes, first)
                self._channel.write(wire.STREAM, head, bodies, sum(sizes))
            elif self._channel.gone:
                raise BrokenPipeError
            self._finish(ended, [] if live else [times()])

    def _finish(self, ended: list[tuple[int, Answer]], batches: list[wire.BatchTimes]) -> None:
        if ended:
            self._channel.reply([id for id, _ in ended], columns([one for _, one in ended]), batches)

    def _close_cancelled(self, live: dict[int, Stream]) -> list[tuple[int, Answer]]:
        """Take out the streams whose clients have left; their ends."""
        return [(id, live.pop(id).end()) for id in live.keys() & self._cancelled.look()]


def _accepts_events(request: Request) -> bool:
    accepted = request.headers.get("accept", "").lower().split(",")
    return any(entry.partition(";")[0].strip() == EVENTS for entry in accepted)


def _as_is(value: Any) -> Body:
    return body_of(value)[0]


def _line(value: Any) -> Body:
    return json_of(value) + b"\n"


def _event(value: Any) -> Body:
    """One server-sent event: a chunk's own line ends would end the event, so each of its lines is a `data` line."""
    text = str(_as_is(value), "utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    return "".join([f"data: {line}\n" for line in text.split("\n")] + ["\n"]).encode()
