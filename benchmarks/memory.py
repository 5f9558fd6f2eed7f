"""Memory of processes, sampled while something goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from benchmarks.cpu import ProcessTree


class Memory(threading.Thread):
    """Samples `read`, which returns bytes, every `interval` seconds."""

    def __init__(self, read: Callable[[], int], interval: float) -> None:
        super().__init__(daemon=True)
        self.samples: list[int] = []
        self._read = read
        self._interval = interval
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(self._interval):
            self.samples.append(self._read())

    def stop(self) -> None:
        self._end.set()
        self.join()


def proportional(tree: ProcessTree) -> Callable[[], int]:
    """Reads the PSS of all processes that belong to the tree now: what they share counts once."""
    pids = tree.pids()
    return lambda: sum(map(_pss, pids))


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
