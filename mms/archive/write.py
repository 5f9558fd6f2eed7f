"""Writes archives: the same input gives the same bytes, and a name never holds half an archive."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import os
import secrets
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from mms.archive.checks import CHUNK, MANIFEST, MAX_RATIO, RATIO_FREE, SIGNATURE, Member, check_names, check_size
from mms.archive.manifest import ArchivedFile, Manifest
from mms.errors import ArchiveError

FORMATS = ("default", "zip-store", "tgz", "no-archive")

# Unpacking costs 4 ms per MB at each load, and most weights shrink by less than a tenth. So many pieces tell.
_WORTHWHILE = 7 / 8  # of a file's size
_SAMPLES = 16
_SAMPLE = 64 << 10

Progress = Callable[[int], None]
Sign = Callable[[bytes], bytes]


def archive_name(model_name: str, format: str) -> str:
    """The file or folder name that an archive of this format has."""
    return model_name + {"tgz": ".tar.gz", "no-archive": ""}.get(format, ".mar")


def write_archive(
    path: Path,
    manifest: Manifest,
    files: Mapping[str, Path],
    *,
    format: str,
    progress: Progress | None = None,
    force: bool = False,
    sign: Sign | None = None,
) -> Path:
    """Writes `files` (name in the archive -> source) and the manifest with their hashes to `path`. Raises ArchiveError.

    Formats: `default` (a zip; of large files, those are deflated that shrink by an eighth), `zip-store`, `tgz`,
    `no-archive` (a folder). `progress` gets the bytes read.
    `sign` makes the signature from the bytes of the manifest.
    """
    if format not in FORMATS:
        raise ArchiveError(f"unknown format {format}; known are {', '.join(FORMATS)}")
    if taken := {MANIFEST, SIGNATURE} & files.keys():
        raise ArchiveError(f"{taken.pop()} is written by the archiver and cannot be one of the files")
    check_names(Member(name, 0) for name in (*files, MANIFEST, SIGNATURE))
    Manifest.parse(manifest.to_json())
    _check_free(path, format, force)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if format != "no-archive":
            check_size(len(files) + 2, sum(source.stat().st_size for source in files.values()))
        _WRITERS[format](temporary, manifest, _Sources(files, progress, sign))
        _put_in_place(temporary, path)
    except OSError as error:
        raise ArchiveError(f"{error.filename or path}: {error.strerror}") from None
    finally:
        _remove(temporary)
    return path


class _Sources:
    """Reads the files in order of their names, once, and keeps size and hash of each."""

    def __init__(self, files: Mapping[str, Path], progress: Progress | None, sign: Sign | None) -> None:
        self.names = sorted(files)
        self._paths = files
        self._progress = progress
        self._sign = sign
        self._done = 0
        self._read: dict[str, ArchivedFile] = {}

    def size(self, name: str) -> int:
        return self._paths[name].stat().st_size

    def chunks(self, name: str) -> Iterator[bytes]:
        digest, size, declared = hashlib.sha256(), 0, self.size(name)
        with open(self._paths[name], "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                yield chunk
                if self._progress:
                    self._progress(self._done + size)
        if size != declared:
            raise ArchiveError(f"{self._paths[name]}: changed while it was read")
        self._done += size
        self._read[name] = ArchivedFile(name, size, digest.hexdigest())

    def shrinks(self, name: str) -> bool:
        """Whether deflating makes it smaller by an eighth, by samples of it if it is large."""
        size = self.size(name)
        if size <= _SAMPLES * _SAMPLE:
            return True
        packer, packed = zlib.compressobj(), 0
        with open(self._paths[name], "rb") as file:
            for number in range(_SAMPLES):
                file.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
                packed += len(packer.compress(file.read(_SAMPLE)))
        return packed + len(packer.flush()) <= _WORTHWHILE * _SAMPLES * _SAMPLE

    def again(self) -> _Sources:
        """For a second attempt, which does not count as progress."""
        return _Sources(self._paths, None, self._sign)

    def documents(self, manifest: Manifest) -> Iterator[tuple[str, bytes]]:
        """What is written last, when the hashes are known: the manifest, and its signature if there is to be one."""
        document = dataclasses.replace(manifest, files=self._read).to_json()
        yield MANIFEST, document
        if self._sign:
            yield SIGNATURE, self._sign(document)


def _write_packed(path: Path, manifest: Manifest, sources: _Sources) -> None:
    stored = frozenset(name for name in sources.names if not sources.shrinks(name))
    bombs = _write_zip(path, manifest, sources, stored=stored)
    if bombs:
        path.unlink()
        _write_zip(path, manifest, sources.again(), stored=stored | bombs)


def _write_stored(path: Path, manifest: Manifest, sources: _Sources) -> None:
    _write_zip(path, manifest, sources, stored=frozenset(sources.names))


def _write_zip(path: Path, manifest: Manifest, sources: _Sources, *, stored: frozenset[str]) -> frozenset[str]:
    """Returns the files that pack so well that a reader would take them for bombs."""
    with _new_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name in sources.names:
            with archive.open(_zip_entry(name, sources.size(name), deflate=name not in stored), "w") as entry:
                for chunk in sources.chunks(name):
                    entry.write(chunk)
        for name, document in sources.documents(manifest):
            archive.writestr(_zip_entry(name, 0, deflate=True), document)
    return frozenset(
        entry.filename
        for entry in archive.infolist()
        if entry.file_size > RATIO_FREE and entry.file_size > MAX_RATIO * entry.compress_size
    )


def _zip_entry(name: str, size: int, *, deflate: bool) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    entry.create_system = 3
    entry.external_attr = 0o100644 << 16
    entry.file_size = size
    return entry


def _write_tgz(path: Path, manifest: Manifest, sources: _Sources) -> None:
    if not _write_tar(path, manifest, sources, level=6):
        path.unlink()
        _write_tar(path, manifest, sources.again(), level=0)


def _write_tar(path: Path, manifest: Manifest, sources: _Sources, *, level: int) -> bool:
    """False when it packs so well that a reader would take it for a bomb."""
    total, honest = 0, True
    with _new_file(path) as file, gzip.GzipFile("", "wb", level, file, mtime=0) as packed:
        for name in sources.names:
            packed.write(_tar_header(f"{manifest.model_name}/{name}", sources.size(name)))
            for chunk in sources.chunks(name):
                packed.write(chunk)
                total += len(chunk)
                honest = honest and total <= MAX_RATIO * file.tell() + RATIO_FREE // 2
            packed.write(bytes(-sources.size(name) % 512))
        for name, document in sources.documents(manifest):
            packed.write(_tar_header(f"{manifest.model_name}/{name}", len(document)))
            packed.write(document + bytes(-len(document) % 512))
        packed.write(bytes(1024))
    return honest


def _tar_header(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size = size
    entry.mode = 0o644
    return entry.tobuf(tarfile.PAX_FORMAT)


def _write_folder(path: Path, manifest: Manifest, sources: _Sources) -> None:
    path.mkdir()
    for name in sources.names:
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with _new_file(target) as file:
            for chunk in sources.chunks(name):
                file.write(chunk)
    (path / MANIFEST).parent.mkdir(exist_ok=True)
    for name, document in sources.documents(manifest):
        with _new_file(path / name) as file:
            file.write(document)


_WRITERS: dict[str, Callable[[Path, Manifest, _Sources], None]] = {
    "default": _write_packed,
    "zip-store": _write_stored,
    "tgz": _write_tgz,
    "no-archive": _write_folder,
}


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o666), "w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _check_free(path: Path, format: str, force: bool) -> None:
    if not os.path.lexists(path):
        return
    if not force:
        raise ArchiveError(f"{path} exists; --force replaces it")
    is_folder = path.is_dir() and not path.is_symlink()
    if is_folder != (format == "no-archive") or (is_folder and not (path / MANIFEST).is_file()):
        raise ArchiveError(f"{path} exists and is not an archive of this format; it is not replaced")


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.is_dir():
        os.replace(temporary, path)
        return
    # A folder cannot be replaced in one step.
    old = temporary.with_suffix(".old")
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
