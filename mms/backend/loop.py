"""The life of a worker process: load, say READY, then read a frame, run its batches, answer, until the channel ends."""

from __future__ import annotations

import gc
import mmap
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable

from mms import wire
from mms.backend.answers import Answer
from mms.backend.loader import load_handler
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
        self._buffer = memoryview(bytearray(READ_SIZE))  # kept: a fresh one per read costs three system calls
        self._rest = b""

    def read(self) -> tuple[int, memoryview, memoryview | bytearray] | None:
        """(kind, head, payloads), or None when the server has closed the channel. Raises FrameError."""
        data = self._at_least(self._rest, wire.HEADER.size)
        if data is None:
            return None
        kind, head_size, payload_size = wire.parse_header(data)
        start = wire.HEADER.size + head_size
        data = self._at_least(data, start)
        if data is None:
            return None
        stop = start + payload_size
        head = memoryview(data)[wire.HEADER.size : start]
        if len(data) >= stop:
            self._rest = data[stop:]
            return kind, head, memoryview(data)[start:stop]
        payload = bytearray(payload_size)
        have = len(data) - start
        payload[:have] = data[start:]
        view = memoryview(payload)
        while have < payload_size:
            count = self._recv_into(view[have:])
            if not count:
                return None
            have += count
        self._rest = b""
        return kind, head, payload

    def _at_least(self, data: bytes, size: int) -> bytes | None:
        """`data` and what follows it on the channel, `size` bytes or more; None at its end."""
        while len(data) < size:
            count = self._recv_into(self._buffer)
            if not count:
                return None
            data = data + self._buffer[:count] if data else bytes(self._buffer[:count])
        return data

    def write(self, kind: int, head: object, payloads: list[bytes | bytearray | memoryview], size: int) -> None:
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
    """Finished jobs on their way back: gathered into one frame while the next batches are quick."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._jobs: list[wire.JobResult] = []
        self._batches: list[wire.BatchTimes] = []
        self._payloads: list[bytes | bytearray | memoryview] = []
        self._size = 0

    def add(self, jobs: list[wire.JobView], answers: list[Answer], times: wire.BatchTimes) -> None:
        results, payloads = self._jobs, self._payloads
        size = self._size
        for job, (status, head, body, error) in zip(jobs, answers, strict=True):
            length = len(body)
            results.append(wire.JobResult(job.id, status, head, error, length))
            payloads.append(body)
            size += length
        self._size = size
        self._batches.append(times)

    def flush(self) -> None:
        if self._jobs:
            self._channel.write(wire.RESULT, wire.Result(self._jobs, self._batches), self._payloads, self._size)
            self._jobs, self._batches, self._payloads, self._size = [], [], [], 0


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
            kind, head, payload = frame
            if kind == wire.STOP:
                return
            if kind != wire.PREDICT:
                raise FrameError(f"unexpected frame of kind {kind}")
            self._predict(wire.decode(wire.PredictView, head), payload)

    def _predict(self, frame: wire.PredictView, payload: memoryview | bytearray) -> None:
        received = flushed = begun = _monotonic()
        replies = Replies(self._channel)
        stages, progress, limit = self._stages, self._progress, self._limit
        jobs, size, at = frame.jobs, frame.batch_size, 0
        whole = payload if len(jobs) == 1 and isinstance(payload, bytearray) else None
        view = memoryview(payload)
        for first in range(0, len(jobs), size):
            batch = jobs[first : first + size]
            if begun - flushed > ANSWER_WITHIN:
                replies.flush()
                flushed = begun
            done = self._started
            self._started = done + len(batch)
            _pack_progress(progress, 0, done, self._started, begun)
            requests = []
            for job in batch:
                end = at + job.size
                requests.append(Request(job, bytearray(view[at:end]) if whole is None else whole, limit))
                at = end
            answers = stages.run(requests)
            ended = _monotonic()
            replies.add(
                batch, answers, wire.BatchTimes(len(batch), begun - received, ended - begun, *stages.take_times())
            )
            begun = ended
        _pack_progress(progress, 0, self._started, self._started, 0.0)
        replies.flush()


def serve(sock: socket.socket, progress: mmap.mmap) -> int:
    """The whole life of a worker; returns its exit code. Runs in the worker process, on its main thread."""
    channel = Channel(sock)
    first = channel.read()
    if first is None:
        return 0
    load = wire.decode(wire.Load, first[1])
    begun = _perf_counter()
    try:
        stages = load_handler(load)
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        channel.write(wire.FAILED, wire.Failed(_reason(error), text), [], 0)
        sys.stderr.write(text)
        return 1
    gc.collect()
    gc.freeze()
    channel.write(wire.READY, wire.Ready(stages.style, _perf_counter() - begun), [], 0)
    Loop(channel, stages, progress, load.max_request_size).run()
    return 0


def main(sock: socket.socket, page: int, leave: Callable[[int], None] = os._exit) -> None:
    """Serve and leave the process, without waiting for threads or exit handlers of the handler's libraries."""
    code = 70  # EX_SOFTWARE
    try:
        code = serve(sock, mmap.mmap(page, wire.PROGRESS.size))
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
