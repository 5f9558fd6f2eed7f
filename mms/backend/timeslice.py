"""Time on the CPU: who loads a model lets those who serve come first, so that requests wait less for a core.

Long time slices: since Linux 6.12 a process that wakes up mostly comes before one with a longer slice, whatever that
has left of it; else it may wait 3 to 4 ms on a core where another computes. Older kernels ignore a slice.

Pauses: who serves is not preferred where the two have just shared a core, whatever their slices. After a pause it
mostly is, as if nothing was owed any more (seen on Linux 6.18).

Cores: where another core is free, a kernel may still let a process that is copied for the first milliseconds share the
one of the event loop, so that is left out until the model's own code runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct

# a handler may replace these in their modules
from os import getpriority, listdir, sched_getaffinity, sched_getscheduler, sched_setaffinity
from threading import get_native_id
from time import sleep

LONG = 10_000_000  # ns; the kernel's own are 0.7 to 4 ms, by the number of cores
USUAL = 0  # the kernel's own

PAUSE = 0.001  # seconds

# glibc has had no function for it until 2.41
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}.get(os.uname().machine)
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")  # struct sched_attr of sched_setattr(2)

_PROCESSOR = 36  # of the fields that follow the name in /proc/PID/stat: `processor` of proc_pid_stat(5)

_libc = ctypes.CDLL(None)


def take(slice_ns: int) -> None:
    """Slices of that length for each thread of this process, and for those that it starts, where that can be.

    Policy and niceness stay as they are. A real-time or idle policy has no slices.
    """
    if _SCHED_SETATTR is None:
        return
    for thread in _threads():
        with contextlib.suppress(OSError, MemoryError):  # it has just ended, or a container forbids it
            policy, nice = sched_getscheduler(thread), getpriority(os.PRIO_PROCESS, thread)
            if policy in (os.SCHED_OTHER, os.SCHED_BATCH):
                wanted = _ATTRIBUTES.pack(_ATTRIBUTES.size, policy, 0, nice, 0, slice_ns, 0, 0)
                _libc.syscall(_SCHED_SETATTR, thread, wanted, 0)


def pause() -> None:
    """Before a step of milliseconds: to copy a process, to settle in a new one, to load, to collect garbage, to end."""
    sleep(PAUSE)


def keep_off(process: int) -> set[int]:
    """Leave out the core on which the main thread of that process has last been, where others are allowed.

    For this thread and what it starts. Returns the cores that were allowed before, for `spread`.
    """
    allowed: set[int] = set()
    with contextlib.suppress(OSError, MemoryError):  # as in `take`; or /proc is hidden
        allowed = sched_getaffinity(0)
        with open(f"/proc/{process}/stat") as file:
            core = int(file.read().rpartition(")")[2].split()[_PROCESSOR])
        if allowed > {core}:
            sched_setaffinity(0, allowed - {core})
    return allowed


def spread(allowed: set[int]) -> None:
    """Back to these cores; nothing is done if there are none."""
    if allowed:
        with contextlib.suppress(OSError):
            sched_setaffinity(0, allowed)


def _threads() -> list[int]:
    try:
        return [int(thread) for thread in listdir("/proc/self/task")]
    except (OSError, MemoryError):  # a sandbox without /proc, no descriptor left
        return [get_native_id()]
