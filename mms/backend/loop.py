"""The life of a worker process: load, say READY, then read a frame, run its batches, answer, until the channel ends."""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial

from mms import wire
from mms.backend import template
from mms.backend.answers import Answer, Body
from mms.backend.loader import load_handler
from mms.backend.prepare import prepare
from mms.backend.stages import Stages
from mms.errors import FrameError, ModelLoadError
from mms.handler import Request

READ_SIZE = 256 << 10
ANSWER_WITHIN = 0.0005  # seconds that a finished answer may wait for the next batches of its frame
JOIN_BELOW = 128 << 10

# A handler may replace functions of these modules; the loop keeps the ones it was imported with.
_monotonic = time.monotonic
_perf_counter = time.perf_counter
_pack_progress = wire.PROGRESS.pack_into


class Channel:
    """The worker's end of its socket to the server. Blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._recv_into = sock.recv_into
        self._send = sock.sendmsg
        self._buffer = bytearray(READ_SIZE)  # kept: a fresh one per read costs three system calls
        self._view = memoryview(self._buffer)
        self._at = self._end = 0  # what was read and not yet handed out

    def read(self) -> tuple[int, bytes, bytearray, int] | None:
        """(kind, head, a buffer, where in it the payloads begin), or None when the server has closed the channel.

        The buffer may be overwritten by the next read, unless the payloads are all that it holds. Raises FrameError.
        """
        if not self._fill(wire.HEADER.size):
            return None
        kind, head_size, payload_size = wire.parse_header(self._buffer, self._at)
        start = wire.HEADER.size + head_size
        if not self._fill(start):
            return None
        begin = self._at + start
        head = bytes(self._view[self._at + wire.HEADER.size : begin])
        if start + payload_size > len(self._buffer):
            self._at = begin
            payload = self._large(payload_size)
            return None if payload is None else (kind, head, payload, 0)
        if not self._fill(start + payload_size):
            return None
        begin = self._at + start
        self._at = begin + payload_size
        return kind, head, self._buffer, begin

    def _fill(self, size: int) -> bool:
        """Have `size` bytes in hand; False at the end of the channel."""
        while self._end - self._at < size:
            if self._at + size > len(self._buffer) or self._at == self._end:
                self._move(size)
            count = self._recv_into(self._view[self._end :])
            if not count:
                return False
            self._end += count
        return True

    def _move(self, size: int) -> None:
        """What is in hand goes to the front of a buffer with room for `size` bytes."""
        rest = self._buffer[self._at : self._end]
        if size > len(self._buffer):
            self._buffer = bytearray(size)
            self._view = memoryview(self._buffer)
        self._view[: len(rest)] = rest
        self._at, self._end = 0, len(rest)

    def _large(self, size: int) -> bytearray | None:
        """A payload that does not fit into the buffer."""
        payload = bytearray(size)
        have = self._end - self._at
        view = memoryview(payload)
        view[:have] = self._view[self._at : self._end]
        self._at = self._end = 0
        while have < size:
            count = self._recv_into(view[have:])
            if not count:
                return None
            have += count
        return payload

    def write(self, kind: int, head: object, payloads: list[Body], size: int) -> None:
        frame = wire.pack(kind, head, size)
        if size < JOIN_BELOW:
            self._sock.sendall(frame + b"".join(payloads))
            return
        buffers = [memoryview(frame), *(memoryview(payload) for payload in payloads if len(payload))]
        while buffers:
            sent = self._send(buffers[:512])
            while buffers and sent >= len(buffers[0]):
                sent -= len(buffers.pop(0))
            if sent:
                buffers[0] = buffers[0][sent:]


class Replies:
    """Finished jobs of one frame on their way back: gathered into one frame while the next batches are quick."""

    def __init__(self, channel: Channel, ids: list[int]) -> None:
        self._channel = channel
        self._ids = ids
        self._sent = 0
        self._answers: list[Answer] = []
        self._batches: list[wire.BatchTimes] = []

    def add(self, answers: list[Answer], times: wire.BatchTimes) -> None:
        self._answers += answers
        self._batches.append(times)

    def flush(self) -> None:
        answers = self._answers
        if answers:
            ids = self._ids[self._sent : self._sent + len(answers)]
            payloads = [body for _, body in answers]
            sizes = list(map(len, payloads))
            outcomes = wire.share([outcome for outcome, _ in answers])
            result = wire.Result(ids, sizes, *outcomes, self._batches)
            self._channel.write(wire.RESULT, result, payloads, sum(sizes))
            self._sent += len(answers)
            self._answers, self._batches = [], []


class Loop:
    """A loaded handler and its channel."""

    def __init__(self, channel: Channel, stages: Stages, progress: mmap.mmap, max_request_size: int) -> None:
        self._channel = channel
        self._stages = stages
        self._progress = progress
        self._limit = max_request_size
        self._started = 0

    def run(self) -> None:
        """Until the server closes the channel or says STOP."""
        while (frame := self._channel.read()) is not None:
            kind, head, payload, at = frame
            if kind == wire.STOP:
                return
            if kind != wire.PREDICT:
                raise FrameError(f"unexpected frame of kind {kind}")
            self._predict(wire.decode(wire.PredictView, head), payload, at)

    def _predict(self, frame: wire.PredictView, payload: bytearray, at: int) -> None:
        """Run the frame's jobs; their bodies lie back to back in `payload`, from `at` on."""
        received = flushed = begun = _monotonic()
        size = frame.batch_size
        replies = Replies(self._channel, frame.ids)
        stages, progress = self._stages, self._progress
        requests = self._requests(frame, payload, at)
        for first in range(0, len(requests), size):
            batch = requests[first : first + size]
            if begun - flushed > ANSWER_WITHIN:
                replies.flush()
                flushed = begun
            done = self._started
            self._started = done + len(batch)
            _pack_progress(progress, 0, done, self._started, begun)
            answers = stages.run(batch)
            ended = _monotonic()
            times = wire.BatchTimes(len(batch), begun - received, ended - begun, *stages.take_times())
            replies.add(answers, times)
            begun = ended
        _pack_progress(progress, 0, self._started, self._started, 0.0)
        replies.flush()

    def _requests(self, frame: wire.PredictView, payload: bytearray, at: int) -> list[Request]:
        facts = wire.spread(frame.facts, frame.facts_of, len(frame.ids))
        if len(facts) == 1 and len(payload) == frame.sizes[0]:
            bodies = [payload]
        else:
            ends = list(itertools.accumulate(frame.sizes, initial=at))
            bodies = [payload[start:end] for start, end in itertools.pairwise(ends)]
        return list(map(Request, facts, frame.request_ids, bodies, itertools.repeat(self._limit)))


def serve(sock: socket.socket, progress: mmap.mmap, loaded: Stages | None = None) -> int:
    """The whole life of a worker; returns its exit code. Runs in the worker process, on its main thread.

    `loaded` is what the template has loaded from which this process was forked.
    """
    channel = Channel(sock)
    first = channel.read()
    if first is None:
        return 0
    load = wire.decode(wire.Load, first[1])
    begun = _perf_counter()
    try:
        if loaded is None:
            stages = load_handler(load)
        else:
            stages = loaded
            template.inherit(stages, load)
        if not load.preparation.template:
            prepare(stages, load)
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        channel.write(wire.FAILED, wire.Failed(_reason(error), text), [], 0)
        sys.stderr.write(text)
        return 1
    if load.preparation.template:
        return template.serve(sock, partial(main, loaded=stages))
    gc.collect()
    gc.freeze()
    channel.write(wire.READY, wire.Ready(stages.style, _perf_counter() - begun), [], 0)
    Loop(channel, stages, progress, load.max_request_size).run()
    return 0


def main(sock: socket.socket, page: int, leave: Callable[[int], None] = os._exit, loaded: Stages | None = None) -> None:
    """Serve and leave the process, without waiting for threads or exit handlers of the handler's libraries."""
    code = 70  # EX_SOFTWARE
    try:
        progress = mmap.mmap(page, wire.PROGRESS.size)
        os.close(page)  # the map keeps a descriptor of its own
        code = serve(sock, progress, loaded)
    except (BrokenPipeError, ConnectionResetError):
        code = 0  # the server has gone
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        leave(code)


def _reason(error: BaseException) -> str:
    if isinstance(error, ModelLoadError):
        return error.message
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
