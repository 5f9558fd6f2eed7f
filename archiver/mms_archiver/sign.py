"""Signs an archive that exists: its files are verified and packed again with a signature of their manifest."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mms.archive import ModelArchive, write_archive
from mms.signature import SigningKey

_FORMATS = {"zip": "default", "tgz": "tgz", "directory": "no-archive"}


def sign_archive(path: Path, key: SigningKey) -> ModelArchive:
    """Replaces the archive by a signed one, which has a hash for every file. Raises ArchiveError."""
    archive = ModelArchive.open(path)
    with tempfile.TemporaryDirectory(prefix="model-archiver-", dir=path.parent) as folder:
        root = archive.extract(Path(folder) / "archive")
        files = {file.name: root / file.name for file in archive.files}
        format = "zip-store" if archive.stored else _FORMATS[archive.format]
        write_archive(path, archive.manifest, files, format=format, force=True, sign=key.sign)
    return ModelArchive.open(path)
