"""Which sandbox a model's workers get, and whether this machine can give it: tried once, before anything is served."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from mms import wire
from mms.config import Config
from mms.errors import ConfigError
from mms.model_settings import ModelSettings
from mms.workers import environment

TRIAL_LIMIT = 30.0


class Sandboxes:
    """The sandboxes of one server's workers. `scratch` is where each worker gets its folder for temporary files."""

    def __init__(self, config: Config, scratch: Path) -> None:
        self.scratch = scratch
        self.trying = 0  # trial processes that are running
        self._config = config
        self._tried: set[wire.Sandbox] = set()
        self._user = _find_user(config.worker_user) if config.worker_user else None

    def of(self, settings: ModelSettings) -> wire.Sandbox:
        """What workers with these settings give up. Raises ConfigError for settings that exclude each other."""
        if settings.worker_memory and settings.gpus:
            raise ConfigError("worker_memory limits address space, which CUDA needs far more of than memory; "
                              "use max_rss, or device = cpu")  # fmt: skip
        restricted = settings.worker_fs == "restricted"
        user = self._user
        return wire.Sandbox(
            uid=user.pw_uid if user else -1,
            gid=user.pw_gid if user else -1,
            groups=_groups(user) if user else (),
            files=restricted,
            read=tuple(map(str, self._config.worker_read)) if restricted else (),
            gpu=restricted and bool(settings.gpus),
            network=settings.worker_network != "none",
            memory=settings.worker_memory,
            nice=self._config.worker_nice,
        )

    async def check(self, sandbox: wire.Sandbox) -> None:
        """Try it in a process of its own, unless that was done. Raises ConfigError with what is in the way."""
        if sandbox == wire.Sandbox() or sandbox in self._tried:
            return
        self.trying += 1
        try:
            failure = await self._try(sandbox)
        finally:
            self.trying -= 1
        if failure:
            raise ConfigError(failure)
        self._tried.add(sandbox)

    async def _try(self, sandbox: wire.Sandbox) -> str:
        """What is in the way, or nothing."""
        scratch = new_scratch(self.scratch, "trial", sandbox)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "mms.backend.sandbox", msgspec.json.encode(sandbox).decode(), str(scratch),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
            env=environment.worker_environment(()),
        )  # fmt: skip
        try:
            async with asyncio.timeout(TRIAL_LIMIT):
                _, said = await process.communicate()
        except BaseException as error:
            process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                return f"a worker's sandbox could not be tried within {TRIAL_LIMIT:g} s"
            raise
        finally:
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)
        if not process.returncode:
            return ""
        lines = said.decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else f"a worker's sandbox cannot be tried: exit code {process.returncode}"

    def hand_over(self, folder: Path) -> None:
        """Let the workers' user read an extracted archive; it still belongs to the server's."""
        if self._user is None:
            return
        for root, _, files in os.walk(folder):
            for path, mode in ((root, 0o750), *((os.path.join(root, name), 0o640) for name in files)):
                os.chown(path, -1, self._user.pw_gid, follow_symlinks=False)
                os.chmod(path, mode)

    def describe(self, settings: ModelSettings) -> dict[str, Any]:
        """What is in force, for a model's description; empty when nothing is."""
        shown: dict[str, Any] = {}
        if self._user is not None:
            shown["user"] = self._user.pw_name
        if settings.worker_fs == "restricted":
            shown["files"] = "restricted"
        if settings.worker_network == "none":
            shown["network"] = "none"
        if settings.worker_memory:
            shown["memory"] = settings.worker_memory
        return shown


def new_scratch(parent: Path, name: str, sandbox: wire.Sandbox) -> Path:
    """A new folder that only such a worker may use. Raises OSError."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
    if sandbox.uid != -1:
        os.chown(folder, sandbox.uid, sandbox.gid)
    return folder


def only_stricter(settings: ModelSettings, server: ModelSettings, origin: str) -> None:
    """A model may give up more than the server demands, never less. Raises ConfigError."""
    loose = {"worker_fs": "open", "worker_network": "open"}
    for name, word in loose.items():
        if getattr(settings, name) == word != getattr(server, name):
            raise ConfigError(
                f"{origin}: {name} = {word}: this server demands {getattr(server, name)}; a model can only be stricter"
            )
    if server.worker_memory and not 0 < settings.worker_memory <= server.worker_memory:
        raise ConfigError(
            f"{origin}: worker_memory = {settings.worker_memory}: this server grants at most {server.worker_memory}"
        )


def _find_user(name: str) -> pwd.struct_passwd:
    if os.geteuid() != 0:
        raise ConfigError(f"worker_user = {name}: only root can run workers as another user; start mms as root")
    try:
        user = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(f"worker_user = {name}: there is no such user; create it, with useradd --system") from None
    if user.pw_uid == 0:
        raise ConfigError(f"worker_user = {name}: that is root, whom workers should not run as; name another")
    return user


def _groups(user: pwd.struct_passwd) -> tuple[int, ...]:
    return tuple(os.getgrouplist(user.pw_name, user.pw_gid))
