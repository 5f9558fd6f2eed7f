"""Reads a tar.gz front to back: regular files and folders only, every read bounded by what is declared.

Python's tarfile follows links, negative sizes and sparse maps, so it is not used for reading.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from mms.archive.checks import (
    CHUNK,
    MANIFEST,
    MAX_RATIO,
    RATIO_FREE,
    SIGNATURE,
    Contents,
    Member,
    check_manifest_size,
    check_mode,
    check_names,
    check_size,
)
from mms.errors import ArchiveError

_MAX_TAR_HEADER = 1 << 16
_MAX_TAR_HEADERS = 16 << 20  # bytes of extended headers in all, as in the directory of a zip
_MAX_RECORDS = 100  # in one of them
_RECORD = re.compile(rb"([1-9]\d{0,5}) ")
_ROOT = ("", ".")
_TAR_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a FIFO"}


class _Gzip:
    """Unpacks one gzip stream, a bounded piece at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._total = 0
        file.seek(0)

    def read(self, size: int) -> bytes:
        """`size` bytes; fewer only at the end."""
        data = bytearray()
        try:
            while len(data) < size and not self._inflate.eof:
                packed = self._inflate.unconsumed_tail or self._file.read(CHUNK)
                piece = self._inflate.decompress(packed, size - len(data))
                if not packed and not piece:
                    raise ArchiveError("the file is truncated")
                data += piece
        except zlib.error:
            raise ArchiveError("damaged gzip data") from None
        self._total += len(data)
        if self._total > MAX_RATIO * self._file.tell() + RATIO_FREE:
            raise ArchiveError(f"unpacks to more than {MAX_RATIO} times its size: a bomb?")
        return bytes(data)

    def finish(self) -> None:
        """Refuses whatever stands after the end of the tar but zeros, and behind the gzip stream anything at all."""
        while data := self.read(CHUNK):
            if any(data):
                raise ArchiveError("bytes after the end of the tar file")
        if self._inflate.unused_data or self._inflate.unconsumed_tail or self._file.read(1):
            raise ArchiveError("bytes after the end of the gzip stream")


class TarContainer:
    """A tar.gz. If all of it lies in one folder, as in TorchServe's, that folder is left out of the names."""

    format = "tgz"

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._prefix = ""
        found: list[Member] = []
        documents: dict[str, bytes] = {}
        total = 0
        for member, chunks in self._walk():
            found.append(member)
            total += member.size
            check_size(len(found), total)
            for name in {MANIFEST, SIGNATURE} & {member.name, member.name.partition("/")[2]}:
                if any(known.endswith(name) for known in documents):
                    raise ArchiveError(f"two {name} in it")
                check_manifest_size(member.size, name)
                documents[member.name] = b"".join(chunks)
        self._prefix = _leading_folder(found)
        self.members: Sequence[Member] = list(self._stripped(found))
        check_names(self.members)
        if self._prefix + MANIFEST not in documents:
            raise ArchiveError(f"no {MANIFEST} in it")
        self.manifest = documents[self._prefix + MANIFEST]
        self.signature = documents.get(self._prefix + SIGNATURE, b"")

    def contents(self) -> Contents:
        remaining = iter(self.members)
        for member, chunks in self._walk():
            for stripped in self._stripped([member]):
                if stripped != next(remaining, None):
                    raise ArchiveError("changed while it was read")
                yield stripped, chunks

    def _stripped(self, members: Iterable[Member]) -> Iterator[Member]:
        for member in members:
            if member.name + "/" != self._prefix:
                yield Member(member.name.removeprefix(self._prefix), member.size, member.is_dir)

    def _walk(self) -> Contents:
        stream = _Gzip(self._file)
        overrides: dict[str, str] = {}
        extended = 0
        while True:
            block = stream.read(512)
            if len(block) != 512:
                raise ArchiveError("the tar file is truncated")
            if not any(block):
                break
            kind, size = block[156:157], _tar_number(block[124:136])
            _check_tar_sum(block)
            if kind in (b"x", b"g", b"L"):
                extended += len(block) + size
                if extended > _MAX_TAR_HEADERS:  # they pack to next to nothing
                    raise ArchiveError(f"more than {_MAX_TAR_HEADERS >> 20} MiB of extended tar headers")
                overrides |= _tar_override(kind, _tar_data(stream, size))
                continue
            member = _tar_member(block, kind, int(overrides.get("size", size)), overrides.get("path"))
            overrides = {}
            if not (member.is_dir and member.name in _ROOT):
                chunks = _tar_chunks(stream, member.size)
                yield member, chunks
                for _ in chunks:
                    pass
        stream.finish()


def _tar_number(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0")
    if not all(char in b"01234567" for char in digits):
        raise ArchiveError("a malformed number in a tar header")
    return int(digits or b"0", 8)


def _check_tar_sum(block: bytes) -> None:
    if _tar_number(block[148:156]) != sum(block[:148]) + 8 * ord(" ") + sum(block[156:]):
        raise ArchiveError("a tar header is damaged (its checksum is wrong)")


def _tar_data(stream: _Gzip, size: int) -> bytes:
    if size > _MAX_TAR_HEADER:
        raise ArchiveError("an extended tar header is too large")
    return b"".join(_tar_chunks(stream, size))


def _tar_chunks(stream: _Gzip, size: int) -> Iterator[bytes]:
    left = size
    while left:
        chunk = stream.read(min(left, CHUNK))
        if not chunk:
            raise ArchiveError("the tar file is truncated")
        left -= len(chunk)
        yield chunk
    stream.read(-size % 512)


def _tar_override(kind: bytes, data: bytes) -> dict[str, str]:
    """What an extended header says of the next entry: its path and its size matter, the rest is left aside."""
    if kind == b"L":
        return {"path": _tar_text(data.rstrip(b"\0"))}
    found, at, records = {}, 0, 0
    while at < len(data):
        records += 1
        if records > _MAX_RECORDS:
            raise ArchiveError(f"an extended tar header with more than {_MAX_RECORDS} records")
        length = _RECORD.match(data, at)
        record = data[at : at + int(length[1])] if length else b""
        if length is None or len(record) != int(length[1]) or record[-1:] != b"\n":
            raise ArchiveError("a malformed extended tar header")
        key, _, value = record[length.end() - at : -1].partition(b"=")
        at += len(record)
        if key.startswith(b"GNU.sparse"):
            raise ArchiveError("a sparse file; only plain files and folders are allowed")
        if key == b"size" and not re.fullmatch(rb"\d{1,15}", value):
            raise ArchiveError("a malformed size in a tar header")
        if key in (b"path", b"size"):
            found[key.decode()] = _tar_text(value)
    if kind == b"g" and found:
        raise ArchiveError("a global tar header that renames or resizes entries")
    return found


def _tar_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ArchiveError(f"{data!r}: the name is not UTF-8") from None


def _tar_member(block: bytes, kind: bytes, size: int, path: str | None) -> Member:
    name = path
    if name is None:
        name = _tar_text(block[:100].partition(b"\0")[0])
        prefix = _tar_text(block[345:500].partition(b"\0")[0]) if block[257:263] == b"ustar\0" else ""
        name = f"{prefix}/{name}" if prefix else name
    if kind not in (b"0", b"\0", b"5"):
        raise ArchiveError(
            f"{name!r}: {_TAR_KINDS.get(kind, 'an unknown kind of entry')}; only files and folders are allowed"
        )
    is_dir = kind == b"5"
    check_mode(name, _tar_number(block[100:108]) & 0o7777, is_dir=is_dir)
    if is_dir and size:
        raise ArchiveError(f"{name!r}: a folder with content")
    # `tar -C folder .` puts "./" before each name: the folder itself, as safe to leave out as TorchServe's.
    name = name.removeprefix("./")
    name = name.removesuffix("/") if is_dir else name
    if not (is_dir and name in _ROOT):
        check_names([Member(name, size, is_dir)])
    return Member(name, size, is_dir)


def _leading_folder(members: Sequence[Member]) -> str:
    if any(member.name == MANIFEST for member in members):
        return ""
    tops = {member.name.partition("/")[0] for member in members}
    if len(tops) != 1 or any("/" not in member.name and not member.is_dir for member in members):
        return ""
    return f"{tops.pop()}/"
