"""What an archive may hold, whatever its container: names, kinds of entries, sizes.

What is doubtful is refused, never repaired. All is checked from headers before a caller gets the first byte.
"""

from __future__ import annotations

import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mms.errors import ArchiveError

MANIFEST = "MAR-INF/MANIFEST.json"
SIGNATURE = "MAR-INF/SIGNATURE.json"  # of the manifest, hence in no manifest
MAX_ENTRIES = 10_000
MAX_MANIFEST = 2 << 20
MAX_SIGNATURE = 2 * MAX_MANIFEST
MAX_TOTAL = 8 << 30
MAX_RATIO = 200  # of unpacked to packed bytes; weights that pack better are stored by write_archive
RATIO_FREE = 1 << 20  # bytes to which MAX_RATIO does not apply
CHUNK = 1 << 18

_MAX_NAME = 1024
_MAX_PART = 255
_MAX_DEPTH = 32

_FILE_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A file or folder of an archive; the last four fields say where a zip keeps its bytes."""

    name: str
    size: int
    is_dir: bool = False
    offset: int = 0
    packed: int = 0
    deflated: bool = False
    crc: int = 0


Contents = Iterator[tuple[Member, Iterator[bytes]]]


class Container(Protocol):
    """An archive whose members have passed all checks. Each file's bytes must be read before the next is asked for."""

    format: str
    members: Sequence[Member]
    manifest: bytes
    signature: bytes  # empty where there is none

    def contents(self) -> Contents: ...


def check_names(members: Iterable[Member]) -> None:
    """Refuses names that could leave the folder, collide (also by case or Unicode form), or cannot be stored."""
    seen: dict[str, tuple[str, bool]] = {}
    listed: set[str] = set()
    folders: set[str] = set()
    for member in members:
        name = member.name
        reason = _name_fault(name)
        if reason:
            raise ArchiveError(f"{name!r}: {reason}")
        parts = name.split("/")
        for depth in range(len(parts) - 1, 0, -1):
            folder = "/".join(parts[:depth])
            if folder in folders:
                break
            folders.add(folder)
            _claim(seen, folder, name, is_dir=True)
        _claim(seen, name, name, is_dir=member.is_dir)
        if name in listed:
            raise ArchiveError(f"{name!r}: the name stands twice")
        listed.add(name)


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _claim(seen: dict[str, tuple[str, bool]], path: str, name: str, *, is_dir: bool) -> None:
    first, first_is_dir = seen.setdefault(_key(path), (path, is_dir))
    if first_is_dir != is_dir:
        raise ArchiveError(f"{name!r}: {first!r} is both a file and a folder")
    if first != path:
        raise ArchiveError(f"{name!r}: differs from {first!r} only in case or Unicode form")


def _name_fault(name: str) -> str:
    parts = name.split("/")
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        return "the name is not UTF-8"
    if "\0" in name:
        return "NUL in the name"
    if any(unicodedata.category(char) == "Cc" for char in name):
        return "a control character in the name"
    if "\\" in name:
        return "a backslash in the name"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "an absolute path"
    if ".." in parts:
        return "'..' in the name"
    if "" in parts or "." in parts:
        return "an empty part in the name"
    if longest > _MAX_PART or len(name.encode()) > _MAX_NAME:
        return f"the name is too long (over {_MAX_PART} bytes in one part, or {_MAX_NAME} in all)"
    return f"more than {_MAX_DEPTH} levels deep" if len(parts) > _MAX_DEPTH else ""


def check_mode(name: str, mode: int, *, is_dir: bool) -> None:
    """Refuses links, devices and the like, and what would run as somebody else."""
    kind = stat.S_IFMT(mode)
    if kind in _FILE_KINDS:
        raise ArchiveError(f"{name!r}: {_FILE_KINDS[kind]}; only files and folders are allowed")
    if kind not in (0, stat.S_IFDIR if is_dir else stat.S_IFREG):
        raise ArchiveError(f"{name!r}: its mode {mode:o} is not that of a {'folder' if is_dir else 'file'}")
    # A folder's setgid bit is common in shared directories, and is not carried over.
    if not is_dir and mode & (stat.S_ISUID | stat.S_ISGID):
        raise ArchiveError(f"{name!r}: setuid or setgid")


def check_size(count: int, total: int) -> None:
    """Refuses too many entries, or too many bytes in all."""
    if count > MAX_ENTRIES:
        raise ArchiveError(f"more than {MAX_ENTRIES} entries")
    if total > MAX_TOTAL:
        raise ArchiveError(
            f"unpacks to more than {MAX_TOTAL >> 30} GiB; use the no-archive format for models of that size"
        )


def check_manifest_size(size: int, name: str = MANIFEST) -> None:
    """Refuses a manifest, or a signature, that is too large to be parsed."""
    limit = MAX_MANIFEST if name == MANIFEST else MAX_SIGNATURE
    if size > limit:
        raise ArchiveError(f"{name} is larger than {limit >> 20} MiB")
