"""Whether the kernel has killed for lack of memory: a counter of this server's control group. Front end's process."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from pathlib import Path

PROOF = 10.0  # seconds between the kernel's kill and the end of a process that holds much memory
LOOK = 1.0


class OutOfMemoryKills:
    """The kills of the last seconds that no death has been explained with yet.

    v2 counts in `memory.events`, v1 in `memory.oom_control`. Without such a counter nothing is ever claimed.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._file = _find(root)
        self._known = 0
        self._known = self._count()
        self._looked = 0.0
        self._kills: deque[float] = deque()

    def look(self, now: float) -> None:
        """Note what is new, at most once a second."""
        if now - self._looked >= LOOK:
            self._note(now)

    def claim(self) -> bool:
        """Whether a process that has just died by SIGKILL was killed for lack of memory; each kill counts once."""
        self._note(time.monotonic())
        if not self._kills:
            return False
        self._kills.popleft()
        return True

    def _note(self, now: float) -> None:
        self._looked = now
        count = self._count()
        self._kills.extend([now] * (count - self._known))
        self._known = count
        while self._kills and self._kills[0] < now - PROOF:
            self._kills.popleft()

    def _count(self) -> int:
        if self._file is not None:
            with contextlib.suppress(OSError, ValueError):
                for line in self._file.read_text().splitlines():
                    name, _, count = line.partition(" ")
                    if name == "oom_kill":
                        return int(count)
        return self._known  # at its first look, or without a descriptor to look with


def _find(root: Path) -> Path | None:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mounted, name = root / "sys/fs/cgroup" / controllers, "memory.oom_control" if controllers else "memory.events"
        for folder in (mounted / path.lstrip("/"), mounted):  # in a container its own group is where the tree begins
            if (folder / name).is_file():
                return folder / name
    return None
