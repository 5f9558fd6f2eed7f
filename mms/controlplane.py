"""The control plane: register, scale, configure, describe, set default, unregister. No HTTP in it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mms import wire
from mms.archive import MODEL_NAME, ModelArchive
from mms.config import Config, ModelSettings, merge_settings, read_yaml
from mms.errors import BadRequestError, ConfigError, ConflictError, NotFoundError, ServiceUnavailableError
from mms.logs import close_model_log, model_logger, open_model_log
from mms.models.download import Downloads, is_remote, split_pin
from mms.models.registry import ModelRegistry
from mms.models.store import ModelStore
from mms.models.version import ModelVersion, VersionState
from mms.rundir import CacheDirectory
from mms.workers import environment
from mms.workers.forkserver import ForkServers
from mms.workers.gpus import find_gpus
from mms.workers.pool import PoolSettings, WorkerPool
from mms.workers.process import Launch, reap_orphans

log = logging.getLogger("mms.controlplane")

_SHA256 = re.compile("[0-9a-f]{64}")


class ControlPlane:
    """Changes what is served; the data plane only ever sees the result in the registry."""

    def __init__(self, config: Config, registry: ModelRegistry, store: ModelStore, cache: CacheDirectory) -> None:
        self.registry = registry
        self.store = store
        self.downloads = Downloads(config, store)
        self.forkservers = ForkServers()
        self.gpus = find_gpus()
        self._config = config
        self._cache = cache
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._loads = asyncio.Semaphore(config.parallel_loads)
        self._numbers = itertools.count(1)
        self._versions: set[ModelVersion] = set()  # registered, or still draining

    async def register(
        self,
        url: str,
        *,
        name: str = "",
        handler: str = "",
        sha256: str = "",
        changes: Mapping[str, Any] | None = None,
        synchronous: bool = True,
        at_start: bool = False,
    ) -> ModelVersion:
        """Serve the archive `url`: a file of the store, or an address to download it from.

        With `synchronous`, return when its workers are ready.

        Raises BadRequestError, ModelNotFoundError, DownloadError, ArchiveError, ConfigError or ConflictError (nothing
        is registered), and ModelLoadError (the version stays registered as FAILED; registering it again replaces it).
        """
        if is_remote(url):
            url, pin = split_pin(url)
            sha256 = sha256 or pin
        sha256 = sha256.lower()
        if sha256 and not _SHA256.fullmatch(sha256):
            raise BadRequestError("sha256: 64 hexadecimal digits are needed")
        if is_remote(url):
            url = await self.downloads.fetch(url, sha256)
        archive = await asyncio.to_thread(self.store.open, url, sha256)
        if handler and self.store.only_signed:
            raise BadRequestError("handler: a signed archive names its own; no other can be chosen with trusted_keys")
        name = name or archive.manifest.model_name
        if not MODEL_NAME.fullmatch(name):
            raise BadRequestError(f"{name!r} is no model name: letters, digits, '_', '-' and '.', at most 128")
        async with self._locks[name]:
            version = await self._add(archive, name, handler, changes or {}, at_start)
        if version.pool is not None:
            version.pool.set_target(version.settings.min_workers)
            if synchronous:
                await version.pool.settled()
        return version

    async def change(
        self, name: str, version: str, changes: Mapping[str, Any], *, synchronous: bool = False
    ) -> ModelVersion:
        """Change batching, queue limits and the number of workers while the version is served: all of it, or nothing.

        With `min_workers` among the changes and `synchronous`, return when that many workers are ready. Raises
        ConfigError (nothing is changed), and ModelLoadError when synchronous and workers cannot be started.
        """
        found = self.registry.version(name, version)
        settings = merge_settings(found.settings, changes, "request", strict=True)
        pool = found.pool
        if pool is None:
            raise ConflictError(f"model {found.label} is still being registered; try again soon")
        found.apply(settings)
        if "min_workers" in changes:
            pool.set_target(settings.min_workers)
            if synchronous:
                await pool.settled()
        return found

    def set_default(self, name: str, version: str) -> None:
        found = self.registry.version(name, version)
        if found.state is VersionState.FAILED:
            raise ConflictError(f"model {found.label} is FAILED and cannot become the default")
        self.registry.set_default(name, version)

    async def unregister(self, name: str, version: str = "") -> None:
        """Stop serving a version (default: all of the model's), after its requests in hand are answered."""
        model = self.registry.model(name)
        versions = [model.version(version)] if version else list(model.versions.values())
        for found in versions:
            self.registry.remove(found)
        await asyncio.gather(*(self._unload(found, self._config.drain_timeout) for found in versions))

    def reap_orphans(self, others: set[int]) -> None:
        """Wait for what workers left behind and died; `others` are children of the server that are not ours."""
        pools = [version.pool for version in self._versions if version.pool is not None]
        # what is being forked or installed at the moment is ours, but not known yet
        if not any(pool.starting for pool in pools):
            workers = {worker.pid for pool in pools for worker in pool.workers if worker.pid is not None}
            reap_orphans(workers | others | set(self.forkservers.pids()))

    async def close(self, drain: float) -> None:
        """Unload everything and end the fork servers."""
        await asyncio.gather(*(self._unload(version, drain) for version in list(self._versions)))
        self.forkservers.close()

    async def _add(
        self, archive: ModelArchive, name: str, handler: str, changes: Mapping[str, Any], at_start: bool
    ) -> ModelVersion:
        """Extract, configure and register; the pool exists afterwards but runs nothing yet."""
        number = archive.manifest.version
        self._failed(name, number)
        target = self._cache.models / f"{name}-{next(self._numbers)}"
        folder = await asyncio.to_thread(archive.extract, target, verify=self._config.verify_archives)
        owned = folder if folder == target else None
        try:
            model_config = read_yaml(folder / archive.manifest.config_file) if archive.manifest.config_file else {}
            settings = self._settings(archive, model_config, changes)
            version = ModelVersion(name, number, archive, settings)
            version.directory = owned
            version.at_start = at_start
            version.pool = self._pool(version, folder, handler or archive.manifest.handler, model_config)
            replaced = self._failed(name, number)
            open_model_log(self._config.run_dir / "logs", name)
            if replaced is not None:
                self.registry.remove(replaced)
            self.registry.add(version)
            self._versions.add(version)
        except BaseException:
            if owned is not None:
                shutil.rmtree(owned, ignore_errors=True)
            raise
        if replaced is not None:
            await self._unload(replaced, self._config.drain_timeout)
        return version

    async def _unload(self, version: ModelVersion, drain: float) -> None:
        await version.unload(drain)
        self._versions.discard(version)
        if not any(other.name == version.name for other in self._versions):
            close_model_log(version.name)

    def _failed(self, name: str, number: str) -> ModelVersion | None:
        """The FAILED version that gives way to a new registration, if there is one; any other is a conflict."""
        try:
            existing = self.registry.version(name, number)
        except (NotFoundError, ServiceUnavailableError):
            return None
        if existing.state is not VersionState.FAILED:
            raise ConflictError(f"Model version {number} is already registered for model {name}")
        return existing

    def _settings(
        self, archive: ModelArchive, model_config: Mapping[str, Any], changes: Mapping[str, Any]
    ) -> ModelSettings:
        settings = merge_settings(
            self._config.model_defaults(),
            model_config,
            f"{archive.path.name}: {archive.manifest.config_file}",
            strict=False,
        )
        settings = merge_settings(settings, changes, "request", strict=True)
        fixed: dict[str, Any] = {}
        gpus = self._gpus_for(settings)
        if settings.min_workers == -1:
            fixed["min_workers"] = len(gpus) or environment.cores()
        return merge_settings(settings, {**fixed, "gpus": gpus}, "request", strict=True)

    def _gpus_for(self, settings: ModelSettings) -> list[int]:
        if settings.device == "cpu":
            return []
        if settings.device == "gpu" and not self.gpus:
            raise ConfigError("device = gpu: this machine has no GPU that the server can see")
        there = [gpu.index for gpu in self.gpus]
        missing = sorted(set(settings.gpus) - set(there))
        if missing:
            seen = ", ".join(map(str, there)) or "none"
            raise ConfigError(f"gpus: {', '.join(map(str, missing))} do not exist; this server sees: {seen}")
        return list(settings.gpus or there)

    def _pool(self, version: ModelVersion, folder: Path, handler: str, model_config: dict[str, Any]) -> WorkerPool:
        settings, manifest = version.settings, version.archive.manifest
        load = wire.Load(
            model_name=version.name,
            version=version.version,
            directory=str(folder.absolute()),
            handler=handler,
            manifest=dict(manifest.raw),
            model_config=model_config,
            batch_size=settings.batch_size,
            isolate_errors=settings.isolate_errors,
            gpu=0 if settings.gpus else None,
            threads=settings.threads,
            max_request_size=self._config.max_request_size,
            max_response_size=self._config.max_response_size,
        )
        how = Launch(
            name=f"mms-{version.name}",
            directory=load.directory,
            environ=environment.worker_environment(self._config.worker_env),
            preload=tuple(sorted({*manifest.preload, *settings.preload})),
        )
        pool = PoolSettings(
            label=version.label,
            load=load,
            launch=how,
            interpreter=self._interpreter(version, folder),
            gpus=[self.gpus[index] for index in settings.gpus],
            response_timeout=settings.response_timeout,
            startup_timeout=settings.startup_timeout,
            stop_grace=self._config.stop_grace,
        )
        return WorkerPool(pool, version.queue, version.metrics, self.forkservers, self._loads)

    def _interpreter(self, version: ModelVersion, folder: Path) -> Callable[[], Awaitable[str]] | None:
        """What makes the archive's own Python, if it brings requirements and may install them."""
        file = version.archive.manifest.requirements_file
        if not file:
            return None
        if not self._config.install_requirements:
            log.warning("%s brings %s, which is not installed: install_requirements is off", version.label, file)
            return None
        make, output = environment.own_interpreter, model_logger(version.name)
        return partial(make, folder / file, self._cache.venvs, self._cache.own, output, version.label)
