"""A reload: the settings are read again, and those that can change are changed. Front end's process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace

from mms.config import Config
from mms.errors import ConfigError, MMSError
from mms.rundir import RunDirectory, note
from mms.systemd import Notifier

log = logging.getLogger("mms.server")

# What a reload changes: the front end and nginx at once, models where they are registered from then on.
LIVE = (
    "access_log", "log_level", "max_connections", "header_timeout", "body_timeout", "keepalive_timeout", "drain_delay",
    "drain_timeout", "stop_grace", "verify_archives", "install_requirements", "require_hashes", "wheelhouse",
    "worker_env", "batch_size", "max_batch_delay", "workers", "response_timeout", "startup_timeout", "queue_size",
    "queue_bytes", "queue_timeout", "queue_order", "max_bytes_in_flight",
)  # fmt: skip


class Reloads:
    """One reload at a time.

    `reread` reads the settings, `current` tells those in force, `apply` changes them. When one of them raises MMSError
    or OSError, everything stays as it was.
    """

    def __init__(
        self,
        reread: Callable[[], Config] | None,
        current: Callable[[], Config],
        apply: Callable[[Config], Awaitable[None]],
        manager: Notifier,
        run_dir: RunDirectory,
    ) -> None:
        self._reread = reread
        self._current = current
        self._apply = apply
        self._manager = manager
        self._run_dir = run_dir
        self._task: asyncio.Task[None] | None = None
        self._again = False

    def begin(self) -> None:
        """Once more if one is under way: what it applies may have been read before the change that is meant now."""
        self._again = True
        if self._task is None:
            self._task = asyncio.create_task(self._reload_as_asked())

    async def ended(self) -> None:
        """Return when none is under way."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _reload_as_asked(self) -> None:
        try:
            while self._again:
                self._again = False
                await self._reload(self._current())
        finally:
            self._task = None

    async def _reload(self, config: Config) -> None:
        """Read the settings again, apply what can change, and leave word of it in the run directory."""
        self._manager.reloading()
        applied: list[str] = []
        restart: list[str] = []
        failure = ""
        try:
            if self._reread is None:
                raise ConfigError("this server has no settings to read again")
            new = self._reread()
            changed = [each.name for each in fields(Config) if getattr(new, each.name) != getattr(config, each.name)]
            applied = [name for name in changed if name in LIVE]
            restart = [name for name in changed if name not in LIVE]
            await self._apply(replace(config, **{name: getattr(new, name) for name in applied}))
        except (MMSError, OSError) as error:
            applied, restart, failure = [], [], str(error)
            log.error("not reloaded, everything stays as it was: %s", failure)
        else:
            log.info("reloaded; changed: %s; changed by a restart only: %s", ", ".join(applied) or "nothing",
                     ", ".join(restart) or "nothing")  # fmt: skip
        finally:
            self._manager.ready(failure or "reloaded")
        note(lambda: self._run_dir.record_reload(applied, restart, failure))
