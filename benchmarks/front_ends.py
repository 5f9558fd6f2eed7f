"""`python -m benchmarks.front_ends`: what a second front end brings where one is the limit, with large JSON bodies.

The load generator and the workers need cores of their own: a machine with fewer is judged by CPU time. So many requests
per second are answered at most, as the busiest front end could take if it had a core for itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.load import LoadError, put_load
from benchmarks.servers import Server, ServerError, Spec, mms_command, running

BAR = 1.6
CONNECTIONS = 64
WARM_UP = 2.0
SMALL = 1 << 10


@dataclass(frozen=True)
class Measured:
    """Requests per second: those that were answered, and at most; CPU µs per request: front ends, and all processes."""

    rate: float
    most: float
    front: float
    total: float


def measure(server: Server, body: Path, seconds: float) -> Measured:
    put_load(server.url, body, connections=CONNECTIONS, seconds=WARM_UP)
    fronts = [server.pid, *(p.pid for p in psutil.Process(server.pid).children() if p.name() == "mms-frontend")]
    before, all_before = [cpu(pid) for pid in fronts], server.tree.seconds()
    load = put_load(server.url, body, connections=CONNECTIONS, seconds=seconds)
    used = [cpu(pid) - start for pid, start in zip(fronts, before, strict=True)]
    total = server.tree.seconds() - all_before
    count = load.requests
    return Measured(count / load.seconds, count / max(used), 1e6 * sum(used) / count, 1e6 * total / count)


def cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def document(size: int) -> bytes:
    """JSON of about that many bytes."""
    chance = random.Random(1)
    return json.dumps({"inputs": [round(chance.random(), 6) for _ in range(max(1, size // 10))]}).encode()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.front_ends", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--size", type=int, default=256 << 10, help="bytes of a large body")
    options = parser.parse_args()
    table = Table("front ends", "body", "requests/s", "at most", "CPU µs, front ends", "CPU µs, all")
    ratios: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in (options.size, SMALL):
            body = Path(folder) / f"{size}.json"
            body.write_bytes(document(size))
            found: dict[int, list[Measured]] = {1: [], 2: []}
            with running(_spec(1)) as one, running(_spec(2)) as two:
                for _ in range(options.repeat):  # in turns, so that what else the machine does meets both alike
                    found[1].append(measure(one, body, options.seconds))
                    found[2].append(measure(two, body, options.seconds))
            for count, runs in found.items():
                median = {name: statistics.median(getattr(run, name) for run in runs) for name in vars(runs[0])}
                cells = (f"{median[name]:.0f}" for name in ("rate", "most", "front", "total"))
                table.add_row(str(count), f"{size >> 10} KiB", *cells)
            pairs = zip(found[2], found[1], strict=True)
            ratios[size] = statistics.median(second.most / first.most for second, first in pairs)
    console = Console(width=100)
    console.print(table)
    for size, ratio in ratios.items():
        console.print(f"{size >> 10} KiB: two front ends could take {ratio:.2f} times what one can")
    console.print(f"{len(os.sched_getaffinity(0))} cores, {CONNECTIONS} connections; the bar is {BAR} for large bodies")
    return 0 if ratios[options.size] >= BAR else 1


def _spec(front_ends: int) -> Spec:
    commands = mms_command(1, "none", front_ends=front_ends, workers=2)
    return Spec(f"{front_ends} front ends", commands, "/predictions/noop", "/ping")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (LoadError, ServerError) as error:
        sys.exit(f"{error}")
