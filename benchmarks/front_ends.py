"""`python -m benchmarks.front_ends`: what a second front end brings where one is the limit, with large JSON bodies.

Bodies that come in small chunks cost a front end much and the load generator and the workers little, so that two cores
are enough to see two front ends answer more. Of bodies with a length, whose cost all of them share, a machine without
cores for each is judged by CPU time: so many requests per second are answered at most, as the busiest front end could
take if it had a core for itself. Each front end is bound to a core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.load import LoadError, put_load
from benchmarks.servers import Server, ServerError, Spec, mms_command, running
from benchmarks.steal import quietly

BAR = 1.6
CONNECTIONS = 64
WARM_UP = 2.0
LARGE, SMALL, CHUNK = 256 << 10, 1 << 10, 1 << 10


@dataclass(frozen=True)
class Case:
    """A JSON body of `size` bytes, in chunks of `chunk` bytes if that is not 0; `figure` of two is held against one's.

    A case without a bar is only shown.
    """

    size: int
    figure: str
    chunk: int = 0
    bar: float = 0.0

    def __str__(self) -> str:
        return f"{self.size >> 10} KiB" + (f" in chunks of {self.chunk >> 10} KiB" if self.chunk else "")


CASES = (Case(LARGE, "rate", CHUNK, bar=BAR), Case(LARGE, "most", bar=BAR), Case(SMALL, "most"))
SAID = {"rate": "two front ends answered {:.2f} times what one did", "most": "two could take {:.2f} times what one can"}


@dataclass(frozen=True)
class Measured:
    """Requests per second: those that were answered, and at most; CPU µs per request: front ends, and all processes."""

    rate: float
    most: float
    front: float
    total: float


def measure(server: Server, body: Path, case: Case, seconds: float) -> Measured:
    fronts = front_ends_of(server)
    put_load(server.url, body, connections=CONNECTIONS, seconds=WARM_UP, chunk=case.chunk)

    def run() -> Measured:
        before, all_before = [cpu(pid) for pid in fronts], server.tree.seconds()
        load = put_load(server.url, body, connections=CONNECTIONS, seconds=seconds, chunk=case.chunk)
        used = [cpu(pid) - start for pid, start in zip(fronts, before, strict=True)]
        total, count = server.tree.seconds() - all_before, load.requests
        return Measured(count / load.seconds, count / max(used), 1e6 * sum(used) / count, 1e6 * total / count)

    return quietly(run)


def front_ends_of(server: Server) -> list[int]:
    """Their pids."""
    children = psutil.Process(server.pid).children()
    return [server.pid, *(child.pid for child in children if child.name() == "mms-frontend")]


def bind(processes: Sequence[int]) -> None:
    """Each to a core, all threads of it: else the system puts one and the load generator on the same for a while."""
    cores = sorted(os.sched_getaffinity(0))
    for number, pid in enumerate(processes):
        for thread in psutil.Process(pid).threads():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.sched_setaffinity(thread.id, {cores[number % len(cores)]})


def cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def document(size: int) -> bytes:
    """JSON of about that many bytes."""
    chance = random.Random(1)
    return json.dumps({"inputs": [round(chance.random(), 6) for _ in range(max(1, size // 10))]}).encode()


def compare(case: Case, body: Path, options: argparse.Namespace, table: Table) -> float:
    """Two front ends beside one, in rows of the table; returns the median of the ratios within one round."""
    found: dict[int, list[Measured]] = {1: [], 2: []}
    with running(_spec(1)) as one, running(_spec(2)) as two:
        for server in (one, two):
            bind(front_ends_of(server))
        for _ in range(options.repeat):  # in turns, so that what else the machine does meets both alike
            found[1].append(measure(one, body, case, options.seconds))
            found[2].append(measure(two, body, case, options.seconds))
    for count, runs in found.items():
        median = {name: statistics.median(getattr(run, name) for run in runs) for name in vars(runs[0])}
        table.add_row(str(count), str(case), *(f"{median[name]:.0f}" for name in ("rate", "most", "front", "total")))
    pairs = zip(found[2], found[1], strict=True)
    ratios = [getattr(second, case.figure) / getattr(first, case.figure) for second, first in pairs]
    return float(statistics.median(ratios))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.front_ends", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    table = Table("front ends", "body", "requests/s", "at most", "CPU µs, front ends", "CPU µs, all")
    ratios: dict[Case, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            print(f"measuring {case}", file=sys.stderr, flush=True)
            body = Path(folder) / f"{case.size}.json"
            body.write_bytes(document(case.size))
            ratios[case] = compare(case, body, options, table)
    console = Console(width=100)
    console.print(table)
    for case, ratio in ratios.items():
        bar = f"; at least {case.bar}" if case.bar else ""
        console.print(f"{case}: {SAID[case.figure].format(ratio)}{bar}")
    console.print(f"{len(os.sched_getaffinity(0))} cores, {CONNECTIONS} connections")
    return 0 if all(ratio >= case.bar for case, ratio in ratios.items()) else 1


def _spec(front_ends: int) -> Spec:
    commands = mms_command(1, "none", front_ends=front_ends, workers=2)
    return Spec(f"{front_ends} front ends", commands, "/predictions/noop", "/ping")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (LoadError, ServerError) as error:
        sys.exit(f"{error}")
