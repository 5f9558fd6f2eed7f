"""A request on its way through the queue and a worker. Front end's process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from mms.errors import MMSError
from mms.structs import quickly_set
from mms.wire import RequestFacts

if TYPE_CHECKING:
    from mms.workers.batching import BatchQueue
    from mms.workers.inflight import Frame


class Caller(Protocol):
    """Who waits for a job: told its outcome exactly once, by `answer` or `fail`.

    If a kind of callers has `answer_all(callers, status, head, bodies)`, which never raises, those of one frame that
    get the same answer but for the body are told together.
    """

    def answer(self, status: int, head: bytes, body: bytes | memoryview) -> None: ...

    def fail(self, error: MMSError) -> None: ...

    def begin(self, status: int, head: bytes) -> StreamCaller:
        """The answer comes in pieces. From now on the caller is the one that is returned."""
        ...


class StreamCaller(Protocol):
    """Who takes an answer in pieces: `answer` is its end, and repeats what `begin` was told; `fail` cuts it."""

    def chunk(self, data: bytes) -> None: ...

    def answer(self, status: int, head: bytes, body: bytes | memoryview) -> None: ...

    def fail(self, error: MMSError) -> None: ...


class Shared(Protocol):
    """The callers of a job that several wait for, each with a deadline of its own."""

    @property
    def since(self) -> float:
        """When the first of those who wait came."""
        ...

    def late(self, now: float, longest: float, error: MMSError) -> bool:
        """Tell those who have waited for `longest` seconds `error`, unless that are all; whether it is all."""
        ...


class Work(Protocol):
    """What is under way for a caller."""

    def cancel(self) -> None:
        """The caller waits for it no longer."""
        ...


class Terms(msgspec.Struct, frozen=True):
    """On which terms a request waits; those without any wait in the plain way. One object for all that say the same.

    `level` counts from 0, the highest priority; `timeout` is in seconds from the request's arrival, 0 for none.
    """

    level: int = 0
    timeout: float = 0.0


@quickly_set
class Job(msgspec.Struct, eq=False):
    """One request on its way through the queue and a worker; `parts` are the pieces in which its body arrived.

    A Struct, because one is made per request and its constructor runs in C.
    """

    id: int
    facts: RequestFacts
    request_id: bytes
    parts: list[bytes | memoryview]
    size: int
    caller: Caller | StreamCaller
    arrived: float
    terms: Terms | None = None
    queue: BatchQueue | None = None
    frame: Frame | None = None  # in which it was last sent; none while it waits
    attempts: int = 0
    settled: bool = False
    stream: StreamCaller | None = None  # the caller, once the answer has begun to stream
    shared: Shared | None = None  # set when several may wait for it
    abandon: Callable[[int], None] | None = None  # tells the worker, which has begun to stream the answer, to stop

    @property
    def timeout(self) -> float:
        """Seconds within which its own deadline lies; 0 when it has none."""
        return self.terms.timeout if self.terms is not None else 0.0

    @property
    def taken(self) -> float:
        """When it was sent to a worker; 0 while it waits."""
        return self.frame.taken if self.frame is not None else 0.0

    @property
    def streams(self) -> bool:
        """Whether part of the answer may have left: then it cannot be had again from another worker."""
        return self.abandon is not None

    def cancel(self) -> None:
        """Nobody waits for the answer any more: if the job still waits it never runs, else its answer is dropped."""
        if not self.settled:
            self.settled = True
            queue = self.queue
            if queue is not None:
                queue.cancelled += 1
                if self.frame is None:
                    queue.drop(self)
                    self.parts.clear()
            self.recall()

    def recall(self) -> None:
        """Nobody waits for it any more: its worker need not begin it, or go on to stream its answer."""
        frame = self.frame
        if self.abandon is not None:
            self.abandon(self.id)
        elif frame is not None and frame.cancel is not None:
            frame.cancel(self.id)

    def fail(self, error: MMSError) -> None:
        if not self.settled:
            self.settled = True
            self.caller.fail(error)
