"""A fork whose child belongs to the server, however its maker ends: for fork servers and templates. Their process.

The maker forks a process that forks the worker, sends its pidfd to the server and ends: so the server, a child
subreaper, becomes the worker's parent.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable

from mms import wire
from mms.backend import timeslice

Send = Callable[[wire.ForkReply, list[int]], None]


def fork_worker(send: Send, descriptors: list[int], become: Callable[[], None]) -> None:
    """`become` runs in the worker and does not return; here, `descriptors` are closed."""
    timeslice.pause()
    try:
        between = os.fork()
    except OSError as error:
        send(wire.ForkReply(0, f"fork failed: {error.strerror}"), [])
    else:
        if between == 0:
            _fork_again(send, become)
        os.waitpid(between, 0)
    for descriptor in descriptors:
        os.close(descriptor)


def reseed() -> None:
    """A worker's own time zone and random numbers, whatever its maker had; Python's `random` sees to itself."""
    time.tzset()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _fork_again(send: Send, become: Callable[[], None]) -> None:
    try:
        timeslice.pause()
        pid = os.fork()
        if pid == 0:
            _live(become)
        send(wire.ForkReply(pid, ""), [os.pidfd_open(pid)])
    except OSError as error:
        send(wire.ForkReply(0, f"fork failed: {error.strerror}"), [])
    finally:
        os._exit(0)


def _live(become: Callable[[], None]) -> None:
    try:
        timeslice.pause()
        become()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)  # EX_SOFTWARE: a worker leaves by itself
