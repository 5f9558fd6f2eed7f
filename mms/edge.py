"""nginx in front of the server: found, started, watched, restarted, reloaded, stopped. Front end's process.

What blocks for long runs in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mms_nginx import Listener, Nginx, edge_user, find_nginx, render
from mms_nginx.spool import remove_leftovers

from mms.addresses import Addresses
from mms.config import Config
from mms.errors import ConfigError, MMSError, StartError
from mms.metrics import RestartFacts
from mms.rundir import CacheDirectory, RunDirectory
from mms.secret import read_secret
from mms.setting import is_loopback
from mms.workers.budget import Budget, how_it_ended

log = logging.getLogger("mms.server")

DEATHS = 5  # with more within DEATH_WINDOW, the server ends
DEATH_WINDOW = 60.0
READ_TIMEOUT = 86_400.0  # the front end answers within its own limits; nginx must not be quicker
KEEPALIVE = 3600.0  # nginx must be the side that closes idle connections: it cannot repeat a POST
NO_ACCESS_LOG = "access_log is written by nginx; start without --edge none, or leave it empty"


class Edge:
    """nginx, if the settings want it and the machine has it; without it, most of this does nothing.

    `lost` is called when it cannot be kept running. The constructor raises ConfigError or StartError.
    """

    def __init__(
        self,
        config: Config,
        addresses: Addresses,
        run_dir: RunDirectory,
        cache: CacheDirectory,
        say: Callable[[str], None],
        lost: Callable[[], None],
    ) -> None:
        self._config = config
        self._addresses = addresses
        self._run_dir = run_dir
        self._cache = cache
        self._lost = lost
        self._program = _find(config, bool(addresses.activated), say)
        self._certificate = Certificate.of(config, self._program is not None)
        self._nginx: Nginx | None = None
        self._leaving: Nginx | None = None
        self._budget = Budget(DEATHS, DEATH_WINDOW)
        self.trouble = ""  # why nothing comes through nginx at the moment
        self._turn = asyncio.Lock()  # of those who start it again or reload it, in threads
        self._renewal: asyncio.Task[None] | None = None
        self._workers: set[int] = set()  # nginx's, when they were last looked at
        self._tidying: asyncio.Task[None] | None = None
        self._restart: asyncio.Task[None] | None = None

    @property
    def wanted(self) -> bool:
        """Whether nginx listens at the public addresses, and the front end behind it."""
        return self._program is not None

    @property
    def user(self) -> tuple[str, int] | None:
        """Name and group of the user that nginx's workers run as, if that is not this user."""
        return edge_user() if self.wanted else None

    @property
    def pids(self) -> set[int]:
        return {self._nginx.pid} if self._nginx is not None else set()

    @property
    def certificate(self) -> str:
        """The certificate's file; empty without TLS."""
        return str(self._certificate.files[0]) if self._certificate is not None else ""

    def places(self) -> tuple[str, str, str]:
        """The public addresses, with https:// where TLS is spoken."""
        inference, management, metrics = (
            f"https://{address}" if self._tls(name, address) else address
            for name, address in self._addresses.of.items()
        )
        return inference, management, metrics

    def restarts(self) -> list[RestartFacts]:
        """How often nginx has died; empty without it."""
        return [self._budget.facts("nginx", self.trouble or "running")] if self.wanted else []

    def what(self) -> str:
        """What stands in front, with its version: in the ready line."""
        if self._nginx is None:
            return "without nginx"
        return f"behind nginx {self._nginx.version}".rstrip()

    @property
    def sockets(self) -> Mapping[str, socket.socket]:
        """The public sockets that nginx serves, by address."""
        return self._nginx.sockets if self._nginx is not None else {}

    def share(self, shared: bool = True) -> None:
        """Whether another server's nginx serves these sockets, too, and will do so when this one has ended."""
        if self._nginx is not None:
            self._nginx.shared = shared

    def listen(self, sockets: Mapping[str, socket.socket] | None = None) -> None:
        """Claim the public addresses, before anything else is begun in vain. Raises StartError.

        `sockets` are those of another server, by address; they are shared with it.
        """
        if self._program is not None:
            self._nginx = Nginx(self._program, self._run_dir.nginx, self._text(self._config), sockets)
            self._nginx.listen()

    async def start(self) -> None:
        """After `listen`: return when every public address accepts connections. Raises StartError."""
        nginx = self._nginx
        if nginx is None:
            return
        async with self._turn:
            try:
                await asyncio.to_thread(nginx.prepare)
                nginx.spawn()
            except BaseException:
                nginx.stop(0)
                raise
            await asyncio.to_thread(nginx.wait)
        asyncio.get_running_loop().add_reader(nginx.pidfd, self._ended)

    async def apply(self, config: Config) -> None:
        """Put changed settings in force. Raises ConfigError or StartError; then the old ones stay in force."""
        if self._program is None and config.access_log is not None:
            raise ConfigError(NO_ACCESS_LOG)
        async with self._turn:
            if self._nginx is not None and (text := self._text(config)) != self._text(self._config):
                await asyncio.to_thread(self._nginx.reload, text)  # closes idle connections: not without need
            self._config = config

    def tick(self) -> None:
        """Look at the certificate and at nginx's workers: once a second."""
        self._renew_certificate()
        self._tidy()

    def reopen_log(self) -> None:
        """Somebody has moved the access log away."""
        if self._nginx is not None:
            self._nginx.reopen()

    async def stop(self, limit: float) -> bool:
        """Let its requests finish for `limit` seconds, then end it; whether they were done in time."""
        nginx, self._nginx = self._nginx, None
        if nginx is None:
            return True
        self._leaving = nginx
        nginx.give_up()
        async with self._turn:
            if nginx.pidfd != -1:
                asyncio.get_running_loop().remove_reader(nginx.pidfd)
            return await asyncio.to_thread(nginx.stop, limit)

    def hasten(self) -> None:
        """It may be waiting for its last requests, in a thread that cannot be cancelled: end that."""
        nginx = self._leaving
        if nginx is not None and nginx.pidfd != -1:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(nginx.pidfd, signal.SIGTERM)

    def _renew_certificate(self) -> None:
        """nginx reads certificate and key at its start: it reloads when they have changed."""
        if self._nginx is None or self._certificate is None or self._renewal is not None:
            return
        if self._certificate.has_changed():
            self._renewal = asyncio.create_task(self._renew(self._nginx))
            self._renewal.add_done_callback(self._renewed)

    def _tidy(self) -> None:
        """When workers of nginx have ended, delete what they may have left of bodies."""
        workers = self._nginx.workers() if self._nginx is not None else set()
        gone, self._workers = self._workers - workers, workers
        if gone and self._nginx is not None:
            self._tidying = asyncio.create_task(
                asyncio.to_thread(remove_leftovers, self._cache.nginx, self._nginx.workers)
            )

    def _tls(self, name: str, address: str) -> tuple[Path, Path] | None:
        """Certificate and key of the inference port, and of the management port where others can reach it."""
        if self._certificate is None or address.startswith("unix:"):
            return None
        spoken = name == "inference" or (name == "management" and not is_loopback(address))
        return self._certificate.files if spoken else None

    def _text(self, config: Config) -> str:
        """nginx's configuration."""
        listeners = [
            Listener(name, address, (self._run_dir.sockets / f"{name}.sock",), self._tls(name, address))
            for name, address in self._addresses.of.items()
        ]
        user = edge_user()
        return render(
            listeners,
            directory=self._run_dir.nginx,
            max_request_size=config.max_request_size,
            user=user[0] if user else None,
            response_timeout=READ_TIMEOUT,
            body_timeout=config.body_timeout,
            header_timeout=config.header_timeout,
            log_level=config.log_level,
            spool=self._cache.nginx,
            access_log=config.access_log,
        )

    async def _renew(self, nginx: Nginx) -> None:
        async with self._turn:
            await asyncio.to_thread(nginx.reload_files)

    def _renewed(self, renewal: asyncio.Task[None]) -> None:
        self._renewal = None
        if not renewal.cancelled():
            error = renewal.exception()
            if isinstance(error, MMSError):
                log.error("the new certificate is not in force: %s", error.message)
            else:
                log.info("nginx has taken the new certificate")

    def _ended(self) -> None:
        """nginx has died: start it again, but not for ever."""
        nginx = self._nginx
        if nginx is not None:
            asyncio.get_running_loop().remove_reader(nginx.pidfd)
            self.trouble = "nginx has ended"
            self._restart = asyncio.create_task(self._start_again(nginx))

    async def _start_again(self, nginx: Nginx) -> None:
        async with self._turn:
            code = await asyncio.to_thread(nginx.exit_code)
            if self._nginx is None or code is None:  # a stop came first
                return
            try:
                await self._replace(nginx, how_it_ended(code))
            except (StartError, OSError) as error:
                if self._nginx is not None:
                    log.error("nginx cannot be started again: %s", error)
                    self._cannot_go_on()

    async def _replace(self, nginx: Nginx, cause: str) -> None:
        begun = time.monotonic()
        self._budget.count(cause)
        self.trouble = f"nginx ended: {cause}"
        if self._budget.spent:
            return self._cannot_go_on()
        log.error("%s; starting it again", self.trouble)
        await asyncio.to_thread(nginx.end, 0)
        await asyncio.to_thread(remove_leftovers, self._cache.nginx, set)
        await asyncio.to_thread(nginx.prepare)
        nginx.spawn()
        await asyncio.to_thread(nginx.wait)
        if self._nginx is not None:
            asyncio.get_running_loop().add_reader(nginx.pidfd, self._ended)
            log.info("nginx %s serves again, after %.1f s", nginx.version, time.monotonic() - begun)
            self.trouble = ""

    def _cannot_go_on(self) -> None:
        log.critical("nginx cannot be kept running; stopping")
        self._lost()


class Certificate:
    """The files of certificate and key, and whether somebody has renewed them."""

    def __init__(self, cert: Path, key: Path) -> None:
        self.files = cert, key
        self._stamp = self._look()

    @classmethod
    def of(cls, config: Config, behind_nginx: bool) -> Certificate | None:
        """The one of the settings, if TLS is wanted; only nginx speaks it. Raises ConfigError."""
        cert, key = config.tls_cert, config.tls_key
        if cert is None and key is None:
            return None
        if cert is None or key is None:
            raise ConfigError("tls_cert and tls_key go together: set both")
        if not behind_nginx:
            raise ConfigError("tls_cert: TLS needs nginx in front; install it and do not start with --edge none")
        read_secret(key, "key", 1)
        if not os.access(cert, os.R_OK):
            raise ConfigError(f"cannot read the certificate {cert}")
        return cls(cert, key)

    def has_changed(self) -> bool:
        """Whether both files are there and one has changed since the last call that said so."""
        stamp = self._look()
        if not stamp or stamp == self._stamp:
            return False
        self._stamp = stamp
        return True

    def _look(self) -> list[tuple[int, ...]]:
        try:
            facts = [path.stat() for path in self.files]
        except OSError:
            return []
        return [(fact.st_ino, fact.st_size, fact.st_mtime_ns) for fact in facts]


def _find(config: Config, passed: bool, say: Callable[[str], None]) -> str | None:
    """The program, None if the front end listens by itself; `passed`: on sockets of the service manager."""
    if passed and config.edge == "nginx":
        raise ConfigError("nginx cannot take over the sockets of the service manager; start with --edge none")
    if config.edge == "none" or passed:
        if config.access_log is not None:
            raise ConfigError(NO_ACCESS_LOG)
        return None
    program = find_nginx(config.nginx)
    if program is None and config.access_log is not None:
        raise StartError("access_log is written by nginx, which is not installed; install it or leave it empty")
    if program is None and config.edge == "nginx":
        raise StartError(f"the program {config.nginx} is not found; install nginx or start with --edge none")
    if program is None:
        say("nginx is not installed: the front end listens by itself (no TLS, no request spooling)")
    return program
