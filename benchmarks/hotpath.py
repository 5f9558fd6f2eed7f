"""`make bench`: CPU per request, throughput and latency of the hot path beside the floors; needs wrk and nginx.

Bars that are missed are named, and what has become worse than the committed figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import socket
import statistics
import sys
import tempfile
import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import guard
from benchmarks.load import LoadError, find_wrk, put_load
from benchmarks.options import names_of
from benchmarks.servers import BATCH_1, BATCH_32, BEHIND_NGINX, FLOOR, PROXY, SPECS, Server, ServerError, running
from benchmarks.steal import quietly

BODY_SIZE = 1024
WARM_UP = 1.0
MANY = 64
MORE = 256
IDLE = 2000
BATCH_32_BAR = 2.2
BATCH_1_BAR = 4.0
NGINX_BAR = 1.15  # of nginx as a bare proxy, beside our own cost
MORE_BAR = 1.2
NOISE = 1.1
BESIDE_IDLE = f"{BATCH_32.name}, beside {IDLE:,} idle connections"


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
    return quietly(lambda: _measure(server, body, connections, seconds))


def _measure(server: Server, body: Path, connections: int, seconds: float) -> Point:
    before = server.tree.seconds()
    load = put_load(server.url, body, connections=connections, seconds=seconds)
    cpu = (server.tree.seconds() - before) / load.requests * 1e6
    return Point(server.spec.name, connections, cpu, load.requests / load.seconds, load.p50, load.p99)


def rounds(points: Sequence[Point], server: str, connections: int) -> list[Point]:
    """That server's points, one per round; empty when it was not measured."""
    return [point for point in points if (point.server, point.connections) == (server, connections)]


def middle(points: Sequence[Point], figure: str) -> float:
    """The median of one figure."""
    return float(statistics.median(getattr(point, figure) for point in points))


def ratio(points: Sequence[Point], server: str, other: str, connections: int, figure: str) -> float | None:
    """The median of `server` / `other` within each round, so that a slow minute of the machine counts for both."""
    pairs = zip(rounds(points, server, connections), rounds(points, other, connections), strict=False)
    ratios = [getattr(one, figure) / getattr(two, figure) for one, two in pairs if getattr(two, figure)]
    return statistics.median(ratios) if ratios else None


def ratios(points: Sequence[Point]) -> dict[str, float]:
    """CPU time as a multiple of the floor's, by server and connections, as it is committed.

    With a few connections it is the time to wake processes, which varies too much.
    """
    found = {}
    for server, connections in dict.fromkeys((point.server, point.connections) for point in points):
        times = ratio(points, server, FLOOR.name, connections, "cpu")
        if times is not None and server != FLOOR.name and connections >= MANY:
            found[f"{server}, {connections} connections"] = times
    return found


def missed_bars(points: Sequence[Point]) -> list[str]:
    """One line for each bar that is missed, or that could not be judged."""
    bars = [
        (BATCH_32_BAR, f"{BATCH_32.name}, {MANY} connections: CPU of the floor's",
         ratio(points, BATCH_32.name, FLOOR.name, MANY, "cpu")),
        (BATCH_1_BAR, f"{BATCH_1.name}, {MANY} connections: CPU of the floor's",
         ratio(points, BATCH_1.name, FLOOR.name, MANY, "cpu")),
        (NGINX_BAR, f"{BEHIND_NGINX.name}, {MANY} connections: CPU without our own, of a bare proxy's",
         _through_nginx(points)),
        (MORE_BAR, f"{BATCH_32.name}: CPU at {MORE} connections of that at {MANY}",
         _median([more.cpu / many.cpu for more, many in _pairs(points, (BATCH_32.name, MORE), (BATCH_32.name, MANY))])),
        (NOISE, f"{BESIDE_IDLE}: CPU of that without them",
         ratio(points, BESIDE_IDLE, BATCH_32.name, MANY, "cpu")),
        (NOISE, "1 connection: p50 with batch 32 of that with batch 1",
         ratio(points, BATCH_32.name, BATCH_1.name, 1, "p50")),
    ]  # fmt: skip
    return [
        f"{what}: {'not measured' if times is None else f'{times:.2f} x'}, the bar is {bar:g} x"
        for bar, what, times in bars
        if times is None or times > bar
    ]


def _pairs(points: Sequence[Point], one: tuple[str, int], other: tuple[str, int]) -> list[tuple[Point, Point]]:
    """Of the same rounds."""
    return list(zip(rounds(points, *one), rounds(points, *other), strict=False))


def _through_nginx(points: Sequence[Point]) -> float | None:
    """What a request costs behind nginx beyond our own cost, as a multiple of a bare proxy with an echo."""
    behind = _pairs(points, (BEHIND_NGINX.name, MANY), (BATCH_32.name, MANY))
    proxies = rounds(points, PROXY.name, MANY)
    beyond = zip(behind, proxies, strict=False)
    return _median([(point.cpu - own.cpu) / proxy.cpu for (point, own), proxy in beyond])


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _rounds(servers: Sequence[Server], body: Path, options: argparse.Namespace) -> list[Point]:
    """All points: the servers take turns within each round, so that a slow minute of the machine hits them alike."""
    points = []
    for connections in options.connections:
        for number in range(options.repeat):
            for server in servers:
                for point in _points(server, body, connections, options.seconds):
                    _say(
                        f"{connections} connections, round {number + 1} of {options.repeat}, {point.server}: "
                        f"{point.cpu:.1f} µs CPU, {point.rate:,.0f}/s, p50 {point.p50:.0f} µs"
                    )
                    points.append(point)
    return points


def _points(server: Server, body: Path, connections: int, seconds: float) -> Iterator[Point]:
    """One, and for one server another one beside idle connections."""
    yield measure(server, body, connections=connections, seconds=seconds)
    if server.spec is BATCH_32 and connections == MANY:
        with idle_connections(server.port):
            yield replace(measure(server, body, connections=connections, seconds=seconds), server=BESIDE_IDLE)


@contextlib.contextmanager
def idle_connections(port: int) -> Iterator[None]:
    """So many clients that have been answered once and say nothing."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            client.sendall(b"GET /ping HTTP/1.1\r\nHost: bench\r\n\r\n")
            client.recv(4096)
        yield


def run(options: argparse.Namespace) -> list[Point]:
    """All points. Raises ServerError or LoadError."""
    find_wrk()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        body = folder / "body"
        body.write_bytes(os.urandom(BODY_SIZE))
        servers = []
        for name in options.only:
            _say(f"starting {SPECS[name].name}")
            servers.append(stack.enter_context(running(SPECS[name])))
        return _rounds(servers, body, options)


def table(points: Sequence[Point]) -> Table:
    """The medians, each but the rate with its ratio to nginx's `return 200`."""
    result = Table(title=f"POST of {BODY_SIZE} bytes, one worker, a handler that does nothing")
    for column in ("conns", "server", "CPU µs/request", "x floor", "requests/s", "p50 µs", "x", "p99 µs", "x"):
        result.add_column(column, justify="left" if column == "server" else "right")
    for server, connections in dict.fromkeys((point.server, point.connections) for point in points):
        group = rounds(points, server, connections)
        cells = []
        for figure, form in (("cpu", ".1f"), ("p50", ".0f"), ("p99", ".0f")):
            times = ratio(points, server, FLOOR.name, connections, figure)
            cells += [format(middle(group, figure), form), "-" if times is None else f"{times:.1f}"]
        cells.insert(2, f"{middle(group, 'rate'):,.0f}")
        result.add_row(str(connections), server, *cells)
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _numbers(text: str) -> list[int]:
    numbers = [int(word) for word in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hotpath", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one measurement (default 5)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the median counts (default 3)")
    parser.add_argument("--connections", type=_numbers, default=[1, MANY, MORE], help="default 1,64,256")
    parser.add_argument("--only", type=names_of(SPECS), default=list(SPECS), help=f"some of {','.join(SPECS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.add_argument("--save", action="store_true", help=f"write the ratios to the floor into {guard.FILE.name}")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed or a figure became worse")
    return parser.parse_args(arguments)


def _end(number: int, frame: types.FrameType | None) -> None:
    # A second Ctrl-C must not cut short the ending of the servers.
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 for errors and, with --check, for missed bars and worse figures; 130 when interrupted."""
    options = _parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    try:
        points = run(options)
    except (ServerError, LoadError) as error:
        _say(f"bench failed: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    Console(width=None if sys.stdout.isatty() else 120).print(table(points))
    missed = missed_bars(points)
    kind = guard.processor()
    before, origin = guard.load(kind)
    worse = guard.changes_for_the_worse(ratios(points), before)
    for line in missed:
        _say(f"missed: {line}")
    _say(f"compared with the figures of {origin}" if before else "no figures are committed")
    for line in worse:
        _say(f"worse: {line}")
    if options.json:
        document = {"points": [asdict(point) for point in points], "missed": missed, "worse": worse}
        options.json.write_text(json.dumps(document, indent=1))
    if options.save:
        guard.save(ratios(points), kind)
    return 1 if (missed or worse) and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
