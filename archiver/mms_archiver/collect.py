"""Gathers what goes into an archive from the command line's files and folders, and makes the manifest of it."""

from __future__ import annotations

import glob
import os
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mms.archive import Manifest
from mms.errors import ArchiveError
from mms.model_settings import ModelSettings, merge_settings
from mms.safe_yaml import read_yaml
from mms.samples import WarmupSample
from mms_archiver.entry import find_entry, handler_file

_SKIPPED_FOLDERS = ("__MACOSX", "__pycache__")
_SKIPPED_FILES = (".DS_Store", "MANIFEST.json", "SIGNATURE.json")
_SKIPPED_ENDINGS = (".pyc", ".mar")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the user asked to be packed."""

    model_name: str
    handler: str
    version: str = "1.0"
    runtime: str = "python"
    model_path: Path | None = None
    serialized_file: Path | None = None
    model_file: Path | None = None
    requirements_file: Path | None = None
    config_file: Path | None = None
    extra_files: str = ""


class Collection:
    """The files of an archive by the name they get in it."""

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}

    def add(self, path: Path, name: str = "") -> str:
        """Takes a file under its own name, or under `name`, which is returned."""
        name = name or path.name
        known = self.files.setdefault(name, path)
        if not path.is_file():
            raise ArchiveError(f"{path}: {'not a plain file' if path.exists() else 'no such file'}")
        if not known.samefile(path):
            raise ArchiveError(f"two files would be called {name}: {known} and {path}")
        return name

    def add_optional(self, path: Path | None) -> str:
        """As add; the empty name for no file."""
        return self.add(path) if path else ""

    def add_folder(self, folder: Path, prefix: str = "") -> None:
        """Takes a folder's files under the names they have in it, without what tools leave behind."""
        for path in sorted(_walk(folder)):
            self.add(path, prefix + path.relative_to(folder).as_posix())

    def add_pattern(self, pattern: str) -> None:
        """Takes a file, a folder under its own name, or all that a glob pattern matches."""
        matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not matches:
            raise ArchiveError(f"{pattern}: matches no file")
        for path in map(Path, matches):
            if path.is_dir():
                self.add_folder(path, f"{path.resolve().name}/")
            else:
                self.add(path)


def collect(recipe: Recipe) -> tuple[Manifest, dict[str, Path]]:
    """The manifest, still without hashes, and the files. Raises ArchiveError or ConfigError on the first mistake."""
    collection = Collection()
    if recipe.model_path:
        collection.add_folder(recipe.model_path)
    handler = _add_handler(recipe, collection)
    serialized_file = collection.add_optional(recipe.serialized_file)
    model_file = collection.add_optional(recipe.model_file)
    requirements_file = collection.add_optional(recipe.requirements_file)
    config_file = collection.add_optional(recipe.config_file)
    for pattern in filter(None, map(str.strip, recipe.extra_files.split(","))):
        collection.add_pattern(pattern)
    if recipe.config_file:
        _check_config(recipe.config_file, collection.files)
    entry = find_entry(handler, collection.files)
    if entry.needs_serialized_file and not serialized_file:
        raise ArchiveError(f"the built-in handler {recipe.handler} needs weights: give --serialized-file")
    manifest = Manifest(
        model_name=recipe.model_name,
        version=recipe.version,
        runtime=recipe.runtime,
        handler=entry.handler,
        preload=entry.preload,
        serialized_file=serialized_file,
        model_file=model_file,
        requirements_file=requirements_file,
        config_file=config_file,
    )
    return manifest, collection.files


def _add_handler(recipe: Recipe, collection: Collection) -> str:
    """Copies in a handler that is given as a file, and returns it as it is named in the archive."""
    path = handler_file(recipe.handler)
    if path is None or path.as_posix() in collection.files:
        return recipe.handler
    return "".join((collection.add(path), *recipe.handler.partition(":")[1:]))


def _check_config(path: Path, files: Container[str]) -> None:
    settings = merge_settings(ModelSettings(), read_yaml(path), str(path), strict=False)
    if missing := missing_sample(settings.warmup, files):
        raise ArchiveError(f"{path}: the warmup sample {missing} is not in the archive; add it with --extra-files")


def missing_sample(samples: Iterable[WarmupSample], files: Container[str]) -> str:
    """The first file of a warm-up that is not among those of the archive, or nothing."""
    return next((sample.file for sample in samples if sample.file and sample.file not in files), "")


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _SKIPPED_FOLDERS]
        for name in folders:
            if os.path.islink(os.path.join(place, name)):
                raise ArchiveError(f"{os.path.join(place, name)}: a link to a folder; put the folder itself there")
        for name in files:
            if name not in _SKIPPED_FILES and not name.endswith(_SKIPPED_ENDINGS):
                yield Path(place, name)


def _raise(error: OSError) -> None:
    raise error
