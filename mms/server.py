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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mms_nginx.find import edge_user, find_nginx

from mms.api.predictions import InferenceApi
from mms.config import Config, is_loopback
from mms.controlplane import ControlPlane
from mms.dataplane import DataPlane
from mms.errors import ConfigError, MMSError, ModelLoadError, StartError
from mms.http.limits import Limits
from mms.http.listener import HttpServer, bind
from mms.metrics import Collector, GpuFacts, registry
from mms.models.download import is_remote, split_pin
from mms.models.registry import ModelRegistry
from mms.models.store import ModelStore
from mms.models.version import ModelVersion
from mms.rundir import CacheDirectory, RunDirectory, Running
from mms.secret import read_secret
from mms.signature import TrustedKeys
from mms.token import TokenFile
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
TICK = 1.0
LAST_ANSWERS = 2.0  # seconds for answers of the management API at the end of a stop
STOP_MARGIN = 10.0  # seconds of a stop beyond drain_timeout and stop_grace
ANY_HOST = {"0.0.0.0", "*"}
LISTENERS = ("inference", "management", "metrics")


class ModelServer:
    """One server: front end, edge, models. `start`, then `run_until_stopped`, then `stop`."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._check_addresses()
        self._token = self._management_token()
        keys = None if config.trusted_keys is None else TrustedKeys(config.trusted_keys)
        self._store = ModelStore(config.model_store, keys)
        self._registry = ModelRegistry()
        self._cache = CacheDirectory(config.cache_dir)
        self._control = ControlPlane(config, self._registry, self._store, self._cache)
        self._startup = self._archives()
        self._run_dir = RunDirectory(config.run_dir)
        self._inference = InferenceApi(DataPlane(self._registry))
        self._nginx_program = self._find_edge()
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
        self._gpus: list[GpuFacts] = []
        self._failures: dict[ModelVersion, ModelLoadError] = {}
        self._clients_done = False

    # start

    async def start(self) -> None:
        """Listen, load, and return when every model is ready or FAILED, but one is ready if there are any.

        Raises MMSError with nothing left running.
        """
        begun = time.monotonic()
        prepare_process()
        user = edge_user() if self._nginx_program else None
        self._run_dir.acquire(user)
        loads: list[asyncio.Task[None]] = []
        try:
            self._cache.acquire(user)
            sockets = self._listen(user[1] if user else None)
            self._catch_signals()
            self._run_dir.record(self._running())
            loads += [asyncio.create_task(self._load(url, name)) for name, url in self._startup]
            await self._serve(sockets)
            self._start_edge()
            self._tick()
            await self._await_loads(loads)
            if not self._stop_asked.is_set():
                self._check_loaded()
        except BaseException:
            for load in loads:
                load.cancel()
            await asyncio.gather(*loads, return_exceptions=True)
            await self.stop()
            raise
        if self._stop_asked.is_set():
            return
        gc.collect()
        gc.freeze()
        self._say(self._ready_line(time.monotonic() - begun))

    async def run_until_stopped(self) -> int:
        """Wait for SIGTERM, SIGINT or the loss of the edge; returns the exit code."""
        await self._stop_asked.wait()
        return self._exit_code

    def _archives(self) -> list[tuple[str, str]]:
        """(name, file) of the models to load at start; what is in the store is checked before anything else happens."""
        startup: list[tuple[str, str]] = []
        for entry in self._config.models:
            if entry.upper() == "ALL":
                startup += [("", name) for name in self._store.names()]
            else:
                name, equals, url = ("", "", "") if is_remote(entry) else entry.partition("=")
                startup.append((name, url) if equals else ("", entry))
        seen: dict[tuple[str, str], str] = {}
        for name, url in startup:
            if is_remote(url):
                self._control.downloads.check(split_pin(url)[0])
                self._registry.announced |= {name} if name else set()
                continue
            archive = self._store.open(url)
            key = (name or archive.manifest.model_name, archive.manifest.version)
            if key in seen:
                raise ConfigError(f"{url} and {seen[key]} both hold model {key[0]} {key[1]}; start only one of them")
            seen[key] = url
            self._registry.announced.add(key[0])
        return startup

    def _management_token(self) -> TokenFile | None:
        """Whoever can register a model runs code here: only this machine may do that without a token."""
        address, file = self._config.management_address, self._config.management_token_file
        if file is None and not is_loopback(address):
            raise ConfigError(
                f"management_address = {address}: other machines reach it, and whoever registers a model runs code "
                "here; set management_token_file, or keep it on 127.0.0.1 or a Unix socket"
            )
        return None if file is None else TokenFile(file)

    def _find_edge(self) -> str | None:
        if self._config.edge == "none":
            if self._config.access_log is not None:
                raise ConfigError("access_log is written by nginx; start without --edge none, or leave it empty")
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
        return self._config.drain_timeout + self._config.stop_grace + STOP_MARGIN

    def _addresses(self) -> tuple[str, str, str]:
        return self._config.inference_address, self._config.management_address, self._config.metrics_address

    def _places(self) -> tuple[str, str, str]:
        """The addresses, with https:// where TLS is spoken."""
        inference, management, metrics = (
            f"https://{address}" if self._speaks_tls(name, address) else address
            for name, address in zip(LISTENERS, self._addresses(), strict=True)
        )
        return inference, management, metrics

    def _listen(self, group: int | None) -> list[socket.socket]:
        """The front end's sockets: behind nginx Unix ones, else the public ones."""
        addresses: list[str] = list(self._addresses())
        if self._nginx_program is not None:
            addresses = [f"unix:{self._run_dir.sockets / name}.sock" for name in LISTENERS]
        bound: list[socket.socket] = []
        try:
            for address in addresses:
                bound.append(bind(address, group=group))
        except StartError:
            for sock in bound:
                sock.close()
            raise
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
            lambda: len(self._http.connections),
            self._inference.failures,
        )

        def refresh() -> None:
            self._gpus = list(monitor.facts())

        guard = Guard(self._config.management_address, self._config.management_hosts, self._token)
        apps = (
            (management.application(self._control, guard), control),
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
        from mms_nginx.render import Listener, render
        from mms_nginx.run import Nginx

        config = self._config
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
        text = render(
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
        self._nginx = Nginx(self._nginx_program, self._run_dir.nginx, text)
        self._nginx.start()
        asyncio.get_running_loop().add_reader(self._nginx.pidfd, self._edge_ended)

    async def _load(self, url: str, name: str) -> None:
        version = await self._control.register(url, name=name, at_start=True, synchronous=False)
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
                    self._say(f"loading for {time.monotonic() - begun:.0f} s: {self._loading()}")
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
        return [
            error.message
            for version, error in self._failures.items()
            if version.pool is not None and not version.pool.ready
        ]

    def _check_loaded(self) -> None:
        failed = self._failed()
        if failed and len(failed) == len(self._registry.versions()):
            raise StartError(f"no model could be loaded: {'; '.join(failed)} (more in {self._run_dir.logs})")

    def _progress(self, version: ModelVersion) -> str:
        pool = version.pool
        if pool is not None and pool.installing:
            return "installing its requirements"
        return f"{pool.ready if pool else 0} of {version.settings.min_workers} workers"

    def _ready_line(self, seconds: float) -> str:
        failed, count = self._failed(), len(self._registry.versions())
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
        if not stamp or stamp == self._tls_stamp or self._nginx is None or self._renewal is not None:
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
        self._control.reap_orphans({self._nginx.pid} if self._nginx is not None else set())
        self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)

    # signals and the edge's life

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        loop.add_signal_handler(signal.SIGUSR1, self._reopen_log)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def _reopen_log(self) -> None:
        if self._nginx is not None:
            self._nginx.reopen()

    def _signalled(self) -> None:
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
            nginx.stop(0)
            try:
                nginx.start()
                loop.add_reader(nginx.pidfd, self._edge_ended)
                return
            except StartError as error:
                log.error("nginx cannot be started again: %s", error.message)
        log.critical("nginx cannot be kept running; stopping")
        self._exit_code = 1
        self._stop_asked.set()

    # stop

    async def stop(self) -> None:
        """Edge, connections, workers; requests in hand get drain_timeout in all, cut short by a second signal.

        Takes at most `_stop_limit`; there is a word every two seconds.
        """
        begun = time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
        until = begun + self._config.drain_timeout
        drain = asyncio.create_task(self._drain(until))
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
        self._cache.release()
        self._run_dir.release()

    async def _drain(self, until: float) -> None:
        def left() -> float:
            return max(0.0, until - time.monotonic())

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


async def serve(config: Config, say: Callable[[str], None]) -> int:
    """The whole life of a server; returns its exit code. Raises MMSError when it cannot start."""
    server = ModelServer(config, say)
    await server.start()
    try:
        return await server.run_until_stopped()
    finally:
        say("stopping")
        await server.stop()
