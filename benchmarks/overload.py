"""`make overload`: what becomes of those who ask more than a model can serve, and how soon all is well again.

A handler that sleeps 5 ms, one worker, one request at a time: its capacity is no CPU time, so that refusing costs it
none. First the capacity; then twice as much for a minute, and half of it; then five times as much, where everybody who
is refused tries again at once, and four fifths of the capacity.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import psutil

from benchmarks.memory import Memory
from benchmarks.openloop import LATENESS, Phase, Request, lateness, percentile, run
from benchmarks.servers import Server, ServerError, Spec, mms_command, running

HANDLER = (
    "import time\n\n\ndef handle(data, context):\n    if data is None:\n        return None\n"
    "    time.sleep(0.005)\n    return [b'ok'] * len(data)\n"
)
PATH = "/predictions/noop"
QUEUE = 100
OLDEST = 40  # requests that may wait to the end, while the newest are served first
IN_WORK = 1
PATIENCE = 1.0  # of the clients: a later answer is no good
NORMAL = 0.05  # seconds within which a request is answered in peace
WINDOW = 0.5
SAMPLE = 0.1
SETTLE = 15.0  # seconds of load before memory counts


class Report:
    """Prints each figure beside its bar and remembers what was missed."""

    def __init__(self) -> None:
        self.missed = 0

    def line(self, what: str, value: float, bar: float, unit: str, *, least: bool = False) -> None:
        good = value >= bar if least else value <= bar
        self.missed += not good
        sign = "at least" if least else "at most"
        print(f"  {what:44} {value:9.1f} {unit:5} {sign} {bar:8.1f}  {'ok' if good else 'MISSED'}")


def measure_capacity(server: Server, seconds: float, seed: int) -> float:
    """Answers per second while the worker never waits: half more than it can serve, without those at the edges."""
    requests = _run(server, [Phase(300.0, seconds)], seed)
    ends = sorted(r.scheduled + r.took for r in requests if r.status == 200 and 1.0 <= r.scheduled + r.took <= seconds)
    return (len(ends) - 1) / (ends[-1] - ends[0])


def _run(server: Server, phases: Sequence[Phase], seed: int) -> list[Request]:
    requests = run(server.port, PATH, phases, seed)
    late = lateness(requests)
    if late > LATENESS:
        raise ServerError(f"void: the generator was {late * 1000:.1f} ms late (p99); the machine is too busy")
    print(f"(the generator was {late * 1000:.1f} ms late, p99)")
    return requests


def good(requests: Sequence[Request]) -> list[Request]:
    return [r for r in requests if r.status == 200 and r.took <= PATIENCE]


def back_to_normal(requests: Sequence[Request], end: float) -> float:
    """Seconds after `end` until the last half second in which more than one in ten was refused or made to wait."""
    windows: dict[int, list[bool]] = {}
    for request in requests:
        if request.scheduled > end:
            bad = request.status != 200 or request.took > NORMAL
            windows.setdefault(int((request.scheduled - end) / WINDOW), []).append(bad)
    return WINDOW * max((number + 1 for number, bad in windows.items() if sum(bad) > 0.1 * len(bad)), default=0)


def twice(server: Server, capacity: float, seconds: float, seed: int, order: str, report: Report) -> None:
    """2 x capacity, then half of it."""
    process = psutil.Process(server.pid)
    memory = Memory(lambda: process.memory_info().rss, SAMPLE)
    memory.start()
    requests = _run(server, [Phase(2 * capacity, seconds), Phase(capacity / 2, 10.0)], seed)
    memory.stop()
    loaded = [r for r in requests if r.phase == 0]
    accepted = [r.took for r in loaded if r.status != 429]
    refused = [r.took for r in loaded if r.status == 429]
    statuses = {status: sum(r.status == status for r in loaded) for status in sorted({r.status for r in loaded})}
    print(f"2 x capacity for {seconds:g} s: {len(loaded)} requests, by status {statuses}")
    share = 100 * sum(r.scheduled + r.took <= seconds for r in good(loaded)) / (capacity * seconds)
    report.line("goodput (answers within 1 s) of capacity", share, 95.0, "%", least=True)
    bound = 1.1 * (QUEUE + IN_WORK) / capacity + 0.010
    print(f"  {'median of the accepted':44} {1000 * percentile(accepted, 0.5):9.1f} ms")
    if order == "fifo" or len(accepted) > 100 * OLDEST:
        report.line("p99 of the accepted", 1000 * percentile(accepted, 0.99), 1000 * bound, "ms")
    else:
        print("  p99 of the accepted: the few that wait until the end are more than 1 % of so short a run")
    report.line("p99 of refusals", 1000 * percentile(refused, 0.99), 20.0, "ms")
    report.line("normal again after", back_to_normal(requests, seconds), 2.0, "s")
    first = memory.samples[min(len(memory.samples) - 1, int(min(SETTLE, seconds / 2) / SAMPLE))]
    report.line("growth of the front end's memory", (memory.samples[-1] - first) / 2**20, 1.0, "MiB")


def storm(server: Server, capacity: float, seconds: float, seed: int, report: Report) -> None:
    """5 x capacity with three immediate retries, then 0.8 x, where a server may be stuck that works for nobody."""
    requests = _run(server, [Phase(5 * capacity, seconds, retries=3), Phase(0.8 * capacity, 10.0)], seed)
    loaded = [r for r in requests if r.phase == 0]
    tries = sum(r.tries for r in loaded)
    print(f"5 x capacity for {seconds:g} s, refused ones try three times more: {len(loaded)} requests, {tries} tries")
    later = [r for r in requests if r.scheduled > seconds + 2.0]
    report.line("goodput from 2 s after", 100 * len(good(later)) / len(later), 100.0, "%", least=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 when a bar is missed or the run is void."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the overload (default 60)")
    parser.add_argument("--order", choices=("adaptive", "fifo"), default="adaptive", help="queue_order")
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals (default 1)")
    options = parser.parse_args(arguments)
    command = mms_command(1, "none", handler=HANDLER, queue_size=QUEUE, queue_order=options.order)
    report = Report()
    try:
        with running(Spec("mms", command, PATH, "/ping")) as server:
            capacity = measure_capacity(server, 5.0, options.seed)
            print(f"capacity {capacity:.1f} requests/s, queue of {QUEUE}, {options.order}, seed {options.seed}")
            twice(server, capacity, options.seconds, options.seed, options.order, report)
            storm(server, capacity, min(10.0, options.seconds), options.seed, report)
    except ServerError as error:
        print(f"overload: {error}", file=sys.stderr)
        return 1
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
