"""A reload: the settings are read again, and those that can change are changed. Front end's process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace

from mms.config import Config
from mms.errors import ConfigError, MMSError
from mms.rundir import RunDirectory
from mms.systemd import Notifier

log = logging.getLogger("mms.server")

# What a reload changes: the front end and nginx at once, models where they are registered from then on.
LIVE = (
    "access_log", "log_level", "max_connections", "header_timeout", "body_timeout", "keepalive_timeout", "drain_delay",
    "drain_timeout", "stop_grace", "verify_archives", "install_requirements", "worker_env", "batch_size",
    "max_batch_delay", "workers", "response_timeout", "startup_timeout", "queue_size", "queue_bytes", "queue_timeout",
    "queue_order", "max_bytes_in_flight",
)  # fmt: skip


class Reloads:
    """One reload at a time.

    `reread` reads the settings, and `apply` puts them in force; either raises MMSError, and everything stays as it was.
    """

    def __init__(
        self,
        reread: Callable[[], Config] | None,
        apply: Callable[[Config], Awaitable[None]],
        manager: Notifier,
        run_dir: RunDirectory,
    ) -> None:
        self._reread = reread
        self._apply = apply
        self._manager = manager
        self._run_dir = run_dir
        self._task: asyncio.Task[None] | None = None

    def begin(self, config: Config) -> None:
        """`config` is what is in force now."""
        if self._task is None:
            self._task = asyncio.create_task(self._reload(config))

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
        except MMSError as error:
            applied, restart, failure = [], [], error.message
            log.error("not reloaded, everything stays as it was: %s", failure)
        else:
            log.info("reloaded; changed: %s; changed by a restart only: %s", ", ".join(applied) or "nothing",
                     ", ".join(restart) or "nothing")  # fmt: skip
        finally:
            self._task = None
        self._manager.ready(failure or "reloaded")
        self._run_dir.record_reload(applied, restart, failure)
