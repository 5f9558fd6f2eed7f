"""A request on its way through the queue and a worker. Front end's process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from mms.errors import MMSError
from mms.wire import RequestFacts

if TYPE_CHECKING:
    from mms.workers.batching import BatchQueue
    from mms.workers.inflight import Frame


class Caller(Protocol):
    """Who waits for a job: told exactly once, by one of these two."""

    def answer(self, status: int, head: bytes, body: bytes | memoryview) -> None: ...

    def fail(self, error: MMSError) -> None: ...


class Work(Protocol):
    """What is under way for a caller."""

    def cancel(self) -> None:
        """The caller waits for it no longer."""
        ...


class Job(msgspec.Struct, eq=False):
    """One request on its way through the queue and a worker; `parts` are the pieces in which its body arrived.

    A Struct, because one is made per request and its constructor runs in C.
    """

    id: int
    facts: RequestFacts
    request_id: bytes
    parts: list[bytes]
    size: int
    caller: Caller
    arrived: float
    queue: BatchQueue | None = None
    taken: float = 0.0
    frame: Frame | None = None
    attempts: int = 0
    settled: bool = False

    def cancel(self) -> None:
        """Nobody waits for the answer any more: if the job still waits it never runs, else its answer is dropped."""
        if not self.settled:
            self.settled = True
            queue = self.queue
            if queue is not None:
                queue.cancelled += 1
                if not self.taken:
                    queue.depth -= 1
                    queue.bytes -= self.size
                    self.parts.clear()

    def fail(self, error: MMSError) -> None:
        if not self.settled:
            self.settled = True
            self.caller.fail(error)
