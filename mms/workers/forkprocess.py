"""The process of a fork server and how it is started: before the server has imported what it needs itself, too.

It imports what every worker needs, and then waits to be told what its workers need besides. Front end's process.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys

from mms.workers import environment


class ForkProcess:
    """A process that was started, and our end of its channel."""

    def __init__(self) -> None:
        let_open_files()
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.setblocking(False)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mms.backend.forkserver", "--control", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            # a worker can read what it was started with
            env={**environment.worker_environment(()), **environment.thread_counts(1)},
        )
        theirs.close()

    def end(self) -> None:
        """Kill and reap it, if that was not done before."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.control.close()


def let_open_files() -> None:
    """This process, and those that it starts, get as many descriptors as the system allows."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
