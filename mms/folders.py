"""The folders and the file of a server whose settings name none."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def default_run_dir() -> Path:
    """`/run/mms` for root (nginx's workers must reach it), else `$XDG_RUNTIME_DIR/mms` or a temporary folder."""
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return Path("/run/mms")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "mms" if runtime else Path(tempfile.gettempdir()) / f"mms-{os.getuid()}"


def default_cache_dir() -> Path:
    """`/var/cache/mms` for root, else `$XDG_CACHE_HOME/mms` or `~/.cache/mms`; without a home, a folder of /var/tmp."""
    if os.geteuid() == 0 and os.access("/var/cache", os.W_OK):
        return Path("/var/cache/mms")
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache).absolute() / "mms"
    home = Path(os.path.expanduser("~"))
    if home.is_absolute() and any(os.access(folder, os.W_OK) for folder in (home / ".cache", home)):
        return home / ".cache" / "mms"
    temporary = "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()  # the former is on disk
    return Path(temporary) / f"mms-cache-{os.getuid()}"


def default_state(cache_dir: Path, run_dir: Path, model_store: Path | None) -> Path:
    """One file per run directory and model store, on disk: a run directory is often emptied at boot."""
    key = hashlib.sha256(os.fsencode(f"{run_dir}\0{model_store or ''}")).hexdigest()[:12]
    return cache_dir / "state" / f"{run_dir.name}-{key}.json"
