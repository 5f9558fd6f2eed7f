"""The .mar format: round trips, and every kind of hostile archive, built byte by byte."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mms.archive import FORMATS, MANIFEST, Manifest, ModelArchive, archive_name, write_archive
from mms.archive.tar import TarContainer
from mms.errors import ArchiveError

PLAIN: dict[str, Any] = {"runtime": "python", "model": {"modelName": "cat", "handler": "service:handle"}}
DOCUMENT = json.dumps(PLAIN).encode()
SOURCES = {"handler.py": b"def handle(data, context): return data\n", "data/weights.bin": bytes(range(256)) * 64}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A zip entry whose every field can lie."""

    name: bytes
    data: bytes = b""
    method: int = 0
    flags: int = 0
    mode: int = 0o100644
    crc: int | None = None
    size: int | None = None
    packed: int | None = None
    offset: int | None = None
    extra: bytes = b""
    body: bytes | None = None
    descriptor: bytes = b""
    local: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> tuple[int, int, int, bytes]:
        body = self.data if self.body is None else self.body
        crc = zlib.crc32(self.data) if self.crc is None else self.crc
        return (
            crc,
            len(body) if self.packed is None else self.packed,
            len(self.data) if self.size is None else self.size,
            body,
        )

    def local_bytes(self) -> bytes:
        lying = replace(self, **self.local)
        crc, packed, size, _ = lying.facts()
        head = (b"PK\3\4", 20, lying.flags, lying.method, 0, 33, crc, packed, size, len(lying.name), len(lying.extra))
        return struct.pack("<4s5H3L2H", *head) + lying.name + lying.extra + self.facts()[3] + self.descriptor

    def central_bytes(self, offset: int) -> bytes:
        crc, packed, size, _ = self.facts()
        offset = offset if self.offset is None else self.offset
        sizes = (len(self.name), len(self.extra), 0, 0, 0, self.mode << 16, offset)
        head = (b"PK\1\2", 0x0314, 20, self.flags, self.method, 0, 33, crc, packed, size)
        return struct.pack("<4s6H3L5H2L", *head, *sizes) + self.name + self.extra


def entry(name: str, data: bytes = b"x", **changes: Any) -> Entry:
    return Entry(name=name.encode(), data=data, **changes)


def deflated(name: str, data: bytes, **changes: Any) -> Entry:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return entry(name, data, method=8, body=packer.compress(data) + packer.flush(), **changes)


def zip_bytes(*entries: Entry, count: int | None = None, document: bytes = DOCUMENT) -> bytes:
    data, central = bytearray(), bytearray()
    entries = (entry(MANIFEST, document), *entries)
    for each in entries:
        central += each.central_bytes(len(data))
        data += each.local_bytes()
    total = len(entries) if count is None else count
    return bytes(data) + central + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, total, total, len(central), len(data), 0)


def tar_entry(name: str, data: bytes = b"", kind: bytes = b"0", mode: int = 0o644, size: bytes | None = None) -> bytes:
    size = b"%011o\0" % len(data) if size is None else size
    head = name.encode().ljust(100, b"\0") + b"%07o\0" % mode + b"0000000\0" * 2 + size + b"00000000000\0"
    head = (head + b" " * 8 + kind + b"target".ljust(100, b"\0") + b"ustar\x0000").ljust(512, b"\0")
    head = head[:148] + b"%06o\0 " % sum(head) + head[156:]
    return head + data + bytes(-len(data) % 512)


def tgz_bytes(*entries: bytes, top: str = "cat/", end: bytes = bytes(1024)) -> bytes:
    return gzip.compress(tar_entry(top + MANIFEST, DOCUMENT) + b"".join(entries) + end, mtime=0)


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "cat.mar"
    path.write_bytes(data)
    return path


def refused(path: Path, reason: str) -> None:
    """Refused with that reason, at open or while it is read, fast and in little memory; nothing is left behind."""
    before = sorted(path.parent.iterdir())
    started = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(ArchiveError, match=reason) as caught:
            ModelArchive.open(path).extract(path.parent / "out")
            ModelArchive.open(path).verify()
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 4  # 2 s without the tracing
    assert caught.value.message.startswith(path.name)
    assert "\n" not in caught.value.message
    assert sorted(path.parent.iterdir()) == before


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "sources"
    for name, data in SOURCES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return {name: folder / name for name in SOURCES}


def make(path: Path, sources: dict[str, Path], format: str = "default", **options: Any) -> Path:
    manifest = Manifest(model_name="cat", version="2.1", handler="handler:handle", preload=("torch",))
    return write_archive(path / archive_name("cat", format), manifest, sources, format=format, **options)


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_gives_back_what_was_put_in(tmp_path: Path, sources: dict[str, Path], format: str) -> None:
    archive = ModelArchive.open(make(tmp_path, sources, format))
    archive.verify()
    folder = archive.extract(tmp_path / "out")
    assert {name: (folder / name).read_bytes() for name in SOURCES} == SOURCES
    assert json.loads((folder / MANIFEST).read_bytes()) == archive.manifest.raw
    assert sorted(file.name for file in archive.files) == sorted(SOURCES)
    assert all(len(file.sha256) == 64 for file in archive.files)
    assert (archive.manifest.model_name, archive.manifest.version) == ("cat", "2.1")
    assert (folder == archive.path) == (format == "no-archive")


@pytest.mark.parametrize("format", FORMATS)
def test_one_small_file_can_be_read_before_the_others(tmp_path: Path, sources: dict[str, Path], format: str) -> None:
    archive = ModelArchive.open(make(tmp_path, sources, format))
    for name, data in SOURCES.items():
        assert archive.peek(name, len(data)) == (None if format == "tgz" else data)
        assert archive.peek(name, len(data) - 1) is None
    assert archive.peek("missing", 1) is None


def test_a_file_that_is_read_before_the_others_has_the_hash_of_the_manifest(
    tmp_path: Path, sources: dict[str, Path]
) -> None:
    archive = ModelArchive.open(make(tmp_path, sources, "no-archive"))
    name = next(iter(SOURCES))
    (archive.path / name).write_bytes(b"other")
    with pytest.raises(ArchiveError, match=name):
        archive.peek(name, 100)


@pytest.mark.parametrize("format", ["default", "zip-store", "tgz"])
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, sources: dict[str, Path], format: str) -> None:
    first = make(tmp_path, sources, format).read_bytes()
    for path in sources.values():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    backwards = dict(reversed(sources.items()))
    assert make(tmp_path, backwards, format, force=True).read_bytes() == first


def test_zip_archives_are_readable_by_python(tmp_path: Path, sources: dict[str, Path]) -> None:
    with zipfile.ZipFile(make(tmp_path, sources)) as archive:
        assert archive.testzip() is None
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_tgz_archives_are_readable_by_python(tmp_path: Path, sources: dict[str, Path]) -> None:
    with tarfile.open(make(tmp_path, sources, "tgz")) as archive:
        assert archive.getnames() == ["cat/data/weights.bin", "cat/handler.py", f"cat/{MANIFEST}"]
        assert {(info.uid, info.mtime, info.mode) for info in archive} == {(0, 0, 0o644)}


@pytest.mark.parametrize("format", FORMATS)
def test_an_existing_archive_is_replaced_only_by_force(tmp_path: Path, sources: dict[str, Path], format: str) -> None:
    make(tmp_path, sources, format)
    with pytest.raises(ArchiveError, match="exists"):
        make(tmp_path, sources, format)
    sources["handler.py"].write_text("new = 1\n")
    archive = ModelArchive.open(make(tmp_path, sources, format, force=True))
    assert (archive.extract(tmp_path / "out") / "handler.py").read_text() == "new = 1\n"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith((".tmp", ".old"))] == []


def test_force_does_not_replace_a_folder_that_is_no_archive(tmp_path: Path, sources: dict[str, Path]) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArchiveError, match="not replaced"):
        make(tmp_path, sources, "no-archive", force=True)
    assert (tmp_path / "cat" / "thesis.txt").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, sources: dict[str, Path], format: str) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, sources, format, progress=interrupt)
    assert sorted(tmp_path.iterdir()) == before


def test_progress_counts_up_to_all_bytes(tmp_path: Path, sources: dict[str, Path]) -> None:
    seen: list[int] = []
    make(tmp_path, sources, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == sum(map(len, SOURCES.values()))


@pytest.mark.parametrize("format", ["default", "tgz"])
def test_weights_of_zeros_are_packed_so_that_they_can_be_read(tmp_path: Path, format: str) -> None:
    (tmp_path / "zeros").write_bytes(bytes(8 << 20))
    path = make(tmp_path, {"zeros": tmp_path / "zeros", "more": tmp_path / "zeros"}, format)
    ModelArchive.open(path).verify()


def test_a_compressible_file_below_the_ratio_passes(tmp_path: Path) -> None:
    data = b"".join(bytes(1000) + os.urandom(8) for _ in range(4000))
    path = write(tmp_path, zip_bytes(deflated("weights", data)))
    assert len(data) > 50 * path.stat().st_size
    ModelArchive.open(path).verify()


def test_extracted_files_are_private_and_not_executable(tmp_path: Path) -> None:
    path = write(tmp_path, zip_bytes(entry("run.sh", mode=0o100777)))
    out = ModelArchive.open(path).extract(tmp_path / "out")
    assert stat.S_IMODE((out / "run.sh").stat().st_mode) == 0o600
    assert stat.S_IMODE(out.stat().st_mode) == 0o700


def test_extraction_never_writes_into_an_existing_folder(tmp_path: Path) -> None:
    path = write(tmp_path, zip_bytes())
    (tmp_path / "out").mkdir()
    with pytest.raises(ArchiveError, match="exists"):
        ModelArchive.open(path).extract(tmp_path / "out")


def test_an_archive_replaced_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    archive = ModelArchive.open(write(tmp_path, zip_bytes()))
    write(tmp_path, zip_bytes(entry("other")))
    with pytest.raises(ArchiveError, match="changed since"):
        archive.extract(tmp_path / "out")


def test_s2_a_file_that_is_rewritten_with_its_old_times_is_not_the_pinned_one_any_more(tmp_path: Path) -> None:
    path = write(tmp_path, zip_bytes())
    archive = ModelArchive.open(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    facts = path.stat()
    with path.open("r+b") as file:  # the same file, the same size
        file.write(file.read())
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(ArchiveError, match="changed since it was opened"):
        archive.extract(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_s2_another_file_than_the_pinned_one_is_not_opened(tmp_path: Path) -> None:
    path = write(tmp_path, zip_bytes())
    with pytest.raises(ArchiveError, match=f"its SHA-256 is {hashlib.sha256(path.read_bytes()).hexdigest()}, and"):
        ModelArchive.open(path, sha256="0" * 64)
    with pytest.raises(ArchiveError, match="a folder has no SHA-256"):
        ModelArchive.open(tmp_path, sha256="0" * 64)


def test_a_missing_archive_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="no such file") as caught:
        ModelArchive.open(tmp_path / "gone.mar")
    assert caught.value.status == 404


def test_an_archive_of_multi_model_server_is_read(tmp_path: Path) -> None:
    document = {
        "specificationVersion": "1.0",
        "implementationVersion": "1.0",
        "description": "Resnet-18",
        "modelServerVersion": "1.0",
        "license": "Apache 2.0",
        "runtime": "python",
        "model": {
            "modelName": "resnet-18",
            "description": "Resnet-18",
            "modelVersion": "1.0",
            "extensions": {"parametersFile": "resnet-18-0000.params"},
            "handler": "mxnet_vision_service:handle",
        },
        "engine": {"engineName": "MXNet", "engineVersion": "1.2.0"},
        "publisher": {"author": "MXNet SDK team", "email": "noreply@example.com"},
    }
    path = tmp_path / "resnet-18.mar"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("MAR-INF")
        archive.writestr(MANIFEST, json.dumps(document))
        archive.writestr("mxnet_vision_service.py", "def handle(data, context): ...\n")
    opened = ModelArchive.open(path)
    opened.verify()
    manifest = opened.manifest
    assert (manifest.handler, manifest.version, manifest.files) == ("mxnet_vision_service:handle", "1.0", {})
    assert manifest.raw["engine"]["engineName"] == "MXNet"
    assert opened.files[0].sha256 == ""


@pytest.mark.parametrize("format", ["zip", "tgz", "tgz with a dot", "directory"])
def test_an_archive_of_torchserve_is_read(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "files" / "densenet161"
    (folder / "MAR-INF").mkdir(parents=True)
    document = {
        "createdOn": "28/07/2020 06:32:08",
        "runtime": "python3",
        "model": {
            "modelName": "densenet161",
            "serializedFile": "densenet161.pth",
            "handler": "image_classifier",
            "modelFile": "model.py",
            "modelVersion": 1.0,
        },
        "archiverVersion": "0.12.0",
    }
    (folder / MANIFEST).write_text(json.dumps(document))
    (folder / "model.py").write_text("class DenseNet: ...\n")
    (folder / "densenet161.pth").write_bytes(b"weights")
    path = tmp_path / "densenet161"
    if format == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("model.py", "densenet161.pth", MANIFEST):
                archive.write(folder / name, name)
    elif format == "directory":
        folder.rename(path)
    else:
        with tarfile.open(path, "w:gz") as archive_:
            archive_.add(folder, "." if "dot" in format else "densenet161")
    opened = ModelArchive.open(path)
    out = opened.extract(tmp_path / "out")
    manifest = opened.manifest
    assert (manifest.handler, manifest.version, manifest.runtime) == ("image_classifier", "1.0", "python3")
    assert (manifest.serialized_file, manifest.model_file) == ("densenet161.pth", "model.py")
    assert (out / manifest.serialized_file).read_bytes() == b"weights"


@pytest.mark.parametrize(
    "handler", ["service:handle", "service.py:handle", "service", "service.py", "a.b:C", "a/b.py:C"]
)
def test_every_spelling_of_a_handler_is_understood(handler: str) -> None:
    document = {"model": {"modelName": "m", "handler": handler}}
    manifest = Manifest.parse(json.dumps(document).encode())
    assert (manifest.handler, manifest.runtime, manifest.version) == (handler, "python", "1.0")


def test_a_manifest_survives_its_own_json() -> None:
    first = Manifest.parse(json.dumps({**PLAIN, "license": "MIT", "preload": ["torch"]}).encode())
    again = Manifest.parse(first.to_json())
    assert again.to_json() == first.to_json()
    assert (again.preload, again.raw["license"]) == (("torch",), "MIT")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (b"", "not JSON"),
        (b"[]", "an object"),
        (b"\xff{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"model": {}, "model": {}}', "stands twice"),
        (b" " * (3 << 20), "larger than"),
        ({"model": None}, "model: an object"),
        ({"model": {"handler": "a:b"}}, "model.modelName: missing"),
        ({"model": {"modelName": "m"}}, "model.handler: missing"),
        ({"model": {"modelName": "../m", "handler": "a:b"}}, "model.modelName"),
        ({"model": {"modelName": ["m"], "handler": "a:b"}}, "model.modelName"),
        ({"model": {"modelName": "m", "handler": 7}}, "model.handler"),
        ({"model": {"modelName": "m", "handler": "../a.py:b"}}, "model.handler"),
        ({"model": {"modelName": "m", "handler": "/a.py:b"}}, "model.handler"),
        ({"model": {"modelName": "m", "handler": "a:b:c"}}, "model.handler"),
        ({"model": {"modelName": "m", "handler": "a:b", "modelVersion": []}}, "model.modelVersion"),
        ({"model": {"modelName": "m", "handler": "a:b", "modelVersion": "1/2"}}, "model.modelVersion"),
        ({"model": {"modelName": "m", "handler": "a:b", "modelVersion": True}}, "model.modelVersion"),
        ({"model": {"modelName": "m", "handler": "a:b", "serializedFile": "../w"}}, "model.serializedFile"),
        ({"model": {"modelName": "m", "handler": "a:b", "configFile": {}}}, "model.configFile"),
        ({"runtime": "java"}, "runtime"),
        ({"runtime": ["python"]}, "runtime"),
        ({"preload": "torch"}, "preload"),
        ({"preload": ["os; x"]}, "preload"),
        ({"files": []}, "files"),
        ({"files": {"a": {"size": 1}}}, "sha256"),
        ({"files": {"a": {"size": True, "sha256": "0" * 64}}}, "files"),
        ({"files": {"a": {"size": -1, "sha256": "0" * 64}}}, "files"),
        ({"files": {"a": {"size": 1, "sha256": "0" * 63}}}, "sha256"),
        ({"files": {"../a": {"size": 1, "sha256": "0" * 64}}}, "files"),
        ({"files": {"a": {"size": 1, "sha256": "0" * 64}}, "model": {**PLAIN["model"], "modelFile": "b"}}, "modelFile"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_manifest_is_refused_with_the_field(tmp_path: Path, change: Any, named: str) -> None:
    document = change if isinstance(change, bytes) else json.dumps({**PLAIN, **change}).encode()
    refused(write(tmp_path, zip_bytes(document=document)), named)


HASHED: dict[str, Any] = {
    "a": {"sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881", "size": 1}
}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([entry("a", b"y")], "'a': its SHA-256"),
        ([entry("a", b"xx")], "'a': 2 bytes, the manifest says 1"),
        ([], "'a': in the manifest, but not"),
        ([entry("a"), entry("b")], "'b': in the archive, but not"),
    ],
    ids=["other content", "other size", "missing", "extra"],
)
def test_files_that_differ_from_the_manifest_are_refused(tmp_path: Path, files: list[Entry], reason: str) -> None:
    path = write(tmp_path, zip_bytes(*files, document=json.dumps({**PLAIN, "files": HASHED}).encode()))
    refused(path, reason)
    assert ModelArchive.open(path).extract(tmp_path / "unverified", verify=False).is_dir()


def test_an_archive_that_matches_its_manifest_passes(tmp_path: Path) -> None:
    document = json.dumps({**PLAIN, "files": HASHED}).encode()
    ModelArchive.open(write(tmp_path, zip_bytes(entry("a"), document=document))).verify()


def test_an_empty_list_of_files_is_a_list(tmp_path: Path) -> None:
    """Only archives of other makers, which have no list, are taken with whatever is in them."""
    document = json.dumps({**PLAIN, "files": {}}).encode()
    archive = ModelArchive.open(write(tmp_path, zip_bytes(document=document)))
    archive.verify()
    assert archive.manifest.hashed and not Manifest.parse(DOCUMENT).hashed
    refused(write(tmp_path, zip_bytes(entry("b"), document=document)), "'b': in the archive, but not")


BAD_NAMES = [
    ("../evil", r"'\.\.'"),
    ("a/../../evil", r"'\.\.'"),
    ("..", r"'\.\.'"),
    ("/etc/passwd", "absolute"),
    ("C:/evil", "absolute"),
    ("c:evil", "absolute"),
    ("a\\..\\evil", "backslash"),
    ("a\0b", "NUL"),
    ("a\nb", "control character"),
    ("a\x7fb", "control character"),
    ("a\x85b", "control character"),
    ("a//b", "empty part"),
    ("./a", "empty part"),
    ("a/./b", "empty part"),
    ("", "empty part"),
    ("x" * 256, "too long"),
    ("\N{SNOWMAN}" * 86, "too long"),
    ("/".join(["x" * 250] * 5), "too long"),
    ("d/" * 32 + "x", "levels"),
]


@pytest.mark.parametrize(("name", "reason"), BAD_NAMES)
def test_a_zip_with_a_bad_name_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    refused(write(tmp_path, zip_bytes(entry(name))), reason)


@pytest.mark.parametrize(
    ("name", "reason"),
    [pair for pair in BAD_NAMES if len(pair[0].encode()) < 90 and "\0" not in pair[0] and pair[0] not in ("", "./a")],
)
def test_a_tgz_with_a_bad_name_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    refused(write(tmp_path, tgz_bytes(tar_entry(name), top="")), reason)


COLLISIONS = [
    (["a", "a"], "stands twice"),
    (["readme", "README"], "only in case"),
    (["stra\N{LATIN SMALL LETTER SHARP S}e", "STRASSE"], "only in case"),
    (["caf\u00e9", "cafe\u0301"], "Unicode form"),
    (["Dir/a", "dir/b"], "only in case"),
    (["a", "a/b"], "both a file and a folder"),
    (["a/b", "a"], "both a file and a folder"),
    (["A", "a/b"], "both a file and a folder"),
]


@pytest.mark.parametrize(("names", "reason"), COLLISIONS)
def test_names_that_collide_are_refused(tmp_path: Path, names: list[str], reason: str) -> None:
    refused(write(tmp_path, zip_bytes(*map(entry, names))), reason)
    refused(write(tmp_path, tgz_bytes(*(tar_entry(f"cat/{name}") for name in names))), reason)


def lying_descriptor(crc: int) -> bytes:
    return struct.pack("<4sLLL", b"PK\7\x08", crc, 1, 1)


GOOD_CRC = zlib.crc32(b"x")
FULL = 0xFFFFFFFF
CUT = bytes(range(99))
EXTRA64 = struct.pack("<HHQQ", 1, 16, 1, 1)
# Deflate's stored blocks, so long that the stream ends exactly where the reader's chunk does.
STORED_CHUNK = b"".join(last + b"\xfb\xff\4\0" + bytes(0xFFFB) for last in (b"\0", b"\0", b"\0", b"\1"))
STREAMED = {"crc": 0, "packed": 0, "size": 0}

BAD_ENTRIES = {
    "symbolic link": (entry("a", mode=0o120777), "symbolic link"),
    "character device": (entry("a", mode=0o020644), "a device"),
    "block device": (entry("a", mode=0o060644), "a device"),
    "FIFO": (entry("a", mode=0o010644), "a FIFO"),
    "socket": (entry("a", mode=0o140644), "a socket"),
    "setuid": (entry("a", mode=0o104755), "setuid"),
    "setgid": (entry("a", mode=0o102755), "setuid or setgid"),
    "file with a folder's mode": (entry("a", mode=0o040755), "not that of a file"),
    "folder with a file's mode": (entry("a/", b"", mode=0o100644), "not that of a folder"),
    "folder with content": (entry("a/", mode=0o040755), "folder with content"),
    "not UTF-8": (Entry(name=b"\xff", data=b"x"), "not UTF-8"),
    "encrypted": (entry("a", flags=1), "encrypted"),
    "strongly encrypted": (entry("a", flags=0x41), "encrypted"),
    "masked": (entry("a", flags=0x2000), "encrypted"),
    "patch": (entry("a", flags=0x20), "unknown flags"),
    "bzip2": (entry("a", method=12), "unknown compression 12"),
    "lzma": (entry("a", method=14), "unknown compression 14"),
    "stored with two sizes": (entry("a", size=2), "two sizes differ"),
    "wrong checksum": (entry("a", crc=1), "CRC-32"),
    "not deflate": (entry("a", method=8, body=b"\xff\xff", size=1), "not deflate"),
    "deflate that goes on": (deflated("a", b"x" * 100, size=10, crc=0), "more than the declared 10"),
    "deflate that ends early": (deflated("a", b"x", size=10), "unpacks to 1 bytes, 10"),
    "data behind deflate": (entry("a", method=8, body=deflated("", b"x").facts()[3] + b"junk"), "after the end"),
    "data a chunk behind deflate": (entry("a", bytes(4 * 0xFFFB), method=8, body=STORED_CHUNK + b"j"), "after the end"),
    "deflate cut off": (entry("a", CUT, method=8, body=deflated("", CUT).facts()[3][:50]), "truncated"),
    "1,000:1": (deflated("a", bytes(4 << 20)), "a bomb"),
    "9 GiB declared": (entry("a", method=8, body=bytes(30 << 10), size=FULL - 1, packed=30 << 10), "a bomb"),
    "other local name": (entry("a", local={"name": b"b"}), "contradicts"),
    "other local flags": (entry("a", local={"flags": 0x800}), "contradicts"),
    "other local method": (entry("a", local={"method": 8}), "contradicts"),
    "other local checksum": (entry("a", local={"crc": 1}), "contradicts"),
    "other local size": (entry("a", local={"size": 2}), "contradicts"),
    "local sizes of nothing": (entry("a", local=STREAMED), "contradicts"),
    "longer local name": (entry("a", local={"name": b"a" * 99}), "contradicts"),
    "bytes behind the data": (entry("a", descriptor=b"junk"), "belong to no entry"),
    "lying descriptor": (
        entry("a", flags=8, local=STREAMED, descriptor=lying_descriptor(GOOD_CRC + 1)),
        "belong to no entry",
    ),
    "no descriptor": (entry("a", flags=8, local=STREAMED), "belong to no entry"),
    "zip64 without need": (entry("a", extra=EXTRA64), "zip64 field contradicts"),
    "zip64 missing": (entry("a", size=FULL, packed=FULL), "zip64 field contradicts"),
    "zip64 too short": (entry("a", size=FULL, packed=FULL, extra=EXTRA64[:12]), "zip64 field contradicts"),
    "zip64 twice": (entry("a", size=FULL, packed=FULL, extra=struct.pack("<HHQ", 1, 8, 1) * 2), "zip64 field"),
    "zip64 of 2^63": (
        entry("a", method=8, size=FULL, extra=struct.pack("<HHQ", 1, 8, 1 << 63)),
        "a bomb",
    ),
    "zip64 packed 2^63": (
        entry("a", size=FULL, packed=FULL, extra=struct.pack("<HHQQ", 1, 16, 1 << 63, 1 << 63)),
        "more than 8 GiB",
    ),
    "header inside another's data": (entry("a", offset=10), "overlaps|no local header"),
    "the same header twice": (entry("a", offset=0), "overlaps"),
    "header far away": (entry("a", offset=FULL - 1), "belong to no entry"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ENTRIES)
def test_a_zip_with_a_hostile_entry_is_refused(tmp_path: Path, kind: str) -> None:
    hostile, reason = BAD_ENTRIES[kind]
    refused(write(tmp_path, zip_bytes(entry("before"), hostile, entry("after"))), reason)


@pytest.mark.parametrize(
    "good",
    [
        entry("a", flags=8, local=STREAMED, descriptor=lying_descriptor(GOOD_CRC)),
        entry("a", flags=8, local=STREAMED, descriptor=lying_descriptor(GOOD_CRC)[4:]),
        entry("a", size=FULL, packed=FULL, extra=EXTRA64),
        entry("a/", b"", mode=0o042755),
        entry("caf\u00e9", flags=0x800),
        deflated("a", b""),
    ],
    ids=["descriptor", "bare descriptor", "zip64", "setgid folder", "UTF-8", "empty deflated"],
)
def test_honest_variants_of_zip_are_read(tmp_path: Path, good: Entry) -> None:
    archive = ModelArchive.open(write(tmp_path, zip_bytes(entry("before"), good, entry("after"))))
    archive.verify()
    assert (archive.extract(tmp_path / "out") / good.name.decode()).exists()


def test_a_zip64_archive_is_read_and_its_lies_are_refused(tmp_path: Path) -> None:
    plain = zip_bytes(entry("a"))
    _, _, _, _, count, size, start, _ = struct.unpack("<4s4H2LH", plain[-22:])

    def zip64(*, count64: int = count, size64: int = size, start64: int = start, at: int = start + size) -> bytes:
        record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count64, count64, size64, start64)
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, FULL, FULL, 0)
        return plain[:-22] + record + locator + end

    ModelArchive.open(write(tmp_path, zip64())).verify()
    refused(write(tmp_path, zip64(start64=1 << 63)), "not where the end record says")
    refused(write(tmp_path, zip64(size64=(1 << 64) - 1)), "not where the end record says")
    refused(write(tmp_path, zip64(count64=1_000_000)), "more than 10000 entries")
    refused(write(tmp_path, zip64(at=0)), "locator")
    refused(write(tmp_path, zip64()[:-22] + plain[-22:-10] + struct.pack("<LLH", size, 7, 0)), "contradicts")


@pytest.mark.parametrize("change", [{4: 1}, {6: 1}, {8: 1}])
def test_a_part_of_a_zip_in_several_files_is_refused(tmp_path: Path, change: dict[int, int]) -> None:
    data = bytearray(zip_bytes(entry("a")))
    for at, value in change.items():
        data[len(data) - 22 + at] = value
    refused(write(tmp_path, bytes(data)), "several files")


def test_overlapping_entries_are_refused(tmp_path: Path) -> None:
    inner = entry("inner")
    outer = entry("outer", inner.local_bytes())
    manifest = entry(MANIFEST, DOCUMENT)
    data = manifest.local_bytes() + outer.local_bytes()
    at = len(manifest.local_bytes())
    central = manifest.central_bytes(0) + outer.central_bytes(at) + inner.central_bytes(at + 30 + len(b"outer"))
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, len(central), len(data), 0)
    refused(write(tmp_path, data + central + end), "overlaps")
    with zipfile.ZipFile(tmp_path / "cat.mar") as archive:
        assert archive.namelist() == [MANIFEST, "outer", "inner"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "neither a zip nor"),
        (b"hello, world", "neither a zip nor"),
        (zip_bytes(entry("a"))[:-1], "no end of a zip|truncated"),
        (zip_bytes(entry("a"))[:100], "truncated"),
        (b"junk" + zip_bytes(entry("a")), "not where the end record says"),
        (zip_bytes(entry("a")) + b"junk", "after the end of the zip"),
        (zip_bytes(entry("a")) + zip_bytes(entry("b")), "not where the end record says"),
        (zip_bytes(entry("a"), count=3), "malformed"),
        (zip_bytes(entry("a"), count=1), "more, or less"),
        (struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, 0, 0, 0), "the zip is empty"),
        (zip_bytes(entry("a")).replace(MANIFEST.encode(), b"MAR-INF/MANIFEST.jso0"), "no MAR-INF"),
        (zip_bytes(*(entry(f"f{i}", b"") for i in range(10_000))), "more than 10000"),
    ],
    ids=[
        *("empty", "not zip", "truncated", "cut in half", "prefix junk", "suffix junk", "two zips", "count too high"),
        *("count too low", "empty zip", "no manifest", "too many entries"),
    ],
)
def test_a_broken_zip_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    refused(write(tmp_path, data), reason)


def test_a_zip_with_prefix_and_moved_offsets_is_refused(tmp_path: Path) -> None:
    manifest = entry(MANIFEST, DOCUMENT)
    data = b"#!/bin/sh\n" + manifest.local_bytes()
    central = manifest.central_bytes(10)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(central), len(data), 0)
    refused(write(tmp_path, data + central + end), "before the first entry")


def test_more_than_8_gib_in_all_are_refused(tmp_path: Path) -> None:
    big = [entry(f"f{i}", size=3 << 30, packed=3 << 30) for i in range(3)]
    refused(write(tmp_path, zip_bytes(*big)), "more than 8 GiB")


BAD_TARS = {
    "hard link": (tar_entry("cat/a", kind=b"1"), "a hard link"),
    "symbolic link": (tar_entry("cat/a", kind=b"2"), "a symbolic link"),
    "character device": (tar_entry("cat/a", kind=b"3"), "a device"),
    "block device": (tar_entry("cat/a", kind=b"4"), "a device"),
    "FIFO": (tar_entry("cat/a", kind=b"6"), "a FIFO"),
    "sparse": (tar_entry("cat/a", kind=b"S"), "unknown kind"),
    "setuid": (tar_entry("cat/a", mode=0o4755), "setuid"),
    "folder with content": (tar_entry("cat/a", b"x", kind=b"5"), "folder with content"),
    "negative size": (tar_entry("cat/a", size=b"-0000000001\0"), "malformed number"),
    "2^63 bytes": (tar_entry("cat/a", size=b"\x80\0\0\0" + struct.pack(">Q", 1 << 63)), "more than 8 GiB"),
    "minus one byte": (tar_entry("cat/a", size=b"\xff" * 12), "more than 8 GiB"),
    "bad checksum": (tar_entry("cat/a").replace(b"cat/a", b"cat/b"), "checksum"),
    "size beyond the end": (tar_entry("cat/a", size=b"00000100000\0"), "truncated"),
    "pax record cut": (tar_entry("x", b"99 path=a\n", kind=b"x"), "malformed extended"),
    "pax negative size": (tar_entry("x", b"11 size=-1\n", kind=b"x"), "malformed size"),
    "pax path escapes": (tar_entry("x", b"15 path=../evil"[:14] + b"\n", kind=b"x") + tar_entry("cat/a"), r"'\.\."),
    "pax for all": (tar_entry("x", b"10 path=a\n", kind=b"g"), "global"),
    "pax sparse": (tar_entry("x", b"22 GNU.sparse.major=1\n", kind=b"x"), "sparse"),
    "huge pax header": (tar_entry("x", size=b"00001000000\0", kind=b"x"), "too large"),
    "long name escapes": (tar_entry("x", b"../../evil\0", kind=b"L") + tar_entry("cat/a"), r"'\.\.'"),
    "two manifests": (tar_entry(f"dog/{MANIFEST}", DOCUMENT), "two"),
    "too many entries": (b"".join(tar_entry(f"cat/{i}") for i in range(10_000)), "more than 10000|a bomb"),
}


@pytest.mark.parametrize("kind", BAD_TARS)
def test_a_tgz_with_a_hostile_entry_is_refused(tmp_path: Path, kind: str) -> None:
    hostile, reason = BAD_TARS[kind]
    refused(write(tmp_path, tgz_bytes(hostile)), reason)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tgz_bytes()[:-9], "truncated"),
        (tgz_bytes()[:-8] + bytes(8), "damaged gzip"),
        (tgz_bytes(end=b""), "truncated"),
        (tgz_bytes(end=bytes(512) + b"junk"), "after the end of the tar"),
        (tgz_bytes() + tgz_bytes(), "after the end of the gzip"),
        (tgz_bytes() + b"junk", "after the end of the gzip"),
        (tgz_bytes(end=bytes(40 << 20)), "a bomb"),
        (tgz_bytes(tar_entry("dog/a")), "no MAR-INF"),
        (gzip.compress(b"not a tar" * 100, mtime=0), "checksum|malformed"),
        (gzip.compress(bytes(1024), mtime=0), "no MAR-INF"),
    ],
    ids=[
        "cut",
        "bad checksum",
        "no end",
        "junk in it",
        "two streams",
        "junk behind",
        "bomb",
        "two tops",
        "no tar",
        "empty",
    ],
)
def test_a_broken_tgz_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    refused(write(tmp_path, data), reason)


def test_a_tgz_rewritten_between_check_and_use_is_refused() -> None:
    file = io.BytesIO(tgz_bytes(tar_entry("cat/a", b"x")))
    container = TarContainer(file)
    file.seek(0)
    file.write(tgz_bytes(tar_entry("cat/b", b"x")))
    with pytest.raises(ArchiveError, match="changed while it was read"):
        for _ in container.contents():
            pass


def folder_archive(tmp_path: Path) -> Path:
    path = tmp_path / "cat.mar"
    (path / "MAR-INF").mkdir(parents=True)
    (path / MANIFEST).write_bytes(DOCUMENT)
    (path / "a").write_text("x")
    return path


def test_a_folder_may_link_to_its_own_files_only(tmp_path: Path) -> None:
    path = folder_archive(tmp_path)
    (path / "link").symlink_to("a")
    ModelArchive.open(path).verify()
    (path / "link").unlink()
    (tmp_path / "cat.mar-secret").write_text("secret")
    for target in ("../cat.mar-secret", "/etc/passwd", "MAR-INF", "nowhere", "link"):
        (path / "link").symlink_to(target)
        refused(path, "symbolic link that leads outside")
        (path / "link").unlink()


def test_a_folder_with_a_fifo_is_refused(tmp_path: Path) -> None:
    path = folder_archive(tmp_path)
    os.mkfifo(path / "fifo")
    refused(path, "a FIFO")


def test_a_folder_deeper_than_the_limit_is_refused(tmp_path: Path) -> None:
    path = folder_archive(tmp_path)
    (path / ("d/" * 33)).mkdir(parents=True)
    refused(path, "levels")


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    path = folder_archive(tmp_path)
    (path / MANIFEST).unlink()
    refused(path, "no MAR-INF")


def test_a_folder_is_verified_even_after_its_workers_left_bytecode(tmp_path: Path, sources: dict[str, Path]) -> None:
    path = make(tmp_path, sources, "no-archive")
    (path / "__pycache__").mkdir()
    (path / "__pycache__" / "handler.pyc").write_bytes(b"")
    ModelArchive.open(path).verify()
    (path / "handler.py").write_text("changed\n")
    refused(path, "'handler.py': 8 bytes")


def test_a_fifo_is_no_archive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cat.mar")
    refused(tmp_path / "cat.mar", "neither a file nor a folder")


def test_the_writer_refuses_what_a_reader_would(tmp_path: Path, sources: dict[str, Path]) -> None:
    for name in ("../a", "HANDLER.PY", MANIFEST, "mar-inf/x"):
        with pytest.raises(ArchiveError):
            make(tmp_path, {**sources, name: sources["handler.py"]})
    with pytest.raises(ArchiveError, match="unknown format rar"):
        make(tmp_path, sources, "rar")
    with pytest.raises(ArchiveError, match="gone"):
        make(tmp_path, {"a": tmp_path / "gone"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sources"]


HONEST = zip_bytes(
    entry("handler.py", b"def handle(d, c): ..."), deflated("w", bytes(range(256)) * 8), entry("d/", b"", mode=0)
)
HONEST_TGZ = tgz_bytes(tar_entry("cat/handler.py", b"def handle(d, c): ..."), tar_entry("cat/d", kind=b"5"))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_mutated_archive_is_read_or_refused_and_nothing_else(tmp_path: Path, data: st.DataObject) -> None:
    honest = data.draw(st.sampled_from([HONEST, HONEST_TGZ, gzip.decompress(HONEST_TGZ)]))
    mutated = bytearray(honest)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.sampled_from(["set", "insert", "delete"])):
            case "set":
                mutated[at] = data.draw(st.integers(0, 255))
            case "insert":
                mutated[at:at] = data.draw(st.binary(max_size=8))
            case _:
                del mutated[at : at + data.draw(st.integers(1, 8))]
    changed = bytes(mutated) if honest[:1] != b"c" else gzip.compress(mutated)
    try:
        ModelArchive.open(write(tmp_path, changed)).verify()
    except ArchiveError as error:
        assert error.status == 400
