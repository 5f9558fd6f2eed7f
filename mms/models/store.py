"""The model store: the folder of archives, and the only place they come from."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mms.archive import ModelArchive
from mms.errors import BadRequestError, ConfigError, ModelNotFoundError
from mms.signature import TrustedKeys

_SUFFIXES = (".mar", ".tar.gz", ".tgz")
_PLAIN = re.compile(r"[^/\\\x00-\x1f\ud800-\udfff]{1,255}")  # the last are bytes that are not UTF-8


class ModelStore:
    """Finds archives by file name; nothing outside its folder can be named."""

    def __init__(self, folder: Path | None, keys: TrustedKeys | None = None) -> None:
        if folder is not None:
            _check(folder)
        self._folder = folder
        self._keys = keys

    @property
    def only_signed(self) -> bool:
        """Whether it holds back archives that no trusted key has signed."""
        return self._keys is not None

    def folder(self) -> Path:
        """Raises ModelNotFoundError if there is none."""
        if self._folder is None:
            raise ModelNotFoundError("the server was started without --model-store")
        return self._folder

    def names(self) -> list[str]:
        """The archives in the store, sorted; those whose names `path` refuses are passed over.

        Raises ModelNotFoundError if the folder cannot be read any more.
        """
        if self._folder is None:
            return []
        try:
            paths = list(self._folder.iterdir())
        except OSError as error:
            raise ModelNotFoundError(f"cannot read the model store: {error.strerror}") from None
        return sorted(
            path.name
            for path in paths
            if _PLAIN.fullmatch(path.name)
            and (path.name.endswith(_SUFFIXES) or os.path.isfile(path / "MAR-INF" / "MANIFEST.json"))
        )

    def path(self, url: str) -> Path:
        """The file that `url` names. Raises BadRequestError for all but a plain file name, else ModelNotFoundError."""
        if self._folder is None:
            raise ModelNotFoundError(f"cannot load {url}: the server was started without --model-store")
        if "://" in url:
            raise BadRequestError(f"cannot load {url}: archives are taken from the model store only, name a file in it")
        if not _PLAIN.fullmatch(url) or url in (".", ".."):
            raise BadRequestError(f"cannot load {url!r}: give the name of a file in the model store, without a path")
        path = self._folder / url
        if not path.exists():
            there = ", ".join(self.names()) or "no archives"
            raise ModelNotFoundError(f"{url} is not in the model store; it holds {there}")
        return path

    def open(self, url: str, sha256: str = "") -> ModelArchive:
        """The archive; structure, signature and, if given, the file's SHA-256 are checked. Raises ArchiveError too."""
        return self._opened(self.path(url), url, sha256)

    def check(self, path: Path, name: str) -> None:
        """Raises ArchiveError if the file at `path` could not be served as `name`: what `open` checks, and hashes."""
        self._opened(path, name).verify()

    def _opened(self, path: Path, name: str, sha256: str = "") -> ModelArchive:
        archive = ModelArchive.open(path, name=name, sha256=sha256)
        if self._keys is not None:
            archive.signed_by = self._keys.check(archive)
        return archive


def _check(folder: Path) -> None:
    try:
        os.scandir(folder).close()
    except PermissionError:
        raise ConfigError(f"this user cannot read the model store {folder}; name another with --model-store") from None
    except OSError:
        raise ConfigError(
            f"the model store {folder} is not a folder; create it or name another with --model-store"
        ) from None
