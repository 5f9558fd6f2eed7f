"""Several batches at a time, and requests prepared meanwhile: `threads`, `preprocess_threads`. In the worker process.

The main thread reads. Preprocess threads (request style only) take requests in the order in which they came; each
execution thread forms a batch from what is ready when it is free; one more thread postprocesses and replies. Without
preprocess threads a batch passes through all its stages in its execution thread. Answers leave as batches end; a batch
with streams is driven to its end by an execution thread. Several front ends have a Source each; a batch is of one.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from queue import SimpleQueue

from mms import wire
from mms.backend.answers import Answers, columns
from mms.backend.channel import ANSWER_WITHIN, Channel, requests_of
from mms.backend.device import modes, own_lane
from mms.backend.forming import Ready, line_up
from mms.backend.sources import Source, Ticket
from mms.backend.stages import RequestStages, Stages
from mms.backend.streams import Stream, Streams
from mms.backend.turns import Busy, Sending
from mms.handler import Requests

_monotonic = time.monotonic

_SOURCE = attrgetter("source")
_GONE = wire.Outcome(499, b"", "Cancelled")  # for the server's account: nobody reads it


@dataclass(slots=True)
class Ended:
    """A batch after its inference; times in seconds, `begun` on the monotonic clock."""

    tickets: list[Ticket]
    begun: float
    inference: float


class Streaming(list[Ticket]):
    """The requests of a batch that is answered with streams: work for an execution thread, as a batch is."""

    def __init__(self, batch: Ended, answers: Answers) -> None:
        super().__init__(batch.tickets)
        self.batch = batch
        self.answers = answers


class Pipeline:
    """A loaded handler, with threads that are kept as long as the worker lives."""

    def __init__(
        self, stages: Stages, load: wire.Load, *, preprocess_threads: int, device: str, busy: Busy | None = None
    ) -> None:
        self._busy = busy
        self._stages = stages
        self._limit = load.max_request_size
        self._threads = load.threads
        self._preprocess_threads = preprocess_threads
        self._device = device
        self._closed = False
        lock = threading.Lock()
        self._arrived = threading.Condition(lock)
        self._prepared = threading.Condition(lock)
        self._waiting: deque[Ticket] = deque()
        self._preparing = 0  # requests that preprocess threads have in hand
        self._ready = Ready()
        self._ended: SimpleQueue[Ended | None] = SimpleQueue()
        self._streaming: deque[Streaming] = deque()
        # one for all: what the handler has counted goes to the first channel
        self._replying = threading.Lock() if busy is None else Sending(busy)
        self._taken = 0
        self._start_threads()

    def source(self, channel: Channel, page: mmap.mmap) -> Source:
        return Source(channel, page, self._busy, self._replying, self._take)

    def _take(self, source: Source, first: int, frame: wire.PredictView, payload: bytearray, at: int) -> None:
        """Line up what has come; `first` is the place of the first job among the source's."""
        now = _monotonic()
        requests = requests_of(frame, payload, at, self._limit)
        numbered = enumerate(zip(frame.ids, requests, strict=True))
        rank = self._taken
        arrived = frame.forming.arrived if frame.forming is not None else now
        tickets = [Ticket(source, first + n, rank + n, id, request, now, arrived) for n, (id, request) in numbered]
        self._taken += len(tickets)
        if frame.levels:
            self._rank(tickets, frame)
        with self._arrived:  # the lock of both
            source.batch_size, source.forming = frame.batch_size, frame.forming
            if self._preprocess_threads:
                for ticket in tickets:
                    line_up(self._waiting, ticket)
                self._arrived.notify(len(tickets))
            else:
                for ticket in tickets:
                    self._ready.add(ticket)
                self._prepared.notify(len(tickets))

    def close(self) -> None:
        """The threads end when they have done what they have in hand."""
        with self._arrived:  # the lock of both
            self._closed = True
            self._arrived.notify_all()
            self._prepared.notify_all()
        self._ended.put(None)

    def _rank(self, tickets: list[Ticket], frame: wire.PredictView) -> None:
        """By priority. None starves: what overtakes a request is worth so many turns at most, one being what a worker
        runs and prepares at a time.
        """
        most = wire.FAIR_TURN * (frame.batch_size * self._threads + self._preprocess_threads)
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
        with own_lane(self._device) as lane:
            if isinstance(stages, RequestStages):
                stages.move = lane.move
            while batch := self._next_batch():
                account = batch[0].source.account
                begun = account.begin(thread, batch)
                answers = stages.run(Requests.made([ticket.request for ticket in batch]))
                lane.wait()
                if stages.streams and any([type(body) is Stream for body in answers[1]]):
                    self._stream(thread, batch, answers, partial(_times_of, batch, begun, stages))
                    continue
                seconds = _monotonic() - begun
                account.idle(thread)
                waited = begun - batch[0].received
                self._send(batch, answers, [wire.BatchTimes(len(batch), waited, seconds, *stages.take_times())])

    def _prepare(self, thread: int, stages: RequestStages) -> None:
        """preprocess, one request at a time."""
        arrived, waiting = self._arrived, self._waiting
        begin_batch = stages.context.begin_batch
        while True:
            with arrived:
                while not waiting:
                    if self._closed:
                        return
                    arrived.wait()
                ticket = waiting.popleft()
                source = ticket.source
                gone = source.gone or ticket.id in source.cancelled.look()
                if gone:
                    self._prepared.notify()  # a batch may have waited for it
                else:
                    self._preparing += 1
            if gone:
                self._send([ticket], ([_GONE], [b""]), [])
                continue
            account = source.account
            begun = account.begin(thread, [ticket])
            begin_batch([ticket.request])
            prepared = ticket.prepared = stages.prepare(ticket.request)
            ticket.preprocess = _monotonic() - begun
            account.idle(thread)
            with self._prepared:
                self._preparing -= 1
                if prepared.answer is None:
                    self._ready.add(ticket)
                self._prepared.notify()
            if prepared.answer is not None:
                self._ended.put(Ended([ticket], _monotonic(), 0.0))

    def _infer(self, thread: int, stages: RequestStages) -> None:
        """inference, on batches of what is prepared."""
        begin_batch = stages.context.begin_batch
        with own_lane(self._device) as lane:
            stages.move = lane.move
            while batch := self._next_batch():
                account = batch[0].source.account
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
                    answers = columns(list(map(stages.finish, prepared)))
                    self._stream(thread, batch, answers, partial(_times_with, ended, now))
                    continue
                account.idle(thread)
                self._ended.put(ended)

    def _reply(self, thread: int, stages: RequestStages) -> None:
        """postprocess, and the answers of batches that have ended meanwhile in one frame, while that is quick."""
        ended = self._ended
        tickets: list[Ticket] = []
        answers: Answers = [], []
        times: list[wire.BatchTimes] = []
        kept_since = 0.0
        while (batch := ended.get()) is not None:
            if tickets and tickets[0].source is not batch.tickets[0].source:
                self._send(tickets, answers, times)
                tickets, answers, times = [], ([], []), []
            account = batch.tickets[0].source.account
            begun = account.begin(thread, batch.tickets, _preparation(batch.tickets) + batch.inference)
            stages.context.begin_batch([ticket.request for ticket in batch.tickets])
            prepared = [ticket.prepared for ticket in batch.tickets if ticket.prepared is not None]
            of_batch = columns(list(map(stages.finish, prepared)))
            now = _monotonic()
            if stages.streams and any([type(body) is Stream for body in of_batch[1]]):
                with self._prepared:
                    self._streaming.append(Streaming(batch, of_batch))
                    self._prepared.notify()
            else:
                if not tickets:
                    kept_since = begun
                tickets += batch.tickets
                answers[0].extend(of_batch[0])
                answers[1].extend(of_batch[1])
                times.append(_times(batch, now - begun))
            account.idle(thread)
            if tickets and (ended.empty() or now - kept_since > ANSWER_WITHIN):
                self._send(tickets, answers, times)
                tickets, answers, times = [], ([], []), []

    def _stream(self, thread: int, batch: list[Ticket], answers: Answers, times: Callable[[], wire.BatchTimes]) -> None:
        """Send the answers of a batch, and drive those of them that are streams."""
        source = batch[0].source
        account = source.account
        streams = Streams(source, source.page, partial(account.begin, thread, batch))
        try:
            streams.run([ticket.id for ticket in batch], answers, times)
        except ConnectionError:
            if not source.lost():
                raise
        account.idle(thread)
        account.done(batch)

    def _next_batch(self) -> list[Ticket]:
        """The next one that goes, when it does; empty when the channel has ended."""
        prepared, ready = self._prepared, self._ready
        batch: list[Ticket] = []
        while not batch:
            with prepared:
                while True:
                    if self._streaming:
                        return self._streaming.popleft()
                    now = math.inf if self._closed else _monotonic()  # at the end, nothing waits for a fuller batch
                    coming = bool(self._waiting or self._preparing)
                    batch, gone = ready.take(now, coming=coming)
                    if batch or gone:
                        break
                    if self._closed:
                        return []
                    goes_at = ready.goes_at(coming)
                    prepared.wait(None if goes_at is None else goes_at - now)
                if ready:
                    prepared.notify()  # there may be a batch for another thread
            for _, some in itertools.groupby(gone, _SOURCE):
                tickets = list(some)
                self._send(tickets, ([_GONE] * len(tickets), [b""] * len(tickets)), [])
        return batch

    def _send(self, tickets: list[Ticket], answers: Answers, times: list[wire.BatchTimes]) -> None:
        """Of one source."""
        source = tickets[0].source
        source.account.done(tickets)
        try:
            source.reply([ticket.id for ticket in tickets], answers, times)
        except ConnectionError:
            if not source.lost():
                raise


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
