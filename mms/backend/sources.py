"""The requests of a pipeline and where they come from: per front end a channel, and a page that says how far it is.

Runs in the worker process.
"""

from __future__ import annotations

import mmap
import struct
import threading
import time
from collections.abc import Callable

from mms import sharedpage, wire
from mms.backend.answers import Answers, Body
from mms.backend.channel import Channel
from mms.backend.stages import Prepared
from mms.backend.turns import Busy, Sending
from mms.handler import Request

_monotonic = time.monotonic
_write_counts = struct.Struct("<QQ").pack_into  # the first two fields of sharedpage.PROGRESS


class Ticket:
    """A request in the worker; `place` counts all that its source was ever sent, `rank` is its place in the order.

    It was `received` here, and had `arrived` at the front end.
    """

    __slots__ = ("arrived", "id", "place", "prepared", "preprocess", "rank", "received", "request", "source")

    def __init__(
        self, source: Source, place: int, rank: int, id: int, request: Request, received: float, arrived: float
    ) -> None:
        self.source = source
        self.place = place
        self.rank = rank
        self.id = id
        self.request = request
        self.received = received
        self.arrived = arrived
        self.preprocess = 0.0  # seconds
        self.prepared: Prepared | None = None


class Account:
    """What the server reads of this worker's progress: jobs done and begun, and the work of each thread."""

    def __init__(self, page: mmap.mmap, busy: Busy | None) -> None:
        self._page = page
        self._busy = busy
        self._lock = threading.Lock()
        self._started = 0
        self._done = 0  # all places below are done
        self._done_beyond: set[int] = set()

    def begin(self, thread: int, tickets: list[Ticket], spent: float = 0.0) -> float:
        """They are taken for the first time, or again at the next stage after `spent` seconds in others: the server's
        time limit is for all of them together, without the waiting in between. Returns the time.
        """
        now = _monotonic()
        if self._busy is not None:
            self._busy.begin(thread)
        places = [ticket.place for ticket in tickets]
        sharedpage.write_slot(self._page, thread, now - spent, places)
        if places[-1] >= self._started:
            with self._lock:
                self._started = max(self._started, places[-1] + 1)
                _write_counts(self._page, 0, self._done, self._started)
        return now

    def idle(self, thread: int) -> None:
        sharedpage.clear_slot(self._page, thread)
        if self._busy is not None:
            self._busy.end(thread)

    def done(self, tickets: list[Ticket]) -> None:
        """Their answers are about to be sent."""
        with self._lock:
            beyond = self._done_beyond
            beyond.update([ticket.place for ticket in tickets])
            while self._done in beyond:
                beyond.remove(self._done)
                self._done += 1
            _write_counts(self._page, 0, self._done, self._started)


class Source:
    """A front end's channel and page: its requests come in, and their answers go out, from any thread."""

    def __init__(
        self,
        channel: Channel,
        page: mmap.mmap,
        busy: Busy | None,
        lock: threading.Lock | Sending,
        take: Callable[[Source, int, wire.PredictView, bytearray, int], None],
    ) -> None:
        self.page = page
        self.account = Account(page, busy)
        self.cancelled = sharedpage.Cancelled(page)
        self.gone = False
        self.batch_size = 1  # it and the next one are those of its last frame
        self.forming: wire.Forming | None = None
        self._channel = channel
        self._lock = lock
        self._take = take
        self._place = 0

    def predict(self, frame: wire.PredictView, payload: bytearray, at: int) -> None:
        """Line the frame's jobs up; their bodies lie back to back in `payload`, from `at` on."""
        place = self._place
        self._place += len(frame.ids)
        self._take(self, place, frame, payload, at)

    def close(self) -> None:
        with self._lock:
            self.gone = True
            self._channel.close()

    def reply(self, ids: list[int], answers: Answers, batches: list[wire.BatchTimes]) -> None:
        """As Channel.reply. Raises ConnectionError when the front end has gone."""
        with self._lock:
            self._open().reply(ids, answers, batches)

    def write(self, kind: int, head: object, payloads: list[Body], size: int) -> None:
        """As Channel.write. Raises ConnectionError when the front end has gone."""
        with self._lock:
            self._open().write(kind, head, payloads, size)

    def lost(self) -> bool:
        """It has gone, as sending has shown; whether the worker goes on for others."""
        self.gone = True
        return self._channel.lent

    def _open(self) -> Channel:
        if self.gone:
            raise BrokenPipeError
        return self._channel
