"""ModelServer: build, start, stop. The only place where the parts are wired together."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import itertools
import logging
import os
import resource
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from mms_nginx.find import edge_user, find_nginx

from mms.api.predictions import InferenceApi
from mms.config import Config, is_loopback
from mms.controlplane import ControlPlane
from mms.dataplane import DataPlane
from mms.errors import ConfigError, MMSError, ModelLoadError, StartError
from mms.http.limits import Limits
from mms.http.listener import HttpServer, bind
from mms.metrics import Collector, FrontEndFacts, GpuFacts, registry
from mms.models.download import is_remote, split_pin
from mms.models.readiness import Phase, Readiness
from mms.models.registry import ModelRegistry
from mms.models.store import ModelStore
from mms.models.version import ModelVersion
from mms.rundir import CacheDirectory, RunDirectory, Running, Upgraded
from mms.secret import read_secret
from mms.signature import TrustedKeys
from mms.state import SavedModel, SavedVersion, State, read
from mms.systemd import Notifier, address_of, passed_sockets
from mms.token import TokenFile
from mms.upgrade import Handover, Predecessor, Successor
from mms.workers.environment import memory
from mms.workers.gpus import GpuMonitor

if TYPE_CHECKING:
    from aiohttp import web
    from mms_nginx.run import Nginx

log = logging.getLogger("mms.server")

_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
EDGE_DEATHS = 5
EDGE_WINDOW = 60.0
EDGE_READ_TIMEOUT = 86_400.0  # the front end answers within its own limits; nginx must not be quicker
EDGE_KEEPALIVE = 3600.0
HEARTBEAT = 2.0
PATIENCE = 30.0  # seconds that a service manager is asked for at each heartbeat of a start
TICK = 1.0
LAST_ANSWERS = 2.0  # seconds for answers of the management API at the end of a stop
LAST_REQUESTS = 5.0  # seconds for which idle connections outlive a server that has handed over
STOP_MARGIN = 10.0  # seconds of a stop beyond drain_timeout and stop_grace
ANY_HOST = {"0.0.0.0", "*"}
LISTENERS = ("inference", "management", "metrics")
NO_ACCESS_LOG = "access_log is written by nginx; start without --edge none, or leave it empty"
# What a reload changes: the front end and nginx at once, models where they are registered from then on.
LIVE = (
    "access_log", "log_level", "max_connections", "header_timeout", "body_timeout", "keepalive_timeout", "drain_delay",
    "drain_timeout", "stop_grace", "verify_archives", "install_requirements", "worker_env", "batch_size",
    "max_batch_delay", "workers", "response_timeout", "startup_timeout", "queue_size", "queue_bytes", "queue_timeout",
    "queue_order", "max_bytes_in_flight",
)  # fmt: skip


class ModelServer:
    """One server: front end, edge, models. `start`, then `run_until_stopped`, then `stop`."""

    def __init__(
        self,
        config: Config,
        say: Callable[[str], None],
        *,
        fresh: bool = False,
        reread: Callable[[], Config] | None = None,
        daemon: bool = False,
        old: Predecessor | None = None,
    ) -> None:
        self._config = config
        self._say = say
        self._reread = reread
        self._manager = Notifier(os.environ)
        self._daemon = daemon
        self._old = old
        self._passed, self._given = self._inherited()
        self._at_terminal = os.isatty(0)
        self._check_addresses()
        self._token = self._management_token()
        keys = None if config.trusted_keys is None else TrustedKeys(config.trusted_keys)
        self._store = ModelStore(config.model_store, keys)
        self._registry = ModelRegistry()
        self._cache = CacheDirectory(config.cache_dir)
        self._readiness = Readiness(self._registry)
        self._control = ControlPlane(config, self._registry, self._store, self._cache, config.state)
        self._remote: dict[str, tuple[str, str]] = {}  # file in the store -> name and address to download it from
        self._named = self._archives()
        self._startup = self._plan(self._saved(fresh))
        self._control.announce(self._startup)
        self._run_dir = RunDirectory(config.run_dir, 1 if old is None else old.handover.generation)
        self._inference = InferenceApi(DataPlane(self._registry), self._readiness)
        self._nginx_program = self._find_edge()
        if old is not None and old.handover.edge != (self._nginx_program is not None):
            raise ConfigError(
                f"edge: the running server is {'behind' if old.handover.edge else 'without'} nginx, and an upgrade "
                "keeps that; stop and start instead"
            )
        self._tls = self._certificate()
        self._renewal: asyncio.Task[None] | None = None
        self._tls_stamp = self._look_at_certificate()
        self._http = HttpServer(self._inference, self._limits(), edge=self._nginx_program is not None)
        self._runners: list[web.AppRunner] = []
        self._nginx: Nginx | None = None
        self._leaving_nginx: Nginx | None = None
        self._edge_deaths: deque[float] = deque()
        self._stop_asked = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._exit_code = 0
        self._timer: asyncio.TimerHandle | None = None
        self._reloads: asyncio.Task[None] | None = None
        self._upgrade: asyncio.Task[None] | None = None
        self._successor = Successor()
        self._handed_over = False
        self._sockets: dict[str, socket.socket] = {}
        self._gpus: list[GpuFacts] = []
        self._failures: dict[ModelVersion, ModelLoadError] = {}
        self._unrestored: list[str] = []
        self._fetches: dict[str, asyncio.Task[tuple[str, str]]] = {}
        self._clients_done = False

    # start

    async def start(self) -> None:
        """Listen, load, and return when every model is ready or FAILED, but one is ready if there are any.

        Raises MMSError with nothing left running.
        """
        begun = time.monotonic()
        prepare_process()
        user = edge_user() if self._nginx_program else None
        if self._old is None:
            self._run_dir.acquire(user)
        else:
            self._run_dir.inherit(self._old.handover.lock, user)
        loads: list[asyncio.Task[None]] = []
        try:
            self._cache.acquire(user, for_others=bool(self._config.worker_user))
            await self._control.check_sandbox()
            sockets = self._listen(user[1] if user else None)
            self._catch_signals()
            if self._old is None:
                self._run_dir.record(self._running())
            else:
                asyncio.get_running_loop().add_reader(self._old.channel, self._given_up)
            self._say_restored()
            self._fetches = {
                file: asyncio.create_task(self._control.fetch(url)) for file, (_, url) in self._remote.items()
            }
            loads += [asyncio.create_task(self._load(model)) for model in self._startup]
            loads += [asyncio.create_task(self._load_remote(file)) for file in self._remote]
            if self._old is None:
                await self._serve(sockets)
                self._start_edge()
            self._tick()
            self._watchdog()
            await self._await_loads(loads)
            if not self._stop_asked.is_set():
                self._check_loaded()
                if self._old is not None:
                    await self._take_over(sockets)
        except BaseException:
            unfinished = [*loads, *self._fetches.values()]
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
            await self.stop()
            raise
        if self._stop_asked.is_set():
            return
        self._readiness.phase = Phase.SERVING
        gc.collect()
        gc.freeze()
        line = self._ready_line(time.monotonic() - begun)
        self._manager.ready(line)
        self._say(line)
        if self._old is not None:
            self._old.served(line)
            self._old.channel.close()

    async def run_until_stopped(self) -> int:
        """Wait for SIGTERM, SIGINT or the loss of the edge; returns the exit code."""
        await self._stop_asked.wait()
        return self._exit_code

    def _inherited(self) -> tuple[dict[str, socket.socket], dict[str, str]]:
        """The front end's sockets that were passed to this process, and the addresses that count in place of ours."""
        if self._old is None:
            passed = passed_sockets(os.environ, LISTENERS)
            return passed, {name: address_of(sock) for name, sock in passed.items()}
        told = self._old.handover
        if told.activated:
            return self._old.sockets, told.addresses
        config = self._config
        wanted = config.inference_address, config.management_address, config.metrics_address
        for name, address in zip(LISTENERS, wanted, strict=True):
            if address != told.addresses[name]:
                raise ConfigError(
                    f"{name}_address = {address}: the running server has {told.addresses[name]}, and an upgrade keeps "
                    "its sockets; stop and start instead"
                )
        return {} if told.edge else self._old.sockets, {}

    def _saved(self, fresh: bool) -> State:
        if self._old is not None:
            return self._old.handover.state
        return State() if fresh else read(self._config.state)

    def _archives(self) -> dict[tuple[str, str], SavedVersion]:
        """What `models` names in the store, by name and version; it is checked before anything else happens."""
        urls: list[tuple[str, str]] = []
        for entry in self._config.models:
            if entry.upper() == "ALL":
                urls += [("", name) for name in self._store.names()]
            else:
                name, equals, url = ("", "", "") if is_remote(entry) else entry.partition("=")
                urls.append((name, url) if equals else ("", entry))
        named: dict[tuple[str, str], SavedVersion] = {}
        for name, url in urls:
            if is_remote(url):
                self._remote[self._control.downloads.check(split_pin(url)[0])] = name, url
                if name:
                    self._registry.announced[name, ""] = ""
                continue
            archive = self._store.open(url)
            key = (name or archive.manifest.model_name, archive.manifest.version)
            if key in named:
                raise ConfigError(
                    f"{url} and {named[key].archive} both hold model {key[0]} {key[1]}; start only one of them"
                )
            named[key] = SavedVersion(version=key[1], archive=url, sha256="", named=True)
        return named

    def _plan(self, state: State) -> list[SavedModel]:
        """What to register: the saved state, and what `models` names beside it.

        Of a version that both have, the archive is that of `models` and the settings are the saved ones. What was named
        by `models` once is registered no more when `models` names other things now.
        """
        missing = dict(self._named)
        plan: dict[str, SavedModel] = {}
        for model in state.models:
            versions = []
            for saved in model.versions:
                named = missing.pop((model.name, saved.version), None)
                if named is not None:
                    saved = msgspec.structs.replace(named, settings=saved.settings)
                elif self._is_remote(model.name, saved):
                    saved = msgspec.structs.replace(saved, sha256="")
                elif saved.named and self._config.models:
                    log.info("%s %s is not restored: models names it no more", model.name, saved.version)
                    continue
                versions.append(saved)
            plan[model.name] = SavedModel(name=model.name, default=model.default, versions=versions)
        for (name, _), saved in missing.items():
            known = plan.get(name) or SavedModel(name=name, default=saved.version, versions=[])
            plan[name] = msgspec.structs.replace(known, versions=[*known.versions, saved])
        return [_with_default(model) for model in plan.values() if model.versions]

    def _is_remote(self, name: str, saved: SavedVersion) -> bool:
        """Whether `models` names it by the address that its archive is downloaded from."""
        return saved.named and saved.archive in self._remote and self._remote[saved.archive][0] in ("", name)

    def _restored(self) -> list[str]:
        """What is registered because it was before, not because `models` names it."""
        return [
            f"{model.name} {saved.version}"
            for model in self._startup
            for saved in model.versions
            if (model.name, saved.version) not in self._named and not self._is_remote(model.name, saved)
        ]

    def _say_restored(self) -> None:
        if restored := self._restored():
            self._say(f"restoring {', '.join(restored)} from {self._config.state} (--fresh ignores it)")

    def _management_token(self) -> TokenFile | None:
        """Whoever can register a model runs code here: only this machine may do that without a token."""
        address, file = self._addresses()[1], self._config.management_token_file
        if file is None and not is_loopback(address):
            raise ConfigError(
                f"management_address = {address}: other machines reach it, and whoever registers a model runs code "
                "here; set management_token_file, or keep it on 127.0.0.1 or a Unix socket"
            )
        return None if file is None else TokenFile(file)

    def _find_edge(self) -> str | None:
        if self._given and self._config.edge == "nginx":
            raise ConfigError("nginx cannot take over the sockets of the service manager; start with --edge none")
        if self._config.edge == "none" or self._given:
            if self._config.access_log is not None:
                raise ConfigError(NO_ACCESS_LOG)
            return None
        program = find_nginx(self._config.nginx)
        if program is None and self._config.access_log is not None:
            raise StartError("access_log is written by nginx, which is not installed; install it or leave it empty")
        if program is None and self._config.edge == "nginx":
            raise StartError(f"the program {self._config.nginx} is not found; install nginx or start with --edge none")
        if program is None:
            self._say("nginx is not installed: the front end listens by itself (no TLS, no request spooling)")
        return program

    def _certificate(self) -> tuple[Path, Path] | None:
        """Certificate and key, if TLS is wanted; only nginx speaks it."""
        cert, key = self._config.tls_cert, self._config.tls_key
        if cert is None and key is None:
            return None
        if cert is None or key is None:
            raise ConfigError("tls_cert and tls_key go together: set both")
        if self._nginx_program is None:
            raise ConfigError("tls_cert: TLS needs nginx in front; install it and do not start with --edge none")
        read_secret(key, "key", 1)
        if not os.access(cert, os.R_OK):
            raise ConfigError(f"cannot read the certificate {cert}")
        return cert, key

    def _look_at_certificate(self) -> list[tuple[int, ...]]:
        try:
            facts = [path.stat() for path in self._tls or ()]
        except OSError:
            return []
        return [(fact.st_ino, fact.st_size, fact.st_mtime_ns) for fact in facts]

    def _speaks_tls(self, name: str, address: str) -> bool:
        """The inference port does, and the management port where others can reach it."""
        if self._tls is None or address.startswith("unix:"):
            return False
        return name == "inference" or (name == "management" and not is_loopback(address))

    def _limits(self) -> Limits:
        config = self._config
        return Limits(
            max_request_size=config.max_request_size,
            max_connections=config.max_connections,
            header_timeout=config.header_timeout,
            body_timeout=config.body_timeout,
            keepalive_timeout=config.keepalive_timeout,
            max_bytes_in_flight=config.max_bytes_in_flight or memory() // 4,
        )

    def _check_addresses(self) -> None:
        """No two listeners may share an address; found here, it can be said in terms of the settings."""
        for (one, first), (two, second) in itertools.combinations(zip(LISTENERS, self._addresses(), strict=True), 2):
            if _overlap(first, second):
                where = first if first == second else f"{first} and {second}"
                raise ConfigError(f"{one}_address and {two}_address would both listen on {where}; each needs its own")

    def _running(self) -> Running:
        token_file = str(self._config.management_token_file or "")
        certificate = str(self._tls[0]) if self._tls else ""
        return Running(os.getpid(), *self._places(), self._stop_limit(), token_file, certificate)

    def _stop_limit(self) -> float:
        return self._config.drain_delay + self._config.drain_timeout + self._config.stop_grace + STOP_MARGIN

    def _addresses(self) -> tuple[str, str, str]:
        config = self._config
        inference, management, metrics = (
            self._given.get(name, address)
            for name, address in zip(
                LISTENERS, (config.inference_address, config.management_address, config.metrics_address), strict=True
            )
        )
        return inference, management, metrics

    def _places(self) -> tuple[str, str, str]:
        """The addresses, with https:// where TLS is spoken."""
        inference, management, metrics = (
            f"https://{address}" if self._speaks_tls(name, address) else address
            for name, address in zip(LISTENERS, self._addresses(), strict=True)
        )
        return inference, management, metrics

    def _listen(self, group: int | None) -> list[socket.socket]:
        """The front end's sockets: behind nginx Unix ones, else the public ones, or those that were passed to us."""
        addresses: list[str] = list(self._addresses())
        if self._nginx_program is not None:
            addresses = [f"unix:{self._run_dir.sockets / name}.sock" for name in LISTENERS]
        bound: list[socket.socket] = []
        try:
            for name, address in zip(LISTENERS, addresses, strict=True):
                bound.append(self._passed.get(name) or bind(address, group=group))
        except StartError:
            for sock in bound:
                sock.close()
            raise
        self._sockets = dict(zip(LISTENERS, bound, strict=True))
        return bound

    async def _serve(self, sockets: list[socket.socket]) -> None:
        # aiohttp takes 0.3 s to import: by now the workers are starting beside it
        from aiohttp import web

        from mms.api import management, metrics
        from mms.api.guard import Guard

        inference, control, scrape = sockets
        await self._http.start(inference)
        monitor = GpuMonitor(self._control.gpus)
        collector = Collector(
            lambda: (version.facts() for version in self._registry.versions()),
            lambda: self._gpus,
            lambda: FrontEndFacts(len(self._http.connections), self._http.shedding.bytes, self._http.shedding.step),
            self._inference.failures,
            lambda: self._control.saver is not None and self._control.saver.failed,
        )

        def refresh() -> None:
            self._gpus = list(monitor.facts())

        guard = Guard(self._addresses()[1], self._config.management_hosts, self._token)
        apps = (
            (management.application(self._control, self._readiness, guard), control),
            (metrics.application(registry(collector), refresh), scrape),
        )
        for app, sock in apps:
            # behind nginx, nginx must be the side that closes idle connections: it cannot repeat a POST
            keepalive = EDGE_KEEPALIVE if self._nginx_program else self._config.keepalive_timeout
            runner = web.AppRunner(
                app,
                access_log=None,
                handle_signals=False,
                keepalive_timeout=keepalive,
                shutdown_timeout=LAST_ANSWERS,
            )
            await runner.setup()
            self._runners.append(runner)
            await web.SockSite(runner, sock).start()

    def _start_edge(self) -> None:
        if self._nginx_program is None:
            return
        # jinja2 is needed behind nginx only
        from mms_nginx.run import Nginx

        sockets = self._old.sockets if self._old is not None else {}
        self._nginx = Nginx(self._nginx_program, self._run_dir.nginx, self._edge_text(self._config), sockets)
        self._nginx.start()
        asyncio.get_running_loop().add_reader(self._nginx.pidfd, self._edge_ended)

    def _edge_text(self, config: Config) -> str:
        """nginx's configuration."""
        from mms_nginx.render import Listener, render

        listeners = [
            Listener(
                name,
                address,
                (self._run_dir.sockets / f"{name}.sock",),
                self._tls if self._speaks_tls(name, address) else None,
            )
            for name, address in zip(LISTENERS, self._addresses(), strict=True)
        ]
        user = edge_user()
        return render(
            listeners,
            directory=self._run_dir.nginx,
            max_request_size=config.max_request_size,
            user=user[0] if user else None,
            response_timeout=EDGE_READ_TIMEOUT,
            body_timeout=config.body_timeout,
            header_timeout=config.header_timeout,
            log_level=config.log_level,
            spool=self._cache.nginx,
            access_log=config.access_log,
        )

    async def _load(self, model: SavedModel) -> None:
        """The versions of one name, the default one first: requests must not meet another in its place."""
        versions = []
        for saved in sorted(model.versions, key=lambda saved: saved.version != model.default):
            try:
                if self._is_remote(model.name, saved):
                    await self._fetches[saved.archive]
                versions.append(await self._control.restore(model.name, saved.version))
            except MMSError as error:
                if (model.name, saved.version) in self._named:
                    raise
                self._unrestored.append(f"{model.name} {saved.version} is not restored: {error.message}")
                log.error("%s", self._unrestored[-1])
        self._registry.sort(model.name, [saved.version for saved in model.versions])
        for version in versions:
            await self._settle(version)

    async def _load_remote(self, file: str) -> None:
        """What `models` names by its address and the saved state does not have: its version shows when it is here."""
        await self._fetches[file]
        if any(self._is_remote(model.name, saved) and saved.archive == file
               for model in self._startup for saved in model.versions):  # fmt: skip
            return
        name, _ = self._remote[file]
        version = await self._control.load_named(file, name)
        self._registry.announced.pop((name, ""), None)
        await self._settle(version)

    async def _settle(self, version: ModelVersion) -> None:
        if version.pool is not None:
            try:
                await version.pool.settled()
            except ModelLoadError as error:  # described and tried again
                self._failures[version] = error

    async def _await_loads(self, loads: list[asyncio.Task[None]]) -> None:
        """Until all are done or one is impossible, with a word every two seconds; a stop signal ends it."""
        begun = time.monotonic()
        stop = asyncio.create_task(self._stop_asked.wait())
        pending: set[asyncio.Task[None]] = set(loads)
        try:
            while pending and not self._stop_asked.is_set():
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

    def _loading(self) -> str:
        waiting = [
            f"{version.label} ({self._progress(version)})"
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

    def _check_loaded(self) -> None:
        """Raises StartError when `models` names all there is and nothing of it loads; saved models can be mended."""
        failed = self._failed()
        if self._old is not None and failed:
            ready = {(each.name, each.version) for each in self._registry.versions() if each.pool and each.pool.ready}
            wanted = {(model.name, saved.version) for model in self._startup for saved in model.versions}
            if wanted.intersection(self._old.handover.loaded) - ready:
                raise StartError(f"not all that is served now could be loaded: {'; '.join(failed)}")
        if failed and not self._restored() and len(failed) == len(self._registry.versions()):
            raise StartError(f"no model could be loaded: {'; '.join(failed)} (more in {self._run_dir.logs})")

    def _progress(self, version: ModelVersion) -> str:
        pool = version.pool
        if pool is not None and pool.installing:
            return "installing its requirements"
        return f"{pool.ready if pool else 0} of {version.settings.min_workers} workers"

    def _ready_line(self, seconds: float) -> str:
        failed, count = self._failed(), len(self._registry.versions()) + len(self._unrestored)
        inference, management, metrics = map(_url, self._places())
        edge = "behind nginx" if self._nginx is not None else "without nginx"
        ready = f"{count - len(failed)} of {count}" if failed else str(count)
        text = (
            f"ready in {seconds:.1f} s: {ready} model{'s' * (count != 1)} at {inference} {edge}, "
            f"management {management}, metrics {metrics}/metrics"
        )
        return f"{text}; FAILED: {'; '.join(failed)}" if failed else text

    def _renew_certificate(self) -> None:
        """nginx reads certificate and key at its start: it reloads when they have changed."""
        stamp = self._look_at_certificate()
        if not stamp or stamp == self._tls_stamp or self._nginx is None or self._renewal is not None or self._reloads:
            return
        self._tls_stamp = stamp
        self._renewal = asyncio.create_task(asyncio.to_thread(self._nginx.reload_files))
        self._renewal.add_done_callback(self._renewed)

    def _renewed(self, renewal: asyncio.Task[None]) -> None:
        self._renewal = None
        if not renewal.cancelled():
            error = renewal.exception()
            if isinstance(error, MMSError):
                log.error("the new certificate is not in force: %s", error.message)
            else:
                log.info("nginx has taken the new certificate")

    def _tick(self) -> None:
        self._renew_certificate()
        nginx = {self._nginx.pid} if self._nginx is not None else set()
        self._control.reap_orphans({self._successor.pid} | nginx)
        self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)

    def _watchdog(self) -> None:
        """Tell the service manager that the event loop turns."""
        if self._manager.watchdog:
            self._manager.send("WATCHDOG=1")
            asyncio.get_running_loop().call_later(self._manager.watchdog, self._watchdog)

    # signals and the edge's life

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        loop.add_signal_handler(signal.SIGUSR1, self._reopen_log)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up)
        loop.add_signal_handler(signal.SIGUSR2, self._upgrade_asked)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def _reopen_log(self) -> None:
        if self._nginx is not None:
            self._nginx.reopen()

    def _hung_up(self) -> None:
        """SIGHUP: reload, but when it means that the terminal we run in is gone, stop."""
        if self._at_terminal and not os.isatty(0):
            self._signalled()
        elif self._reloads is None:
            self._reloads = asyncio.create_task(self._reload())

    async def _reload(self) -> None:
        """Read the settings again, apply what can change, and leave word of it in the run directory."""
        self._manager.reloading()
        applied: list[str] = []
        restart: list[str] = []
        failure = ""
        try:
            if self._upgrade is not None:
                raise ConfigError("the server is being upgraded; reload when that is done")
            if self._reread is None:
                raise ConfigError("this server has no settings to read again")
            new = self._reread()
            changed = [
                each.name for each in fields(Config) if getattr(new, each.name) != getattr(self._config, each.name)
            ]
            applied, restart = (
                [name for name in changed if name in LIVE],
                [name for name in changed if name not in LIVE],
            )
            await self._apply(replace(self._config, **{name: getattr(new, name) for name in applied}))
        except MMSError as error:
            applied, restart, failure = [], [], error.message
            log.error("not reloaded, everything stays as it was: %s", failure)
        else:
            log.info("reloaded; changed: %s; changed by a restart only: %s", ", ".join(applied) or "nothing",
                     ", ".join(restart) or "nothing")  # fmt: skip
        finally:
            self._reloads = None
        self._manager.ready(failure or "reloaded")
        self._run_dir.record_reload(applied, restart, failure)

    async def _apply(self, config: Config) -> None:
        if self._nginx_program is None and config.access_log is not None:
            raise ConfigError(NO_ACCESS_LOG)
        if self._renewal is not None:
            await asyncio.wait([self._renewal])
        if self._nginx is not None and (text := self._edge_text(config)) != self._edge_text(self._config):
            await asyncio.to_thread(self._nginx.reload, text)  # closes idle connections: not without need
        self._config = config
        self._control.config = config
        self._http.apply(self._limits())
        logging.getLogger("mms").setLevel(config.log_level.upper())
        self._run_dir.record(self._running())

    def _signalled(self) -> None:
        if self._readiness.phase is not Phase.DRAINING and not self._handed_over:
            self._manager.send("STOPPING=1")
        self._readiness.phase = Phase.DRAINING
        if self._stop_asked.is_set():
            self._stop_now.set()
        self._stop_asked.set()

    def _edge_ended(self) -> None:
        """nginx has died: start it again, but not for ever."""
        nginx, loop = self._nginx, asyncio.get_running_loop()
        if nginx is None:
            return
        loop.remove_reader(nginx.pidfd)
        code = nginx.exit_code()
        now = time.monotonic()
        self._edge_deaths.append(now)
        while self._edge_deaths[0] < now - EDGE_WINDOW:
            self._edge_deaths.popleft()
        if len(self._edge_deaths) <= EDGE_DEATHS:
            log.error("nginx ended (%s); starting it again", code)
            try:
                nginx.restart()
                loop.add_reader(nginx.pidfd, self._edge_ended)
                return
            except StartError as error:
                log.error("nginx cannot be started again: %s", error.message)
        log.critical("nginx cannot be kept running; stopping")
        self._exit_code = 1
        self._readiness.phase = Phase.DRAINING
        self._stop_asked.set()

    # upgrade

    def _upgrade_asked(self) -> None:
        """SIGUSR2."""
        if self._upgrade is None:
            self._upgrade = asyncio.create_task(self._hand_over())

    async def _hand_over(self) -> None:
        """Start a new server and end when it serves; when it does not come to that, all stays as it is."""
        before = self._run_dir.upgraded()
        number = before.number + 1 if before else 1

        def tell(progress: str, *, failure: str = "", pid: int = 0) -> None:
            with contextlib.suppress(OSError):
                self._run_dir.record_upgrade(Upgraded(number, progress, failure, pid))

        tell("the new server starts")
        try:
            self._check_upgradable()
            if self._reloads is not None:
                await asyncio.wait([self._reloads])
            self._control.frozen = True
            self._successor.start(self._handover)
            line = await self._successor.serves(tell)
        except MMSError as error:
            log.error("not upgraded, everything stays as it was: %s", error.message)
            self._successor.pid = 0
            await self._control.thaw()
            self._upgrade = None
            tell("", failure=error.message)
            return
        pid = self._successor.pid
        self._handed_over = True
        self._run_dir.leave()
        if self._nginx is not None:
            self._nginx.shared = True
        self._manager.send(f"MAINPID={pid}", "READY=1", f"STATUS={line}")
        tell(line, pid=pid)
        log.info("upgraded: pid %d serves from now on", pid)
        self._stop_asked.set()

    def _check_upgradable(self) -> None:
        if self._readiness.phase is not Phase.SERVING:
            raise StartError(f"the server is {self._readiness.phase}; try again when it serves")
        if not self._daemon and not self._manager.present:
            raise StartError(
                "the server runs in the foreground, and whoever started it would see it end; "
                "start it with --daemon, or from systemd with Type=notify"
            )

    def _handover(self, channel: int) -> Handover:
        sockets = self._nginx.sockets if self._nginx is not None else self._sockets
        return Handover(
            generation=self._run_dir.generation + 1,
            daemon=self._daemon,
            edge=self._nginx is not None,
            addresses=dict(zip(LISTENERS, self._addresses(), strict=True)),
            activated=bool(self._given),
            sockets={name: sock.fileno() for name, sock in sockets.items()},
            lock=self._run_dir.lock,
            channel=channel,
            state=self._control.snapshot(),
            loaded=[
                (version.name, version.version)
                for version in self._registry.versions()
                if version.pool is not None and version.pool.ready
            ],
        )

    async def _take_over(self, sockets: list[socket.socket]) -> None:
        """All that the old server serves is loaded: serve on its sockets beside it, and be the one that runs here."""
        assert self._old is not None
        asyncio.get_running_loop().remove_reader(self._old.channel)
        self._readiness.phase = Phase.SERVING
        await self._serve(sockets)
        self._start_edge()
        if self._stop_asked.is_set():
            return
        self._run_dir.take_over(self._running())
        if self._nginx is not None:
            self._nginx.shared = False

    def _given_up(self) -> None:
        """The old server has ended, or does not want this one any more."""
        assert self._old is not None
        asyncio.get_running_loop().remove_reader(self._old.channel)
        log.error("the old server has given up this upgrade; stopping")
        self._exit_code = 1
        self._stop_asked.set()

    # stop

    async def stop(self) -> None:
        """After drain_delay: edge, connections, workers; requests in hand get drain_timeout in all.

        A second signal cuts it short.
        Takes at most `_stop_limit`; there is a word every two seconds.
        """
        begun = time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
        if self._upgrade is not None:
            self._upgrade.cancel()
        delay = self._config.drain_delay if self._readiness.phase is Phase.DRAINING else 0.0
        until = begun + delay + self._config.drain_timeout
        drain = asyncio.create_task(self._drain(delay, until))
        now = asyncio.create_task(self._stop_now.wait())
        while not await _first_of(drain, now):
            self._say(f"stopping for {time.monotonic() - begun:.0f} s: {self._leaving(until)}")
        now.cancel()
        if not drain.done():
            self._hasten_edge()
            drain.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await drain
            await self._stop_edge(0)
            await self._control.close(0)
        for runner in self._runners:
            await runner.cleanup()
        if self._upgrade is not None:
            await asyncio.wait([self._upgrade])
        self._cache.release()
        self._run_dir.release()

    async def _drain(self, delay: float, until: float) -> None:
        def left() -> float:
            return max(0.0, until - time.monotonic())

        await asyncio.sleep(delay)
        if self._handed_over and self._nginx is None:
            for runner in self._runners:
                for site in list(runner.sites):
                    await site.stop()
            await self._http.retire(min(LAST_REQUESTS, left()))
        timeout = self._config.drain_timeout
        if not await self._stop_edge(left()):
            log.warning("nginx was ended: its requests took longer than drain_timeout (%g s)", timeout)
        cut = await self._http.drain(left())
        if cut:
            log.warning("%d connections were cut: their requests took longer than drain_timeout (%g s)", cut, timeout)
        self._clients_done = True
        await self._control.close(left())

    def _leaving(self, until: float) -> str:
        left = until - time.monotonic()
        if self._clients_done or left < 0:
            return "workers are ending"
        pools = [(version.queue, version.pool) for version in self._registry.versions() if version.pool is not None]
        waiting = sum(queue.depth + pool.in_flight for queue, pool in pools)
        return f"requests in hand ({waiting} at workers and in queues) have {left:.0f} s left"

    async def _stop_edge(self, limit: float) -> bool:
        """Whether its requests were done in time."""
        nginx, self._nginx = self._nginx, None
        if nginx is None:
            return True
        if nginx.pidfd != -1:
            asyncio.get_running_loop().remove_reader(nginx.pidfd)
        self._leaving_nginx = nginx
        return await asyncio.to_thread(nginx.stop, limit)

    def _hasten_edge(self) -> None:
        """nginx may be waiting for its last requests, in a thread that cannot be cancelled."""
        nginx = self._leaving_nginx
        if nginx is not None and nginx.pidfd != -1:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(nginx.pidfd, signal.SIGTERM)


def prepare_process() -> None:
    """Orphans of a fork server become ours, and as many descriptors as the system allows."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _url(address: str) -> str:
    return address if address.startswith(("unix:", "https:")) else f"http://{address}"


async def _first_of(*tasks: asyncio.Task[Any]) -> bool:
    """Whether one of them is done within a heartbeat."""
    done, _ = await asyncio.wait(tasks, timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


def _overlap(one: str, other: str) -> bool:
    """Whether nobody can listen on both addresses."""
    if one.startswith("unix:") or other.startswith("unix:"):
        return one == other
    parts = [address.replace("localhost", "127.0.0.1").rpartition(":") for address in (one, other)]
    hosts, ports = {host for host, _, _ in parts}, {port for _, _, port in parts}
    any_host = bool(hosts & ANY_HOST) and not any(host.startswith("[") for host in hosts)
    return len(ports) == 1 and "0" not in ports and (len(hosts) == 1 or any_host)


def _with_default(model: SavedModel) -> SavedModel:
    """The default may be gone: the version registered last takes its place."""
    if any(saved.version == model.default for saved in model.versions):
        return model
    return msgspec.structs.replace(model, default=model.versions[-1].version)


async def serve(
    config: Config,
    say: Callable[[str], None],
    *,
    fresh: bool = False,
    reread: Callable[[], Config] | None = None,
    daemon: bool = False,
    old: Predecessor | None = None,
) -> int:
    """The whole life of a server; returns its exit code. Raises MMSError when it cannot start.

    `fresh` ignores the saved state; `reread` reads the settings again for a reload; a `daemon` may be succeeded by
    another process, and takes over from `old`, if there is one.
    """
    server = ModelServer(config, say, fresh=fresh, reread=reread, daemon=daemon, old=old)
    await server.start()
    try:
        return await server.run_until_stopped()
    finally:
        say("stopping")
        await server.stop()
