"""Shows what is in an archive: tables for people, one JSON document for programs."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from mms.archive import ModelArchive
from mms.signature import signers


def print_tables(archive: ModelArchive) -> None:
    """The manifest, then the files with size and the beginning of their hash."""
    console = Console()
    console.print(_manifest_table(archive))
    console.print(_file_table(archive))


def as_json(archive: ModelArchive) -> str:
    """Everything that `inspect` knows, as one document."""
    document = {
        "path": str(archive.path),
        "format": archive.format,
        "size": sum(file.size for file in archive.files),
        "manifest": archive.manifest.raw,
        "signedBy": signers(archive),
        "files": [{"name": file.name, "size": file.size, "sha256": file.sha256} for file in archive.files],
    }
    return json.dumps(document, indent=2)


def _manifest_table(archive: ModelArchive) -> Table:
    manifest = archive.manifest
    rows = {
        "model": manifest.model_name,
        "version": manifest.version,
        "handler": manifest.handler,
        "serialized file": manifest.serialized_file,
        "model file": manifest.model_file,
        "requirements file": manifest.requirements_file,
        "config file": manifest.config_file,
        "preload": ", ".join(manifest.preload),
        "runtime": manifest.runtime,
        "format": archive.format,
        "signed by": ", ".join(f"{key_id[:16]} (not checked)" for key_id in signers(archive)),
        "archiver": str(manifest.raw.get("archiverVersion", "")),
    }
    return _table(("", archive.path.name), [(name, value) for name, value in rows.items() if value])


def _file_table(archive: ModelArchive) -> Table:
    rows = [(file.name, decimal(file.size), file.sha256[:16] or "-") for file in archive.files]
    rows.append((f"in all: {len(rows)}", decimal(sum(file.size for file in archive.files)), ""))
    return _table(("file", "size", "SHA-256"), rows)


def _table(heads: tuple[str, ...], rows: list[Any]) -> Table:
    table = Table(show_edge=False)
    for head in heads:
        table.add_column(head, justify="right" if head == "size" else "left", overflow="fold")
    for row in rows:
        # A name from an archive is text, never markup.
        table.add_row(*(Text(cell) for cell in row))
    return table
