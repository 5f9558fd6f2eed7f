"""What is loaded at start: which versions, how their loading goes, and the ready line. Front end's process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from mms.config import Config
from mms.controlplane import ControlPlane
from mms.errors import ConfigError, MMSError, ModelLoadError, StartError
from mms.models.download import is_remote, split_pin
from mms.models.version import ModelVersion
from mms.state import SavedModel, SavedVersion, State
from mms.systemd import Notifier

log = logging.getLogger("mms.server")

HEARTBEAT = 2.0
PATIENCE = 30.0  # seconds that a service manager is asked for at each heartbeat of a start


class Plan:
    """What to register: the saved state, and what the setting `models` names beside it.

    The constructor checks what `models` names. It raises MMSError.
    """

    def __init__(self, config: Config, control: ControlPlane, saved: State) -> None:
        self.remote: dict[str, tuple[str, str]] = {}  # file in the store -> name and address to download it from
        self.named: dict[tuple[str, str], SavedVersion] = {}  # what `models` names in the store, by name and version
        self._find(config, control)
        self.models = self._beside(saved, config)

    def is_remote(self, name: str, saved: SavedVersion) -> bool:
        """Whether `models` names it by the address that its archive is downloaded from."""
        return saved.named and saved.archive in self.remote and self.remote[saved.archive][0] in ("", name)

    def restored(self) -> list[str]:
        """What is registered because it was before, not because `models` names it."""
        return [
            f"{model.name} {saved.version}"
            for model in self.models
            for saved in model.versions
            if (model.name, saved.version) not in self.named and not self.is_remote(model.name, saved)
        ]

    def _find(self, config: Config, control: ControlPlane) -> None:
        urls: list[tuple[str, str]] = []
        for entry in config.models:
            if entry.upper() == "ALL":
                urls += [("", name) for name in control.store.names()]
            else:
                name, equals, url = ("", "", "") if is_remote(entry) else entry.partition("=")
                urls.append((name, url) if equals else ("", entry))
        for name, url in urls:
            if is_remote(url):
                self.remote[control.downloads.check(split_pin(url)[0])] = name, url
                if name:
                    control.registry.announced[name, ""] = ""
                continue
            archive = control.store.open(url)
            key = (name or archive.manifest.model_name, archive.manifest.version)
            if key in self.named:
                raise ConfigError(
                    f"{url} and {self.named[key].archive} both hold model {key[0]} {key[1]}; start only one of them"
                )
            self.named[key] = SavedVersion(version=key[1], archive=url, sha256="", named=True)

    def _beside(self, state: State, config: Config) -> list[SavedModel]:
        """Of a version that both have, the archive is that of `models` and the settings are the saved ones.

        What was named by `models` once is registered no more when `models` names other things now.
        """
        missing = dict(self.named)
        plan: dict[str, SavedModel] = {}
        for model in state.models:
            versions = []
            for saved in model.versions:
                named = missing.pop((model.name, saved.version), None)
                if named is not None:
                    saved = msgspec.structs.replace(named, settings=saved.settings)
                elif self.is_remote(model.name, saved):
                    saved = msgspec.structs.replace(saved, sha256="")
                elif saved.named and config.models:
                    log.info("%s %s is not restored: models names it no more", model.name, saved.version)
                    continue
                versions.append(saved)
            plan[model.name] = SavedModel(name=model.name, default=model.default, versions=versions)
        for (name, _), saved in missing.items():
            known = plan.get(name) or SavedModel(name=name, default=saved.version, versions=[])
            plan[name] = msgspec.structs.replace(known, versions=[*known.versions, saved])
        return [_with_default(model) for model in plan.values() if model.versions]


class Startup:
    """Loads what the plan says, with a word every two seconds."""

    def __init__(self, plan: Plan, control: ControlPlane, say: Callable[[str], None], manager: Notifier) -> None:
        self._plan = plan
        self._control = control
        self._registry = control.registry
        self._say = say
        self._manager = manager
        self._fetches: dict[str, asyncio.Task[tuple[str, str]]] = {}
        self._loads: list[asyncio.Task[None]] = []
        self._failures: dict[ModelVersion, ModelLoadError] = {}
        self._unrestored: list[str] = []
        control.announce(plan.models)

    def begin(self, state: Path) -> None:
        """Start to load all of it; `state` is the file that names what is restored."""
        if restored := self._plan.restored():
            self._say(f"restoring {', '.join(restored)} from {state} (--fresh ignores it)")
        self._fetches = {
            file: asyncio.create_task(self._control.fetch(url)) for file, (_, url) in self._plan.remote.items()
        }
        self._loads += [asyncio.create_task(self._load(model)) for model in self._plan.models]
        self._loads += [asyncio.create_task(self._load_remote(file)) for file in self._plan.remote]

    async def wait(self, stop_asked: asyncio.Event) -> None:
        """Until all are done or one is impossible, which raises its MMSError; a stop ends it."""
        begun = time.monotonic()
        stop = asyncio.create_task(stop_asked.wait())
        pending: set[asyncio.Task[None]] = set(self._loads)
        try:
            while pending and not stop_asked.is_set():
                done, _ = await asyncio.wait({*pending, stop}, timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
                pending -= done
                for task in done - {stop}:
                    task.result()
                if not done:
                    text = f"loading for {time.monotonic() - begun:.0f} s: {self._loading()}"
                    self._manager.loading(text, PATIENCE)
                    self._say(text)
        finally:
            stop.cancel()
            for task in pending:
                task.cancel()

    async def cancel(self) -> None:
        unfinished = [*self._loads, *self._fetches.values()]
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)

    def check(self, logs: Path, served: Collection[tuple[str, str]] = ()) -> None:
        """Raises StartError when `models` names all there is and nothing of it loads; saved models can be mended.

        But not those that a running server has `served` until now, by name and version.
        """
        failed = self._failed()
        ready = {(each.name, each.version) for each in self._registry.versions() if each.pool and each.pool.ready}
        wanted = {(model.name, saved.version) for model in self._plan.models for saved in model.versions}
        if failed and wanted.intersection(served) - ready:
            raise StartError(f"not all that is served now could be loaded: {'; '.join(failed)}")
        if failed and not self._plan.restored() and len(failed) == len(self._registry.versions()):
            raise StartError(f"no model could be loaded: {'; '.join(failed)} (more in {logs})")

    def ready_line(self, seconds: float, places: tuple[str, str, str], edge: str) -> str:
        """What is said when the start is over; `places` are the addresses of inference, management and metrics."""
        failed, count = self._failed(), len(self._registry.versions()) + len(self._unrestored)
        inference, management, metrics = map(_url, places)
        ready = f"{count - len(failed)} of {count}" if failed else str(count)
        text = (
            f"ready in {seconds:.1f} s: {ready} model{'s' * (count != 1)} at {inference} {edge}, "
            f"management {management}, metrics {metrics}/metrics"
        )
        return f"{text}; FAILED: {'; '.join(failed)}" if failed else text

    async def _load(self, model: SavedModel) -> None:
        """The versions of one name, the default one first: requests must not meet another in its place."""
        versions = []
        for saved in sorted(model.versions, key=lambda saved: saved.version != model.default):
            try:
                if self._plan.is_remote(model.name, saved):
                    await self._fetches[saved.archive]
                versions.append(await self._control.restore(model.name, saved.version))
            except MMSError as error:
                if (model.name, saved.version) in self._plan.named:
                    raise
                self._unrestored.append(f"{model.name} {saved.version} is not restored: {error.message}")
                log.error("%s", self._unrestored[-1])
        self._registry.sort(model.name, [saved.version for saved in model.versions])
        for version in versions:
            await self._settle(version)

    async def _load_remote(self, file: str) -> None:
        """What `models` names by its address and the saved state does not have: its version shows when it is here."""
        await self._fetches[file]
        if any(self._plan.is_remote(model.name, saved) and saved.archive == file
               for model in self._plan.models for saved in model.versions):  # fmt: skip
            return
        name, _ = self._plan.remote[file]
        version = await self._control.load_named(file, name)
        self._registry.announced.pop((name, ""), None)
        await self._settle(version)

    async def _settle(self, version: ModelVersion) -> None:
        if version.pool is not None:
            try:
                await version.pool.settled()
            except ModelLoadError as error:  # described and tried again
                self._failures[version] = error

    def _loading(self) -> str:
        waiting = [
            f"{version.label} ({_progress(version)})"
            for version in self._registry.versions()
            if version.pool is None or version.pool.ready < version.pool.target
        ]
        return ", ".join(waiting) or "archives are being extracted, or their requirements installed"

    def _failed(self) -> list[str]:
        """Why models do not serve that were to be loaded at start."""
        return self._unrestored + [
            error.message
            for version, error in self._failures.items()
            if version.pool is not None and not version.pool.ready
        ]


def _progress(version: ModelVersion) -> str:
    pool = version.pool
    if pool is not None and pool.installing:
        return "installing its requirements"
    return f"{pool.ready if pool else 0} of {version.settings.min_workers} workers"


def _url(address: str) -> str:
    return address if address.startswith(("unix:", "https:")) else f"http://{address}"


def _with_default(model: SavedModel) -> SavedModel:
    """The default may be gone: the version registered last takes its place."""
    if any(saved.version == model.default for saved in model.versions):
        return model
    return msgspec.structs.replace(model, default=model.versions[-1].version)
