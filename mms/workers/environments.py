"""The environments that archives' requirements are installed into: which of them anybody needs. Front end's process.

They lie in one folder, which several servers use. Each server writes down there which one it needs for which version,
and what it wrote stays when it ends: its saved state needs them at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec

log = logging.getLogger("mms.workers")

_DIGEST = re.compile("[0-9a-f]{16}")
_DELETED = ".old"


class _Record(msgspec.Struct):
    """What one server needs."""

    state: str  # the file of what is registered with it; empty if that is not saved
    needed: dict[str, str]  # environments by the versions that need them


class Environments:
    """Those in `folder`, as far as this server is concerned.

    The folder `server` is there while this server runs, as those of the others are beside it. `state` is the file of
    its saved state.
    """

    def __init__(self, folder: Path, server: Path, state: Path | None) -> None:
        self.folder = folder
        self.needed: dict[str, str] = {}  # by the label of the version
        self._server = server
        self._state = "" if state is None else str(state.absolute())
        self._records = folder / "needed"

    async def need(self, label: str, digest: str) -> Path:
        """The version needs this environment from now on: its folder, whether it is there or not. Raises OSError."""
        self.needed[label] = digest
        await asyncio.to_thread(self._note)
        return self.folder / digest

    async def tidy(self, labels: Collection[str]) -> None:
        """Delete what no version needs, here or on another server; `labels` are those that this one has."""
        for label in self.needed.keys() - set(labels):
            del self.needed[label]
        try:
            await asyncio.to_thread(self._tidy, labels)
        except (OSError, ValueError) as error:
            log.warning("environments that no version needs stay: %s", error)

    def _note(self) -> None:
        with self._locked():
            self._write()

    def _tidy(self, labels: Collection[str]) -> None:
        with self._locked():
            needed = self._needed_by_others(labels)
            self._write()
            needed.update(self.needed.values())
            for found in list(self.folder.iterdir()):
                if _DIGEST.fullmatch(found.name) and found.name not in needed:
                    found.rename(f"{found}-{secrets.token_hex(4)}{_DELETED}")
                    log.info("no version needs the environment %s any more; deleting it", found)
        for found in self.folder.glob(f"*{_DELETED}"):  # others may look and write meanwhile
            shutil.rmtree(found, ignore_errors=True)

    def _needed_by_others(self, labels: Collection[str]) -> set[str]:
        """From their records. Those of servers that have ended go with their saved state, or when this one has it."""
        needed: set[str] = set()
        for file in list(self._records.iterdir()) if self._records.is_dir() else ():
            if file == self._record or file.suffix != ".json":
                continue
            try:
                record = msgspec.json.decode(file.read_bytes(), type=_Record)
            except msgspec.DecodeError:
                raise ValueError(f"{file} is damaged; delete it") from None
            if self._server.with_name(file.stem).exists():
                needed.update(record.needed.values())
            elif record.state and record.state == self._state:  # what could not be restored needs its own still
                for label in record.needed.keys() & set(labels):
                    self.needed.setdefault(label, record.needed[label])
                file.unlink()
            elif record.state and os.path.exists(record.state):
                needed.update(record.needed.values())
            else:
                file.unlink()
        return needed

    def _write(self) -> None:
        if not self.needed:
            self._record.unlink(missing_ok=True)
            return
        self._records.mkdir(mode=0o700, exist_ok=True)
        temporary = self._record.with_suffix(".new")
        temporary.write_bytes(msgspec.json.encode(_Record(self._state, dict(self.needed))))
        temporary.rename(self._record)

    @property
    def _record(self) -> Path:
        return self._records / f"{self._server.name}.json"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Whoever reads or changes records, or takes an environment away, is alone."""
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
