"""`make bench-peers`: the same work behind other servers, each in an environment of its own; needs wrk.

Bars are against the best of those that are installed. `--install` makes their environments, which see the torch of this
one.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from benchmarks import suite
from benchmarks.figures import Bench, Figure
from benchmarks.hotpath import BODY_SIZE, Point, measure, rounds
from benchmarks.models import HANDLERS, Model, spec
from benchmarks.servers import Command, Server, ServerError, Spec, running

FOLDER = Path("build") / "peers"
DELAY_MS = 2  # for which peers wait for a full batch: what they need for their best throughput
BATCHES = (1, 32)
ONE, FEW, MANY = 1, 8, 64
OURS = "mms"


@dataclass(frozen=True)
class Peer:
    """A server that pip installs: `arguments` for a folder and a port follow its file of benchmarks/handlers."""

    package: str
    path: str
    arguments: Callable[[Path, int], list[str]]
    wrapped: bool = False  # bodies are the member `body` of a JSON object

    def body(self, work: str) -> bytes:
        if not self.wrapped:
            return BODIES[work]
        value = json.loads(BODIES[work]) if work == "mlp" else base64.b64encode(BODIES[work]).decode()[:BODY_SIZE]
        return json.dumps({"body": value}).encode()


@dataclass(frozen=True)
class Bars:
    """What our figures are held against, as multiples of the best peer's."""

    rate: float
    rate_of_few: float
    cpu: float


BODIES = {"noop": os.urandom(BODY_SIZE), "mlp": json.dumps([number / 64 for number in range(64)]).encode()}
BARS = {"noop": Bars(1.5, 3.0, 0.5), "mlp": Bars(1.3, 2.0, 2 / 3)}
PEERS = {
    "mosec": Peer(
        "mosec==0.9.8",
        "/inference",
        lambda folder, port: ["--address", "127.0.0.1", "--port", str(port), "--path", f"{folder}/ipc",
                              "--timeout", "120000", "--capacity", "2048"],
    ),
    "litserve": Peer("litserve==0.2.19", "/predict", lambda folder, port: [], wrapped=True),
}  # fmt: skip


def python_of(folder: Path, name: str) -> Path:
    """Where a peer's interpreter is, if it is installed."""
    return folder.absolute() / name / "bin" / "python"


def install(folder: Path) -> None:
    """Raises CalledProcessError; pip has said why."""
    for name, peer in PEERS.items():
        python = python_of(folder, name)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", peer.package], check=True)
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip()
        # behind the peer's own: it takes from here what it has not, which is torch
        (Path(packages) / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
        print(f"{peer.package} is installed in {folder / name}", flush=True)


def peer_spec(folder: Path, name: str, work: str, batch: int) -> Spec:
    peer = PEERS[name]

    def commands(scratch: Path, port: int) -> list[Command]:
        settings = {"PEER_WORK": work, "PEER_BATCH": batch, "PEER_DELAY_MS": DELAY_MS, "PEER_PORT": port}
        environ = [f"{key}={value}" for key, value in settings.items()]
        script = str(HANDLERS / f"peer_{name}.py")
        python = str(python_of(folder, name))
        return [["env", "--unset=PYTHONPATH", *environ, python, script, *peer.arguments(scratch, port)]]

    return Spec(name, commands, peer.path, ping="", body=peer.body(work))


def our_spec(work: str, batch: int) -> Spec:
    files = ("work.py", "work_mlp.py") if work == "mlp" else ("work.py",)
    model = Model("bench", "peer_mms.py:Bench", {"batch_size": batch, "peers": {"work": work}}, files=files)
    return spec(OURS, [model], body=BODIES[work], workers=1)


def compare(work: str, folder: Path, bench: Bench) -> Iterator[Figure]:
    """All figures of one kind of work."""
    names = [name for name in PEERS if python_of(folder, name).exists()]
    if not names:
        raise ServerError(f"no peer is installed in {folder}: make peers")
    bars, alone = BARS[work], []
    for batch in BATCHES:
        specs = [our_spec(work, batch), *(peer_spec(folder, name, work, batch) for name in names)]
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(running(each)) for each in specs]
            points = measured(bench, servers)
            memory = [resident(server) for server in servers]
        of_work = f"{work}, batch {batch}"
        yield against_the_best(f"{of_work}, {MANY} connections: requests/s", points, MANY, "rate", bars.rate)
        if batch > 1:
            yield against_the_best(f"{of_work}, {FEW} connections: requests/s", points, FEW, "rate", bars.rate_of_few)
        yield against_the_best(f"{of_work}, {MANY} connections: CPU/request", points, MANY, "cpu", bars.cpu)
        yield against_the_best(f"{of_work}, {MANY} connections: p99", points, MANY, "p99", 1.0)
        if work == "noop" and batch == 1:
            best = min(memory[1:])
            detail = f"{memory[0] >> 20} MiB, best peer {best >> 20} MiB"
            yield Figure("memory of server and one worker, resident", detail, memory[0] / best, 1.0, least=False)
        alone.append(points)
    if work == "noop" and "mosec" in names:
        ours, mosec = median(alone[1], OURS, ONE, "p50"), median(alone[0], "mosec", ONE, "p50")
        detail = f"{ours:.0f} µs with batches, mosec's {mosec:.0f} µs without"
        yield Figure("noop, 1 connection: p50", detail, ours / mosec, 1.0, least=False)


def measured(bench: Bench, servers: Sequence[Server]) -> list[Point]:
    """One point per server, number of connections and round; the servers take turns."""
    points = []
    for connections in (MANY, FEW, ONE):
        for _ in range(bench.repeat):
            for server in servers:
                body = bench.folder / server.spec.name
                body.write_bytes(server.spec.body)
                points.append(measure(server, body, connections=connections, seconds=bench.seconds))
    return points


def against_the_best(what: str, points: Sequence[Point], connections: int, figure: str, bar: float) -> Figure:
    """Ours as a multiple of the best peer's, which is the greatest rate, or the least of anything else."""
    most = figure == "rate"
    names = dict.fromkeys(point.server for point in points if point.server != OURS)
    found = {name: median(points, name, connections, figure) for name in names}
    best = (max if most else min)(found, key=lambda name: found[name])
    pairs = zip(rounds(points, OURS, connections), rounds(points, best, connections), strict=True)
    ratio = statistics.median(getattr(one, figure) / getattr(other, figure) for one, other in pairs)
    unit = "/s" if most else " µs"
    detail = f"{median(points, OURS, connections, figure):,.0f}{unit}, {best} {found[best]:,.0f}{unit}"
    return Figure(what, detail, ratio, bar, least=most)


def median(points: Sequence[Point], server: str, connections: int, figure: str) -> float:
    return float(statistics.median(getattr(point, figure) for point in rounds(points, server, connections)))


def resident(server: Server) -> int:
    """Bytes of all its processes, what they share counted in each."""
    return sum(psutil.Process(pid).memory_info().rss for pid in server.tree.pids())


def scenario(work: str, folder: Path) -> suite.Scenario:
    run = partial(compare, work, folder)
    run.__doc__ = {"noop": "a body of 1 KiB and no work at all", "mlp": "a tiny network, JSON in and out"}[work]
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--peers", type=Path, default=FOLDER)
    parser.add_argument("--install", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if options.install:
        install(options.peers)
        return 0
    scenarios = {work: scenario(work, options.peers) for work in BARS}
    text = f"{__doc__} --peers FOLDER: where their environments are (default {FOLDER}); --install: make them."
    return suite.main("peers", "Beside other servers", text, scenarios, rest)


if __name__ == "__main__":
    sys.exit(main())
