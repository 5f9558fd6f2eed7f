"""A figure and its bar, and what the scenarios of `benchmarks.engine` share to measure one."""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import SCRIPT, Load, find_wrk, put_load
from benchmarks.servers import Server
from benchmarks.steal import quietly

WARM_UP = 3.0
TURN = 1.0  # seconds: two figures that are compared are measured in turns this short
QUIET_TRIES = 10  # with which most seconds of a shared machine have one that is undisturbed


@dataclass(frozen=True)
class Figure:
    """One ratio and its bar; `least` tells whether it must be at least the bar, or at most."""

    what: str
    detail: str
    ratio: float
    bar: float
    least: bool = True

    @property
    def met(self) -> bool:
        return self.ratio >= self.bar if self.least else self.ratio <= self.bar


class Bench:
    """What the scenarios share: how long to measure, and a body to send."""

    def __init__(self, seconds: float, repeat: int, folder: Path) -> None:
        self.seconds = seconds
        self.repeat = repeat
        self.folder = folder
        self.body = folder / "body"
        self.body.write_bytes(os.urandom(1024))

    def load(
        self, server: Server, connections: int, *, model: str = "", body: Path | None = None, seconds: float = 0.0
    ) -> Load:
        """For `seconds`, or as long as one measurement takes."""
        self.at_once(server, connections, WARM_UP, model=model, body=body)
        return self.at_once(server, connections, seconds or self.seconds, model=model, body=body)

    def at_once(
        self, server: Server, connections: int, seconds: float, *, model: str = "", body: Path | None = None
    ) -> Load:
        """Without a warm-up."""
        url = server.url.rpartition("/")[0] + f"/{model}" if model else server.url
        return put_load(url, body or self.body, connections=connections, seconds=seconds)

    def quiet_p99(self, server: Server, *, model: str = "", seconds: float) -> float:
        """In µs, of one connection, while nobody else had a processor: milliseconds in a second are all of a p99."""
        return quietly(lambda: self.at_once(server, 1, seconds, model=model), bearable=0.0, tries=QUIET_TRIES).p99

    def beside(
        self,
        what: str,
        server: Server,
        other: Callable[[], AbstractContextManager[None]],
        bar: float,
        *,
        model: str = "",
    ) -> Figure:
        """The p99 of one connection while `other` is entered, of that without, in turns of a second.

        So what else the machine does meets both alike. Void where the p99 without it varies by more than the bar.
        """
        alone, beside = [], []
        for _ in range(max(1, round(self.seconds * self.repeat))):
            alone.append(self.quiet_p99(server, model=model, seconds=TURN))
            with other():
                beside.append(self.quiet_p99(server, model=model, seconds=TURN))
        with_it, without = statistics.median(beside), statistics.median(alone)
        spread = max(alone) / min(alone)
        void = f"; void: alone it varies by {spread:.1f}" if spread > bar else ""
        detail = f"p99 {with_it / 1000:.1f} ms, alone {without / 1000:.1f} ms{void}"
        return Figure(what, detail, with_it / without, bar, least=False)

    def rates(self, server: Server, other: Server, connections: int) -> tuple[float, float, float]:
        """Requests per second of both, and the median of the ratio of each round."""
        pairs = []
        for _ in range(self.repeat):
            one, two = self.load(server, connections), self.load(other, connections)
            pairs.append((one.requests / one.seconds, two.requests / two.seconds))
        firsts, seconds = zip(*pairs, strict=True)
        return statistics.median(firsts), statistics.median(seconds), statistics.median(a / b for a, b in pairs)


@contextmanager
def background(server: Server, bench: Bench, model: str, connections: int = 1) -> Iterator[None]:
    """Steady load on a model of the server meanwhile: as much as it can take, one at a time on each connection."""
    url = server.url.rpartition("/")[0] + f"/{model}"
    until_it_is_ended = "-d1h"
    command = [find_wrk(), "-t1", f"-c{connections}", until_it_is_ended, "-s", str(SCRIPT), url, "--", str(bench.body)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()
