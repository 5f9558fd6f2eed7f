"""The .mar format: a manifest and the files of one model, as a zip, a tar.gz or a folder. Standard library only.

An archive is refused, with the reason, before anything of it is used; the rules are in `checks`.
"""

from mms.archive.archive import ModelArchive
from mms.archive.checks import MANIFEST, SIGNATURE
from mms.archive.manifest import HANDLER, MODEL_NAME, RUNTIMES, VERSION, ArchivedFile, Manifest
from mms.archive.write import FORMATS, archive_name, write_archive

__all__ = [
    "FORMATS",
    "HANDLER",
    "MANIFEST",
    "MODEL_NAME",
    "RUNTIMES",
    "SIGNATURE",
    "VERSION",
    "ArchivedFile",
    "Manifest",
    "ModelArchive",
    "archive_name",
    "write_archive",
]
