"""A worker's process as the server knows it: pid, pidfd, channel, progress page, output. Front end's process.

The pidfd is the truth about life and death: it cannot be reused, and it works whoever the parent is.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from mms import arena, sharedpage, wire
from mms.allocator import keep_freed_memory
from mms.arena import Arena
from mms.workers.budget import how_it_ended
from mms.workers.forkprocess import let_open_files
from mms.workers.forkserver import UnsafeFork
from mms.workers.sandbox import new_scratch

CHANNEL_BUFFER = 1 << 20
_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a worker is started. With an `interpreter` it is that program's fresh process, else a fork."""

    name: str
    directory: str
    environ: Mapping[str, str]
    preload: tuple[str, ...]
    scratch: Path  # where each gets a folder for its temporary files
    sandbox: wire.Sandbox
    interpreter: str | None = None
    threads: int = 1
    preprocess_threads: int = 0


class WorkerProcess:
    """One worker process; owns its descriptors and its scratch folder."""

    def __init__(
        self,
        pid: int,
        pidfd: int,
        channel: socket.socket,
        page: mmap.mmap,
        output: int,
        scratch: Path,
        arena: Arena | None = None,
    ) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.channel = channel
        self.output = output
        self.scratch = scratch
        self.arena = arena
        self._page = page

    def progress(self) -> tuple[int, int, float]:
        """Jobs finished and begun since the start, and when the batch in hand began (monotonic; 0 while idle)."""
        done, started, begun_at = sharedpage.PROGRESS.unpack_from(self._page)
        return done, started, begun_at

    def cancel(self, job: int) -> None:
        """Nobody waits for this job, or the rest of its stream: the worker sees it before it goes on with it."""
        if not self._page.closed:
            sharedpage.write_cancelled(self._page, job)

    @property
    def busy(self) -> bool:
        """Whether the worker is at work, be it for another front end; False while it has only one."""
        return sharedpage.read_busy(self._page)

    @property
    def stopped(self) -> bool:
        """Whether somebody has stopped it (SIGSTOP), so that it waits for nobody."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
        except OSError:
            return False

    def running(self) -> list[tuple[float, tuple[int, ...]]]:
        """Of a worker with several threads: when each of those at work began, and the places of its jobs."""
        return list(sharedpage.read_slots(self._page))

    def resident_bytes(self) -> int:
        """Memory that it holds now, with what it shares with others; 0 when it has ended."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * mmap.PAGESIZE
        except OSError:
            return 0

    def private_bytes(self) -> int:
        """Memory that it shares with no other process: what one more of its kind costs. 0 when it has ended.

        For a large process that takes milliseconds: call it outside the event loop.
        """
        try:
            lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            return 0
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))

    def kill(self) -> None:
        """SIGKILL the worker and everything in its process group. Safe until it is reaped."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def reap(self) -> str | None:
        """How the process ended, or None while it runs. Its helpers are killed with it."""
        try:
            status = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # it ended before it became our child: the process that forked it is about to end
            return None if os.path.exists(f"/proc/{self.pid}") else "unknown exit"
        if status is None:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # the pid is still ours: nobody has reaped it
        os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        return how_it_ended(status.si_status if status.si_code == os.CLD_EXITED else -status.si_status)

    def close(self, *, keep_scratch: bool = False) -> None:
        """Release the descriptors; after the transports that use channel and output are closed."""
        os.close(self.pidfd)
        self._page.close()
        if self.arena is not None:
            self.arena.close()
        if not keep_scratch:
            _remove(self.scratch)


class Forker(Protocol):
    """What workers are forked from."""

    async def fork(
        self, preload: tuple[str, ...], request: wire.ForkRequest, descriptors: Sequence[int]
    ) -> tuple[int, int]:
        """Its pid and pidfd. Raises ForkServerDied, or UnsafeFork: then it is to be a fresh interpreter."""
        ...


async def launch(how: Launch, forker: Forker) -> WorkerProcess:
    """Start a worker. Raises ForkServerDied or OSError, with nothing left behind."""
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    page = arena.create(sharedpage.page_size(how.threads, how.preprocess_threads))
    scratch = None
    try:
        scratch = new_scratch(how.scratch, how.name, how.sandbox)
        bodies, shared = arena.attach(page)
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHANNEL_BUFFER)
        if how.interpreter is None:
            pid, pidfd = await _fork_or_spawn(how, forker, scratch, theirs, page, write_end)
        else:
            pid, pidfd = _spawn(how, scratch, theirs, page, write_end)
    except BaseException:
        ours.close()
        os.close(read_end)
        if scratch is not None:
            _remove(scratch)
        raise
    finally:
        theirs.close()
        os.close(write_end)
        os.close(page)
    return WorkerProcess(pid, pidfd, ours, shared, read_end, scratch, bodies)


async def _fork_or_spawn(
    how: Launch, forker: Forker, scratch: Path, channel: socket.socket, page: int, output: int
) -> tuple[int, int]:
    request = wire.ForkRequest(dict(how.environ), how.name, how.directory, os.getpid(), str(scratch), how.sandbox)
    try:
        return await forker.fork(how.preload, request, (channel.fileno(), page, output))
    except UnsafeFork:
        return _spawn(how, scratch, channel, page, output)


def _spawn(how: Launch, scratch: Path, channel: socket.socket, page: int, output: int) -> tuple[int, int]:
    """A fresh process of the server's Python, which becomes one of the worker's own in its sandbox."""
    sandbox = how.sandbox
    own: tuple[str, ...] = ()
    if how.interpreter is not None:
        own = ("--interpreter", how.interpreter)
        if sandbox.files:
            sandbox = msgspec.structs.replace(sandbox, read=(*sandbox.read, str(Path(how.interpreter).parents[1])))
    arguments = [
        "--channel",
        str(channel.fileno()),
        "--page",
        str(page),
        "--server",
        str(os.getpid()),
        "--name",
        how.name,
        "--scratch",
        str(scratch),
        "--sandbox",
        msgspec.json.encode(sandbox).decode(),
        *own,
    ]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "mms.backend", *arguments],
        pass_fds=(channel.fileno(), page),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd=how.directory,
        env=dict(how.environ),
        start_new_session=True,
    )
    pidfd = os.pidfd_open(process.pid)
    process.returncode = 0  # the pidfd is waited for, not this object: keeps its destructor from reaping or warning
    return process.pid, pidfd


def _remove(scratch: Path) -> None:
    """Mostly it is empty; else a thread does it, as there may be much in it."""
    try:
        scratch.rmdir()
    except OSError:
        asyncio.get_running_loop().run_in_executor(None, partial(shutil.rmtree, scratch, ignore_errors=True))


def prepare_process() -> None:
    """Orphans of a fork server become children of this process, which gets as many descriptors as the system allows,
    and keeps memory for large bodies.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    let_open_files()
    keep_freed_memory()


def reap_orphans(known: set[int]) -> list[int]:
    """Wait for dead children that nobody knows, and kill those that have left their worker: this process adopts both.

    What a worker starts is known by its oom_score_adj. Returns the pids of the killed ones.
    """
    own = os.getpid()
    try:
        children = Path(f"/proc/{own}/task/{own}/children").read_text()
        own_score = _oom_score(own)
    except OSError:  # no descriptor is left: at the next look
        return []
    killed = []
    for pid in map(int, children.split()):
        if pid in known:
            continue
        if _is_zombie(pid):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            continue
        with contextlib.suppress(OSError):  # it has just ended, or no descriptor is left
            if _oom_score(pid) > own_score:
                os.kill(pid, signal.SIGKILL)  # it is our child, so the pid is still its own
                killed.append(pid)
    return killed


def _oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
