"""The folder in which nginx keeps large bodies: what its killed workers have left there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path


def remove_leftovers(spool: Path, workers: Callable[[], set[int]]) -> None:
    """Delete the files in `spool` that none of the processes has open.

    nginx unlinks each as soon as it has made it; a worker that is killed in between leaves it. Nothing is deleted
    while there is a worker that cannot be looked into.
    """
    found = {}
    for path in spool.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            found[_identity(path.stat())] = path
    with contextlib.suppress(OSError):
        # afterwards: whoever has made one of these files since is among the workers
        for pid in workers() if found else ():
            for identity in _opened(pid):
                found.pop(identity, None)
        for path in found.values():
            path.unlink(missing_ok=True)


def _opened(pid: int) -> Iterator[tuple[int, int]]:
    """The files that a process has open; none when it has ended. Raises PermissionError."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), os.scandir(f"/proc/{pid}/fd") as descriptors:
        for descriptor in descriptors:
            with contextlib.suppress(FileNotFoundError):
                yield _identity(os.stat(descriptor.path))


def _identity(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino
