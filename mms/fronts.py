"""What the main process and its further front ends tell each other: messages, and the line that carries them.

What is served is told as a whole (Picture), so that a front end that was started again learns it as any other does.
Descriptors travel beside the messages, in the order in which the messages name them.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from mms.http.limits import Limits
from mms.metrics import Parts

READ_SIZE = 256 << 10
MAX_DESCRIPTORS = 250  # beside one message: SCM_MAX_FD is 253
_SIZE = struct.Struct("<I")


class QueueSettings(msgspec.Struct, frozen=True):
    """The settings of a model that its requests and its queue need; names and meanings are ModelSettings'."""

    batch_size: int
    preferred_batch_sizes: tuple[int, ...]
    max_batch_delay: float
    queue_size: int
    queue_bytes: int
    queue_timeout: float
    queue_order: str
    priority_levels: int
    default_priority: int
    priority_queue_sizes: tuple[int, ...]
    request_timeout: float
    response_timeout: float
    startup_timeout: float
    retry: int


class Shown(msgspec.Struct, frozen=True):
    """A registered version; `state` is its VersionState, `next_start_at` on the monotonic clock."""

    number: int
    name: str
    version: str
    settings: QueueSettings
    state: str
    can_wait: bool
    next_start_at: float
    scales: bool  # by itself: it is to be told of the work there is


# from the main process


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The first message."""

    front_ends: int
    edge: bool
    limits: Limits
    token: str
    token_file: str


class Picture(msgspec.Struct, tag=True, frozen=True):
    """What is served now. `defaults` are versions by model, `announced` is the registry's, the rest is for probes."""

    versions: list[Shown]
    defaults: dict[str, str]
    announced: list[tuple[str, str, str]]
    health: str
    report: tuple[int, dict[str, Any]]
    limits: Limits
    log_level: str


class Listen(msgspec.Struct, tag=True, frozen=True):
    """Accept connections on the socket beside it, and soon no more on the one before."""


class Lent(msgspec.Struct, tag=True, frozen=True):
    """A worker of the version `number` takes jobs. Beside it: a channel, and the file of its arena and page."""

    worker: int
    number: int
    pid: int
    threads: int
    preprocess_threads: int


class Recall(msgspec.Struct, tag=True, frozen=True):
    """Send the worker nothing more, and say Left when it has answered what it has."""

    worker: int


class Gone(msgspec.Struct, tag=True, frozen=True):
    """The worker has ended."""

    worker: int
    cause: str


class Leave(msgspec.Struct, tag=True, frozen=True):
    """The version, which is in the picture no more, is being unloaded: say Empty when its requests are answered."""

    number: int
    reason: str


class Forget(msgspec.Struct, tag=True, frozen=True):
    """The version has no workers any more: what still waits for it fails."""

    number: int


class Sync(msgspec.Struct, tag=True, frozen=True):
    """Say Synced: all that was said before has been done."""

    number: int


class Ask(msgspec.Struct, tag=True, frozen=True):
    """Send Counts."""


class Shut(msgspec.Struct, tag=True, frozen=True):
    """Accept nothing more."""


class Drain(msgspec.Struct, tag=True, frozen=True):
    """Let requests in hand finish for so many seconds, then say Drained."""

    seconds: float


# from a front end


class Synced(msgspec.Struct, tag=True, frozen=True):
    """See Sync."""

    number: int


class Left(msgspec.Struct, tag=True, frozen=True):
    """The worker is not used any more, and owes nothing."""

    worker: int


class Empty(msgspec.Struct, tag=True, frozen=True):
    """See Leave."""

    number: int


class Kill(msgspec.Struct, tag=True, frozen=True):
    """The worker must be ended, for this reason."""

    worker: int
    cause: str


class Load(msgspec.Struct, tag=True, frozen=True):
    """The work that there is for a version which scales by itself: `jobs` are those in hand, by worker."""

    number: int
    jobs: dict[int, int]
    waiting: int
    oldest_wait: float
    batch_seconds: float
    submitted: int


class Rouse(msgspec.Struct, tag=True, frozen=True):
    """A request to the version waits, and it has no worker."""

    number: int


class Drained(msgspec.Struct, tag=True, frozen=True):
    """So many connections were cut."""

    cut: int


class Said(msgspec.Struct, tag=True, frozen=True):
    """A record for the log."""

    logger: str
    level: int
    text: str


class Counted(msgspec.Struct, frozen=True):
    """What a front end has counted for a version (VersionMetrics.parts), and its queue at the moment."""

    parts: Parts
    cancelled: int
    retries: int
    queue_depth: int
    queue_bytes: int
    newest_first: bool
    drain_rate: float
    in_flight: int


class Counts(msgspec.Struct, tag=True, frozen=True):
    """All that a front end has counted since its start. `failures` are of requests that reached no model."""

    versions: dict[int, Counted]
    failures: list[tuple[int, str, int]]
    connections: int
    bytes_in_flight: int
    shedding_step: int


ToFront = Hello | Picture | Listen | Lent | Recall | Gone | Leave | Forget | Sync | Ask | Shut | Drain
ToMain = Synced | Left | Empty | Kill | Load | Rouse | Drained | Said | Counts

_encode = msgspec.msgpack.Encoder().encode
_NO_DESCRIPTORS: tuple[int, ...] = ()


class Line:
    """One end of a socket between the two; owns it. What cannot be sent at once is kept until it can.

    `told` is called for each message, with the descriptors that came up to then; `ended` once, at the end.
    """

    def __init__(self, sock: socket.socket, kind: Any, ended: Callable[[], None]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._told: Callable[[Any, deque[int]], None] = lambda message, descriptors: None
        self._unread = bytearray()
        self._received: deque[int] = deque()
        self._unsent: deque[tuple[memoryview, Sequence[int], Sequence[int]]] = deque()
        self._closed = False

    def listen(self, told: Callable[[Any, deque[int]], None]) -> None:
        self._told = told
        self._loop.add_reader(self._sock, self._readable)

    def tell(self, message: Any, descriptors: Sequence[int] = _NO_DESCRIPTORS) -> None:
        """`descriptors` are the caller's. Raises OSError if there are some and none is left to copy them."""
        if self._closed:
            return
        block = _encode(message)
        kept = _copies(descriptors)
        self._unsent.append((memoryview(_SIZE.pack(len(block)) + block), kept, kept))
        if len(self._unsent) == 1:
            self._writable()

    def finish(self) -> None:
        """The other end's process has ended: hear what it has said until then, and close."""
        while not self._closed and self._read():
            pass
        self.close()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
            _close(self._received)
            for _, _, kept in self._unsent:
                _close(kept)
            self._unsent.clear()

    def _writable(self) -> None:
        while self._unsent:
            data, descriptors, kept = self._unsent[0]
            beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                sent = self._sock.sendmsg([data], beside)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._writable)
                return
            except OSError:  # its end is seen by reading
                break
            if sent < len(data):
                self._unsent[0] = data[sent:], _NO_DESCRIPTORS, kept
            else:
                self._unsent.popleft()
                _close(kept)
        self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        self._read()

    def _read(self) -> bool:
        """Whether there may be more."""
        try:
            data, descriptors, _, _ = socket.recv_fds(
                self._sock, READ_SIZE, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return False
        except OSError:
            data, descriptors = b"", []
        self._received += descriptors
        if not data:
            self.close()
            self._ended()
            return False
        unread = self._unread
        unread += data
        while not self._closed and len(unread) >= _SIZE.size:
            end = _SIZE.size + _SIZE.unpack_from(unread)[0]
            if len(unread) < end:
                break
            message = self._decode(bytes(unread[_SIZE.size : end]))
            del unread[:end]
            self._told(message, self._received)
        return True


def _copies(descriptors: Sequence[int]) -> list[int]:
    copies: list[int] = []
    try:
        for descriptor in descriptors:
            copies.append(os.dup(descriptor))
    except OSError:
        _close(copies)
        raise
    return copies


def _close(descriptors: Sequence[int] | deque[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
