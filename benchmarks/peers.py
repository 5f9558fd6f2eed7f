"""`make bench-peers`: the same work behind other servers, each in an environment of its own; needs wrk.

Bars are against the best of those that are installed. `--install` makes their environments, which see the torch of this
one.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import suite
from benchmarks.figures import Bench, Figure
from benchmarks.hotpath import Point, measure, middle, rounds
from benchmarks.load import LoadError, put_load
from benchmarks.options import names_of
from benchmarks.peer_servers import OURS, PEERS, Counts, absence, install, our_spec, peer_spec
from benchmarks.servers import ServerError, running

FOLDER = Path("build") / "peers"
BATCHES = (1, 32)
ONE, FEW, MANY = 1, 8, 64
SECONDS = 2.0  # with which all of it takes twelve minutes
JIT_SECONDS = 5.0  # of load until Java has compiled what is hot


@dataclass(frozen=True)
class Bars:
    """What our figures are held against, as multiples of the best peer's."""

    rate: float
    rate_of_few: float
    cpu: float


NETWORK = Bars(1.3, 2.0, 2 / 3)
BARS = {"noop": Bars(1.5, 3.0, 0.5), "mlp": NETWORK, "mlp-json": NETWORK}
ABOUT = {
    "noop": "a body of 1 KiB and no work at all",
    "mlp": "a tiny network; the handler reads and writes JSON",
    "mlp-json": "the same network beside mosec and Triton; each server reads and writes JSON itself",
}


@dataclass(frozen=True)
class Sample(Point):
    """A point, and of how many requests the batches were."""

    batch: float = 0.0


class Contender:
    """A server that runs, with the work and a batch size, until the stack is closed."""

    def __init__(
        self, stack: contextlib.ExitStack, bench: Bench, peers: Path, name: str, work: str, batch: int
    ) -> None:
        number = len(list(bench.folder.iterdir()))
        self._counts, self._body = Counts(bench.folder / f"counts-{number}"), bench.folder / f"body-{number}"
        path = self._counts.path
        spec = our_spec(work, batch, path) if name == OURS else peer_spec(peers, name, work, batch, path)
        self.name = name
        self._body.write_bytes(spec.body)
        self._server = stack.enter_context(running(spec))
        if name != OURS and PEERS[name].java:
            put_load(self._server.url, self._body, connections=FEW, seconds=JIT_SECONDS)

    def sample(self, connections: int, seconds: float) -> Sample:
        batches, requests = self._counts.read()
        try:
            point = measure(self._server, self._body, connections=connections, seconds=seconds)
        except LoadError as error:  # on a busy machine, some do not answer at all for a second
            say(f"  once more, {self.name}: {error}")
            point = measure(self._server, self._body, connections=connections, seconds=seconds)
        more_batches, more_requests = self._counts.read()
        batch = (more_requests - requests) / max(1, more_batches - batches)
        return Sample(self.name, connections, point.cpu, point.rate, point.p50, point.p99, batch)

    def resident(self) -> int:
        """Bytes of all its processes, what they share counted in each."""
        return sum(psutil.Process(pid).memory_info().rss for pid in self._server.tree.pids())


def compare(work: str, peers: Path, names: Sequence[str], bench: Bench) -> Iterator[Figure]:
    """All figures of one kind of work."""
    for batch in BATCHES:
        with contextlib.ExitStack() as stack:
            contenders = [Contender(stack, bench, peers, OURS, work, batch)]
            for name in names:
                try:
                    contenders.append(Contender(stack, bench, peers, name, work, batch))
                except (ServerError, LoadError) as error:
                    say(f"left out: {error}")
            if len(contenders) == 1:
                raise ServerError("no peer could be started")
            samples = [
                sample
                for connections in ((MANY, FEW) if batch > 1 else (MANY,))
                for sample in in_turns(contenders, connections, bench)
            ]
            memory = {contender.name: contender.resident() for contender in contenders}
        Console(width=None if sys.stdout.isatty() else 120).print(table(f"{work}, batch {batch}", samples))
        yield from judged(f"{work}, batch {batch}", BARS[work], samples)
        if work == "noop" and batch == 1:
            yield from judged_memory(memory)
    if work == "noop" and "mosec" in names:
        yield from alone(work, peers, bench)


def alone(work: str, peers: Path, bench: Bench) -> Iterator[Figure]:
    """One connection: ours with any batch size, mosec without batches."""
    with contextlib.ExitStack() as stack:
        mosec = Contender(stack, bench, peers, "mosec", work, 1)
        ours = [Contender(stack, bench, peers, OURS, work, batch) for batch in BATCHES]
        for contender, batch in zip(ours, BATCHES, strict=True):
            samples = in_turns([contender, mosec], ONE, bench)
            what = f"{work}, batch {batch}, {ONE} connection: p50, mosec without batches"
            yield against_the_best(what, samples, ONE, "p50", 1.0)


def in_turns(contenders: list[Contender], connections: int, bench: Bench) -> list[Sample]:
    """One sample per server and round. A peer that does not answer as it should is left out from then on."""
    samples: list[Sample] = []
    for _ in range(bench.repeat):
        for contender in list(contenders):
            try:
                sample = contender.sample(connections, bench.seconds)
            except LoadError as error:
                if contender.name == OURS:
                    raise
                say(f"  left out, {contender.name}: {error}")
                contenders.remove(contender)
                continue
            say(
                f"  {connections} connections, {sample.server}: {sample.rate:,.0f}/s, {sample.cpu:.1f} µs CPU, "
                f"p50 {sample.p50:,.0f} µs, p99 {sample.p99:,.0f} µs, batches of {sample.batch:.1f}"
            )
            samples.append(sample)
    names = [contender.name for contender in contenders]
    if names == [OURS]:
        raise ServerError("no peer is left")
    return [sample for sample in samples if sample.server in names]


def judged(what: str, bars: Bars, samples: Sequence[Point]) -> Iterator[Figure]:
    yield against_the_best(f"{what}, {MANY} connections: requests/s", samples, MANY, "rate", bars.rate)
    if rounds(samples, OURS, FEW):
        yield against_the_best(f"{what}, {FEW} connections: requests/s", samples, FEW, "rate", bars.rate_of_few)
    yield against_the_best(f"{what}, {MANY} connections: CPU/request", samples, MANY, "cpu", bars.cpu)
    yield against_the_best(f"{what}, {MANY} connections: p99", samples, MANY, "p99", 1.0)


def judged_memory(memory: dict[str, int]) -> Iterator[Figure]:
    """Against the best server for Python alone; the others are shown."""
    comparable = {name: size for name, size in memory.items() if name != OURS and PEERS[name].python}
    if comparable:
        best = min(comparable, key=lambda name: comparable[name])
        detail = ", ".join(f"{name} {size >> 20}" for name, size in memory.items()) + " MiB"
        what = f"memory of server and one worker, resident, of {best}'s"
        yield Figure(what, detail, memory[OURS] / memory[best], 1.0, least=False)


def against_the_best(what: str, samples: Sequence[Point], connections: int, figure: str, bar: float) -> Figure:
    """Ours as a multiple of the best peer's, which is the greatest rate, or the least of anything else."""
    most = figure == "rate"
    names = dict.fromkeys(sample.server for sample in samples if sample.server != OURS)
    found = {name: middle(rounds(samples, name, connections), figure) for name in names}
    best = (max if most else min)(found, key=lambda name: found[name])
    pairs = zip(rounds(samples, OURS, connections), rounds(samples, best, connections), strict=True)
    ratio = statistics.median(getattr(one, figure) / getattr(other, figure) for one, other in pairs)
    unit = "/s" if most else " µs"
    ours = middle(rounds(samples, OURS, connections), figure)
    return Figure(what, f"{ours:,.0f}{unit}, {best} {found[best]:,.0f}{unit}", ratio, bar, least=most)


def table(title: str, samples: Sequence[Sample]) -> Table:
    """The medians of each server."""
    result = Table(title=title)
    for column in ("conns", "server", "requests/s", "CPU µs/request", "p50 µs", "p99 µs", "mean batch"):
        result.add_column(column, justify="left" if column == "server" else "right")
    for server, connections in dict.fromkeys((sample.server, sample.connections) for sample in samples):
        group = rounds(samples, server, connections)
        forms = {"rate": ",.0f", "cpu": ".1f", "p50": ",.0f", "p99": ",.0f", "batch": ".1f"}
        cells = [format(middle(group, figure), form) for figure, form in forms.items()]
        result.add_row(str(connections), server, *cells)
    return result


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def able_to(work: str, names: Sequence[str]) -> list[str]:
    """Those of the peers that are compared in this kind of work."""
    return [name for name in names if PEERS[name].own_json or work != "mlp-json"]


def scenario(work: str, options: argparse.Namespace) -> suite.Scenario:
    def run(bench: Bench) -> Iterator[Figure]:
        installed = [name for name in options.against if not absence(options.peers, name)]
        if not installed:
            raise ServerError(f"no peer is installed in {options.peers}: make peers")
        if names := able_to(work, installed):
            yield from compare(work, options.peers, names, bench)
        else:
            say(f"skipped: {work}: of {', '.join(installed)}, none is compared in it")

    run.__doc__ = ABOUT[work]
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--peers", type=Path, default=FOLDER)
    parser.add_argument("--against", type=names_of(PEERS), default=list(PEERS))
    parser.add_argument("--install", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    if options.install:
        return install(options.peers)
    for line in filter(None, [absence(options.peers, name) for name in options.against]):
        say(f"skipped: {line}")
    scenarios = {work: scenario(work, options) for work in BARS}
    text = (
        f"{__doc__} --peers FOLDER: where their environments are (default {FOLDER}); --install: make them; "
        f"--against NAMES: some of {','.join(PEERS)}."
    )
    return suite.main("peers", "Beside other servers", text, scenarios, rest, seconds=SECONDS)


if __name__ == "__main__":
    sys.exit(main())
