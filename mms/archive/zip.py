"""Reads a zip whose central directory, local headers and extents all tell the same story, and no other.

Python's zipfile accepts overlapping entries, prefixed and joined files, so it is not used for reading.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from mms.archive.checks import (
    CHUNK,
    MANIFEST,
    MAX_ENTRIES,
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

_MAX_CENTRAL = 16 << 20

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF

_DESCRIPTOR_FLAG = 0x0008
_ENCRYPTED_FLAGS = 0x2041
_KNOWN_FLAGS = 0x080E  # compression level, data descriptor, UTF-8
_METHODS = {0: False, 8: True}  # stored, deflated


def end_record(file: BinaryIO) -> bytes:
    """The zip's end record with its comment, or nothing."""
    size = file.seek(0, os.SEEK_END)
    tail = _read_at(file, max(0, size - _END.size - _FULL16), min(size, _END.size + _FULL16))
    found = tail.rfind(b"PK\5\6")
    return tail[found:] if found >= 0 else b""


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise ArchiveError("the file is truncated")
    return data


class ZipContainer:
    """A zip whose central directory, local headers and extents all tell the same story."""

    format = "zip"

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        start, size, count = self._directory()
        headers = self._headers(_read_at(file, start, size), count)
        check_names(member for _, member in headers)
        check_size(count, sum(member.size for _, member in headers))
        placed = sorted(headers, key=lambda header: header[1].offset)
        ends = [member.offset for _, member in placed[1:]] + [start]
        if not placed:
            raise ArchiveError("the zip is empty")
        if placed[0][1].offset:
            raise ArchiveError("there are bytes before the first entry: junk, or another archive")
        located = {
            member.name: self._locate(header, member, end) for (header, member), end in zip(placed, ends, strict=True)
        }
        self.members: Sequence[Member] = [located[member.name] for _, member in headers]
        if not any(member.name == MANIFEST and not member.is_dir for member in self.members):
            raise ArchiveError(f"no {MANIFEST} in it")
        self.manifest = self._document(MANIFEST)
        self.signature = self._document(SIGNATURE)

    def contents(self) -> Contents:
        for member in self.members:
            yield member, self._read(member)

    def _document(self, name: str) -> bytes:
        """The whole of a small file; nothing if it is not there."""
        found = [member for member in self.members if member.name == name and not member.is_dir]
        if not found:
            return b""
        check_manifest_size(found[0].size, name)
        return b"".join(self._read(found[0]))

    def _directory(self) -> tuple[int, int, int]:
        """Offset, size and number of entries of the central directory."""
        record = end_record(self._file)
        if len(record) < _END.size:
            raise ArchiveError("no end of a zip file in it: truncated?")
        _, disk, first_disk, here, count, size, start, comment = _END.unpack_from(record)
        if len(record) != _END.size + comment:
            raise ArchiveError("bytes after the end of the zip file")
        end = self._file.seek(0, os.SEEK_END) - len(record)
        if end >= _LOCATOR.size and _read_at(self._file, end - _LOCATOR.size, 4) == b"PK\6\7":
            end, values = self._directory64(end - _LOCATOR.size)
            for small, large, full in zip(
                (here, count, size, start), values, (_FULL16,) * 2 + (_FULL32,) * 2, strict=True
            ):
                if small not in (large, full):
                    raise ArchiveError("the zip64 end record contradicts the end record")
            here, count, size, start = values
        if disk or first_disk or here != count:
            raise ArchiveError("a part of a zip in several files")
        if count > MAX_ENTRIES:
            raise ArchiveError(f"more than {MAX_ENTRIES} entries")
        if size > _MAX_CENTRAL or start + size != end:
            raise ArchiveError("the central directory is not where the end record says: truncated, joined or prefixed")
        return start, size, count

    def _directory64(self, locator: int) -> tuple[int, tuple[int, int, int, int]]:
        _, disk, offset, disks = _LOCATOR.unpack(_read_at(self._file, locator, _LOCATOR.size))
        if disk or disks != 1 or offset + _END64.size != locator:
            raise ArchiveError("the zip64 locator does not point at the zip64 end record")
        signature, size, _, _, disk, first_disk, *values = _END64.unpack(_read_at(self._file, offset, _END64.size))
        if signature != b"PK\6\6" or size != _END64.size - 12 or disk or first_disk:
            raise ArchiveError("the zip64 end record is malformed")
        return offset, tuple(values)

    def _headers(self, data: bytes, count: int) -> list[tuple[_Header, Member]]:
        headers, at = [], 0
        for _ in range(count):
            if len(data) < at + _CENTRAL.size or data[at : at + 4] != b"PK\1\2":
                raise ArchiveError("the central directory is malformed")
            fields = _CENTRAL.unpack_from(data, at)
            flags, method, crc, packed, size, n_name, n_extra, n_comment, disk = fields[3:5] + fields[7:14]
            mode, offset = fields[15:]
            at += _CENTRAL.size
            name = data[at : at + n_name]
            extra = data[at + n_name : at + n_name + n_extra]
            at += n_name + n_extra + n_comment
            size, packed, offset = _widen(extra, size, packed, offset)
            header = _Header(name, flags, method, crc, packed, size)
            headers.append((header, header.member(offset, mode >> 16)))
            if disk:
                raise ArchiveError(f"{header.text!r}: on another disk")
        if at != len(data):
            raise ArchiveError("the central directory holds more, or less, than its entries")
        return headers

    def _locate(self, header: _Header, member: Member, end: int) -> Member:
        """The member with the offset of its data; its extent must end where the next one begins."""
        name = member.name
        if member.offset + _LOCAL.size > end:
            raise ArchiveError(f"{name!r}: overlaps another entry")
        local = _read_at(self._file, member.offset, _LOCAL.size)
        signature, _, flags, method, _, _, crc, packed, size, n_name, n_extra = _LOCAL.unpack(local)
        if signature != b"PK\3\4":
            raise ArchiveError(f"{name!r}: no local header where the central directory says")
        data = member.offset + _LOCAL.size + n_name + n_extra
        if data + member.packed > end:
            raise ArchiveError(f"{name!r}: overlaps another entry")
        tail = _read_at(self._file, member.offset + _LOCAL.size, n_name + n_extra)
        size, packed, _ = _widen(tail[n_name:], size, packed, 0)
        found = _Header(tail[:n_name], flags, method, crc, packed, size)
        blank = _Header(header.name, header.flags, header.method, 0, 0, 0)
        if found != header and not (flags & _DESCRIPTOR_FLAG and found == blank):
            raise ArchiveError(f"{name!r}: the local header contradicts the central directory")
        gap = _read_at(self._file, data + member.packed, min(end - data - member.packed, 25))
        if gap not in (header.descriptors() if flags & _DESCRIPTOR_FLAG else (b"",)):
            raise ArchiveError(f"{name!r}: followed by bytes that belong to no entry")
        return Member(name, member.size, member.is_dir, data, member.packed, member.deflated, member.crc)

    def _read(self, member: Member) -> Iterator[bytes]:
        """The bytes of a file: exactly as many as declared, with the declared checksum."""
        crc, size = 0, 0
        for chunk in self._inflated(member) if member.deflated else self._raw(member):
            size += len(chunk)
            if size > member.size:
                raise ArchiveError(f"{member.name!r}: unpacks to more than the declared {member.size} bytes")
            crc = zlib.crc32(chunk, crc)
            yield chunk
        if size != member.size:
            raise ArchiveError(f"{member.name!r}: unpacks to {size} bytes, {member.size} are declared")
        if crc != member.crc:
            raise ArchiveError(f"{member.name!r}: damaged (its CRC-32 is wrong)")

    def _raw(self, member: Member) -> Iterator[bytes]:
        for at in range(0, member.packed, CHUNK):
            yield _read_at(self._file, member.offset + at, min(CHUNK, member.packed - at))

    def _inflated(self, member: Member) -> Iterator[bytes]:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            for packed in self._raw(member):
                ended = inflate.eof
                while not inflate.eof and (chunk := inflate.decompress(packed, CHUNK)):
                    yield chunk
                    packed = inflate.unconsumed_tail
                if ended or inflate.unused_data:
                    raise ArchiveError(f"{member.name!r}: bytes after the end of its data")
        except zlib.error:
            raise ArchiveError(f"{member.name!r}: damaged (not deflate data)") from None
        if not inflate.eof:
            raise ArchiveError(f"{member.name!r}: its data are truncated")


@dataclass(frozen=True, slots=True)
class _Header:
    """What a zip says twice about an entry: in its local header and in the central directory."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int

    @property
    def text(self) -> str:
        return self.name.decode(errors="backslashreplace")

    def member(self, offset: int, mode: int) -> Member:
        """The entry, after the checks that need nothing but this header."""
        try:
            name = self.name.decode()
        except UnicodeDecodeError:
            raise ArchiveError(f"{self.text!r}: the name is not UTF-8") from None
        if self.flags & _ENCRYPTED_FLAGS:
            raise ArchiveError(f"{name!r}: encrypted")
        if self.flags & ~_KNOWN_FLAGS:
            raise ArchiveError(f"{name!r}: unknown flags {self.flags:#06x}")
        if self.method not in _METHODS:
            raise ArchiveError(f"{name!r}: unknown compression {self.method}; stored and deflate are understood")
        is_dir = name.endswith("/")
        check_mode(name, mode, is_dir=is_dir)
        if is_dir and self.size:
            raise ArchiveError(f"{name!r}: a folder with content")
        if not _METHODS[self.method] and self.packed != self.size:
            raise ArchiveError(f"{name!r}: stored, but its two sizes differ")
        if self.size > RATIO_FREE and self.size > MAX_RATIO * self.packed:
            raise ArchiveError(f"{name!r}: unpacks to more than {MAX_RATIO} times its size: a bomb?")
        path = name.removesuffix("/")
        return Member(path, self.size, is_dir, offset, self.packed, _METHODS[self.method], self.crc)

    def descriptors(self) -> set[bytes]:
        """The forms that the data descriptor behind the data may have."""
        wide = struct.pack("<LQQ", self.crc, self.packed, self.size)
        forms = {wide, b"PK\7\x08" + wide}
        if max(self.packed, self.size) <= _FULL32:
            small = struct.pack("<LLL", self.crc, self.packed, self.size)
            forms |= {small, b"PK\7\x08" + small}
        return forms


def _widen(extra: bytes, *values: int) -> list[int]:
    """Size, packed size and offset, with those that are full replaced from the zip64 field, which must fit exactly."""
    widened, at = list(values), 0
    fields: list[bytes] = []
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            fields.append(extra[at + 4 : at + 4 + size])
        at += 4 + size
    full = [i for i, value in enumerate(values) if value == _FULL32]
    if len(fields) > 1 or sum(map(len, fields)) != 8 * len(full):
        raise ArchiveError("a zip64 field contradicts its header")
    for i, wide in zip(full, struct.unpack(f"<{len(full)}Q", b"".join(fields)), strict=True):
        widened[i] = wide
    return widened
