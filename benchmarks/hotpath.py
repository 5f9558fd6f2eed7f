"""`make bench`: CPU per request, throughput and latency of the hot path beside the floors; needs wrk and nginx."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.load import LoadError, find_wrk, put_load
from benchmarks.servers import BATCH_1, BATCH_32, FLOOR, SPECS, Server, ServerError, running

BODY_SIZE = 1024
WARM_UP = 1.0
MANY = 64
BATCH_32_BAR = 3.0
BATCH_1_BAR = 6.0
NOISE = 1.1


@dataclass(frozen=True)
class Point:
    """One server at one number of connections: microseconds, except requests per second."""

    server: str
    connections: int
    cpu: float
    rate: float
    p50: float
    p99: float


def measure(server: Server, body: Path, *, connections: int, seconds: float) -> Point:
    """Warms the server up, then puts load on it and reads what it cost."""
    put_load(server.url, body, connections=connections, seconds=WARM_UP)
    before = server.tree.seconds()
    load = put_load(server.url, body, connections=connections, seconds=seconds)
    cpu = (server.tree.seconds() - before) / load.requests * 1e6
    return Point(server.spec.name, connections, cpu, load.requests / load.seconds, load.p50, load.p99)


def median(points: Sequence[Point]) -> Point:
    """The median of each figure by itself."""
    middle = {
        name: statistics.median(getattr(point, name) for point in points) for name in ("cpu", "rate", "p50", "p99")
    }
    return Point(points[0].server, points[0].connections, **middle)


def find(points: Sequence[Point], server: str, connections: int) -> Point | None:
    """That server's point, or None when it was not measured."""
    return next((point for point in points if (point.server, point.connections) == (server, connections)), None)


def missed_bars(points: Sequence[Point]) -> list[str]:
    """One line for each bar that is missed, or that could not be judged."""
    floor, batch_32, batch_1 = (find(points, spec.name, MANY) for spec in (FLOOR, BATCH_32, BATCH_1))
    alone_32, alone_1 = (find(points, spec.name, 1) for spec in (BATCH_32, BATCH_1))
    missed = []
    for point, bar in ((batch_32, BATCH_32_BAR), (batch_1, BATCH_1_BAR)):
        if point is None or floor is None:
            missed.append(f"not measured at {MANY} connections: a server that the bar of {bar:g} x the floor compares")
        elif point.cpu > bar * floor.cpu:
            ratio = point.cpu / floor.cpu
            missed.append(f"{point.server}, {MANY} connections: {ratio:.1f} x the floor, the bar is {bar:g} x")
    if alone_32 is None or alone_1 is None:
        missed.append("not measured at 1 connection: batch 32 or batch 1")
    elif alone_32.p50 > NOISE * alone_1.p50:
        missed.append(f"1 connection: p50 {alone_32.p50:.0f} µs with batch 32, {alone_1.p50:.0f} µs with batch 1")
    return missed


def _rounds(servers: Sequence[Server], body: Path, options: argparse.Namespace) -> list[Point]:
    """All points: the servers take turns within each round, so that a slow minute of the machine hits them alike."""
    points = []
    for connections in options.connections:
        for number in range(options.repeat):
            for server in servers:
                point = measure(server, body, connections=connections, seconds=options.seconds)
                _say(
                    f"{connections} connections, round {number + 1} of {options.repeat}, {point.server}: "
                    f"{point.cpu:.1f} µs CPU, {point.rate:,.0f}/s, p50 {point.p50:.0f} µs"
                )
                points.append(point)
    return points


def _medians(points: Sequence[Point]) -> list[Point]:
    groups: dict[tuple[int, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.connections, point.server), []).append(point)
    return [median(group) for group in groups.values()]


def run(options: argparse.Namespace) -> tuple[list[Point], list[Point]]:
    """All points and their medians. Raises ServerError or LoadError."""
    find_wrk()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        body = folder / "body"
        body.write_bytes(os.urandom(BODY_SIZE))
        servers = []
        for name in options.only:
            _say(f"starting {SPECS[name].name}")
            servers.append(stack.enter_context(running(SPECS[name])))
        points = _rounds(servers, body, options)
    return points, _medians(points)


def table(points: Sequence[Point]) -> Table:
    """The medians, with their ratio to nginx's `return 200`."""
    columns = ("connections", "server", "CPU µs/request", "x floor", "requests/s", "p50 µs", "p99 µs")
    result = Table(title=f"POST of {BODY_SIZE} bytes, one worker, a handler that does nothing")
    for column in columns:
        result.add_column(column, justify="left" if column == "server" else "right")
    for point in points:
        floor = find(points, FLOOR.name, point.connections)
        ratio = f"{point.cpu / floor.cpu:.1f}" if floor and floor.cpu else "-"
        numbers = (f"{point.cpu:.1f}", ratio, f"{point.rate:,.0f}", f"{point.p50:.0f}", f"{point.p99:.0f}")
        result.add_row(str(point.connections), point.server, *numbers)
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _numbers(text: str) -> list[int]:
    numbers = [int(word) for word in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - SPECS.keys():
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SPECS)}")
    return names


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hotpath", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one measurement (default 5)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the median counts (default 3)")
    parser.add_argument("--connections", type=_numbers, default=[1, MANY], help="default 1,64")
    parser.add_argument("--only", type=_names, default=list(SPECS), help=f"some of {','.join(SPECS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    return parser.parse_args(arguments)


def _end(number: int, frame: types.FrameType | None) -> None:
    # A second Ctrl-C must not cut short the ending of the servers.
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 for errors and, with --check, for missed bars; 130 when interrupted."""
    options = _parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    try:
        points, medians = run(options)
    except (ServerError, LoadError) as error:
        _say(f"bench failed: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    Console(width=None if sys.stdout.isatty() else 120).print(table(medians))
    missed = missed_bars(medians)
    for line in missed:
        _say(f"missed: {line}")
    if options.json:
        figures = {"medians": medians, "points": points}
        document = {name: [asdict(point) for point in some] for name, some in figures.items()}
        options.json.write_text(json.dumps({**document, "missed": missed}, indent=1))
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
