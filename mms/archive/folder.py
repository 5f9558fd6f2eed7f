"""Reads an archive that is a folder, and is used in place."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from mms.archive.checks import (
    CHUNK,
    MANIFEST,
    MAX_ENTRIES,
    MAX_SIGNATURE,
    SIGNATURE,
    Contents,
    Member,
    check_manifest_size,
    check_mode,
    check_names,
)
from mms.errors import ArchiveError


class FolderContainer:
    """An archive that is a folder. It is used in place, so there is no limit to its size."""

    format = "directory"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._root = os.path.realpath(path)
        self.members: Sequence[Member] = sorted(self._scan(path, ""), key=lambda member: member.name)
        check_names(self.members)
        if not any(member.name == MANIFEST and not member.is_dir for member in self.members):
            raise ArchiveError(f"no {MANIFEST} in it")
        self.manifest = self._document(MANIFEST)
        signed = any(member.name == SIGNATURE and not member.is_dir for member in self.members)
        self.signature = self._document(SIGNATURE) if signed else b""

    def contents(self) -> Contents:
        for member in self.members:
            yield member, self._read(member)

    def _document(self, name: str) -> bytes:
        with open(self._path / name, "rb") as file:
            data = file.read(MAX_SIGNATURE + 1)
        check_manifest_size(len(data), name)
        return data

    def _scan(self, folder: Path, prefix: str) -> list[Member]:
        members: list[Member] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                # Workers that load from this folder leave their bytecode there.
                if entry.name == "__pycache__":
                    continue
                member = self._member(entry, prefix + entry.name)
                members.append(member)
                if member.is_dir:
                    check_names([member])
                    members += self._scan(folder / entry.name, f"{member.name}/")
                if len(members) > MAX_ENTRIES:
                    raise ArchiveError(f"more than {MAX_ENTRIES} entries")
        return members

    def _member(self, entry: os.DirEntry[str], name: str) -> Member:
        if entry.is_symlink():
            target = os.path.realpath(entry.path)
            if not target.startswith(self._root + "/") or not os.path.isfile(target):
                raise ArchiveError(f"{name!r}: a symbolic link that leads outside, or not to a file")
        facts = entry.stat()
        is_dir = stat.S_ISDIR(facts.st_mode)
        check_mode(name, facts.st_mode, is_dir=is_dir)
        return Member(name, 0 if is_dir else facts.st_size, is_dir)

    def _read(self, member: Member) -> Iterator[bytes]:
        if member.is_dir:
            return
        left = member.size
        with open(self._path / member.name, "rb") as file:
            while chunk := file.read(min(CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    break
                yield chunk
        if left:
            raise ArchiveError(f"{member.name!r}: changed while it was read")
