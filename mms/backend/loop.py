"""The life of a worker process: load, say READY, then read a frame, run its batches, answer, until the channel ends."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import select
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from mms import sharedpage, wire
from mms.allocator import keep_freed_memory
from mms.arena import Arena, attach
from mms.backend import template, timeslice, weights
from mms.backend.answers import Answers
from mms.backend.channel import ANSWER_WITHIN, Channel, requests_of
from mms.backend.device import lane
from mms.backend.loader import device_of, load_handler
from mms.backend.pipeline import Pipeline
from mms.backend.prepare import prepare
from mms.backend.stages import RequestStages, Stages
from mms.backend.streams import Stream, Streams
from mms.backend.turns import Busy, Source, Turns
from mms.errors import ModelLoadError

# A handler may replace functions of these modules; the loop keeps the ones it was imported with.
_monotonic = time.monotonic
_perf_counter = time.perf_counter
_pack_progress = sharedpage.PROGRESS.pack_into


class Loop:
    """A loaded handler and its channel: one batch at a time."""

    def __init__(self, stages: Stages, max_request_size: int, channel: Channel, progress: mmap.mmap) -> None:
        self._channel = channel
        self._stages = stages
        self._progress = progress
        self._limit = max_request_size
        self._started = 0

    def predict(self, frame: wire.PredictView, payload: bytearray, at: int) -> None:
        """Run the frame's jobs; their bodies lie back to back in `payload`, from `at` on."""
        received = flushed = begun = _monotonic()
        ids, size = frame.ids, frame.batch_size
        channel, stages, progress = self._channel, self._stages, self._progress
        staged = stages.style == "request"
        outcomes: list[wire.Outcome] = []  # gathered into one frame while the next batches are quick
        bodies: list[Any] = []
        batches: list[wire.BatchTimes] = []
        requests = requests_of(frame, payload, at, self._limit)
        jobs = len(ids)
        for first in range(0, jobs, size):
            count = min(size, jobs - first)
            batch = requests[first : first + size] if jobs > size else requests
            if begun - flushed > ANSWER_WITHIN:
                channel.reply(ids[first - len(bodies) : first], (outcomes, bodies), batches)
                outcomes, bodies, batches, flushed = [], [], [], begun
            done = self._started
            self._started = done + count
            _pack_progress(progress, 0, done, self._started, begun)
            answers = stages.run(batch)
            if stages.streams and any([type(body) is Stream for body in answers[1]]):
                if bodies:
                    channel.reply(ids[first - len(bodies) : first], (outcomes, bodies), batches)
                    outcomes, bodies, batches = [], [], []
                self._stream(ids[first : first + size], answers, done, received, begun)
                begun = flushed = _monotonic()
                continue
            ended = _monotonic()
            times = wire.BatchTimes(count, begun - received, ended - begun)
            if staged:
                times.preprocess, times.inference, times.postprocess = stages.take_times()
            outcomes += answers[0]
            bodies += answers[1]
            batches.append(times)
            begun = ended
        _pack_progress(progress, 0, self._started, self._started, 0.0)
        if bodies:
            channel.reply(ids[jobs - len(bodies) :], (outcomes, bodies), batches)

    def close(self) -> None:
        """Of a further front end that has gone: what it had sent is given up, in the middle or not."""
        _pack_progress(self._progress, 0, self._started, self._started, 0.0)
        self._channel.close()

    def _stream(self, ids: list[int], answers: Answers, done: int, received: float, begun: float) -> None:
        """The rest of a batch that answers with streams."""
        progress, started = self._progress, self._started

        def beat() -> None:
            _pack_progress(progress, 0, done, started, _monotonic())

        def times() -> wire.BatchTimes:
            return wire.BatchTimes(len(ids), begun - received, _monotonic() - begun, *self._stages.take_times())

        Streams(self._channel, progress, beat).run(ids, answers, times)


def serve(sock: socket.socket, page: mmap.mmap, loaded: Stages | None = None, arena: Arena | None = None) -> int:
    """The whole life of a worker; returns its exit code. Runs in the worker process, on its main thread.

    `loaded` is what the template has loaded from which this process was forked; large bodies pass through the `arena`.
    """
    channel = Channel(sock, arena)
    further = channel.begin()
    first = channel.read()
    if first is None:
        return 0
    load = wire.decode(wire.Load, first[1])
    is_worker = not (load.preparation.template or load.preparation.owner)
    timeslice.pause()
    begun = _perf_counter()
    borrowed = weights.Borrowed(load.weights)
    try:
        if loaded is None:
            stages = load_handler(load, borrowed.are_lent)
            borrowed.put(stages.handler)
        else:
            stages = loaded
            template.inherit(stages, load)
        if is_worker:
            channel.metrics = stages.metrics
            channel.send_metrics()  # what `initialize` has counted; nothing of a warm-up is
            ours = lane(device_of(load))
            if isinstance(stages, RequestStages):
                stages.move = ours.move
            prepare(stages, load)
            ours.wait()
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        channel.write(wire.FAILED, wire.Failed(_reason(error), text), [], 0)
        sys.stderr.write(text)
        return 1
    if is_worker:
        timeslice.pause()
        gc.collect()
        gc.freeze()
        keep_freed_memory()  # not before: what the load has used goes back
    if not load.preparation.template:  # it serves nobody, and its workers begin with what it has
        timeslice.take(timeslice.USUAL)
    if arena is not None and not is_worker:
        arena.close()  # it serves nobody, and the workers that are forked from it have their own
    if load.preparation.template:
        # what `initialize` has counted is told by the first worker alone: it has run once
        return template.serve(sock, partial(main, loaded=stages), stages.metrics.take)
    if load.preparation.owner:
        return weights.serve(sock, stages)
    prepares = load.preprocess_threads if isinstance(stages, RequestStages) else 0
    ready = wire.Ready(stages.style, _perf_counter() - begun, load.threads, prepares, borrowed.size, borrowed.fault)
    channel.write(wire.READY, ready, [], 0)
    busy = Busy() if further is not None else None
    with contextlib.ExitStack() as ended:
        if load.threads > 1 or prepares:
            pipeline = Pipeline(stages, load, preprocess_threads=prepares, device=device_of(load), busy=busy)
            ended.callback(pipeline.close)
            make: Callable[[Channel, mmap.mmap], Source] = pipeline.source
        else:
            make = partial(Loop, stages, load.max_request_size)
        if further is not None and busy is not None:
            Turns(channel, further, page, make, busy).run()
        else:
            predict = make(channel, page).predict
            # Who sleeps in a poll for something to read is not woken each time the server has read an answer, which
            # makes room to write: one call more per frame, and one switch of processes less.
            readable = select.poll()
            readable.register(sock, select.POLLIN)
            for frame, payload, at in channel.predictions(readable.poll):
                predict(frame, payload, at)
    return 0


def main(sock: socket.socket, page: int, leave: Callable[[int], None] = os._exit, loaded: Stages | None = None) -> None:
    """Serve and leave the process, without waiting for threads or exit handlers of the handler's libraries."""
    code = 70  # EX_SOFTWARE
    try:
        bodies, progress = attach(page)
        os.close(page)  # the maps keep descriptors of their own
        code = serve(sock, progress, loaded, bodies)
    except (BrokenPipeError, ConnectionResetError):
        code = 0  # the server has gone
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        timeslice.take(timeslice.LONG)  # to give the memory of a framework back takes milliseconds
        timeslice.pause()
        leave(code)


def _reason(error: BaseException) -> str:
    if isinstance(error, ModelLoadError):
        return error.message
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
