"""Verifies an archive as a server would meet it: structure, hashes, and whether its handler can be imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from mms.archive import ModelArchive
from mms.errors import ArchiveError
from mms.signature import TrustedKeys
from mms_archiver.entry import built_in_handlers

# Runs in a process of its own, in the folder of the archive. The verdict goes to a file: what a handler prints, or
# a sys.exit in it, must not pass for one.
_IMPORT = """
import importlib, sys
module, name, verdict = sys.argv[1:]
sys.path.insert(0, "")
try:
    found = importlib.import_module(module)
    own = [n for n, v in vars(found).items() if isinstance(v, type) and v.__module__ == module and n[0] != "_"]
    name = name or ("handle" if hasattr(found, "handle") else own[0] if len(own) == 1 else "")
    if not name:
        text = f"{module} has neither a function handle nor exactly one class; it holds: {', '.join(own) or 'no class'}"
    elif not callable(getattr(found, name, None)):
        text = f"{module} has no class or function {name}"
    else:
        text = "ok"
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
        module, name = _entry(archive)
        verdict = _import(root.resolve(), module, name, Path(folder), timeout)
    if verdict != "ok":
        raise ArchiveError(f"{path.name}: {verdict}")
    return archive


def _entry(archive: ModelArchive) -> tuple[str, str]:
    """Module and name of the manifest's handler; the name is empty where the manifest leaves it to the server."""
    location, _, name = archive.manifest.handler.partition(":")
    module = location.removesuffix(".py").replace("/", ".")
    files = {file.name for file in archive.files}
    path = module.replace(".", "/")
    if module.startswith("mms_handlers.") or {f"{path}.py", f"{path}/__init__.py"} & files:
        return module, name
    if not name and module in built_in_handlers():
        return f"mms_handlers.{module}", ""
    raise ArchiveError(f"{archive.path.name}: its handler {location} is not in the archive and not built in")


def _import(root: Path, module: str, name: str, folder: Path, timeout: float) -> str:
    verdict, errors = folder / "verdict", folder / "stderr"
    search = [os.path.abspath(place) for place in sys.path if place]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search), "PYTHONDONTWRITEBYTECODE": "1"}
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", _IMPORT, module, name, str(verdict)],
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
