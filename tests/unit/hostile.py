"""Archives built byte by byte, so that every field can lie, and those that must be refused with the reason."""

from __future__ import annotations

import gzip
import json
import struct
import time
import tracemalloc
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from mms.archive import MANIFEST, ModelArchive
from mms.errors import ArchiveError

PLAIN: dict[str, Any] = {"runtime": "python", "model": {"modelName": "cat", "handler": "service:handle"}}
DOCUMENT = json.dumps(PLAIN).encode()


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
HONEST = zip_bytes(
    entry("handler.py", b"def handle(d, c): ..."), deflated("w", bytes(range(256)) * 8), entry("d/", b"", mode=0)
)
HONEST_TGZ = tgz_bytes(tar_entry("cat/handler.py", b"def handle(d, c): ..."), tar_entry("cat/d", kind=b"5"))
