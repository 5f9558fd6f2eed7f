"""`make bench-bodies`: what large bodies cost, both ways: CPU time beside a bare echo, and memory; needs wrk."""

from __future__ import annotations

import os
import socket
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Bench, Figure
from benchmarks.load import put_load
from benchmarks.memory import Memory, proportional
from benchmarks.models import Model, spec
from benchmarks.servers import BODY_ECHO, Server, ServerError, running
from benchmarks.steal import quietly
from benchmarks.suite import Scenario, main

SIZES = {"100 KiB": (100 << 10, 32), "10 MiB": (10 << 20, 4)}  # and from how many connections
CPU_BAR = 1.6
BIG = 10 << 20
CROWD = 16  # connections, each with a body of 10 MiB in flight
CROWDED = 5.0  # seconds: they are all answered at about the same time
MEMORY_BAR = 2.0
LIMIT = 100 << 20
LIMIT_BAR = 1.05  # the pieces of a body come with a little of their own, and what is read at a time on top
TOO_LARGE = 1 << 30
PIECE = 1 << 20
SAMPLE = 0.01
MODEL = Model("echo", "echo_body.py:EchoBody")


def cpu(bench: Bench) -> Iterator[Figure]:
    """CPU time of all processes per echo, beside that of an httptools echo without a worker."""
    with running(spec("mms", [MODEL], workers=1)) as ours, running(BODY_ECHO) as bare:
        for name, (size, connections) in SIZES.items():
            body = body_of(bench, size)
            pairs = [
                (cost(ours, body, connections, bench.seconds), cost(bare, body, connections, bench.seconds))
                for _ in range(bench.repeat)
            ]
            one, other = (statistics.median(costs) for costs in zip(*pairs, strict=True))
            ratio = statistics.median(one / other for one, other in pairs)
            detail = f"{one * 1e6:,.0f} µs, bare echo {other * 1e6:,.0f} µs"
            yield Figure(f"CPU of an echo of {name}", detail, ratio, CPU_BAR, least=False)


def memory(bench: Bench) -> Iterator[Figure]:
    """What memory of all processes grows by with each body of 10 MiB more that is in flight."""
    body = body_of(bench, BIG)
    peaks = []
    for connections in (1, CROWD):
        with running(spec("mms", [MODEL], workers=1)) as server:
            peaks.append(peak_under(server, body, connections, max(bench.seconds, CROWDED)))
    one, all_of_them = peaks
    detail = f"{all_of_them >> 20} MiB with {CROWD} at a time, {one >> 20} MiB with one"
    growth = (all_of_them - one) / (CROWD - 1) / BIG
    yield Figure("memory per echo of 10 MiB more, of its body", detail, growth, MEMORY_BAR, least=False)


def too_large(bench: Bench) -> Iterator[Figure]:
    """A body of 1 GiB whose length is not said beforehand, against a limit of 100 MiB."""
    with running(spec("mms", [MODEL], workers=1, max_request_size=LIMIT)) as server:
        at_rest = proportional(server.tree)()
        sampled = Memory(proportional(server.tree), SAMPLE)
        sampled.start()
        sent = send_chunked(server)
        sampled.stop()
    more = max(sampled.samples) - at_rest
    detail = f"{more / (1 << 20):.1f} MiB beyond {at_rest >> 20} MiB, 413 after {sent >> 20} MiB"
    yield Figure("memory of a body of 1 GiB, of the limit", detail, more / LIMIT, LIMIT_BAR, least=False)


SCENARIOS: dict[str, Scenario] = {"cpu": cpu, "memory": memory, "too-large": too_large}


def body_of(bench: Bench, size: int) -> Path:
    path = bench.folder / str(size)
    if not path.exists():
        path.write_bytes(os.urandom(size))
    return path


def cost(server: Server, body: Path, connections: int, seconds: float) -> float:
    """CPU seconds per request."""
    put_load(server.url, body, connections=connections, seconds=1.0)

    def run() -> float:
        before = server.tree.seconds()
        load = put_load(server.url, body, connections=connections, seconds=seconds)
        return (server.tree.seconds() - before) / load.requests

    return quietly(run)


def peak_under(server: Server, body: Path, connections: int, seconds: float) -> int:
    """The most memory that the server had at a time."""
    sampled = Memory(proportional(server.tree), SAMPLE)
    sampled.start()
    try:
        put_load(server.url, body, connections=connections, seconds=seconds)
    finally:
        sampled.stop()
    return max(sampled.samples)


def send_chunked(server: Server) -> int:
    """Send until the server has had enough; how much that was. Raises ServerError if it does not say 413."""
    head = f"POST {server.spec.path} HTTP/1.1\r\nHost: bench\r\nTransfer-Encoding: chunked\r\n\r\n"
    sent, chunk = 0, b"%x\r\n" % PIECE + bytes(PIECE) + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(head.encode())
        try:
            while sent < TOO_LARGE:
                client.sendall(chunk)
                sent += PIECE
        except OSError:
            return sent  # it has closed; what it said was lost with that
        answer = client.recv(64)
    if not answer.startswith(b"HTTP/1.1 413"):
        raise ServerError(f"a body of {sent} bytes was answered with {answer!r}")
    return sent


if __name__ == "__main__":
    sys.exit(main("bodies", "Large bodies", __doc__, SCENARIOS))
