"""The frames between the server and a worker: both codecs in one file, used by both processes.

A frame is a fixed header (magic, version, kind, length of the head, length of the payloads), a msgpack head, and the
payloads of all jobs back to back. The head of a frame holds whatever is known of *all* its jobs, so that a frame costs
one system call, one encode and one decode however many requests it carries.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from mms.errors import FrameError

HEADER = struct.Struct("<2sBBIQ")
MAGIC = b"MM"
VERSION = 1
MAX_HEAD = 64 << 20
MAX_PAYLOAD = 16 << 30

LOAD, PREDICT, STOP = 1, 2, 3  # server -> worker
READY, FAILED, RESULT = 16, 17, 18  # worker -> server

# What a worker tells of its progress in the memory page that it shares with the server: how many jobs it has finished
# and how many it has begun since its start, and when it began the batch in hand (time.monotonic(); 0 while idle).
PROGRESS = struct.Struct("<QQd")


class Load(msgspec.Struct, array_like=True):
    """The first frame to a worker: what to load, and where."""

    model_name: str
    version: str
    directory: str
    handler: str
    manifest: dict[str, Any]
    model_config: dict[str, Any]
    batch_size: int
    isolate_errors: str
    gpu: int | None
    threads: int
    max_request_size: int
    max_response_size: int


class JobHead(msgspec.Struct, array_like=True, gc=False):
    """One request of a PREDICT frame; `headers` is [name, value, name, value, ...] as the client sent them.

    `encoding` is the lower-case Content-Encoding; `query_is_input` is set for /invocations, where MMS hands query
    parameters to the handler as inputs.
    """

    id: int
    request_id: bytes
    content_type: str
    encoding: str
    query: bytes
    query_is_input: bool
    headers: list[bytes]
    size: int


class Predict(msgspec.Struct, array_like=True):
    """Jobs in the order in which they are to run, in batches of up to `batch_size`."""

    batch_size: int
    jobs: list[JobHead]


class JobView(msgspec.Struct, array_like=True, gc=False):
    """JobHead as a worker reads it: the headers stay encoded until a handler asks for them."""

    id: int
    request_id: bytes
    content_type: str
    encoding: str
    query: bytes
    query_is_input: bool
    headers: msgspec.Raw
    size: int


class PredictView(msgspec.Struct, array_like=True):
    """Predict as a worker reads it."""

    batch_size: int
    jobs: list[JobView]


class JobResult(msgspec.Struct, array_like=True, gc=False):
    """The outcome of one job; the payload is the body.

    `error` is empty for an answer, else the error's type, and the payload its message. `head` is a block of validated
    response header lines, each with its CRLF, that always has a content-type for an answer.
    """

    id: int
    status: int
    head: bytes
    error: str
    size: int


class BatchTimes(msgspec.Struct, array_like=True, gc=False):
    """Seconds that one batch spent: waiting in the worker, in the handler and (request style) in each stage."""

    jobs: int
    waited: float
    handler: float
    preprocess: float
    inference: float
    postprocess: float


class Result(msgspec.Struct, array_like=True):
    """The outcomes of finished jobs, and the times of the batches finished since the last RESULT frame."""

    jobs: list[JobResult]
    batches: list[BatchTimes]


class Ready(msgspec.Struct, array_like=True):
    """The handler is loaded; `style` is 'batch' or 'request'."""

    style: str
    load_seconds: float


class Failed(msgspec.Struct, array_like=True):
    """The handler could not be loaded; the worker exits after this frame."""

    message: str
    traceback: str


class ForkRequest(msgspec.Struct, array_like=True):
    """What the fork server does on request: fork a worker that owns the descriptors passed beside this message.

    Descriptors, in order: channel, progress page, output (a pipe for standard output and standard error).
    `server` is the server's pid: the worker's parent once the fork server has let go of it.
    """

    environ: dict[str, str]
    name: str
    directory: str
    server: int


class Preloaded(msgspec.Struct, array_like=True):
    """The fork server's first message; `errors` names the modules that could not be imported, and why.

    With more than one thread it must not fork: a lock held by another thread would stay locked in the worker.
    """

    errors: list[str]
    threads: int


class ForkReply(msgspec.Struct, array_like=True):
    """The fork server's answer, beside which the worker's pidfd is passed; `error` is empty on success."""

    pid: int
    error: str


_encoder = msgspec.msgpack.Encoder()
_decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {
    kind: msgspec.msgpack.Decoder(kind)
    for kind in (Load, PredictView, Result, Ready, Failed, Preloaded, ForkRequest, ForkReply)
}
EMPTY_HEADERS = msgspec.Raw(_encoder.encode([]))
decode_headers = msgspec.msgpack.Decoder(list[bytes]).decode


def pack(kind: int, head: Any, payload_size: int = 0) -> bytes:
    """Header and head of a frame; the caller sends `payload_size` bytes of payload after it."""
    block = _encoder.encode(head)
    return HEADER.pack(MAGIC, VERSION, kind, len(block), payload_size) + block


def encode(head: Any) -> bytes:
    """One message without a frame around it (for sockets that keep message borders)."""
    return _encoder.encode(head)


def decode(kind: type, block: bytes | memoryview) -> Any:
    """The head as `kind`. Raises FrameError."""
    try:
        return _decoders[kind].decode(block)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FrameError(f"bad {kind.__name__} frame: {error}") from None


def parse_header(data: bytes | bytearray | memoryview, offset: int = 0) -> tuple[int, int, int]:
    """kind, length of the head, length of the payloads. Raises FrameError."""
    magic, version, kind, head, payload = HEADER.unpack_from(data, offset)
    if magic != MAGIC or version != VERSION:
        raise FrameError(f"not a frame: {bytes(data[offset : offset + 4])!r}")
    if head > MAX_HEAD or payload > MAX_PAYLOAD:
        raise FrameError(f"frame too large: {head} + {payload} bytes")
    return kind, head, payload


class FrameReader:
    """Cuts a stream, fed as it arrives, into frames. A frame that arrives whole is not copied."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0
        self._needed = HEADER.size

    def feed(self, data: bytes) -> Iterator[tuple[int, memoryview, memoryview]]:
        """(kind, head, payloads) for each frame that `data` completes. Raises FrameError."""
        if self._chunks or len(data) < self._needed:
            self._chunks.append(data)
            self._size += len(data)
            if self._size < self._needed:
                return
            data = b"".join(self._chunks)
            self._chunks.clear()
            self._size = 0
        self._needed = HEADER.size
        view = memoryview(data)
        at, end = 0, len(data)
        while end - at >= HEADER.size:
            kind, head, payload = parse_header(data, at)
            start = at + HEADER.size
            stop = start + head + payload
            if stop > end:
                self._needed = stop - at
                break
            yield kind, view[start : start + head], view[start + head : stop]
            at = stop
        if at < end:
            rest = data[at:] if at else data
            self._chunks.append(rest)
            self._size = len(rest)
