"""A further front end's process, as the main process has it: started, told, heard, killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from mms import fronts
from mms.workers.budget import how_it_ended
from mms.workers.environment import quick_copies


class Front:
    """One further front end; `number` counts from 1, also over its restarts."""

    def __init__(self, number: int, told: Callable[[Front, Any], None], ended: Callable[[Front], None]) -> None:
        self.number = number
        self.counts: fronts.Counts | None = None  # when it was last asked
        self.loads: dict[int, fronts.Load] = {}  # of versions that scale by themselves
        self.leaving: set[int] = set()  # versions of which it still has requests, though they take no more
        self.cut: asyncio.Future[int] | None = None  # while it drains
        self.picture: fronts.Picture | None = None  # that it was told last
        self.asked = self.synced = 0
        self.silent_since: float | None = None
        self.cause = ""  # why it was killed
        self._told = told
        self._ended = ended
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mms.frontend", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **quick_copies(os.environ)},
            )
        self.pid = process.pid
        self._pidfd = os.pidfd_open(process.pid)
        process.returncode = 0  # the pidfd is waited for, not this object
        self._line = fronts.Line(ours, fronts.ToMain, lambda: None)
        self._line.listen(self._heard)
        asyncio.get_running_loop().add_reader(self._pidfd, self._over)

    def tell(self, message: Any, descriptors: Sequence[int] = ()) -> None:
        self._line.tell(message, descriptors)

    def sync(self) -> int:
        """Ask it whether it has done all that it was told."""
        self.asked += 1
        if self.silent_since is None:
            self.silent_since = time.monotonic()
        self.tell(fronts.Sync(self.asked))
        return self.asked

    def kill(self, cause: str) -> None:
        self.cause = self.cause or cause
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _heard(self, message: Any, descriptors: deque[int]) -> None:
        if type(message) is fronts.Synced:
            self.synced = message.number
            self.silent_since = None if self.synced == self.asked else time.monotonic()
        self._told(self, message)

    def _over(self) -> None:
        status = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        if status is None:
            return
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._line.finish()
        code = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
        self.cause = self.cause or how_it_ended(code)
        self._ended(self)
