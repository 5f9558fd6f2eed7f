"""The answers of one model version that are kept for identical requests, and what joins such requests in flight.

Front end's process, event loop. A request that is in flight is run by a job whose caller is a Flight; it goes on as
long as anybody waits for it.
"""

from __future__ import annotations

import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import cast

import msgspec

from mms.caching import CacheSettings
from mms.errors import MMSError
from mms.metrics import CacheFacts, VersionMetrics
from mms.workers.job import Caller, Job, StreamCaller, Terms, Work

log = logging.getLogger("mms.cache")

MAX_BODY = 1 << 20  # a larger one is passed by: to hash it would hold up the event loop for more than a millisecond
OVERHEAD = 512  # bytes of memory that a kept answer takes beside its head and body
HIT = b"x-mms-cache: hit\r\n"
JOINED = b"x-mms-cache: joined\r\n"

_NOT_KEPT = re.compile(rb"^(?:set-cookie:|cache-control:.*\b(?:no-store|private)\b)", re.IGNORECASE | re.MULTILINE)
_EVENTS = b"text/event-stream"
_encode = msgspec.msgpack.Encoder().encode


class _Done:
    """The work for a request that was answered at once."""

    def cancel(self) -> None:
        pass


DONE = _Done()


class Kept(msgspec.Struct, eq=False, gc=False):
    """An answer with status 200, as those get it who come later; until `until` (monotonic seconds)."""

    head: bytes
    body: bytes
    until: float
    size: int


class AnswerCache:
    """Least recently used answers go first. `clock` counts monotonic seconds, as `Job.arrived` does."""

    def __init__(
        self, settings: CacheSettings, metrics: VersionMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings = settings
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self.joined = 0
        self.passed = 0  # requests with too large a body
        self.evictions = 0
        self.cancelled = 0  # requests whose client has left others waiting for the same answer
        self.metrics = metrics
        self._clock = clock
        self._names = [name.encode() for name in settings.headers]
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()
        self._flights: dict[tuple[bytes, Terms | None], Flight] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def submit(self, job: Job, run: Callable[[Job], Work], *, serves: bool) -> Work:
        """Answer the job, let it wait for one like it, or `run` it. While the version does not serve, nothing is given
        from what is kept.
        """
        if job.size > MAX_BODY:
            self.passed += 1
            return run(job)
        key = self._key(job)
        flight = self._flights.get((key, job.terms))  # nobody waits on another's deadline or priority
        if flight is not None:
            self.joined += 1
            job.parts.clear()
            return flight.join(job)
        kept = self._find(key, job.arrived) if serves else None
        if kept is not None:
            self.hits += 1
            self.metrics.requests[200] += 1
            job.caller.answer(200, kept.head, kept.body)
            return DONE
        flight = Flight(self, key, job)
        run(job)
        self.misses += 1
        self._flights[flight.place] = flight
        return flight.leader

    def clear(self) -> int:
        """Forget all answers, and do not keep those that are under way; how many there were."""
        count = len(self._kept)
        self._kept.clear()
        self._flights.clear()
        self.bytes = 0
        return count

    def land(self, flight: Flight) -> bool:
        """The flight is over: nobody joins it any more. False when what it brings is out of date already."""
        if self._flights.get(flight.place) is not flight:
            return False
        del self._flights[flight.place]
        return True

    def keep(self, key: bytes, head: bytes, body: bytes | memoryview) -> None:
        """Keep an answer, if it fits and may be kept."""
        head += HIT
        size = len(head) + len(body) + OVERHEAD
        if size > self.settings.size or _NOT_KEPT.search(head):
            return
        self._drop(key)
        self._kept[key] = Kept(head, bytes(body), self._clock() + self.settings.ttl_s, size)
        self.bytes += size
        while self.bytes > self.settings.size:
            self._drop(next(iter(self._kept)))
            self.evictions += 1

    def facts(self) -> CacheFacts:
        """For the metrics collector."""
        results = {"hit": self.hits, "joined": self.joined, "miss": self.misses, "passed": self.passed}
        return CacheFacts(results, self.evictions, self.bytes, len(self))

    def _find(self, key: bytes, now: float) -> Kept | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        if kept.until <= now:
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return kept

    def _drop(self, key: bytes) -> None:
        if (kept := self._kept.pop(key, None)) is not None:
            self.bytes -= kept.size

    def _key(self, job: Job) -> bytes:
        """All that the handler may go by: the body as it came, and of the headers those that describe or choose it."""
        facts = job.facts
        headers = facts.headers
        events = any(_EVENTS in value.lower() for value in _values(headers, b"accept"))  # a stream has that form then
        values = [_values(headers, name) for name in self._names]
        about = _encode((facts.content_type, facts.encoding, facts.query, facts.query_is_input, events, values))
        known = blake2b(about, digest_size=32)
        for part in job.parts:
            known.update(part)
        return known.digest()


class Waiting:
    """One caller's share in a flight."""

    __slots__ = ("_flight", "arrived", "caller")

    def __init__(self, flight: Flight, job: Job) -> None:
        self._flight = flight
        self.arrived = job.arrived
        self.caller = job.caller

    def cancel(self) -> None:
        self._flight.leave(self)

    def begin(self, status: int, head: bytes) -> None:
        self.caller = cast(Caller, self.caller).begin(status, head)


class Flight:
    """The caller of one job, for all that wait for its answer. The first, its leader, brought the job."""

    def __init__(self, cache: AnswerCache, key: bytes, job: Job) -> None:
        self.key = key
        self.place = key, job.terms
        self.leader = Waiting(self, job)
        self._cache = cache
        self._job: Job | None = job
        self._waiting = {self.leader: None}  # in the order of their arrival
        job.caller = job.shared = self

    def join(self, job: Job) -> Waiting:
        """A request like the one that is run is answered along with it, but has its own deadline."""
        waiting = Waiting(self, job)
        self._waiting[waiting] = None
        run = self._job
        if job.terms is not None and run is not None and run.queue is not None:
            run.queue.deadlines.watch(run, job.arrived)
        return waiting

    @property
    def since(self) -> float:
        return next(iter(self._waiting)).arrived

    def late(self, now: float, longest: float, error: MMSError) -> bool:
        late = [one for one in self._waiting if one.arrived + longest <= now]
        if len(late) == len(self._waiting):
            return True
        for one in late:
            del self._waiting[one]
            self._cache.metrics.count(error)
            self._tell(one.caller.fail, error)
        return False

    def leave(self, waiting: Waiting) -> None:
        """One waits no longer; the last one takes the job along."""
        job = self._job
        if job is None or waiting not in self._waiting:
            return
        del self._waiting[waiting]
        if self._waiting:
            self._cache.cancelled += 1
            return
        self._cache.land(self)
        self._job = None
        job.cancel()

    def answer(self, status: int, head: bytes, body: bytes | memoryview) -> None:
        if self._cache.land(self) and status == 200:
            self._cache.keep(self.key, head, body)
        waiting = self._end()
        self._cache.metrics.requests[status] += len(waiting) - 1  # one is counted already
        for one in waiting:
            self._tell(one.caller.answer, status, head if one is self.leader else head + JOINED, body)

    def begin(self, status: int, head: bytes) -> Flight:
        """The answer is a stream: it goes to those that wait now, nobody joins any more, and it is not kept."""
        self._cache.land(self)
        for one in list(self._waiting):
            self._tell(one.begin, status, head if one is self.leader else head + JOINED)
        return self

    def chunk(self, data: bytes | memoryview) -> None:
        for one in list(self._waiting):
            self._tell(cast(StreamCaller, one.caller).chunk, data)

    def fail(self, error: MMSError) -> None:
        self._cache.land(self)
        for place, one in enumerate(self._end()):
            if place:  # one is counted already
                self._cache.metrics.count(error)
            self._tell(one.caller.fail, error)

    def _end(self) -> list[Waiting]:
        waiting = list(self._waiting)
        self._job = None  # it refers back to this: without the cycle, both are freed without the collector
        self._waiting.clear()
        return waiting

    def _tell(self, outcome: Callable[..., None], *words: object) -> None:
        try:
            outcome(*words)
        except Exception:  # one caller's fault must not cost the others their answer
            log.exception("an answer could not be delivered")


def _values(headers: list[bytes], name: bytes) -> list[bytes]:
    """All values of a header, whose name is in lower case."""
    return [value for at, value in enumerate(headers) if at % 2 and headers[at - 1].lower() == name]
