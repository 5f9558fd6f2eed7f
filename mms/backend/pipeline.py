"""Several batches at a time, and requests prepared meanwhile: `threads`, `preprocess_threads`. In the worker process.

The main thread reads. Preprocess threads (request style only) take requests in the order in which they came; each
execution thread forms a batch from what is ready when it is free; one more thread postprocesses and replies. Without
preprocess threads a batch passes through all its stages in its execution thread. Answers leave as batches end; a batch
with streams is driven to its end by an execution thread.
"""

from __future__ import annotations

import bisect
import mmap
import os
import struct
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from queue import SimpleQueue

from mms import sharedpage, wire
from mms.backend.answers import Answer, Body
from mms.backend.channel import ANSWER_WITHIN, Channel, requests_of
from mms.backend.device import modes, own_lane
from mms.backend.stages import Prepared, RequestStages, Stages
from mms.backend.streams import Stream, Streams
from mms.handler import Request

FAIR_TURN = 10  # times what a worker runs and prepares at a time: so many of a higher priority may overtake a request

_monotonic = time.monotonic
_write_counts = struct.Struct("<QQ").pack_into  # the first two fields of sharedpage.PROGRESS

_RANK = attrgetter("rank")
_GONE: Answer = wire.Outcome(499, b"", "Cancelled"), b""  # for the server's account: nobody reads it


class Ticket:
    """A request in the worker; `place` counts all that the worker was ever sent, `rank` is its place in the order."""

    __slots__ = ("id", "place", "prepared", "preprocess", "rank", "received", "request")

    def __init__(self, place: int, id: int, request: Request, received: float) -> None:
        self.place = self.rank = place
        self.id = id
        self.request = request
        self.received = received
        self.preprocess = 0.0  # seconds
        self.prepared: Prepared | None = None


@dataclass(slots=True)
class Ended:
    """A batch after its inference; times in seconds, `begun` on the monotonic clock."""

    tickets: list[Ticket]
    begun: float
    inference: float


class Streaming(list[Ticket]):
    """The requests of a batch that is answered with streams: work for an execution thread, as a batch is."""

    def __init__(self, batch: Ended, answers: list[Answer]) -> None:
        super().__init__(batch.tickets)
        self.batch = batch
        self.answers = answers


class Account:
    """What the server reads of this worker's progress: jobs done and begun, and the work of each thread."""

    def __init__(self, page: mmap.mmap) -> None:
        self._page = page
        self._lock = threading.Lock()
        self._started = 0
        self._done = 0  # all places below are done
        self._done_beyond: set[int] = set()

    def begin(self, thread: int, tickets: list[Ticket], spent: float = 0.0) -> float:
        """They are taken for the first time, or again at the next stage after `spent` seconds in others: the server's
        time limit is for all of them together, without the waiting in between. Returns the time.
        """
        now = _monotonic()
        places = [ticket.place for ticket in tickets]
        sharedpage.write_slot(self._page, thread, now - spent, places)
        if places[-1] >= self._started:
            with self._lock:
                self._started = max(self._started, places[-1] + 1)
                _write_counts(self._page, 0, self._done, self._started)
        return now

    def idle(self, thread: int) -> None:
        sharedpage.clear_slot(self._page, thread)

    def done(self, tickets: list[Ticket]) -> None:
        """Their answers are about to be sent."""
        with self._lock:
            beyond = self._done_beyond
            beyond.update([ticket.place for ticket in tickets])
            while self._done in beyond:
                beyond.remove(self._done)
                self._done += 1
            _write_counts(self._page, 0, self._done, self._started)


class Pipeline:
    """A loaded handler and its channel, with threads that are kept as long as the worker lives."""

    def __init__(
        self,
        channel: Channel,
        stages: Stages,
        page: mmap.mmap,
        load: wire.Load,
        *,
        preprocess_threads: int,
        device: str,
    ) -> None:
        self._channel = channel
        self._stages = stages
        self._account = Account(page)
        self._limit = load.max_request_size
        self._threads = load.threads
        self._preprocess_threads = preprocess_threads
        self._device = device
        self._batch_size = load.batch_size
        self._closed = False
        lock = threading.Lock()
        self._arrived = threading.Condition(lock)
        self._prepared = threading.Condition(lock)
        self._waiting: deque[Ticket] = deque()
        self._ready: deque[Ticket] = deque()
        self._ended: SimpleQueue[Ended | None] = SimpleQueue()
        self._streaming: deque[Streaming] = deque()
        self._page = page
        self._cancelled = sharedpage.Cancelled(page)
        self._replying = threading.Lock()

    def run(self) -> None:
        """Until the server closes the channel or says STOP."""
        self._start_threads()
        ready, waiting = (self._arrived, self._waiting) if self._preprocess_threads else (self._prepared, self._ready)
        place = 0
        try:
            for frame, payload, at in self._channel.predictions():
                now = _monotonic()
                requests = requests_of(frame, payload, at, self._limit)
                numbered = enumerate(zip(frame.ids, requests, strict=True), place)
                tickets = [Ticket(number, id, request, now) for number, (id, request) in numbered]
                place += len(tickets)
                if frame.levels:
                    self._rank(tickets, frame)
                with ready:
                    self._batch_size = frame.batch_size
                    for ticket in tickets:
                        _line_up(waiting, ticket)
                    ready.notify(len(tickets))
        finally:
            with ready:
                self._closed = True
                self._arrived.notify_all()
                self._prepared.notify_all()
            self._ended.put(None)

    def _rank(self, tickets: list[Ticket], frame: wire.PredictView) -> None:
        """By priority. How many may overtake a request is bounded, so none starves."""
        most = FAIR_TURN * (frame.batch_size * self._threads + self._preprocess_threads)
        for ticket, level in zip(tickets, frame.levels, strict=True):
            ticket.rank += level * most

    def _start_threads(self) -> None:
        stages, threads = self._stages, self._threads
        work: list[tuple[str, Callable[[], None]]] = []
        if isinstance(stages, RequestStages) and self._preprocess_threads:
            own = stages.for_thread
            work += [(f"execute-{number}", partial(self._infer, number, own())) for number in range(threads)]
            preparing = range(threads, threads + self._preprocess_threads)
            work += [(f"preprocess-{number}", partial(self._prepare, number, own())) for number in preparing]
            work.append(("reply", partial(self._reply, preparing.stop, own())))
        else:
            work += [
                (f"execute-{number}", partial(self._execute, number, stages.for_thread())) for number in range(threads)
            ]
        begin = modes()
        for name, target in work:
            threading.Thread(target=self._guarded, args=(begin, target), name=name, daemon=True).start()

    def _guarded(self, begin: Callable[[], None], target: Callable[[], None]) -> None:
        try:
            begin()
            target()
        except BaseException:
            if self._closed:  # the server has gone
                return
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(70)  # EX_SOFTWARE: without this thread, requests would wait for ever

    def _execute(self, thread: int, stages: Stages) -> None:
        """Whole batches, in the order in which they came."""
        account = self._account
        with own_lane(self._device) as lane:
            if isinstance(stages, RequestStages):
                stages.move = lane.move
            while batch := self._next_batch():
                begun = account.begin(thread, batch)
                answers = stages.run([ticket.request for ticket in batch])
                lane.wait()
                if stages.streams and any([type(body) is Stream for _, body in answers]):
                    self._stream(thread, batch, answers, partial(_times_of, batch, begun, stages))
                    continue
                seconds = _monotonic() - begun
                account.idle(thread)
                waited = begun - batch[0].received
                self._send(batch, answers, [wire.BatchTimes(len(batch), waited, seconds, *stages.take_times())])

    def _prepare(self, thread: int, stages: RequestStages) -> None:
        """preprocess, one request at a time."""
        account, arrived, waiting = self._account, self._arrived, self._waiting
        begin_batch = stages.context.begin_batch
        while True:
            with arrived:
                while not waiting:
                    if self._closed:
                        return
                    arrived.wait()
                ticket = waiting.popleft()
                gone = ticket.id in self._cancelled.look()
            if gone:
                self._send([ticket], [_GONE], [])
                continue
            begun = account.begin(thread, [ticket])
            begin_batch([ticket.request])
            prepared = ticket.prepared = stages.prepare(ticket.request)
            ticket.preprocess = _monotonic() - begun
            account.idle(thread)
            if prepared.answer is not None:
                self._ended.put(Ended([ticket], _monotonic(), 0.0))
                continue
            with self._prepared:
                _line_up(self._ready, ticket)
                self._prepared.notify()

    def _infer(self, thread: int, stages: RequestStages) -> None:
        """inference, on batches of what is prepared."""
        account = self._account
        begin_batch = stages.context.begin_batch
        with own_lane(self._device) as lane:
            stages.move = lane.move
            while batch := self._next_batch():
                begin_batch([ticket.request for ticket in batch])
                if isinstance(batch, Streaming):
                    begun = account.begin(thread, batch)
                    self._stream(thread, batch, batch.answers, partial(_times_with, batch.batch, begun))
                    continue
                begun = account.begin(thread, batch, _preparation(batch))
                prepared = [ticket.prepared for ticket in batch if ticket.prepared is not None]
                stages.infer(prepared)
                lane.wait()
                now = _monotonic()
                ended = Ended(batch, begun, now - begun)
                if stages.streams and any([one.answer and type(one.answer[1]) is Stream for one in prepared]):
                    # an inference that yields stays in its thread: CUDA's stream and torch's modes are the thread's own
                    answers = list(map(stages.finish, prepared))
                    self._stream(thread, batch, answers, partial(_times_with, ended, now))
                    continue
                account.idle(thread)
                self._ended.put(ended)

    def _reply(self, thread: int, stages: RequestStages) -> None:
        """postprocess, and the answers of batches that have ended meanwhile in one frame, while that is quick."""
        account, ended = self._account, self._ended
        tickets: list[Ticket] = []
        answers: list[Answer] = []
        times: list[wire.BatchTimes] = []
        kept_since = 0.0
        while (batch := ended.get()) is not None:
            begun = account.begin(thread, batch.tickets, _preparation(batch.tickets) + batch.inference)
            stages.context.begin_batch([ticket.request for ticket in batch.tickets])
            of_batch = [stages.finish(ticket.prepared) for ticket in batch.tickets if ticket.prepared is not None]
            now = _monotonic()
            if stages.streams and any([type(body) is Stream for _, body in of_batch]):
                with self._prepared:
                    self._streaming.append(Streaming(batch, of_batch))
                    self._prepared.notify()
            else:
                if not tickets:
                    kept_since = begun
                tickets += batch.tickets
                answers += of_batch
                times.append(_times(batch, now - begun))
            account.idle(thread)
            if tickets and (ended.empty() or now - kept_since > ANSWER_WITHIN):
                self._send(tickets, answers, times)
                tickets, answers, times = [], [], []

    def _stream(
        self, thread: int, batch: list[Ticket], answers: list[Answer], times: Callable[[], wire.BatchTimes]
    ) -> None:
        """Send the answers of a batch, and drive those of them that are streams."""
        account = self._account
        streams = Streams(self, self._page, partial(account.begin, thread, batch))
        streams.run([ticket.id for ticket in batch], answers, times)
        account.idle(thread)
        account.done(batch)

    def _next_batch(self) -> list[Ticket]:
        """The first ready request and those behind it that share its bucket; empty when the channel has ended."""
        prepared, ready = self._prepared, self._ready
        batch: list[Ticket] = []
        while not batch:
            with prepared:
                while not ready or self._streaming:
                    if self._streaming:
                        return self._streaming.popleft()
                    if self._closed:
                        return []
                    prepared.wait()
                batch, gone = self._take_ready()
            if gone:
                self._send(gone, [_GONE] * len(gone), [])
        return batch

    def _take_ready(self) -> tuple[list[Ticket], list[Ticket]]:
        """A batch, and those for which nobody waits any more."""
        ready, size, cancelled = self._ready, self._batch_size, self._cancelled.look()
        bucket: set[object] = set()  # a set, as what has a hash may compare in ways of its own: nan, tensors
        batch: list[Ticket] = []
        gone: list[Ticket] = []
        others: list[Ticket] = []
        while ready and len(batch) < size:
            ticket = ready.popleft()
            if ticket.id in cancelled:
                gone.append(ticket)
                continue
            if not batch:
                bucket.add(_bucket(ticket))
            (batch if _bucket(ticket) in bucket else others).append(ticket)
        ready.extendleft(reversed(others))
        return batch, gone

    def _send(self, tickets: list[Ticket], answers: list[Answer], times: list[wire.BatchTimes]) -> None:
        self._account.done(tickets)
        self.reply([ticket.id for ticket in tickets], answers, times)

    def reply(self, ids: Sequence[int], answers: Sequence[Answer], batches: list[wire.BatchTimes]) -> None:
        """As Channel.reply, from any thread."""
        with self._replying:
            self._channel.reply(ids, answers, batches)

    def write(self, kind: int, head: object, payloads: list[Body], size: int) -> None:
        """As Channel.write, from any thread."""
        with self._replying:
            self._channel.write(kind, head, payloads, size)


def _line_up(line: deque[Ticket], ticket: Ticket) -> None:
    """By rank; mostly it is the last."""
    if line and ticket.rank < line[-1].rank:
        bisect.insort(line, ticket, key=_RANK)
    else:
        line.append(ticket)


def _bucket(ticket: Ticket) -> object:
    return ticket.prepared.bucket if ticket.prepared is not None else None


def _preparation(batch: list[Ticket]) -> float:
    """Seconds that the slowest of them took in preprocess, which they have passed side by side."""
    return max([ticket.preprocess for ticket in batch])


def _times_of(batch: list[Ticket], begun: float, stages: Stages) -> wire.BatchTimes:
    return wire.BatchTimes(len(batch), begun - batch[0].received, _monotonic() - begun, *stages.take_times())


def _times_with(batch: Ended, since: float) -> wire.BatchTimes:
    """The times of a batch whose streams were driven since then."""
    return _times(batch, _monotonic() - since)


def _times(batch: Ended, postprocess: float) -> wire.BatchTimes:
    """`preprocess` is that of all its requests, of which several may have been prepared at a time."""
    count = len(batch.tickets)
    preprocess = sum(ticket.preprocess for ticket in batch.tickets)
    waited = batch.begun - sum(ticket.received + ticket.preprocess for ticket in batch.tickets) / count
    handler = batch.inference + postprocess
    return wire.BatchTimes(count, max(0.0, waited), handler, preprocess, batch.inference, postprocess)
