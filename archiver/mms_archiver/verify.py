"""Verifies an archive as a server would meet it: structure, hashes, and whether its handler can be imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from mms.archive import ModelArchive
from mms.errors import ArchiveError, ConfigError
from mms.model_settings import ModelSettings, merge_settings
from mms.safe_yaml import read_yaml
from mms.signature import TrustedKeys
from mms_archiver.collect import missing_sample

# Runs in a process of its own, in the folder of the archive, and finds the handler by the server's own rule.
# The verdict goes to a file: what a handler prints, or a sys.exit in it, must not pass for one.
_IMPORT = """
import sys
from pathlib import Path
from mms.backend.loader import find_entry
from mms.errors import ModelLoadError
handler, verdict = sys.argv[1:]
sys.path.insert(0, "")
try:
    find_entry(handler, Path())
    text = "ok"
except ModelLoadError as error:
    text = error.message
except Exception as error:
    text = f"its handler cannot be imported: {type(error).__name__}: {error}"
with open(verdict, "w", encoding="utf-8") as file:
    file.write(text)
"""


def verify_archive(path: Path, *, timeout: float, keys: TrustedKeys | None = None) -> ModelArchive:
    """Raises ArchiveError with the first fault; `timeout` is for the import, `keys` may have signed it."""
    archive = ModelArchive.open(path)
    if keys is not None:
        archive.signed_by = keys.check(archive)
    with tempfile.TemporaryDirectory(prefix="model-archiver-") as folder:
        root = archive.extract(Path(folder) / "archive")
        _check_place(archive)
        _check_warmup(archive, root)
        verdict = _import(root.resolve(), archive.manifest.handler, Path(folder), timeout)
    if verdict != "ok":
        raise ArchiveError(f"{path.name}: {verdict}")
    return archive


def _check_place(archive: ModelArchive) -> None:
    """The handler must come with the archive or with MMS: what is only installed here may be missing elsewhere."""
    location = archive.manifest.handler.partition(":")[0]
    path = location.removesuffix(".py").replace(".", "/")
    files = {file.name for file in archive.files}
    if not location.startswith("mms_handlers.") and not {f"{path}.py", f"{path}/__init__.py"} & files:
        raise ArchiveError(f"{archive.path.name}: its handler {location} is not in the archive and not built in")


def _check_warmup(archive: ModelArchive, root: Path) -> None:
    """The samples of `warmup` in model-config.yaml must be well-formed, and their files in the archive."""
    config_file = archive.manifest.config_file
    config = read_yaml(root / config_file) if config_file else {}
    origin = f"{archive.path.name}: {config_file}"
    try:
        samples = merge_settings(ModelSettings(), {"warmup": config.get("warmup", ())}, origin, strict=True).warmup
    except ConfigError as error:
        raise ArchiveError(error.message) from None
    if missing := missing_sample(samples, {file.name for file in archive.files}):
        raise ArchiveError(f"{origin}: the warmup sample {missing} is not in the archive")


def _import(root: Path, handler: str, folder: Path, timeout: float) -> str:
    verdict, errors = folder / "verdict", folder / "stderr"
    search = [os.path.abspath(place) for place in sys.path if place]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search), "PYTHONDONTWRITEBYTECODE": "1"}
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", _IMPORT, handler, str(verdict)],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"its handler takes more than {timeout:g} s to import"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if verdict.is_file():
        return " ".join(verdict.read_text("utf-8").split())
    last = errors.read_text("utf-8", "replace").strip().rpartition("\n")[2]
    return f"importing its handler ended the process with status {process.returncode}{': ' if last else ''}{last}"
