"""The worker's end of its socket to the server: frames in, frames out. Runs in the worker process."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence

from mms import wire
from mms.arena import WHERE, Arena
from mms.backend.answers import Answers, Body
from mms.errors import FrameError
from mms.handler import Requests
from mms.handler_metrics import Metrics

_HEADER = wire.HEADER.size
READ_SIZE = 256 << 10
JOIN_BELOW = 32 << 10
ANSWER_WITHIN = 0.0005  # seconds that a finished answer may wait for others to share its frame


class Channel:
    """The worker's end of its socket to the server. Blocking. Large answers go into the `arena`, if there is one."""

    lent = False  # to a further front end

    def __init__(self, sock: socket.socket, arena: Arena | None = None) -> None:
        self.metrics: Metrics | None = None  # the handler's, once it is loaded
        self._arena = arena
        self._sock = sock
        self._recv_into = sock.recv_into
        self._send = sock.sendmsg
        self._send_all = sock.sendall
        self._buffer = bytearray(READ_SIZE)  # kept: a fresh one per read costs three system calls
        self._view = memoryview(self._buffer)
        self._at = self._end = 0  # what was read and not yet handed out

    @property
    def gone(self) -> bool:
        """Whether a front end has ended: without the main process, this one ends, too."""
        return False

    @property
    def pending(self) -> bool:
        """Whether something was read that was not handed out."""
        return self._end != self._at

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()
        if self._arena is not None:
            self._arena.close()

    def begin(self) -> socket.socket | None:
        """Read the first bytes; returns the socket that may come beside them, on which further channels follow."""
        data, descriptors, _, _ = socket.recv_fds(self._sock, READ_SIZE, 1, socket.MSG_CMSG_CLOEXEC)
        self._buffer[: len(data)] = data
        self._end = len(data)
        return socket.socket(fileno=descriptors[0]) if descriptors else None

    def read(self) -> tuple[int, memoryview, bytearray, int] | None:
        """(kind, head, a buffer, where in it the payloads begin), or None when the server has closed the channel.

        The head is not valid after the next read, nor is the buffer unless the payloads are all that it holds. Raises
        FrameError.
        """
        if self._end - self._at < _HEADER and not self._fill(_HEADER):
            return None
        kind, head_size, payload_size = wire.parse_header(self._buffer, self._at)
        start = _HEADER + head_size
        if self._end - self._at < start and not self._fill(start):
            return None
        begin = self._at + start
        head = self._view[self._at + _HEADER : begin]
        if payload_size:
            if start + payload_size > len(self._buffer):
                self._at = begin
                payload = self._large(payload_size)
                return None if payload is None else (kind, head, payload, 0)
            if not self._fill(start + payload_size):
                return None
            begin = self._at + start
            head = self._view[begin - head_size : begin]  # it may have been moved
        self._at = begin + payload_size
        return kind, head, self._buffer, begin

    def predictions(
        self, wait: Callable[[], object] | None = None
    ) -> Iterator[tuple[wire.PredictView, bytearray, int]]:
        """Each frame of requests, the buffer with its payloads and where in it they begin, until the server says STOP
        or closes the channel. `wait` returns when there is something to read. Raises FrameError.
        """
        while True:
            if wait is not None and self._end == self._at:
                wait()
            frame = self.read()
            if frame is None:
                return
            kind, head, payload, at = frame
            if kind == wire.STOP:
                self.send_metrics()
                return
            if kind == wire.PREDICT:
                yield wire.decode(wire.PredictView, head), payload, at
            elif kind == wire.PREDICT | wire.SHARED and self._arena is not None:
                view = wire.decode(wire.PredictView, head)
                view.bodies = self._arena.requests.take(payload[at : at + WHERE.size], view.sizes)
                yield view, payload, at
            else:
                raise FrameError(f"unexpected frame of kind {kind}")

    def _fill(self, size: int) -> bool:
        """Have `size` bytes in hand; False at the end of the channel."""
        while self._end - self._at < size:
            if self._at == self._end:
                self._at = self._end = 0
            if self._at + size > len(self._buffer):
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

    def send_metrics(self) -> None:
        """What the handler has counted and measured since the last time, if there is anything."""
        if self.metrics is not None and self.metrics.changed:
            self.write(wire.MEASURED, self.metrics.take(), [], 0)

    def reply(self, ids: list[int], answers: Answers, batches: list[wire.BatchTimes]) -> None:
        """A RESULT frame with finished jobs, at least one, and the times of their batches."""
        self.send_metrics()  # before the answers: who has one finds its numbers in /metrics
        outcomes, bodies = answers
        size = sum(map(len, bodies))
        result = wire.Result(ids, [], *wire.share(outcomes), batches)
        if size < wire.INLINE_BELOW:
            result.bodies = bodies
            self._send_all(wire.pack(wire.RESULT, result))
            return
        result.sizes = list(map(len, bodies))
        if self._arena is not None and (where := self._arena.answers.put(bodies, size)) is not None:
            self.write(wire.RESULT | wire.SHARED, result, (where,), len(where))
        else:
            self.write(wire.RESULT, result, bodies, size)

    def write(self, kind: int, head: object, payloads: Sequence[Body], size: int) -> None:
        frame = wire.pack(kind, head, size)
        if size < JOIN_BELOW:
            self._send_all(b"".join((frame, *payloads)))
            return
        buffers = [memoryview(frame), *(memoryview(payload) for payload in payloads if len(payload))]
        while buffers:
            sent = self._send(buffers[:512])
            while buffers and sent >= len(buffers[0]):
                sent -= len(buffers.pop(0))
            if sent:
                buffers[0] = buffers[0][sent:]


def requests_of(frame: wire.PredictView, payload: bytearray, at: int, limit: int) -> Requests:
    """The requests of a frame, whose bodies lie back to back in `payload`, from `at` on; unpacked to `limit` bytes."""
    facts, bodies = frame.facts, frame.bodies
    for one in facts:
        one.headers = one.headers.copy()  # of the frame's head, which is not kept
    count = len(frame.ids)
    if frame.facts_of or len(facts) != 1:
        facts = wire.spread(facts, frame.facts_of, count)
    if not bodies:
        whole = count == 1 and len(payload) == frame.sizes[0]
        bodies = [payload] if whole else wire.cut(frame.sizes, payload, at)
    return Requests(facts, frame.request_ids, bodies, limit)
