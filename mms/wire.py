"""The frames between the server and a worker: both codecs in one file, used by both processes.

A frame is a fixed header (magic, version, kind, length of the head, length of the payloads), a msgpack head, and the
payloads of all jobs back to back. The head of a frame holds whatever is known of *all* its jobs, so that a frame costs
one system call, one encode and one decode however many requests it carries. That includes their bodies if these are
small: then the frame has `bodies`, and neither `sizes` nor payloads. Large ones mostly lie in the memory that both
share (`arena`): the frame is of the kind with SHARED, and instead of payloads there is where they begin.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

import msgspec

from mms.errors import FrameError
from mms.samples import WarmupSample

HEADER = struct.Struct("<2sBBIQ")
MAGIC = b"MM"
VERSION = 2
MAX_HEAD = 64 << 20
MAX_PAYLOAD = 16 << 30
INLINE_BELOW = 64 << 10  # bytes: bodies that are fewer in all are a column of their frame's head, cut and joined in C
FAIR_TURN = 10  # so often a lower priority has its turn, at the latest: of a queue's frames, of what a worker runs

LOAD, PREDICT, STOP = 1, 2, 3  # server -> worker
READY, FAILED, RESULT, MEASURED, STREAM = 16, 17, 18, 19, 20  # worker -> server
SHARED = 128  # added to PREDICT and RESULT
FORK = 32  # server -> template
LOADED, FORKED = 48, 49  # template -> server


class Preparation(msgspec.Struct, array_like=True, frozen=True):
    """What a worker does between loading its handler and READY.

    Each sample of `warmup` runs in each of `batch_sizes`. A `template` does none of it: it forks the workers that do.
    Nor does an `owner`, which lends its weights to them.
    """

    warmup: tuple[WarmupSample, ...] = ()
    batch_sizes: tuple[int, ...] = (1,)
    compile: bool = False
    cuda_graphs: tuple[int, ...] = ()
    template: bool = False
    owner: bool = False


class SharedStorage(msgspec.Struct, array_like=True, frozen=True):
    """Memory that another process has: `size` bytes, `offset` bytes behind where `handle` leads.

    On `device` cuda that is a handle of CUDA IPC with torch's counter of its users, on the cpu a file's path.
    """

    device: str
    handle: bytes
    size: int
    offset: int
    counter: bytes = b""
    counter_offset: int = 0


class SharedTensor(msgspec.Struct, array_like=True, frozen=True):
    """A parameter or buffer in one of the storages, with all names by which the handler has it."""

    names: list[str]
    storage: int
    dtype: str
    shape: list[int]
    stride: list[int]
    offset: int


class Weights(msgspec.Struct, array_like=True, frozen=True):
    """What the networks of an owner's handler hold; `fault` says why it cannot be lent."""

    storages: list[SharedStorage]
    tensors: list[SharedTensor]
    fault: str = ""

    @property
    def size(self) -> int:
        return sum(storage.size for storage in self.storages)


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
    cpu_threads: int
    max_request_size: int
    max_response_size: int
    threads: int = 1
    preprocess_threads: int = 0
    preparation: Preparation = Preparation()
    weights: Weights | None = None  # lent by an owner on the same GPU


class RequestFacts(msgspec.Struct, array_like=True, eq=False, gc=False):
    """What a request says besides its body; `headers` is [name, value, name, value, ...] as the client sent them.

    `encoding` is the lower-case Content-Encoding; `query_is_input` is set for /invocations, where MMS hands query
    parameters to the handler as inputs. Requests that say the same share one object.
    """

    content_type: str
    encoding: str
    query: bytes
    query_is_input: bool
    headers: list[bytes]


class Forming(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How a worker with preprocess threads forms batches of what it has prepared.

    `preferred` sizes, the largest first; `delay` is how many seconds a request may wait for a fuller batch, and
    `arrived` when the first of the frame's reached the front end (monotonic).
    """

    preferred: tuple[int, ...]
    delay: float
    arrived: float


class Predict(msgspec.Struct, array_like=True):
    """Jobs in the order in which they are to run, in batches of up to `batch_size`: one column per fact.

    `facts` holds each RequestFacts once, `facts_of` the index of each job's; it is empty while all share the first.
    `levels` are the jobs' priorities, 0 the highest, for workers that have an order of their own; so is `forming`,
    which is missing where batches are of what is there.
    """

    batch_size: int
    ids: list[int]
    sizes: list[int]
    request_ids: list[bytes]
    facts: list[RequestFacts]
    facts_of: list[int]
    bodies: list[bytes] = []
    levels: list[int] = []
    forming: Forming | None = None


class RequestFactsView(msgspec.Struct, array_like=True, gc=False):
    """RequestFacts as a worker reads it: the headers stay encoded until a handler asks for them."""

    content_type: str
    encoding: str
    query: bytes
    query_is_input: bool
    headers: msgspec.Raw


class PredictView(msgspec.Struct, array_like=True):
    """Predict as a worker reads it."""

    batch_size: int
    ids: list[int]
    sizes: list[int]
    request_ids: list[bytes]
    facts: list[RequestFactsView]
    facts_of: list[int]
    bodies: list[bytearray] = []
    levels: list[int] = []
    forming: Forming | None = None


class Outcome(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What became of a job; the payload is the body.

    `error` is empty for an answer, else the error's type, and the payload its message. `head` is a block of validated
    response header lines, each with its CRLF, that always has a content-type for an answer.
    """

    status: int
    head: bytes
    error: str


class BatchTimes(msgspec.Struct, array_like=True, gc=False):
    """Seconds that one batch spent: waiting in the worker, in the handler and (request style) in each stage."""

    jobs: Annotated[int, msgspec.Meta(ge=0)]  # a negative one would make room for another that is huge
    waited: float
    handler: float
    preprocess: float = 0.0
    inference: float = 0.0
    postprocess: float = 0.0


class Result(msgspec.Struct, array_like=True):
    """Finished jobs in the order in which they ran, and the times of their batches.

    `outcomes` and `outcome_of` are to each other as `facts` and `facts_of` of Predict. Of a batch with streams, jobs
    come as they finish, in several frames; the last of these has the times of the whole batch.
    """

    ids: list[int]
    sizes: list[int]
    outcomes: list[Outcome]
    outcome_of: list[int]
    batches: list[BatchTimes]
    bodies: list[bytes] = []


class Chunks(msgspec.Struct, array_like=True):
    """A STREAM frame: the next piece of each of these jobs' answers, whose ends are RESULTs without a body.

    `first` has, by job, the outcomes of those that begin with this frame.
    """

    ids: list[int]
    sizes: list[int]
    first: dict[int, Outcome]


class Series(msgspec.Struct, array_like=True, gc=False):
    """What was added to one metric of a handler with one set of labels: [name, value, name, value, ...].

    `value` is the sum of what was added, for a gauge the latest value; `counts` are those of a histogram's buckets.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    value: float
    counts: list[int]


class Measured(msgspec.Struct, array_like=True):
    """What the handler has counted and measured since the last frame of this kind; not sent when that is nothing."""

    series: list[Series]


class Ready(msgspec.Struct, array_like=True):
    """The handler is loaded; `style` is 'batch' or 'request'.

    `threads` batches run at a time; with `preprocess_threads`, requests are prepared while they do. `borrowed` is how
    many bytes of weights are another process's, `unshared` why they are not, though they were lent.
    """

    style: str
    load_seconds: float
    threads: int = 1
    preprocess_threads: int = 0
    borrowed: int = 0
    unshared: str = ""


class Failed(msgspec.Struct, array_like=True):
    """The handler could not be loaded; the worker exits after this frame."""

    message: str
    traceback: str


class Sandbox(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker gives up beyond what every worker does; by default nothing.

    `uid` -1: stay who the server is. With `files`, only the system, Python, the archive and the paths in `read` can be
    read, GPU devices used if `gpu`, and only the scratch folder written. `memory` is address space in bytes.
    """

    uid: int = -1
    gid: int = -1
    groups: tuple[int, ...] = ()
    files: bool = False
    read: tuple[str, ...] = ()
    gpu: bool = False
    network: bool = True
    memory: int = 0
    nice: int = 0


class ForkRequest(msgspec.Struct, array_like=True):
    """What a fork server or a template does on request: fork a worker that owns the descriptors passed beside this.

    Descriptors, in order: channel, progress page, output (a pipe for standard output and standard error).
    `server` is the server's pid: the worker's parent once the process that forked it has let go of it.
    """

    environ: dict[str, str]
    name: str
    directory: str
    server: int
    scratch: str
    sandbox: Sandbox


class Preload(msgspec.Struct, array_like=True):
    """The first message to a fork server: what to import, for all of its workers."""

    modules: list[str]


class Preloaded(msgspec.Struct, array_like=True):
    """What a fork server answers to it; `errors` names the modules that could not be imported, and why.

    A template says it as well, when it has loaded. With more than one thread neither must fork: a lock held by another
    thread would stay locked in the worker. An owner says it with its weights.
    """

    errors: list[str]
    threads: int
    weights: Weights | None = None


class ForkReply(msgspec.Struct, array_like=True):
    """The answer to a ForkRequest, beside which the worker's pidfd is passed; `error` is empty on success."""

    pid: int
    error: str


_encoder = msgspec.msgpack.Encoder()
_KINDS = (Load, PredictView, Result, Chunks, Measured, Ready, Failed, Preload, Preloaded, ForkRequest, ForkReply)
_decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {kind: msgspec.msgpack.Decoder(kind) for kind in _KINDS}
EMPTY_HEADERS = msgspec.Raw(_encoder.encode([]))
decode_headers = msgspec.msgpack.Decoder(list[bytes]).decode


T = TypeVar("T")
Payload = TypeVar("Payload", bytes, bytearray, memoryview)


def share(values: list[T]) -> tuple[list[T], list[int]]:
    """Each distinct object of `values` once, and the index of each value's; no indexes when there is only one."""
    if values.count(values[0]) == len(values):
        return values[:1], []
    distinct: dict[T, int] = {}
    places = [distinct.setdefault(value, len(distinct)) for value in values]
    return list(distinct), places


def spread(distinct: list[T], places: list[int], count: int) -> list[T]:
    """The `count` values that `share` was given. Raises FrameError when the columns do not fit together."""
    if not places and len(distinct) == 1:
        return distinct * count
    try:
        values = [distinct[place] for place in places]
    except IndexError:
        values = []
    if len(values) != count:
        raise FrameError(f"a frame with {count} jobs but {len(places)} references to {len(distinct)} values")
    return values


def cut(sizes: list[int], payload: Payload, at: int = 0) -> list[Payload]:
    """The bodies of these sizes, which lie back to back in `payload`, from `at` on."""
    ends = itertools.accumulate(sizes, initial=at)
    return [payload[start:end] for start, end in itertools.pairwise(ends)]


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
        self._chunks: list[bytes | bytearray] = []
        self._size = 0
        self._needed = HEADER.size

    @property
    def missing(self) -> int:
        """How many bytes are still to come of the frame that has begun, as far as is known."""
        return self._needed - self._size

    def take(self) -> tuple[bytes, int]:
        """The beginning of a frame that has begun, and the size of all of it: somebody else reads the rest."""
        begun, size = b"".join(self._chunks), self._needed
        self._chunks.clear()
        self._size, self._needed = 0, HEADER.size
        return begun, size

    def whole(self, data: bytes | bytearray) -> tuple[int, memoryview, memoryview] | None:
        """What `feed` would yield, if `data` is one frame and nothing came before; else None. Raises FrameError."""
        if self._chunks or len(data) < HEADER.size:
            return None
        kind, head, payload = parse_header(data)
        start = HEADER.size + head
        if start + payload != len(data):
            return None
        view = memoryview(data)
        return kind, view[HEADER.size : start], view[start:]

    def feed(self, data: bytes | bytearray) -> Iterator[tuple[int, memoryview, memoryview]]:
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
