"""ModelArchive: an archive on disk, opened, verified and extracted, whatever its container."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from mms.archive.checks import MANIFEST, SIGNATURE, Container, Contents, Member
from mms.archive.folder import FolderContainer
from mms.archive.manifest import ArchivedFile, Manifest
from mms.archive.tar import TarContainer
from mms.archive.zip import ZipContainer, end_record
from mms.errors import ArchiveError


class ModelArchive:
    """An archive on disk that has passed every check which needs no content. Made by `open`."""

    def __init__(self, path: Path, container: Container, stamp: tuple[int, ...], name: str, sha256: str) -> None:
        self.path = path
        self.name = name
        self.format = container.format
        self.manifest = Manifest.parse(container.manifest)
        self.manifest_bytes = container.manifest
        self.signature = container.signature
        self.signed_by = ""  # the id of the trusted key, once that was checked
        self.stored = container.format == "zip" and not any(
            member.deflated for member in container.members if member.name not in (MANIFEST, SIGNATURE)
        )
        self._stamp = stamp
        self._sha256 = sha256  # of the file, if it was checked
        self._digest = hashlib.sha256(container.manifest).hexdigest()
        known = self.manifest.files
        self.files: Sequence[ArchivedFile] = [
            ArchivedFile(member.name, member.size, known[member.name].sha256 if member.name in known else "")
            for member in container.members
            if not member.is_dir and member.name not in (MANIFEST, SIGNATURE)
        ]

    @classmethod
    def open(cls, path: Path, *, name: str = "", sha256: str = "") -> ModelArchive:
        """Checks names, sizes, structure and manifest; nothing is extracted. Raises ArchiveError.

        `name` stands for the archive in errors, where the file's own name would tell nobody anything. With `sha256`,
        the file must have that hash, and later it must still be that very file, unchanged.
        """
        name = name or path.name
        with _naming(name), _opened(path) as file:
            stamp = _stamp(path, file)
            if sha256 and file is None:
                raise ArchiveError("a folder has no SHA-256; pin a file, or leave the SHA-256 away")
            if sha256 and file is not None and (found := _sha256(file)) != sha256:
                raise ArchiveError(f"its SHA-256 is {found}, and another was asked for")
            return cls(path, _container(path, file), stamp, name, sha256)

    def digest(self) -> str:
        """SHA-256 of what names its content: the manifest with the hash of each file, or else the archive file."""
        if self.manifest.files or self.format == "directory":
            return self._digest
        with _naming(self.name), self._reopen() as file:
            return self._sha256 or (_sha256(file) if file else self._digest)

    def verify(self) -> None:
        """Reads everything and compares it with the manifest's hashes, if it has any. Raises ArchiveError."""
        with _naming(self.name), self._reopen() as file:
            for _, chunks in self._contents(file, verify=True):
                for _ in chunks:
                    pass

    def peek(self, name: str, limit: int) -> bytes | None:
        """The content of one file, with its hash compared; None if it is longer than `limit`.

        Of a tar.gz None as well: all that comes before it would have to be unpacked. Raises ArchiveError.
        """
        if self.format != "tgz":
            with _naming(self.name), self._reopen() as file:
                for member, chunks in self._contents(file, verify=True):
                    if member.name == name and member.size <= limit:
                        return b"".join(chunks)
        return None

    def extract(self, destination: Path, *, verify: bool = True) -> Path:
        """The folder to load from: `destination`, which must not exist; of a folder archive, the folder itself.

        The files are hashed while they are written; those of a signed archive always, as its signature covers only the
        hashes. On failure (ArchiveError) nothing is left behind.
        """
        verify = verify or bool(self.signed_by)
        if self.format == "directory":
            if verify:
                self.verify()
            return self.path
        with _naming(self.name), self._reopen() as file:
            if os.path.lexists(destination):
                raise ArchiveError(f"{destination} exists")
            temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
            try:
                for member, chunks in self._contents(file, verify=verify):
                    _write(temporary, member, chunks)
                self._check_unchanged(file)
                os.rename(temporary, destination)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        return destination

    @contextmanager
    def _reopen(self) -> Iterator[BufferedReader | None]:
        with _opened(self.path) as file:
            self._check_unchanged(file)
            yield file

    def _check_unchanged(self, file: BufferedReader | None) -> None:
        if _stamp(self.path, file) != self._stamp:
            raise ArchiveError("changed since it was opened")

    def _contents(self, file: BufferedReader | None, *, verify: bool) -> Contents:
        container = _container(self.path, file)
        expected = self.manifest.files if verify else {}
        if verify and self.manifest.hashed:
            _compare_names({file.name for file in self.files}, set(expected))
        for member, chunks in container.contents():
            known = expected.get(member.name)
            yield member, _hashed(known, chunks) if known else chunks


def _compare_names(found: set[str], expected: set[str]) -> None:
    if missing := sorted(expected - found):
        raise ArchiveError(f"{missing[0]!r}: in the manifest, but not in the archive")
    if extra := sorted(found - expected):
        raise ArchiveError(f"{extra[0]!r}: in the archive, but not in the manifest")


def _hashed(file: ArchivedFile, chunks: Iterator[bytes]) -> Iterator[bytes]:
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
        yield chunk
    if size != file.size:
        raise ArchiveError(f"{file.name!r}: {size} bytes, the manifest says {file.size}")
    if digest.hexdigest() != file.sha256:
        raise ArchiveError(f"{file.name!r}: its SHA-256 is not that of the manifest")


def _write(root: Path, member: Member, chunks: Iterator[bytes]) -> None:
    target = root / member.name
    folder = target if member.is_dir else target.parent
    for missing in [parent for parent in (folder, *folder.parents) if not parent.exists()][::-1]:
        missing.mkdir(0o700)
    if not member.is_dir:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(target, flags, 0o600), "wb") as file:
            file.writelines(chunks)


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader | None]:
    """The file at `path`; None if that is a folder."""
    if path.is_dir():
        yield None
        return
    # Without O_NONBLOCK, opening a FIFO would wait for its other end.
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ArchiveError("neither a file nor a folder")
        yield file


def _container(path: Path, file: BufferedReader | None) -> Container:
    """The archive by what it is, not by its name."""
    if file is None:
        return FolderContainer(path)
    file.seek(0)
    magic = file.read(2)
    if magic == b"\x1f\x8b":
        return TarContainer(file)
    if magic == b"PK" or end_record(file):
        return ZipContainer(file)
    raise ArchiveError("neither a zip nor a tar.gz file")


def _sha256(file: BufferedReader) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path, file: BufferedReader | None) -> tuple[int, ...]:
    """Changes when the file is replaced or rewritten. A folder's says only that it is the same folder."""
    facts = path.stat() if file is None else os.fstat(file.fileno())
    same = (facts.st_dev, facts.st_ino)
    # whoever rewrites a file can set its mtime, but not its ctime
    return same if file is None else (*same, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ArchiveError as error:
        raise ArchiveError(f"{name}: {error.message}", status=error.status) from None
    except FileNotFoundError as error:
        raise ArchiveError(f"{error.filename}: no such file", status=404) from None
    except OSError as error:
        raise ArchiveError(f"{name}: {error.filename or ''}: {error.strerror}", status=500) from None
