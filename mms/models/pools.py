"""From an archive and its settings to the pool of its workers, and what all pools of a server share."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mms import wire
from mms.archive import ModelArchive
from mms.config import Config
from mms.errors import ConfigError
from mms.logs import model_logger
from mms.model_settings import ModelSettings, merge_settings
from mms.models.version import ModelVersion
from mms.rundir import CacheDirectory
from mms.workers import environment
from mms.workers.autoscaler import Bounds
from mms.workers.environments import Environments
from mms.workers.forkserver import ForkServers
from mms.workers.gpus import find_gpus
from mms.workers.others import FrontEnds, check_shared
from mms.workers.placement import plan
from mms.workers.pool import WorkerPool
from mms.workers.process import Launch
from mms.workers.requirements import Installer
from mms.workers.restarts import Restarts
from mms.workers.sandbox import Sandboxes, only_stricter
from mms.workers.scheduling import largest_batch, warmup_sizes
from mms.workers.settings import PoolSettings

log = logging.getLogger("mms.controlplane")


class Pools:
    """Makes pools; `config` may be replaced, for those that are made from then on."""

    def __init__(self, config: Config, cache: CacheDirectory, boot_tries: int, state: Path | None) -> None:
        self.config = config
        self.gpus = find_gpus()
        self.forkservers = ForkServers()
        self.restarts = Restarts()
        self.sandboxes = Sandboxes(config, cache.scratch)
        self.environments = Environments(cache.venvs, cache.own, state)
        self._boot_tries = boot_tries
        self._loads = asyncio.Semaphore(config.parallel_loads)
        self.others: FrontEnds | None = None  # that use the workers, too

    def settings(
        self, archive: ModelArchive, model_config: Mapping[str, Any], changes: Mapping[str, Any], origin: str
    ) -> ModelSettings:
        """Of a version that is about to be registered, with `changes` that `origin` asks for. Raises ConfigError."""
        settings = merge_settings(
            self.config.model_defaults(),
            model_config,
            f"{archive.path.name}: {archive.manifest.config_file}",
            strict=False,
        )
        only_stricter(settings, self.config.model_defaults(), f"{archive.path.name}: {archive.manifest.config_file}")
        settings = merge_settings(settings, changes, origin, strict=True)
        only_stricter(settings, self.config.model_defaults(), origin)
        try:
            placement = plan(settings, self.gpus, environment.cores())
        except ConfigError as error:  # at a start, many are loaded
            raise ConfigError(f"{archive.path.name}: {error.message}") from None
        settings = dataclasses.replace(settings, gpus=placement.gpus)
        if settings.min_workers == -1:
            most = placement.size if settings.max_workers == -1 else settings.max_workers
            settings = dataclasses.replace(settings, min_workers=min(placement.size, most))
        if self.others is not None:
            check_shared(settings, archive.path.name)
        return settings

    def begin_imports(self, archive: ModelArchive, settings: ModelSettings) -> None:
        """Of what workers of a version that is about to be registered are forked with, if they will be forked."""
        own = archive.manifest.requirements_file and self.config.install_requirements
        if settings.min_workers and not own:
            self.forkservers.begin(_preload(archive, settings))

    def pool(
        self, version: ModelVersion, folder: Path, model_config: dict[str, Any], sandbox: wire.Sandbox
    ) -> WorkerPool:
        """For a version whose archive lies extracted in `folder`; it runs nothing yet."""
        settings, manifest = version.settings, version.archive.manifest
        load = wire.Load(
            model_name=version.name,
            version=version.version,
            directory=str(folder.absolute()),
            handler=version.handler,
            manifest=dict(manifest.raw),
            model_config=model_config,
            batch_size=largest_batch(settings),
            isolate_errors=settings.isolate_errors,
            gpu=None,
            cpu_threads=settings.cpu_threads,
            max_request_size=self.config.max_request_size,
            max_response_size=self.config.max_response_size,
            threads=settings.threads,
            preprocess_threads=settings.preprocess_threads,
            preparation=wire.Preparation(
                warmup=settings.warmup,
                batch_sizes=warmup_sizes(settings),
                compile=settings.compile,
                cuda_graphs=settings.cuda_graphs,
            ),
        )
        how = Launch(
            name=f"mms-{version.name}",
            directory=load.directory,
            environ=environment.worker_environment(self.config.worker_env),
            preload=_preload(version.archive, settings),
            scratch=self.sandboxes.scratch,
            sandbox=sandbox,
        )
        pool = PoolSettings(
            label=version.label,
            load=load,
            launch=how,
            interpreter=self._interpreter(version, folder, sandbox),
            placement=plan(settings, self.gpus, environment.cores()),
            response_timeout=settings.response_timeout,
            startup_timeout=settings.startup_timeout,
            stop_grace=self.config.stop_grace,
            max_requests=settings.max_requests,
            max_rss=settings.max_rss,
            share_weights=settings.share_weights,
            boot_tries=self._boot_tries,
            number=version.number,
        )
        return WorkerPool(
            pool, version.queue, version.metrics, self.forkservers, self._loads, self.restarts, self.others
        )

    def _interpreter(
        self, version: ModelVersion, folder: Path, sandbox: wire.Sandbox
    ) -> Callable[[], Awaitable[str]] | None:
        """What makes the archive's own Python, if it brings requirements and may install them."""
        file = version.archive.manifest.requirements_file
        if not file:
            return None
        if not self.config.install_requirements:
            log.warning("%s brings %s, which is not installed: install_requirements is off", version.label, file)
            return None
        installer = Installer(
            environments=self.environments,
            scratch=self.sandboxes.scratch,
            sandbox=sandbox,
            worker_env=self.config.worker_env,
            wheelhouse=self.config.wheelhouse,
            require_hashes=self.config.require_hashes,
        )
        return partial(installer.interpreter, folder / file, model_logger(version.name), version.label)


def bounds_of(settings: ModelSettings) -> Bounds:
    """Between how many workers the settings let a pool run."""
    return Bounds(
        settings.min_workers,
        settings.worker_limit,
        up_after=settings.scale_up_after,
        down_after=settings.scale_down_after,
        zero_after=settings.scale_to_zero_after,
        on_request=settings.load_on_request and not settings.min_workers,
    )


def _preload(archive: ModelArchive, settings: ModelSettings) -> tuple[str, ...]:
    return tuple(sorted({*archive.manifest.preload, *settings.preload}))
