"""The control plane: register, scale, configure, describe, set default, unregister. No HTTP in it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from mms.archive import HANDLER, MODEL_NAME, ModelArchive
from mms.config import Config
from mms.errors import (
    ArchiveError,
    BadRequestError,
    ConflictError,
    MMSError,
    NotFoundError,
    ServiceUnavailableError,
    UpgradingError,
)
from mms.logs import close_model_log, open_model_log
from mms.metrics import RestartFacts
from mms.model_settings import merge_settings
from mms.models.cached import CachedVersion, new_version
from mms.models.download import Downloads, is_remote, split_pin
from mms.models.pools import Pools, bounds_of
from mms.models.registry import ModelRegistry
from mms.models.served import VersionState
from mms.models.store import ModelStore
from mms.models.version import ModelVersion
from mms.rundir import CacheDirectory
from mms.safe_yaml import MAX_FILE, parse_yaml, read_yaml
from mms.state import SavedModel, SavedVersion, Saver, State
from mms.workers.others import FrontEnds, check_shared
from mms.workers.process import reap_orphans
from mms.workers.restarts import MAX_BOOT_FAILURES

log = logging.getLogger("mms.controlplane")

_SHA256 = re.compile("[0-9a-f]{64}")


class ControlPlane:
    """Changes what is served; the data plane only ever sees the result in the registry."""

    def __init__(
        self,
        config: Config,
        registry: ModelRegistry,
        store: ModelStore,
        cache: CacheDirectory,
        state: Path | None = None,
        boot_tries: int = MAX_BOOT_FAILURES,
    ) -> None:
        self.registry = registry
        self.store = store
        self.downloads = Downloads(config, store)
        self.saver = Saver(state, self.snapshot) if state is not None else None
        self.pools = Pools(config, cache, boot_tries, state)
        self.config = config
        self._cache = cache
        self._state = state
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # names that are being registered
        self._numbers = itertools.count(1)
        self._versions: dict[ModelVersion, SavedVersion] = {}  # registered, or still draining
        # by name and version: what is to be registered at start or could not be, and whether it is the default
        self._waiting: dict[tuple[str, str], tuple[SavedVersion, bool]] = {}
        self._last: State | None = None  # what was registered when all began to be unloaded: it stays saved
        self.before: Mapping[tuple[str, str], int] = {}  # workers in the server that this one succeeds
        self._tidying: set[asyncio.Task[None]] = set()
        self.frozen = False  # an upgrade goes on: what is registered must stay as the new server was told

    @property
    def others(self) -> FrontEnds | None:
        """The front ends beside this process."""
        return self.pools.others

    async def look(self) -> None:
        """What is described next takes in what other front ends know."""
        if self.others is not None:
            await self.others.look()

    def apply(self, config: Config) -> None:
        """Other settings of the server from now on."""
        self.config = self.pools.config = config

    async def check_sandbox(self) -> None:
        """Whether this machine can give workers what the server's settings demand. Raises ConfigError."""
        await self.pools.sandboxes.check(self.pools.sandboxes.of(self.config.model_defaults()))

    async def register(
        self,
        url: str,
        *,
        name: str = "",
        handler: str = "",
        sha256: str = "",
        changes: Mapping[str, Any] | None = None,
        synchronous: bool = True,
    ) -> ModelVersion:
        """Serve the archive `url`: a file of the store, or an address to download it from.

        With `synchronous`, return when its workers are ready.

        Raises BadRequestError, ModelNotFoundError, DownloadError, ArchiveError, ConfigError or ConflictError (nothing
        is registered), ModelLoadError (the version stays registered as FAILED; registering it again replaces it), and
        ConflictError when it was unregistered before its workers were ready.
        """
        self._check_thawed()
        url, sha256 = await self.fetch(url, sha256)
        archive, digest = await self._open(url, handler, sha256)
        name = name or archive.manifest.model_name
        saved = SavedVersion(
            version=archive.manifest.version,
            archive=url,
            sha256=digest,
            handler=handler,
            settings=dict(changes or {}),
        )
        version = await self._serve(archive, name, saved, at_start=False)
        if synchronous:
            await self._settled(version)
        return version

    async def fetch(self, url: str, sha256: str = "") -> tuple[str, str]:
        """The file in the store that `url` names, downloaded if it is an address, and the SHA-256 it must have, if any.

        Raises BadRequestError, ConflictError, DownloadError or ArchiveError.
        """
        if is_remote(url):
            url, pin = split_pin(url)
            sha256 = sha256 or pin
        sha256 = sha256.lower()
        if sha256 and not _SHA256.fullmatch(sha256):
            raise BadRequestError("sha256: 64 hexadecimal digits are needed")
        if is_remote(url):
            url = await self.downloads.fetch(url, sha256)
        return url, sha256

    async def load_named(self, file: str, name: str) -> ModelVersion:
        """Register what the setting `models` names, without waiting for its workers. Raises as `register`."""
        archive, digest = await self._open(file, "")
        saved = SavedVersion(version=archive.manifest.version, archive=file, sha256=digest, named=True)
        return await self._serve(archive, name or archive.manifest.model_name, saved, at_start=True)

    def announce(self, models: Iterable[SavedModel]) -> None:
        """Say what will be registered by `restore`; until then it is kept in the saved state, and requests get 503."""
        for model in models:
            for saved in model.versions:
                self._waiting[model.name, saved.version] = saved, saved.version == model.default
                self.registry.announced[model.name, saved.version] = ""

    async def restore(self, name: str, number: str) -> ModelVersion:
        """Register what was announced, without waiting for its workers.

        Raises as `register`; then it can be tried again. An archive that is not the saved one is an ArchiveError.
        """
        saved, _ = self._waiting[name, number]
        self.registry.announced[name, number] = ""
        try:
            archive, digest = await self._open(saved.archive, saved.handler)
            if saved.sha256 not in ("", digest):
                raise ArchiveError(f"{saved.archive} has changed since it was registered; register it again")
            return await self._serve(archive, name, msgspec.structs.replace(saved, sha256=digest), at_start=True)
        except MMSError as error:
            if (name, number) in self._waiting:
                self.registry.announced[name, number] = error.message
            raise

    async def retry(self, name: str, version: str = "", *, synchronous: bool = True) -> ModelVersion:
        """Start the workers that a version lacks now, not after the pause; one that was not restored is tried again.

        Raises what `restore` raises, and when synchronous ModelLoadError if they cannot be started, ConflictError if
        the version is unregistered meanwhile.
        """
        failed = [number for (waiting, number), why in self.registry.announced.items() if waiting == name and why]
        if version in failed:
            found = await self.restore(name, version)
        elif failed and not version and not any(model.name == name for model in self.registry):
            found = await self.restore(name, failed[0])
        else:
            found = self.registry.version(name, version)
            if found.pool is not None:
                found.queue.forget_poison()
                found.pool.try_now()
        if synchronous:
            await self._settled(found)
        return found

    async def change(
        self, name: str, version: str, changes: Mapping[str, Any], *, synchronous: bool = False
    ) -> ModelVersion:
        """Change batching, queue limits and the number of workers while the version is served: all of it, or nothing.

        Between `min_workers` and `max_workers`, those that run stay; `min_workers` 0 stops them all. With one of the
        two among the changes and `synchronous`, return when all wanted workers are ready. Raises ConfigError (nothing
        is changed), and when synchronous ModelLoadError if workers cannot be started, ConflictError if the version is
        unregistered meanwhile.
        """
        self._check_thawed()
        found = self.registry.version(name, version)
        settings = merge_settings(found.settings, changes, "request", strict=True)
        if self.others is not None:
            check_shared(settings, f"model {found.label}")
        pool = found.pool
        if pool is None:
            raise ConflictError(f"model {found.label} is still being registered; try again soon")
        found.apply(settings)
        scales = not changes.keys().isdisjoint(("min_workers", "max_workers"))
        if scales:
            bounds = bounds_of(settings)
            none = changes.get("min_workers") == 0
            pool.set_target(0 if none else pool.scaling.adjusted(bounds), bounds)
        if (saved := self._versions.get(found)) is not None:
            self._versions[found] = msgspec.structs.replace(saved, settings={**saved.settings, **changes})
        await self._publish()
        if scales and synchronous:
            await self._settled(found)
        return found

    async def set_default(self, name: str, version: str) -> None:
        self._check_thawed()
        found = self.registry.version(name, version)
        if found.state is VersionState.FAILED:
            raise ConflictError(f"model {found.label} is FAILED and cannot become the default")
        self.registry.set_default(name, version)
        for (waiting, number), (saved, _) in self._waiting.items():
            if waiting == name:
                self._waiting[waiting, number] = saved, False
        await self._publish()

    def clear_cache(self, name: str, version: str) -> int:
        """Forget the answers that the version's cache keeps; how many there were. Raises NotFoundError without one."""
        found = self.registry.version(name, version)
        if not isinstance(found, CachedVersion):
            raise NotFoundError(f"model {found.label} has no cache; its setting cache is off")
        return found.cache.clear()

    async def unregister(self, name: str, version: str = "") -> None:
        """Stop serving a version (default: all of the model's), after its requests in hand are answered."""
        self._check_thawed()
        forgotten = self._forget(name, version)
        try:
            model = self.registry.model(name)
            versions = [model.version(version)] if version else list(model.versions.values())
        except MMSError:
            if not forgotten:
                raise
            versions = []
        for found in versions:
            self.registry.remove(found)
        await self._publish()
        await asyncio.gather(*(self._unload(found, self.config.drain_timeout) for found in versions))
        if self.pools.environments.needed:
            self.tidy()

    def tidy(self) -> None:
        """Begin to delete the environments of requirements that nothing needs which is registered, or waits to be."""
        labels = {version.label for version in self._versions} | {" ".join(key) for key in self._waiting}
        tidying = asyncio.create_task(self.pools.environments.tidy(labels))
        self._tidying.add(tidying)
        tidying.add_done_callback(self._tidying.discard)

    def reap_orphans(self, others: set[int]) -> None:
        """Wait for what workers left behind and died; `others` are children of the server that are not ours."""
        pools = [version.pool for version in self._versions if version.pool is not None]
        # what is being forked, installed or tried at the moment is ours, but not known yet
        if not self.pools.sandboxes.trying and not any(pool.starting for pool in pools):
            workers = {worker.pid for pool in pools for worker in pool.workers if worker.pid is not None}
            workers |= {pid for pool in pools for pid in pool.starter.helpers}
            for pid in reap_orphans(workers | others | set(self.pools.forkservers.pids())):
                log.warning("process %d, which a worker had started, had left its session; killed", pid)

    def restarts(self) -> list[RestartFacts]:
        """What has died and is started again, beside the workers of each version."""
        return [*self.pools.forkservers.facts(), self.pools.restarts.facts()]

    async def close(self, drain: float) -> None:
        """Unload everything and end the fork servers; what is registered stays saved."""
        self._last = self.snapshot()
        await asyncio.gather(*(self._unload(version, drain) for version in list(self._versions)))
        self.pools.forkservers.close()

    async def thaw(self) -> None:
        """Changes are taken again; the saved state may have been changed by another server meanwhile."""
        self.frozen = False
        await self.save()

    def snapshot(self) -> State:
        """What is registered, or waits to be."""
        if self._last is not None:
            return self._last
        models = {
            model.name: SavedModel(
                name=model.name,
                default=model.default,
                versions=[self._versions[version] for version in model.versions.values()],
            )
            for model in self.registry
        }
        for (name, number), (saved, default) in self._waiting.items():
            known = models.get(name)
            models[name] = SavedModel(
                name=name,
                default=number if default or known is None else known.default,
                versions=[*(known.versions if known else ()), saved],
            )
        return State(models=list(models.values()))

    async def _settled(self, version: ModelVersion) -> None:
        """Wait for the version's workers. Raises ModelLoadError, or ConflictError if it is unregistered meanwhile."""
        if version.pool is not None:
            await version.pool.settled()
            await self._sync()
        if version.state in (VersionState.DRAINING, VersionState.UNLOADED):
            raise ConflictError(f"model {version.label} was unregistered before it had its workers")

    def _check_thawed(self) -> None:
        if self.frozen:
            raise UpgradingError("the server is being upgraded; try again when that is done")

    async def _publish(self) -> None:
        """What was changed is saved, and every front end knows it."""
        await self.save()
        await self._sync()

    async def _sync(self) -> None:
        if self.others is not None:
            await self.others.sync()

    async def save(self) -> None:
        """Return when what is registered is on disk, if that is wanted."""
        if self.saver is not None and self._last is None:
            await asyncio.shield(self.saver.save())

    async def _open(self, url: str, handler: str, sha256: str = "") -> tuple[ModelArchive, str]:
        """The archive and, if what is registered is saved, its digest."""
        archive = await asyncio.to_thread(self.store.open, url, sha256)
        if handler and self.store.only_signed:
            raise BadRequestError("handler: a signed archive names its own; no other can be chosen with trusted_keys")
        if handler and not HANDLER.fullmatch(handler):
            raise BadRequestError(f"handler = {handler!r}: module:Name is needed")
        return archive, await asyncio.to_thread(archive.digest) if self.saver is not None else ""

    async def _serve(self, archive: ModelArchive, name: str, saved: SavedVersion, *, at_start: bool) -> ModelVersion:
        """Register, save, and begin to start workers."""
        if not MODEL_NAME.fullmatch(name):
            raise BadRequestError(f"{name!r} is no model name: letters, digits, '_', '-' and '.', at most 128")
        async with self._locks.setdefault(name, asyncio.Lock()):
            version = await self._add(archive, name, saved, at_start)
        if version.pool is not None:
            bounds, before = bounds_of(version.settings), self.before.get((name, version.version), 0) if at_start else 0
            version.pool.set_target(min(max(bounds.low, before), bounds.high), bounds)
            if at_start:
                version.pool.scaling.minimum = version.pool.owed
        await self._publish()
        return version

    def _forget(self, name: str, version: str) -> bool:
        """Give up what could not be restored."""
        announced = self.registry.announced
        keys = [key for key, why in announced.items() if why and key[0] == name and version in ("", key[1])]
        for key in keys:
            del announced[key], self._waiting[key]
        return bool(keys)

    async def _add(self, archive: ModelArchive, name: str, saved: SavedVersion, at_start: bool) -> ModelVersion:
        """Extract, configure and register; the pool exists afterwards but runs nothing yet."""
        number = archive.manifest.version
        self._failed(name, number)
        origin = f"{name} {number} in {self._state} (--fresh ignores it)" if at_start else "request"
        await self._begin_imports(archive, saved, origin)
        target = self._cache.models / f"{name}-{next(self._numbers)}"
        folder = await asyncio.to_thread(archive.extract, target, verify=self.config.verify_archives)
        owned = folder if folder == target else None
        try:
            model_config = read_yaml(folder / archive.manifest.config_file) if archive.manifest.config_file else {}
            settings = self.pools.settings(archive, model_config, saved.settings, origin)
            sandbox = self.pools.sandboxes.of(settings)
            await self.pools.sandboxes.check(sandbox)
            if owned is not None:
                await asyncio.to_thread(self.pools.sandboxes.hand_over, owned)
            front_ends = self.others.count if self.others is not None else 1
            version = new_version(name, number, archive, settings, front_ends)
            version.directory = owned
            version.at_start = at_start
            version.handler = saved.handler or version.handler
            version.sandbox = self.pools.sandboxes.describe(settings)
            version.pool = self.pools.pool(version, folder, model_config, sandbox)
            replaced = self._failed(name, number)
            if not at_start:
                self._check_thawed()
            open_model_log(self.config.run_dir / "logs", name)
            if replaced is not None:
                self.registry.remove(replaced)
            self.registry.add(version)
            self._versions[version] = saved
            _, is_default = self._waiting.pop((name, number), (saved, False))
            if is_default:
                self.registry.set_default(name, number)
        except BaseException:
            if owned is not None:
                shutil.rmtree(owned, ignore_errors=True)
            raise
        if replaced is not None:
            await self._unload(replaced, self.config.drain_timeout)
        return version

    async def _begin_imports(self, archive: ModelArchive, saved: SavedVersion, origin: str) -> None:
        """Have what the version's workers need imported while its files are unpacked, if that can be known so early."""
        file = archive.manifest.config_file
        with contextlib.suppress(MMSError):  # raised when it is unpacked
            data = await asyncio.to_thread(archive.peek, file, MAX_FILE) if file else b""
            if data is not None:
                settings = self.pools.settings(archive, parse_yaml(data, file), saved.settings, origin)
                self.pools.begin_imports(archive, settings)

    async def _unload(self, version: ModelVersion, drain: float) -> None:
        await version.unload(drain)
        self._versions.pop(version, None)
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
