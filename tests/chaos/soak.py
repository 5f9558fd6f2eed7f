"""Registered, asked and unregistered again, thousands of times beside steady load: what the server has kept of it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter

import psutil
from rich.console import Console

from tests.asking import digest
from tests.chaos.clients import Clients, Outcome
from tests.chaos.rig import STEADY, Rig, rig
from tests.servers import processes_in

CYCLES = 2000
CLIENTS = 4
PAUSE = 0.01
WARM_UP = 0.15  # of the time: caches fill, the allocator finds its size
GROWTH = 5 << 20
SHARE = 0.05
SAMPLE = 1.0


def run(seconds: float, seed: int, console: Console) -> int:
    """2,000 cycles per 20 minutes; the number of promises broken."""
    cycles = max(1, round(CYCLES * min(1.0, seconds / 1200)))
    begun = time.monotonic()
    with rig("none", seed) as under:
        clients = Clients([under.port], STEADY, under.timeline, _nothing, clients=CLIENTS, pause=PAUSE, seed=seed)
        with clients:
            _cycles(under, round(cycles * WARM_UP), begun + seconds * WARM_UP)
            before, lasting = under.state(), _memory(under)
            samples = [before.memory]
            over = threading.Event()
            sampler = threading.Thread(target=_sample, args=(under, samples, over))
            sampler.start()
            _cycles(under, cycles, begun + seconds)
            over.set()
            sampler.join()
        under.settle()
        after = under.compare(before)
        account, problems = clients.account, [*clients.account.violations, *under.problems]
        allowed = max(GROWTH, round(before.memory * SHARE))
        if after.memory - before.memory > allowed:
            problems.append(f"memory grew by {(after.memory - before.memory) / 2**20:.1f} MiB")
        now = _memory(under)
        most, which = max((now[each] - then, each.name()) for each, then in lasting.items() if each in now)
        if most > GROWTH:
            problems.append(f"memory of {which} grew by {most / 2**20:.1f} MiB")
    console.print(
        f"soak: {time.monotonic() - begun:.0f} s, {cycles:,} cycles after the warm-up, {account.sent:,} requests "
        f"beside them, lost {account.lost}; memory {before.memory / 2**20:.1f} → {after.memory / 2**20:.1f} MiB (peak "
        f"{max(samples) / 2**20:.1f}, allowed +{allowed / 2**20:.1f}), of its other processes at most "
        f"+{most / 2**20:.1f} ({which}); descriptors {before.descriptors} → {after.descriptors}, files "
        f"{before.files.total()} → {after.files.total()}, processes {before.processes.total()} → "
        f"{after.processes.total()}",
        highlight=False,
    )
    for problem in problems:
        console.print(f"VIOLATION {problem}", style="red", markup=False)
    return len(problems)


def _cycles(under: Rig, count: int, end: float) -> None:
    """So many, evenly until `end`, each with a name that comes again only much later."""
    running, begun = under.running, time.monotonic()
    for number in range(count):
        name = f"cycle-{number % 100}"
        steps = (
            running.manage("POST", f"/models?url=account-1.0.mar&model_name={name}&initial_workers=1"),
            running.predict(name, name.encode()),
            running.manage("DELETE", f"/models/{name}"),
        )
        if [reply.status for reply in steps] != [200] * 3 or steps[1].json()["sha256"] != digest(name.encode()):
            under.problems.append(f"cycle {number}: {[(reply.status, reply.body[:200]) for reply in steps]}")
        threading.Event().wait(begun + (end - begun) * (number + 1) / count - time.monotonic())


def _memory(under: Rig) -> dict[psutil.Process, int]:
    """Of the workers that stay and of the fork server."""
    found = {}
    for process in processes_in(under.running.folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.pid != under.running.pid:
                found[process] = process.memory_info().rss
    return found


def _sample(under: Rig, samples: list[int], over: threading.Event) -> None:
    server = psutil.Process(under.running.pid)
    while not over.wait(SAMPLE):
        samples.append(server.memory_info().rss)


def _nothing(outcome: Outcome, faults: Counter[str]) -> bool:
    """Nothing goes wrong here."""
    return False
