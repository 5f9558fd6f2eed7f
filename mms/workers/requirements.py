"""An archive's own virtual environment: its requirements, installed by pip as its workers run. Front end's process.

Packages bring code that runs when they are installed (setup.py) and whenever Python starts (.pth). So pip gets the
user and the sandbox of the workers, and nothing else ever starts the Python of such an environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import shutil
import signal
import sys
import sysconfig
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mms import wire
from mms.errors import ModelLoadError
from mms.workers.environment import worker_environment
from mms.workers.environments import Environments
from mms.workers.sandbox import new_scratch

log = logging.getLogger("mms.environment")

INSTALL_LIMIT = 1800.0
KEPT_LINES = 20
_LIST = re.compile(r"\s*(-r|-c|--requirement|--constraint)")  # what stands behind it is a file of requirements, too
_WORD = re.compile(r"[^\s=]+")
_installing: defaultdict[Path, asyncio.Lock] = defaultdict(asyncio.Lock)


@dataclass(frozen=True, kw_only=True)
class Installer:
    """Makes the environments of archives whose workers get this sandbox.

    `scratch` is where each is made. With a `wheelhouse`, packages come from that folder alone, and the network is
    closed where the workers' is.
    """

    environments: Environments
    scratch: Path
    sandbox: wire.Sandbox
    worker_env: tuple[str, ...]
    wheelhouse: Path | None
    require_hashes: bool

    async def interpreter(self, requirements: Path, output: logging.Logger, label: str) -> str:
        """The Python of an environment that has `requirements`, made on first use and found again by their content.

        The server's own packages are visible behind its own, so that a worker can run there. What pip says goes to
        `output`. Raises ModelLoadError.
        """
        digest = await asyncio.to_thread(self._digest, requirements)
        try:
            folder = await self.environments.need(label, digest)
            python = folder / "bin" / "python"
            async with _installing[folder]:
                if not python.exists():
                    async with asyncio.timeout(INSTALL_LIMIT):
                        await self._install(requirements, folder, output, label)
        except TimeoutError:
            limit = f"{INSTALL_LIMIT:g} s"
            raise ModelLoadError(f"the requirements of {label} could not be installed within {limit}") from None
        except OSError as error:
            raise ModelLoadError(f"the requirements of {label} cannot be installed: {error}") from None
        return str(python)

    def _digest(self, requirements: Path) -> str:
        """Of all that decides what is in it, and whose: also the files of the archive that the requirements name."""
        made_by = (sys.version, sys.prefix, self.sandbox.uid, str(self.wheelhouse), self.require_hashes)
        digest = hashlib.sha256(repr(made_by).encode())
        archive = requirements.parent.resolve()
        lists = [archive / requirements.name]
        for file in lists:  # it grows: `-r more.txt` names others
            text = file.read_bytes()
            digest.update(b"%d " % len(text) + text)
            for line in text.decode("utf-8", "replace").splitlines():
                is_list = _LIST.match(line)
                for word in _WORD.findall(line, is_list.end() if is_list else 0):
                    with contextlib.suppress(OSError, ValueError):
                        named = (file.parent / word).resolve()
                        if not named.is_relative_to(archive) or not named.is_file() or named in lists:
                            continue
                        if is_list:
                            lists.append(named)
                        else:
                            digest.update(named.read_bytes())
        return digest.hexdigest()[:16]

    async def _install(self, requirements: Path, folder: Path, output: logging.Logger, label: str) -> None:
        log.info("%s: installing %s into %s", label, requirements.name, folder)
        scratch = new_scratch(self.scratch, "venv", self.sandbox)
        try:
            building = scratch / "venv"
            python = str(building / "bin" / "python")
            await _run(output, label, sys.executable, "-m", "venv", "--without-pip", str(building))
            has_pip = _show_server_packages(building)
            await asyncio.to_thread(self._hand_over, building)
            sandboxed = self._sandboxed(scratch, requirements.parent)
            if not has_pip:
                await _run(output, label, *sandboxed, python, "-m", "ensurepip", environ=self._environ())
            pip = (python, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-color")
            words = ("install", "--progress-bar", "off", *self._options(), "-r", str(requirements))
            await _run(output, label, *sandboxed, *pip, *words, environ=self._environ())
            os.rename(building, folder)  # what stands at `folder` is complete
        except OSError:
            if not await asyncio.to_thread(folder.exists):  # otherwise another server was quicker
                raise
        finally:
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)
        log.info("%s: installed %s", label, requirements.name)

    def _hand_over(self, building: Path) -> None:
        """To the workers' user; until here, nothing that an archive brought has run in it."""
        if self.sandbox.uid != -1:
            for root, folders, files in os.walk(building):
                for path in (root, *(os.path.join(root, name) for name in (*folders, *files))):
                    os.chown(path, self.sandbox.uid, self.sandbox.gid, follow_symlinks=False)

    def _sandboxed(self, scratch: Path, directory: Path) -> tuple[str, ...]:
        """The beginning of a command that shall run as the workers do, but may ask an index for packages."""
        offline = self.wheelhouse is not None
        read = (*self.sandbox.read, str(self.wheelhouse)) if offline else self.sandbox.read
        box = msgspec.structs.replace(
            self.sandbox, network=self.sandbox.network or not offline, read=read if self.sandbox.files else ()
        )
        words = (msgspec.json.encode(box).decode(), str(scratch), str(directory))
        return (sys.executable, "-P", "-m", "mms.backend.sandbox", *words)

    def _options(self) -> tuple[str, ...]:
        offline = () if self.wheelhouse is None else ("--no-index", "--find-links", str(self.wheelhouse))
        return (*offline, *(("--require-hashes",) if self.require_hashes else ()))

    def _environ(self) -> Mapping[str, str]:
        """The workers' variables, and pip's own settings."""
        return worker_environment((*self.worker_env, *(name for name in os.environ if name.startswith("PIP_"))))


def _show_server_packages(building: Path) -> bool:
    """Let the environment see the server's packages behind its own; whether pip is among them."""
    base = list(dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))))
    site = building / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "server.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in base))
    return any(Path(path, "pip").is_dir() for path in base)


async def _run(output: logging.Logger, label: str, *command: str, environ: Mapping[str, str] | None = None) -> None:
    """Run to the end, each line to the log. Raises ModelLoadError; if it is given up, all it has started ends."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environ,
        limit=1 << 20,  # bytes in one line
        start_new_session=True,
    )
    assert process.stdout is not None
    last: deque[str] = deque(maxlen=KEPT_LINES)
    try:
        async for line in process.stdout:
            last.append(line.decode("utf-8", "backslashreplace").rstrip())
            output.info("[%s install] %s", label, last[-1])
        await process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        raise
    if process.returncode:
        lines = [line for line in last if line.strip()] or [f"exit code {process.returncode}"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1])
        raise ModelLoadError(
            f"the requirements of {label} cannot be installed: {reason.removeprefix('ERROR: ')}",
            traceback="\n".join(lines),
        )
