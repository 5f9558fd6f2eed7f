"""What is fuzzed: each target takes bytes and raises only when a promise is broken.

A promise is more than not crashing: a request that h11 refuses must not be served, and one that both accept must
mean the same; an archive must hold what Python's own readers find in it; what is cut differently must not be read
differently.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h11

from mms import payload, wire
from mms.archive import ModelArchive
from mms.archive.manifest import Manifest
from mms.errors import ArchiveError, BadRequestError, ConfigError, FrameError, MMSError, RequestTooLargeError
from mms.http.connection import Connection
from mms.http.listener import HttpServer
from mms.safe_yaml import parse_yaml
from mms.tallies import Tallies
from tests.unit import http_client as fake

CORPUS = Path(__file__).parent / "corpus"
MAX_SIZE = 20_000
READ_KINDS = (wire.Load, wire.PredictView, wire.Result, wire.Chunks, wire.Measured, wire.Ready, wire.Failed,
              wire.Preload, wire.Preloaded, wire.ForkRequest, wire.ForkReply)  # fmt: skip
FORM = "multipart/form-data; boundary=XX"

Requests = list[tuple[bytes, bytes, bytes]]  # method, target, body


def http(data: bytes) -> None:
    """The front end's connection, whole and in pieces, against h11."""
    whole = _served(data, 0)
    for step in (1, 7):
        cut = _served(data, step)
        assert cut == whole, f"in pieces of {step}: {cut}, whole: {whole}"
    for index, (ours, (theirs, fault)) in enumerate(zip(whole, _h11(data), strict=False)):
        assert theirs is not None, f"request {index} is served as {ours}, but h11 says: {fault}"
        assert ours == theirs, f"request {index} is {ours} to us and {theirs} to h11"


def _served(data: bytes, step: int) -> Requests:
    application, transport = fake.Application(), fake.Transport()
    connection = fake.LOOP.run_until_complete(_connect(application))
    connection.connection_made(transport)
    if data:
        fake.Client(application, connection, transport).send(data, step=step)
    exchanges = application.exchanges
    return [(each.head.method, each.head.target, b"".join(each.parts)) for each in exchanges]


async def _connect(application: fake.Application) -> Connection:
    return HttpServer(application, fake.LIMITS, edge=False)._connect()


def _h11(data: bytes) -> Iterator[tuple[tuple[bytes, bytes, bytes] | None, str]]:
    """What h11 makes of each request; one that it refuses is the last, and nothing follows it."""
    while data:
        for _ in range(2):  # a server may skip an empty line before a request (RFC 9112, 2.2); ours does, h11 does not
            data = data.removeprefix(b"\r\n")
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        connection.receive_data(data)
        head, body = None, b""
        try:
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    yield None, "not complete"
                    return
                if isinstance(event, h11.Request):
                    head = event
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
        except h11.RemoteProtocolError as error:
            yield None, str(error)
            return
        assert head is not None
        yield (bytes(head.method), bytes(head.target), body), ""
        data = connection.trailing_data[0]


def codec(data: bytes) -> None:
    """Frames from a worker, whole and in pieces, and the messages in them."""
    frames = {step: _frames(data, step) for step in (0, 1, 5)}
    assert frames[0] == frames[1] == frames[5]
    for _, head, _ in frames[0][0]:
        for message in READ_KINDS:
            with contextlib.suppress(FrameError):
                wire.decode(message, head)
        with contextlib.suppress(FrameError):
            tallies = Tallies("cat 1.0")
            for series in wire.decode(wire.Measured, head).series:
                tallies.add(series.name, series.kind, series.labels, series.value, series.counts)


def _frames(data: bytes, step: int) -> tuple[list[tuple[int, bytes, bytes]], bool]:
    """The frames, and whether what follows them is no frame."""
    reader, found = wire.FrameReader(), []
    try:
        for at in range(0, len(data), step or max(1, len(data))):
            for kind, head, body in reader.feed(data[at : at + (step or len(data))]):
                found.append((kind, bytes(head), bytes(body)))
    except FrameError:
        return found, True
    return found, False


def archive(data: bytes) -> None:
    """A zip or tar.gz: refused, or extracted as Python's own readers would."""
    with tempfile.TemporaryDirectory(prefix="mms-fuzz-") as folder:
        path, target = Path(folder) / "a.mar", Path(folder) / "extracted"
        path.write_bytes(data)
        try:
            opened = ModelArchive.open(path)
            opened.extract(target)
        except ArchiveError as error:
            assert error.status == 400, error
            assert [entry.name for entry in Path(folder).iterdir()] == ["a.mar"], "a refused archive leaves files"
            return
        found = {str(entry.relative_to(target)): entry.read_bytes() for entry in target.rglob("*") if entry.is_file()}
        theirs = _tar(data) if opened.format == "tgz" else _zip(data)
        assert found == theirs, f"{sorted(found)} to us, {sorted(theirs)} to Python, or other bytes"
        assert {entry.name for entry in Path(folder).iterdir()} == {"a.mar", "extracted"}


def _zip(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {entry.filename: file.read(entry) for entry in file.infolist() if not entry.is_dir()}


def _tar(data: bytes) -> dict[str, bytes]:
    """Without the leading folder that ours strips."""
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        members = {entry.name: file.extractfile(entry) for entry in file if entry.isreg()}
        found = {name: content.read() for name, content in members.items() if content is not None}
    tops = {name.partition("/")[0] for name in found}
    if "MAR-INF/MANIFEST.json" not in found and len(tops) == 1:
        found = {name.partition("/")[2]: content for name, content in found.items()}
    return found


def manifest(data: bytes) -> None:
    """A manifest: refused, or the same after a trip through its own JSON."""
    try:
        found = Manifest.parse(data)
    except ArchiveError:
        return
    again = Manifest.parse(found.to_json())
    assert (again.model_name, again.version, again.handler) == (found.model_name, found.version, found.handler)
    assert Manifest.parse(again.to_json()) == again


def yaml(data: bytes) -> None:
    """A settings file."""
    try:
        assert isinstance(parse_yaml(data, "file"), dict)
    except ConfigError as error:
        assert "\n" not in error.message


def multipart(data: bytes) -> None:
    """A form: refused, or no byte in it that the client did not send."""
    try:
        parts = payload.parse_form(data, FORM)
    except BadRequestError:
        return
    assert len(parts) <= payload.MAX_PARTS
    for part in parts:
        assert bytes(part.data) in data
        with contextlib.suppress(MMSError):
            part.value()


def body(data: bytes) -> None:
    """A body as JSON, as text, as gzip and as deflate."""
    with contextlib.suppress(BadRequestError):
        payload.decode_json(data)
    with contextlib.suppress(BadRequestError):
        payload.decode_text(data)
    with contextlib.suppress(BadRequestError):
        payload.parse_query(data)
    for encoding in ("gzip", "deflate"):
        with contextlib.suppress(BadRequestError, RequestTooLargeError):
            assert len(payload.unpack(data, encoding, 1 << 20)) <= 1 << 20


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (http, codec, archive, manifest, yaml, multipart, body)
}


@functools.cache
def seeds(name: str) -> list[bytes]:
    """The committed examples of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
