"""What a worker does to its own process before it loads anything. Runs in the worker process, single-threaded."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from mms import wire
from mms.backend import sandbox

_PR_SET_PDEATHSIG = 1  # prctl(2)
_PR_SET_NAME = 15
_ADOPTION_LIMIT = 5.0

_libc = ctypes.CDLL(None, use_errno=True)


def settle_in(
    *, server: int, name: str, directory: str, keep: tuple[int, ...], scratch: str, box: wire.Sandbox
) -> None:
    """Own session, the server as parent (whose death ends this process), no foreign descriptors, default signals,
    temporary files in `scratch`, and then into the sandbox. Raises sandbox.Refused.
    """
    _join(server, name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    close_all_but(keep)
    os.umask(0o077)
    os.chdir(directory)
    _use(scratch)
    sandbox.limit()
    sandbox.apply(box, directory, scratch)
    if os.getppid() != server:
        os._exit(0)  # the server has died while this process was not bound to it


def settle_again(*, server: int, name: str, scratch: str, box: wire.Sandbox) -> None:
    """As settle_in, after a fork from a process that has settled in: it is in its sandbox already."""
    _join(server, name)
    _use(scratch)
    sandbox.take_home(box, scratch)


def redirect_output(output: int) -> None:
    """Standard output and error go to the model's log; standard input is empty."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # new objects: the old ones remember whether their file could seek, and a pipe cannot
    sys.stdout = _writer(1)
    sys.stderr = _writer(2)


def _writer(fd: int) -> TextIO:
    return open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def replace_environment(environ: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environ)


def close_all_but(keep: tuple[int, ...]) -> None:
    """Close every descriptor from 3 on that is not in `keep`."""
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") > 0 else 1 << 16)


def die_with_parent() -> None:
    """The fork server itself must not outlive the server."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def set_name(name: str) -> None:
    """The name that `ps` and `top` show (15 bytes)."""
    _libc.prctl(_PR_SET_NAME, name.encode()[:15])


def _join(server: int, name: str) -> None:
    if os.getsid(0) != os.getpid():
        os.setsid()
    _await_parent(server)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(0)
    set_name(name)


def _use(scratch: str) -> None:
    if scratch:
        os.environ["TMPDIR"] = scratch
        tempfile = sys.modules.get("tempfile")  # a preloaded module may have asked it already
        if tempfile is not None:
            tempfile.tempdir = None  # type: ignore[attr-defined]  # sys.modules holds plain modules


def _await_parent(server: int) -> None:
    """A forked worker is adopted by the server as soon as the process between it and the fork server has ended."""
    until = time.monotonic() + _ADOPTION_LIMIT
    while os.getppid() != server:
        if time.monotonic() > until or not os.path.exists(f"/proc/{server}"):
            os._exit(71)  # EX_OSERR: the server is gone, or no child subreaper
        time.sleep(0.0005)
