"""MAR-INF/MANIFEST.json: what an archive is, how to load it, and the hash of each of its files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mms import __version__
from mms.archive.checks import MANIFEST, Member, check_manifest_size, check_names
from mms.errors import ArchiveError

RUNTIMES = ("python", "python3")

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}")
HANDLER = re.compile(r"(?!.*\.\.)[\w-][\w.-]*(?:/[\w.-]+)*(?::[^\W\d]\w*)?")
_MODULE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_KEYS = {  # of the object "model" -> field of Manifest
    "serializedFile": "serialized_file",
    "modelFile": "model_file",
    "requirementsFile": "requirements_file",
    "configFile": "config_file",
}


@dataclass(frozen=True, slots=True)
class ArchivedFile:
    """A file of an archive; `sha256` is empty when the manifest has none."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest. Archives of other makers list no `files`; `raw` is the document as handlers see it."""

    model_name: str
    version: str = "1.0"
    handler: str
    runtime: str = "python"
    serialized_file: str = ""
    model_file: str = ""
    requirements_file: str = ""
    config_file: str = ""
    preload: tuple[str, ...] = ()
    files: Mapping[str, ArchivedFile] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hashed(self) -> bool:
        """Whether the document lists its files, if only to say that there are none."""
        return self.raw.get("files") is not None

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Raises ArchiveError that names the field at fault."""
        document = _load(data)
        model = document.get("model")
        if not isinstance(model, dict):
            raise _fault("model", "an object with modelName and handler is needed")
        manifest = cls(
            model_name=_matching(model.get("modelName"), MODEL_NAME, "model.modelName"),
            version=_matching(_version(model.get("modelVersion")), VERSION, "model.modelVersion"),
            handler=_matching(model.get("handler"), HANDLER, "model.handler"),
            runtime=_runtime(document.get("runtime")),
            preload=_modules(document.get("preload")),
            files=_files(document.get("files")),
            raw=document,
            **{name: _file_name(model.get(key), f"model.{key}") for key, name in _FILE_KEYS.items()},
        )
        for key, name in _FILE_KEYS.items():
            named = getattr(manifest, name)
            if named and manifest.files and named not in manifest.files:
                raise _fault(f"model.{key}", f"{named!r} is not among its files")
        return manifest

    def to_json(self) -> bytes:
        """The document: `raw` with every field of this manifest on top; the same manifest gives the same bytes."""
        model: dict[str, Any] = {
            **self.raw.get("model", {}),
            "modelName": self.model_name,
            "modelVersion": self.version,
            "handler": self.handler,
        }
        for key, name in _FILE_KEYS.items():
            model.pop(key, None)
            if getattr(self, name):
                model[key] = getattr(self, name)
        document = {
            "specificationVersion": "1.0",
            "implementationVersion": "1.0",
            "modelServerVersion": "1.0",
            "archiverVersion": __version__,
            **self.raw,
            "runtime": self.runtime,
            "model": model,
            "preload": list(self.preload),
            "files": {name: _file_entry(self.files[name]) for name in sorted(self.files)},
        }
        return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"


def _file_entry(file: ArchivedFile) -> dict[str, Any]:
    return {"sha256": file.sha256, "size": file.size}


def _fault(name: str, reason: str) -> ArchiveError:
    return ArchiveError(f"{MANIFEST}: {name}: {reason}")


def _load(data: bytes) -> dict[str, Any]:
    check_manifest_size(len(data))
    try:
        text = data.decode("utf-8-sig")
        document = json.loads(text, object_pairs_hook=_unique)
        if "\\u" in text:  # half of a surrogate pair is no text, and could never be written again
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{MANIFEST}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ArchiveError(f"{MANIFEST}: an object is needed")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def _matching(value: Any, pattern: re.Pattern[str], name: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _fault(name, "missing" if value is None else f"{value!r:.80} is not a valid value")
    return value


def _version(value: Any) -> Any:
    """1.0 where there is none, as in archives of MMS; a number becomes its text, as in TorchServe."""
    if value is None or value == "":
        return "1.0"
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _runtime(value: Any) -> str:
    if value is None:
        return "python"
    if value not in RUNTIMES:
        raise _fault("runtime", f"{value!r:.80} is not supported; {' and '.join(RUNTIMES)} are")
    return str(value)


def _file_name(value: Any, name: str) -> str:
    if value is None or value == "":
        return ""
    if not isinstance(value, str):
        raise _fault(name, "a file name is needed")
    return _archived_name(value, name)


def _archived_name(value: str, name: str) -> str:
    try:
        check_names([Member(value, 0)])
    except ArchiveError as error:
        raise _fault(name, error.message) from None
    return value


def _modules(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _fault("preload", "a list of modules is needed")
    return tuple(_matching(module, _MODULE, "preload") for module in value)


def _files(value: Any) -> dict[str, ArchivedFile]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _fault("files", "an object is needed")
    return {_archived_name(name, "files"): _file(name, entry) for name, entry in value.items()}


def _file(name: str, entry: Any) -> ArchivedFile:
    size = entry.get("size") if isinstance(entry, dict) else None
    if type(size) is not int or size < 0:
        raise _fault("files", f"{name!r}: sha256 and size are needed")
    return ArchivedFile(name, size, _matching(entry.get("sha256"), _SHA256, f"files: {name!r}: sha256"))
