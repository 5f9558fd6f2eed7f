"""How faults are made that need more than a signal: mounts, name spaces, limits."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def works(*command: str) -> bool:
    """Whether this machine and user may do it."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


needs_mounts = pytest.mark.skipif(
    not works("unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"), reason="may not mount"
)
needs_pid_namespaces = pytest.mark.skipif(
    not works("unshare", "--pid", "--fork", "--mount-proc", "true"), reason="may not make a PID name space"
)


@contextlib.contextmanager
def small_disk(path: Path, size: int, *, owner: int = 0, mode: int = 0o700) -> Iterator[Path]:
    """A file system of its own at `path`."""
    path.mkdir(exist_ok=True)
    options = f"size={size},mode={mode:o},uid={owner}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextlib.contextmanager
def full(path: Path, *, free: int, owner: int = 0) -> Iterator[None]:
    """A folder on a disk with only so many bytes left."""
    with small_disk(path, free + (1 << 20), owner=owner):
        fill(path, leave=free)
        yield


def fill(path: Path, *, leave: int = 0) -> Path:
    """A file that takes all the room but `leave` bytes; deleting it mends the disk."""
    file = path / "fills-the-disk"
    left = os.statvfs(path)
    file.write_bytes(bytes(max(0, left.f_bavail * left.f_bsize - leave)))
    return file
