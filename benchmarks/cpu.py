"""CPU time of everything that belongs to one server, from /proc.

Belonging is known by descent, or by an environment variable that every child inherits: workers of a fork server may
have lost their parent, and nginx overwrites its environment.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

MARK = "BENCH_MARK"
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class _Stat:
    parent: int
    started: int
    seconds: float


def _stat(pid: int) -> _Stat | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if fields[0] == "Z":
        return None
    return _Stat(int(fields[1]), int(fields[19]), sum(map(int, fields[11:15])) / TICKS)


def _marked(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


@dataclass
class ProcessTree:
    """The processes of one server; once seen they stay known, whoever their parent is later."""

    roots: set[int]
    mark: str
    _known: dict[int, int] = field(default_factory=dict)

    def _stats(self) -> dict[int, _Stat]:
        everybody = {int(name): _stat(int(name)) for name in os.listdir("/proc") if name.isdigit()}
        stats = {pid: stat for pid, stat in everybody.items() if stat is not None and pid != os.getpid()}
        mine = {pid for pid, stat in stats.items() if self._known.get(pid) == stat.started}
        mine |= {pid for pid in stats if pid in self.roots or _marked(pid, self.mark)}
        while more := {pid for pid, stat in stats.items() if stat.parent in mine} - mine:
            mine |= more
        self._known = {pid: stats[pid].started for pid in mine}
        return {pid: stats[pid] for pid in sorted(mine)}

    def pids(self) -> list[int]:
        """Who belongs to the server now."""
        return list(self._stats())

    def seconds(self) -> float:
        """CPU seconds used so far, user and system, with those of reaped children."""
        return sum(stat.seconds for stat in self._stats().values())
