"""One nginx, as a child of the server process: check, start, reload, reopen, stop.

Everything here blocks but `listen`, `spawn` and `give_up`. `spawn`, and so `start`, must be called in the main thread:
nginx gets SIGTERM when the thread that started it ends (PR_SET_PDEATHSIG), so that it never outlives the server.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from mms.errors import StartError
from mms_nginx.check import (
    accepts,
    check_file,
    check_free,
    has_lost_its_file,
    listen,
    listen_addresses,
    nginx_command,
    nginx_environment,
    remove_socket_file,
    worker_count,
)
from mms_nginx.find import edge_user

START_TIMEOUT = 5.0
TERM_TIMEOUT = 2.0
KILL_TIMEOUT = 2.0
GIVEN_UP = "nginx is being stopped"
_POLL = 0.005

# Runs in the child before nginx does. A parent that died before prctl sends no signal, hence the second look.
_SHIM = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)\n"
    "os.getppid() == int(sys.argv[1]) or os._exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])"
)
_RESET_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)


class Nginx:
    """One nginx: the master is our child and leads a process group of its own, with its workers in it.

    It inherits its public `sockets`, by address, from us. Those that are given are served in the place of new ones, and
    may be those of another nginx that is about to end.
    """

    def __init__(
        self, program: str, directory: Path, text: str, sockets: Mapping[str, socket.socket] | None = None
    ) -> None:
        self.pid = 0
        self.pidfd = -1
        self.version = ""  # what the program said at its last check
        self.sockets = dict(sockets or {})
        self.shared = bool(sockets)  # another one serves them, too: socket files are not ours to remove
        self._program = program
        self._directory = directory
        self._file = directory / "nginx.conf"
        self._candidate = directory / "nginx.conf.new"
        self._text = text
        self._exit_code: int | None = None
        self._given_up = False

    def check(self) -> None:
        """Writes the configuration and has `nginx -t` judge it. Raises StartError with nginx's reason in one line."""
        self._prepare_directory()
        self._adopt(self._text)

    def start(self) -> None:
        """Returns when every public address accepts connections, else raises StartError and leaves no process."""
        try:
            self.prepare()
            self.spawn()
        except BaseException:
            self.stop(0)
            raise
        self.wait()

    def listen(self) -> None:
        """Its sockets, as far as there are none yet. Raises StartError."""
        for address in listen_addresses(self._text):
            if address in self.sockets and has_lost_its_file(address):
                self.sockets.pop(address).close()
            if address not in self.sockets:
                self.sockets[address] = listen(address)  # with a better reason than nginx's

    def prepare(self) -> None:
        """The first part of a start: its sockets, and what can be known before. Raises StartError."""
        self.listen()
        self.check()
        (self._directory / "nginx.pid").unlink(missing_ok=True)

    def spawn(self) -> None:
        """The second part of a start: the process. Does not wait for it. Raises StartError."""
        if self._given_up:
            raise StartError(GIVEN_UP)
        shim = [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid())]
        given = [sock.fileno() for sock in self.sockets.values()]
        # under other numbers: a descriptor that is copied to itself is inherited from glibc 2.29 on only
        taken = [max(given, default=0) + 1 + position for position in range(len(given))]
        # what it may say before it has read its file is that it inherits sockets; errors there were found by the check
        command = nginx_command(self._program, self._directory, self._file, log=os.devnull)
        self._exit_code = None
        self.pid = os.posix_spawn(
            sys.executable,
            [*shim, *command],
            nginx_environment() | {"NGINX": "".join(f"{number};" for number in taken)},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                *((os.POSIX_SPAWN_DUP2, ours, its) for ours, its in zip(given, taken, strict=True)),
            ],
            setpgroup=0,
            setsigmask=(),
            setsigdef=_RESET_SIGNALS,
        )
        self.pidfd = os.pidfd_open(self.pid)

    def wait(self) -> None:
        """The last part of a start, after `spawn`: as `start`."""
        try:
            self._wait_listening(listen_addresses(self._text))
        except BaseException:
            self.stop(0)
            raise

    def give_up(self) -> None:
        """It is about to be stopped: a start or reload that is under way in another thread ends with StartError."""
        self._given_up = True

    def exit_code(self) -> int | None:
        """None while the master runs, else its exit code or minus its signal; it is reaped, its workers killed."""
        if self._exit_code is None and self.pid:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                self._exit_code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                self._end_group()
        return self._exit_code

    def reload(self, text: str) -> None:
        """Puts a new configuration in force. Raises StartError when nginx refuses it; the old one stays in force."""
        if not self.pid or self.exit_code() is not None:
            raise StartError("nginx is not running")
        known = listen_addresses(self._text)
        self._adopt(text, [address for address in listen_addresses(text) if address not in known])
        before = self.workers()
        signal.pidfd_send_signal(self.pidfd, signal.SIGHUP)
        self._wait_reloaded(before, worker_count(text))
        self._text = text

    def reload_files(self) -> None:
        """As reload, with the same configuration: for what is in the files that it names."""
        self.reload(self._text)

    def reopen(self) -> None:
        """Has the access log opened anew, after somebody has moved it away."""
        if self.pidfd != -1:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGUSR1)

    def workers(self) -> set[int]:
        """The pids of its workers, those that are leaving among them."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        except OSError:
            return set()
        return set(map(int, children.split()))

    def stop(self, timeout: float) -> bool:
        """Lets requests in hand finish for `timeout` seconds, then insists; returns when no process of it is left.

        The result is whether it ended within `timeout`.
        """
        addresses = list(self.sockets)
        for sock in self.sockets.values():  # nginx's are the last ones now: when it closes them, clients are refused
            sock.close()
        self.sockets.clear()
        in_time = self.end(timeout)
        for address in () if self.shared else addresses:
            remove_socket_file(address)
        return in_time

    def end(self, timeout: float) -> bool:
        """As stop, but keeps the sockets for the next start: clients who connect meanwhile wait."""
        in_time = True
        for number, patience in ((signal.SIGQUIT, timeout), (signal.SIGTERM, TERM_TIMEOUT)):
            if not self.pid or self.exit_code() is not None:
                break
            in_time = number == signal.SIGQUIT
            signal.pidfd_send_signal(self.pidfd, number)
            self._wait_exit(patience)
        if self.pid and self.exit_code() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._wait_exit(KILL_TIMEOUT)
            self.exit_code()
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd != -1:
            os.close(pidfd)
        return in_time

    def _prepare_directory(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        user = edge_user()
        if user is not None:
            os.chown(self._directory, -1, user[1])
            self._directory.chmod(0o710)

    def _adopt(self, text: str, addresses: list[str] | None = None) -> None:
        self._candidate.write_text(text)
        self.version = check_file(self._program, self._directory, self._candidate)
        for address in addresses or ():
            check_free(address)
        self._candidate.replace(self._file)

    def _wait_listening(self, addresses: list[str]) -> None:
        waiting = list(addresses)
        deadline = time.monotonic() + START_TIMEOUT
        while waiting or not self._pid_written() or len(self.workers()) < worker_count(self._text):
            if self._wait_exit(_POLL):
                code = self.exit_code()
                raise StartError(f"nginx ended at its start with exit code {code}; its own words are in the log")
            if time.monotonic() > deadline:
                raise StartError(f"nginx is not ready after {START_TIMEOUT:g} s: {', '.join(waiting) or 'no workers'}")
            if self._given_up:
                raise StartError(GIVEN_UP)
            waiting = [address for address in waiting if not accepts(address)]

    def _pid_written(self) -> bool:
        try:
            return (self._directory / "nginx.pid").read_text().strip() == str(self.pid)
        except OSError:
            return False

    def _wait_reloaded(self, before: set[int], count: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while len(self.workers() - before) < count:
            if self._given_up:
                raise StartError(GIVEN_UP)
            if self._wait_exit(_POLL) or time.monotonic() > deadline:
                raise StartError("nginx did not take its new configuration; its own words are in the log")

    def _wait_exit(self, timeout: float) -> bool:
        """Whether the master ended in time; it stays unreaped, so that its process group cannot become another's."""
        return bool(select.select([self.pidfd], [], [], timeout)[0])

    def _end_group(self) -> None:
        """Kills what is left of the group and reaps the master, and its orphans where we are their subreaper."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + KILL_TIMEOUT
        while time.monotonic() < deadline:
            try:
                os.killpg(self.pid, 0)
                if os.waitpid(-self.pid, os.WNOHANG)[0] == 0:
                    time.sleep(_POLL)
            except ProcessLookupError:
                return
            except ChildProcessError:
                time.sleep(_POLL)
