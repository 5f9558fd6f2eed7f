"""A server under observation: its models, the faults that can be done to it, and what must be left afterwards."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.asking import Reply, fetch
from tests.chaos.clients import CUT, Outcome, Port, Timeline
from tests.conftest import pack
from tests.servers import Server, mms, processes_in, scratch, server
from tests.waiting import eventually

RESPONSE_TIMEOUT = 2.0
SETTLE = 30.0
PAUSE = 0.3
CALL_LIMIT = 20.0
DEATHS = 4  # of nginx, and of the second front end, in DEATH_WINDOW; one more than the next ends the server
DEATH_WINDOW = 61.0
MEMORY = 24 << 20  # what the server may have grown by, beyond a fifth: two restarts of everything leave fragments

STEADY = ("steady", "swapped", "scaled")  # registered all the time
PASSING = "passing"
LONE_KILL = 3.0  # seconds in which a request may still feel that a worker was killed: it waits for the replacement
EFFECTS = {
    "worker killed": LONE_KILL,
    "worker stopped for good": RESPONSE_TIMEOUT + LONE_KILL,
    "worker stopped for a while": PAUSE,
    "fork server killed": 1.0,
    "fork server stopped for a while": PAUSE,
    "nginx worker killed": 0.5,
    "nginx master killed": 2.0,
    "nginx worker stopped for a while": PAUSE,
    "nginx reloaded": 1.0,
    "front end killed": 0.5,
    "front end stopped for a while": PAUSE,
    "server upgraded": 2.0,
    "model absent": 1.0,
}
_RANDOM = re.compile(r"-[a-z0-9_]{8}(?=/|$)")  # the ends of temporary names
_NUMBERS = re.compile(r"\d+")
ABSENCE = (  # the last: a large body that nobody wants is refused before it is read, which ends the connection
    (404, "ModelNotFoundException"),
    (503, "ModelLoadingException"),
    (503, "DrainingException"),
    (0, CUT),
)
WORKER_DEATHS = ("worker killed", "worker stopped for good")


def explain(outcome: Outcome, faults: Counter[str]) -> bool:
    """Whether one of the faults may end a request of this kind like this. What is not listed must not happen."""
    deaths = sum(faults[kind] for kind in WORKER_DEATHS)
    if outcome.target == PASSING and (outcome.status, outcome.type) in ABSENCE and faults["model absent"]:
        return True
    if outcome.status == 0:
        # nginx closes its idle connections when it is reloaded; a request that crosses this has to be sent again
        crossed = outcome.reused and faults["nginx reloaded"]
        died = faults["nginx worker killed"] or faults["nginx master killed"]
        return outcome.port == "nginx" and bool(crossed or died)
    if outcome.status == 502:  # of nginx: who had the request has ended
        return faults["front end killed"] > 0
    if outcome.type == "WorkerDiedException":  # its worker and its next one were killed, or the retry budget is spent
        return deaths > 1 if outcome.status == 500 else deaths > 0
    if outcome.status == 504:
        return faults["worker stopped for good"] > 0
    return False


@dataclass(frozen=True)
class State:
    """What a server holds when nobody asks it for anything."""

    processes: Counter[str]
    descriptors: int  # without those of clients, nginx among them
    memory: int
    files: Counter[str]  # by their names without what is random or counted
    threads: int
    unanswered: int  # requests in queues and at workers


class Rig:
    """One server with the models that chaos needs, and the ways to hurt it. Faults are noted on `timeline`."""

    def __init__(self, running: Server, edge: str, dice: random.Random, front_ends: int = 1) -> None:
        self.running = running
        self.timeline = Timeline(EFFECTS)
        self.port = Port("nginx" if edge == "nginx" else "direct", running.url)
        self.problems: list[str] = []
        self._edge = edge
        self._front_ends = front_ends
        self._dice = dice
        self._version = 1
        self._absence: contextlib.AbstractContextManager[None] | None = self.timeline.lasting("model absent")
        self._absence.__enter__()
        self._deaths: dict[str, list[float]] = {}  # when which part of the server was killed that it counts deaths of
        self._timers: list[threading.Timer] = []

    # faults

    def faults(self) -> dict[str, tuple[int, Callable[[], None]]]:
        """Weight and act of each kind."""
        kinds: dict[str, tuple[int, Callable[[], None]]] = {
            "worker killed": (6, self.kill_worker),
            "worker stopped for good": (1, self.hang_worker),
            "worker stopped for a while": (3, self.pause_worker),
            "fork server killed": (2, self.kill_fork_server),
            "fork server stopped for a while": (1, self.pause_fork_server),
            "model registered or unregistered": (3, self.register_or_unregister),
            "model scaled": (2, self.scale),
            "version swapped": (2, self.swap),
        }
        if self._edge == "nginx":
            kinds |= {
                "nginx worker killed": (2, self.kill_nginx_worker),
                "nginx master killed": (1, self.kill_nginx),
                "nginx worker stopped for a while": (2, self.pause_nginx_worker),
                "nginx reloaded": (2, self.reload_nginx),
            }
        if self._front_ends > 1:
            kinds |= {
                "front end killed": (1, self.kill_front_end),
                "front end stopped for a while": (2, self.pause_front_end),
            }
        return kinds

    def one_fault(self) -> None:
        kinds = self.faults()
        (kind,) = self._dice.choices(list(kinds), [weight for weight, _ in kinds.values()])
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # another fault came first
            kinds[kind][1]()

    def kill_worker(self) -> None:
        if worker := self._worker():
            self.timeline.add("worker killed")
            worker.kill()

    def hang_worker(self) -> None:
        if worker := self._worker():
            self.timeline.add("worker stopped for good")
            worker.suspend()

    def pause_worker(self) -> None:
        if worker := self._worker():
            self._suspend(worker, "worker stopped for a while")

    def kill_fork_server(self) -> None:
        for process in self.running.named("mms-forkserver"):
            self.timeline.add("fork server killed")
            process.kill()

    def pause_fork_server(self) -> None:
        for process in self.running.named("mms-forkserver"):
            self._suspend(process, "fork server stopped for a while")

    def kill_nginx_worker(self) -> None:
        if workers := self._nginx_workers():
            self.timeline.add("nginx worker killed")
            self._dice.choice(workers).kill()

    def pause_nginx_worker(self) -> None:
        if workers := self._nginx_workers():
            self._suspend(self._dice.choice(workers), "nginx worker stopped for a while")

    def kill_nginx(self) -> None:
        master = self._nginx()
        if master is not None and self._may_die("nginx master"):
            self.timeline.add("nginx master killed")
            master.kill()
            eventually(lambda: self._nginx() not in (None, master) and self._accepts())

    def kill_front_end(self) -> None:
        front_ends = self.running.named("mms-frontend")
        if front_ends and self._may_die("front end"):
            with self.timeline.lasting("front end killed"):
                self.timeline.count["front end killed"] += 1
                self._dice.choice(front_ends).kill()
                eventually(lambda: self._front_ends_whole() and self.running.named("mms-frontend") != front_ends)

    def pause_front_end(self) -> None:
        if front_ends := self.running.named("mms-frontend"):
            self._suspend(self._dice.choice(front_ends), "front end stopped for a while")

    def reload_nginx(self) -> None:
        if master := self._nginx():
            before = {process.pid for process in self._nginx_workers()}
            self.timeline.add("nginx reloaded")
            master.send_signal(signal.SIGHUP)
            eventually(lambda: {process.pid for process in self._nginx_workers()} - before or self._nginx() != master)

    def upgrade(self) -> None:
        """Another process in the place of the server; only nginx's end of an idle connection may be felt."""
        with self.timeline.lasting("server upgraded") if self._edge == "nginx" else contextlib.nullcontext():
            done = mms("upgrade", "--run-dir", str(self.running.run_dir))
            if done.returncode:
                self.problems.append(done.stderr)
                return
            self.running.succeed(int(done.stdout.split("upgraded: pid ")[1].split()[0]))

    def register_or_unregister(self) -> None:
        if self._absence is None:
            self._absence = self.timeline.lasting("model absent")
            self._absence.__enter__()
            self._call("DELETE", f"/models/{PASSING}", 404)
        else:
            self._call("POST", f"/models?url=account-1.0.mar&model_name={PASSING}&initial_workers=1", 409)
            self._absence.__exit__(None, None, None)
            self._absence = None
        self.timeline.add("model registered or unregistered")

    def scale(self) -> None:
        self.timeline.add("model scaled")
        self._call("PUT", f"/models/scaled?min_worker={self._dice.randrange(1, 4)}&synchronous=false")

    def swap(self) -> None:
        """The other version in, chosen, the present one out."""
        old, self._version = self._version, 3 - self._version
        self.timeline.add("version swapped")
        self._call("POST", f"/models?url=swapped-{self._version}.0.mar&initial_workers=2", 409)
        self._call("PUT", f"/models/swapped/{self._version}.0/set-default")
        self._call("DELETE", f"/models/swapped/{old}.0", 404)

    # what is left

    def settle(self) -> None:
        """Everything is repaired: every process runs, every model has its workers."""
        for timer in self._timers:
            timer.join()
        if self._absence is None:
            self.register_or_unregister()
        self._call("PUT", "/models/scaled?min_worker=2&synchronous=true")
        try:
            eventually(self._whole, timeout=SETTLE)
        except AssertionError:
            pools = {model: self.running.describe(model) for model in STEADY}
            self.problems.append(f"not repaired after {SETTLE:g} s: {pools}")

    def state(self) -> State:
        running = self.running
        main = psutil.Process(running.pid)
        inside = _files(running.run_dir, running.cache_dir)
        return State(
            Counter(_names(processes_in(running.folder))),
            main.num_fds() - len([c for c in main.net_connections("all") if _is_connection(c)]),
            main.memory_info().rss,
            Counter(
                _NUMBERS.sub("N", _RANDOM.sub("-N", str(path.relative_to(running.folder))))
                for path in inside
                if not path.is_relative_to(running.run_dir / "logs")
            ),
            main.num_threads(),
            round(running.metric("mms_queue_depth") + running.metric("mms_requests_in_flight")),
        )

    def compare(self, before: State) -> State:
        """The state now; what it has too much of is a problem."""
        with contextlib.suppress(AssertionError):
            eventually(lambda: self._left(before, self.state()) == [], timeout=5)
        after = self.state()
        self.problems += self._left(before, after)
        return after

    @staticmethod
    def _left(before: State, after: State) -> list[str]:
        problems = []
        for name in ("processes", "files"):
            if surplus := getattr(after, name) - getattr(before, name):
                problems.append(f"{name}: {dict(surplus)} more than before")
        for name in ("descriptors", "threads", "unanswered"):
            then, now = getattr(before, name), getattr(after, name)
            if now > then + (4 if name == "threads" else 0):  # asyncio keeps a few for file work
                problems.append(f"{name}: {now}, before {then}")
        if after.memory > before.memory * 1.2 + MEMORY:
            problems.append(f"memory: {after.memory >> 20} MiB, before {before.memory >> 20} MiB")
        return problems

    def _whole(self) -> bool:
        wanted = {"steady": 2, "swapped": 2, "scaled": 2}
        if (self._edge == "nginx" and not self._nginx_workers()) or not self._front_ends_whole():
            return False
        try:
            pools = {model: self.running.describe(model) for model in wanted}
        except (OSError, http.client.HTTPException, ValueError):
            return False
        if len(pools["swapped"]["versions"]) != 1:
            return False
        return all(
            [worker["status"] for worker in pool["workers"]] == ["READY"] * wanted[model]
            and {self._status(worker["pid"]) for worker in pool["workers"]}.isdisjoint({psutil.STATUS_STOPPED})
            for model, pool in pools.items()
        ) and not any(process.status() == psutil.STATUS_STOPPED for process in self.running.named("mms-forkserver"))

    def _front_ends_whole(self) -> bool:
        """Whether all further ones are there, and do not stand still."""
        running = self.running.named("mms-frontend")
        return len(running) == self._front_ends - 1 and psutil.STATUS_STOPPED not in [one.status() for one in running]

    @staticmethod
    def _status(pid: int) -> str:
        try:
            return psutil.Process(pid).status()
        except psutil.NoSuchProcess:
            return psutil.STATUS_DEAD

    # means

    def _may_die(self, part: str) -> bool:
        """Whether the server puts up with one more death of it now; then it is counted."""
        now = time.monotonic()
        recent = [death for death in self._deaths.get(part, ()) if death > now - DEATH_WINDOW]
        self._deaths[part] = recent if len(recent) == DEATHS else [*recent, now]
        return len(recent) < DEATHS

    def _worker(self) -> psutil.Process | None:
        """Any worker, in whatever state it is. By its name: the management port may be behind a dead nginx."""
        workers = [process for model in STEADY for process in self.running.named(f"mms-{model}")]
        return self._dice.choice(workers) if workers else None

    def _suspend(self, process: psutil.Process, kind: str) -> None:
        self.timeline.add(kind)
        process.suspend()
        timer = threading.Timer(PAUSE, _resume, (process,))
        self._timers = [each for each in self._timers if each.is_alive()] + [timer]
        timer.start()

    def _nginx(self) -> psutil.Process | None:
        for process in psutil.Process(self.running.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "nginx" and process.status() != psutil.STATUS_ZOMBIE:
                    return process
        return None

    def _nginx_workers(self) -> list[psutil.Process]:
        master = self._nginx()
        return master.children() if master is not None else []

    def _accepts(self) -> bool:
        try:
            return fetch(self.running.url, "GET", "/ping").status == 200
        except OSError:
            return False

    def _call(self, method: str, path: str, done: int = 0) -> None:
        """A management call, again while nginx is away; the status `done` says that a lost one had succeeded."""
        deadline = time.monotonic() + CALL_LIMIT
        while True:
            try:
                reply: Reply = self.running.manage(method, path)
            except (OSError, http.client.HTTPException) as error:
                if self._edge != "nginx" or time.monotonic() > deadline:
                    self.problems.append(f"{method} {path}: {error!r}")
                    return
                threading.Event().wait(0.05)
                continue
            if reply.status not in (200, 202, done):
                self.problems.append(f"{method} {path}: {reply.status} {reply.body.decode()}")
            return


def _names(processes: Iterable[psutil.Process]) -> Iterator[str]:
    """Of those that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield process.name()


def _files(*folders: Path) -> Iterator[Path]:
    """All that is in them, folders as well; what vanishes meanwhile is passed over."""
    for folder in folders:
        for place, inner, files in os.walk(folder):
            yield from (Path(place, name) for name in (*inner, *files))


def _is_connection(found: Any) -> bool:
    """Whether it is a client's, not a listener's or a worker's."""
    return bool(found.laddr) if found.family == socket.AF_UNIX else found.status != psutil.CONN_LISTEN


def _resume(process: psutil.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGCONT)


@contextlib.contextmanager
def rig(edge: str, seed: int, *, front_ends: int = 1, slow: bool = False) -> Iterator[Rig]:
    """A running server with everything registered; with `slow`, some models take a few milliseconds per batch."""
    few, more = (0.002, 0.005) if slow else (0, 0)
    with scratch() as archives, pytest.MonkeyPatch.context() as patch:
        models: list[Path] = [
            pack(archives / "a", "account", "steady", "1.0", "", {"min_workers": 2, "batch_size": 4}),
            pack(archives / "b", "account", "swapped", "1.0", "", {"min_workers": 2, "delay": few}),
            pack(archives / "c", "account", "scaled", "1.0", "", {"min_workers": 2, "batch_size": 2, "delay": more}),
        ]
        spare = (
            pack(archives / "d", "account", "swapped", "2.0", "", {"min_workers": 2, "delay": few}),
            pack(archives / "e", "account", "account", "1.0", "", {"min_workers": 1}),
        )
        patch.setenv("NOTIFY_SOCKET", str(archives / "nobody"))  # an upgrade needs a service manager, or a daemon
        settings: dict[str, Any] = {"response_timeout": RESPONSE_TIMEOUT, "drain_timeout": 5, "front_ends": front_ends}
        with server(*models, spare=spare, edge=edge, **settings) as running:
            yield Rig(running, edge, random.Random(seed), front_ends)
