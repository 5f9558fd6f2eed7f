"""What is registered, as a file: encoding, decoding, and the Saver that keeps it on disk. Front end's process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from mms.archive import MODEL_NAME
from mms.errors import StartError

log = logging.getLogger("mms.state")

SCHEMA = 1
MAX_FILE = 16 << 20
PREVIOUS = ".previous"


class SavedVersion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a version is registered with again; `settings` are those given at registration and changed since."""

    version: str
    archive: str  # its file name in the model store
    sha256: str  # ModelArchive.digest
    named: bool = False  # by the setting `models`, which decides whether it stays
    handler: str = ""
    settings: dict[str, Any] = {}


class SavedModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The versions of one name, in the order of their registration."""

    name: str
    default: str
    versions: list[SavedVersion]


class State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    schema: int = SCHEMA
    models: list[SavedModel] = []


class _Head(msgspec.Struct):
    schema: int


def encode(state: State) -> bytes:
    return msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n"


def decode(data: bytes) -> State:
    """Raises ValueError with what is wrong with it."""
    if len(data) > MAX_FILE:
        raise ValueError(f"it is larger than {MAX_FILE} bytes")
    try:
        schema = msgspec.json.decode(data, type=_Head).schema
        if schema != SCHEMA:
            raise ValueError(f"it has schema {schema}, this version of MMS reads {SCHEMA}")
        state = msgspec.json.decode(data, type=State)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is damaged: {error}") from None
    except RecursionError:
        raise ValueError("it is damaged: nested too deep") from None
    names = [model.name for model in state.models]
    for model in state.models:
        versions = [version.version for version in model.versions]
        if not MODEL_NAME.fullmatch(model.name) or names.count(model.name) > 1 or len({*versions}) < len(versions):
            raise ValueError(
                f"it is damaged: the name {model.name!r} or one of its versions cannot be, or stands twice"
            )
    return state


class Saver:
    """Keeps the file like what is registered. Saves follow each other in a thread, each with the newest state."""

    def __init__(self, path: Path, snapshot: Callable[[], State]) -> None:
        self.failed = False
        self._path = _base(path)
        self._snapshot = snapshot
        self._asked = 0
        self._saved = 0
        self._turn = asyncio.Lock()

    async def save(self) -> None:
        """Return when what is registered now is on disk, or could not be saved: that is logged once, and goes on."""
        self._asked += 1
        mine = self._asked
        async with self._turn:
            if self._saved >= mine:  # a save that began after this call has it
                return
            self._saved = self._asked
            try:
                await asyncio.to_thread(write, self._path, encode(self._snapshot()))
            except OSError as error:
                if not self.failed:
                    log.error("cannot save what is registered in %s: %s; the old file stays, and serving goes on",
                              self._path, error.strerror)  # fmt: skip
                self.failed = True
            else:
                if self.failed:
                    log.info("what is registered is saved again in %s", self._path)
                self.failed = False


def write(path: Path, data: bytes) -> None:
    """Replace the file by `data`, whatever happens meanwhile; the one before stays as FILE.previous. Raises OSError."""
    old = _content(path)
    if old == data:
        return
    temporary, previous, linked = (path.with_name(path.name + end) for end in (".new", PREVIOUS, f"{PREVIOUS}.new"))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if _is_sound(old):
            linked.unlink(missing_ok=True)
            os.link(path, linked)
            linked.rename(previous)
        temporary.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path) -> State:
    """The saved state; empty when there is no file. Raises StartError that offers the previous copy."""
    try:
        data = _content(path)
        if data:
            return decode(data)
        if data is not None:
            raise ValueError("it is empty")
        if path != _base(path):
            raise StartError(f"there is no {path}; start with --state {_base(path)} or --fresh")
        return State()
    except OSError as error:
        reason = error.strerror
    except ValueError as error:
        reason = str(error)
    raise StartError(f"cannot restore what was registered from {path}: {reason}; start with {_advice(path)}")


def _content(path: Path) -> bytes | None:
    """None when there is no file; of one that is too large, a little more than may be. Raises OSError."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is not a plain file")
            return file.read(MAX_FILE + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_sound(data: bytes | None) -> bool:
    try:
        return data is not None and bool(decode(data))
    except ValueError:
        return False


def _advice(path: Path) -> str:
    previous = path.with_name(path.name + PREVIOUS)
    if path == _base(path) and previous.exists():
        return f"--state {previous} (the copy before), or with --fresh"
    return "--fresh"


def _base(path: Path) -> Path:
    """A previous copy is read, but not written: what is saved from then on goes to the file itself."""
    return path.with_name(path.name.removesuffix(PREVIOUS))
