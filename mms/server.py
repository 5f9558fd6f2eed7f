"""ModelServer: build, start, stop. The only place where the parts are wired together."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mms.addresses import LISTENERS, Addresses
from mms.api.predictions import InferenceApi
from mms.config import Config
from mms.controlplane import ControlPlane
from mms.dataplane import DataPlane
from mms.edge import Edge
from mms.errors import ConfigError
from mms.listeners import Listeners
from mms.metrics import Collector, GpuFacts, RestartFacts, registry
from mms.models.readiness import Phase, Readiness
from mms.models.registry import ModelRegistry
from mms.models.store import ModelStore
from mms.reload import Reloads
from mms.rundir import CacheDirectory, RunDirectory, Running, note
from mms.setting import is_loopback
from mms.signature import TrustedKeys
from mms.startup import HEARTBEAT, Plan, Startup
from mms.state import State, read
from mms.systemd import Notifier, passed_sockets
from mms.token import VARIABLES, Token, take_token
from mms.upgrade import Predecessor, Upgrades
from mms.workers.forkprocess import ForkProcess
from mms.workers.gpus import GpuMonitor
from mms.workers.process import prepare_process

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger("mms.server")

TICK = 1.0
LAST_REQUESTS = 5.0  # seconds for which idle connections outlive a server that has handed over
STOP_MARGIN = 10.0  # seconds of a stop beyond drain_timeout and stop_grace


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
        ahead: ForkProcess | None = None,
    ) -> None:
        self._config = config
        self._say = say
        self._old = old
        self._manager = Notifier(os.environ)
        self._at_terminal = os.isatty(0)
        self._addresses = self._find_addresses()
        taken = {name: os.environ[name] for name in VARIABLES.values() if name in os.environ}
        self._token = self._management_token()
        inference_token = take_token("inference", config.inference_token_file, os.environ)
        keys = None if config.trusted_keys is None else TrustedKeys(config.trusted_keys)
        store = ModelStore(config.model_store, keys)
        self._registry = ModelRegistry()
        self._cache = CacheDirectory(config.cache_dir)
        self._readiness = Readiness(self._registry, self._obstacle, self._restarts)
        self._control = ControlPlane(config, self._registry, store, self._cache, config.state)
        self._control.pools.forkservers.ahead = ahead
        if old is not None:
            self._control.before = {(name, number): count for name, number, count in old.handover.workers}
        saved = old.handover.state if old is not None else State() if fresh else read(config.state)
        self._startup = Startup(Plan(config, self._control, saved), self._control, say, self._manager)
        self._run_dir = RunDirectory(config.run_dir, 1 if old is None else old.handover.generation)
        self._inference = InferenceApi(DataPlane(self._registry), self._readiness, inference_token)
        self._edge = Edge(config, self._addresses, self._run_dir, self._cache, say, self._part_lost)
        self._check_upgrade()
        self._reloads = Reloads(reread, lambda: self._config, self._apply, self._manager, self._run_dir)
        self._listeners = Listeners(
            config,
            self._addresses,
            self._registry,
            self._inference,
            self._readiness,
            edge=self._edge.wanted,
            token=taken.get(VARIABLES["inference"], ""),
            lost=self._part_lost,
        )
        self._fleet = self._listeners.fleet
        self._control.pools.others = self._fleet if config.front_ends > 1 else None
        self._registry.forget = self._listeners.forget_versions
        self._stop_asked = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._upgrades = Upgrades(
            self._readiness,
            self._control,
            self._edge,
            self._addresses,
            self._reloads,
            self._manager,
            self._run_dir,
            self._stop_asked.set,
            daemon=daemon,
            environ=taken,
        )
        self._fresh = fresh
        self._exit_code = 0
        self._timer: asyncio.TimerHandle | None = None
        self._gpus: list[GpuFacts] = []
        self._clients_done = False

    # start

    async def start(self) -> None:
        """Listen, load, and return when every model is ready or FAILED, but one is ready if there are any.

        Raises MMSError with nothing left running.
        """
        begun = time.monotonic()
        prepare_process()
        user = self._edge.user
        if self._old is None:
            self._run_dir.acquire(user)
        else:
            self._run_dir.inherit(self._old.handover.lock, user)
        try:
            self._cache.acquire(user, for_others=bool(self._config.worker_user))
            await self._control.check_sandbox()
            self._listeners.bind(self._run_dir.sockets if self._edge.wanted else None, user[1] if user else None)
            self._catch_signals()
            if self._old is None:
                self._edge.listen()
                self._run_dir.record(self._running())
            else:
                self._old.watch(self._given_up)
            self._startup.begin(self._config.state)
            # clients at a socket of the service manager wait for their answers, as for a server that starts when asked
            clients_wait = "inference" in self._addresses.activated
            if self._old is None:
                if not clients_wait:
                    await self._listeners.start()
                await self._edge.start()
            # aiohttp takes 0.2 s to import: beside the workers' start, and nobody's first prediction waits for it
            await asyncio.to_thread(_import_applications)
            applications = self._applications()
            if self._old is None:
                await self._listeners.serve(applications)
            self._tick()
            await self._startup.wait(self._stop_asked)
            if not self._stop_asked.is_set():
                self._startup.check(self._run_dir.logs, () if self._old is None else self._old.handover.loaded)
                if self._old is not None:
                    await self._take_over(self._old, applications)
                elif clients_wait:
                    await self._listeners.start()
            if not self._stop_asked.is_set():
                self._readiness.phase = Phase.SERVING
                await self._fleet.sync()
        except BaseException:
            await self._startup.cancel()
            await self.stop()
            raise
        if self._stop_asked.is_set():
            return
        if self._fresh and self._old is None:
            await self._control.save()  # what was there before is forgotten also if nothing changes from now on
        gc.collect()
        gc.freeze()
        line = self._startup.ready_line(time.monotonic() - begun, self._edge.places(), self._edge.what())
        self._manager.ready(line)
        self._watchdog()
        self._say(line)
        if self._old is not None:
            self._old.served(line)
        self._control.tidy()

    async def run_until_stopped(self) -> int:
        """Wait for SIGTERM, SIGINT or the loss of the edge; returns the exit code."""
        await self._stop_asked.wait()
        return self._exit_code

    def _find_addresses(self) -> Addresses:
        if self._old is None:
            return Addresses(self._config, passed_sockets(os.environ, LISTENERS))
        told = self._old.handover
        sockets = {} if told.edge else self._old.sockets
        return Addresses.inherited(self._config, told.addresses, told.activated, sockets, told.files)

    def _check_upgrade(self) -> None:
        if self._old is not None and self._old.handover.edge != self._edge.wanted:
            raise ConfigError(
                f"edge: the running server is {'without' if self._edge.wanted else 'behind'} nginx, and an upgrade "
                "keeps that; stop and start instead"
            )
        if self._old is not None and self._config.front_ends > 1:
            raise ConfigError("front_ends: a server with several cannot take over from another; stop and start instead")

    def _management_token(self) -> Token | None:
        """Whoever can register a model runs code here: only this machine may do that without a token."""
        address = self._addresses.of["management"]
        token = take_token("management", self._config.management_token_file, os.environ)
        if token is None and not is_loopback(address):
            raise ConfigError(
                f"management_address = {address}: other machines reach it, and whoever registers a model runs code "
                "here; set management_token_file, or keep it on 127.0.0.1 or a Unix socket"
            )
        return token

    def _running(self) -> Running:
        config = self._config
        return Running(
            os.getpid(),
            *self._edge.places(),
            self._stop_limit(),
            management_token_file=str(config.management_token_file or ""),
            inference_token_file=str(config.inference_token_file or ""),
            tls_cert=self._edge.certificate,
        )

    def _stop_limit(self) -> float:
        return self._config.drain_delay + self._config.drain_timeout + self._config.stop_grace + STOP_MARGIN

    def _applications(self) -> list[web.Application]:
        """Of the management and the metrics port."""
        from mms.api import management, metrics
        from mms.api.guard import Guard

        fleet = self._fleet
        monitor = GpuMonitor(self._control.pools.gpus)
        collector = Collector(
            fleet.version_facts,
            lambda: self._gpus,
            self._listeners.facts,
            lambda: fleet.totals.failures(self._inference.failures),
            lambda: self._control.saver is not None and self._control.saver.failed,
            self._restarts,
        )

        async def refresh() -> None:
            self._gpus = await asyncio.to_thread(lambda: list(monitor.facts()))
            for version in list(self._registry.versions()):
                await version.read_memory()
            await fleet.look()

        guard = Guard(self._addresses.of["management"], self._config.management_hosts, self._token)
        return [
            management.application(self._control, self._readiness, guard),
            metrics.application(registry(collector), refresh),
        ]

    async def _take_over(self, old: Predecessor, applications: list[web.Application]) -> None:
        """All that the old server serves is loaded: serve on its sockets beside it, and be the one that runs here."""
        old.stand_alone()
        self._readiness.phase = Phase.SERVING
        await self._listeners.start()
        await self._listeners.serve(applications)
        self._edge.listen(old.sockets)
        await self._edge.start()
        if not self._stop_asked.is_set():
            self._run_dir.take_over(self._running())
            self._edge.share(False)

    def _obstacle(self) -> tuple[str, str]:
        """Why no connection is taken: a word and a sentence; empty while they are."""
        if trouble := self._edge.trouble:
            return "unreachable", trouble
        return self._listeners.obstacle()

    def _restarts(self) -> list[RestartFacts]:
        return [*self._edge.restarts(), *self._fleet.restarts(), *self._control.restarts()]

    def _tick(self) -> None:
        # first: whatever fails below, the clock goes on
        self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)
        self._edge.tick()
        self._control.reap_orphans(self._edge.pids | self._upgrades.pids | self._fleet.pids)
        self._listeners.tick()

    def _watchdog(self) -> None:
        """Tell the service manager that the event loop turns; it wants to know from the ready message on."""
        if self._manager.watchdog:
            asyncio.get_running_loop().call_later(self._manager.watchdog, self._watchdog)
            self._manager.alive()

    # what happens to it while it runs

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        loop.add_signal_handler(signal.SIGUSR1, self._edge.reopen_log)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up)
        loop.add_signal_handler(signal.SIGUSR2, self._upgrades.begin)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def _hung_up(self) -> None:
        """SIGHUP: reload, but when it means that the terminal we run in is gone, stop."""
        if self._at_terminal and not os.isatty(0):
            self._signalled()
        else:
            self._reloads.begin()

    async def _apply(self, config: Config) -> None:
        self._upgrades.check_none()
        await self._edge.apply(config)
        self._config = config
        self._control.apply(config)
        await self._listeners.apply(config)
        logging.getLogger("mms").setLevel(config.log_level.upper())
        note(lambda: self._run_dir.record(self._running()))

    def _signalled(self) -> None:
        if self._readiness.phase is Phase.DRAINING:
            self._stop_now.set()
        elif not self._upgrades.handed_over:
            self._manager.send("STOPPING=1")
        self._drains()

    def _given_up(self) -> None:
        self._exit_code = 1
        self._stop_asked.set()

    def _part_lost(self) -> None:
        self._exit_code = 1
        self._drains()

    def _drains(self) -> None:
        self._readiness.phase = Phase.DRAINING
        self._fleet.show()
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
        self._upgrades.cancel()
        delay = self._config.drain_delay if self._readiness.phase is Phase.DRAINING else 0.0
        until = begun + delay + self._config.drain_timeout
        drain = asyncio.create_task(self._drain(delay, until))
        now = asyncio.create_task(self._stop_now.wait())
        while not await _first_of(drain, now):
            self._say(f"stopping for {time.monotonic() - begun:.0f} s: {self._leaving(until)}")
        now.cancel()
        if not drain.done():
            self._edge.hasten()
            drain.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await drain
            await self._edge.stop(0)
            await self._control.close(0)
        await self._listeners.close()
        await self._upgrades.ended()
        self._cache.release()
        self._run_dir.release()

    async def _drain(self, delay: float, until: float) -> None:
        def left() -> float:
            return max(0.0, until - time.monotonic())

        await asyncio.sleep(delay)
        if self._upgrades.handed_over and not self._edge.wanted:
            await self._listeners.retire(min(LAST_REQUESTS, left()))
        timeout = self._config.drain_timeout
        if not await self._edge.stop(left()):
            log.warning("nginx was ended: its requests took longer than drain_timeout (%g s)", timeout)
        cut = await self._listeners.drain(until)
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


def _import_applications() -> None:
    """All that only the management and the metrics port need."""
    from mms.api import guard, management, metrics  # noqa: F401  # to have imported them is all


async def _first_of(*tasks: asyncio.Task[Any]) -> bool:
    """Whether one of them is done within a heartbeat."""
    done, _ = await asyncio.wait(tasks, timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


async def serve(
    config: Config,
    say: Callable[[str], None],
    *,
    fresh: bool = False,
    reread: Callable[[], Config] | None = None,
    daemon: bool = False,
    old: Predecessor | None = None,
    ahead: ForkProcess | None = None,
) -> int:
    """The whole life of a server; returns its exit code. Raises MMSError when it cannot start.

    `fresh` ignores the saved state; `reread` reads the settings again for a reload; nobody waits for a `daemon`, so
    that another process may succeed it; `old` is the server that this one succeeds; of `ahead` its first fork server
    is made.
    """
    server = ModelServer(config, say, fresh=fresh, reread=reread, daemon=daemon, old=old, ahead=ahead)
    await server.start()
    try:
        return await server.run_until_stopped()
    finally:
        say("stopping")
        await server.stop()
