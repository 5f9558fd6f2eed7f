"""What a service manager is told (sd_notify), and the sockets that it may have opened for us (socket activation)."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping, Sequence

from mms.errors import StartError

FIRST_DESCRIPTOR = 3  # sd_listen_fds(3)
PATIENCE = 1.0  # seconds for a manager that has not read the messages before
MAX_DIGITS = 15


class Notifier:
    """Sends datagrams to NOTIFY_SOCKET; without one it does nothing. A manager that does not listen is no error.

    Raises StartError when the manager wants signs of life at no time that can be.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        self.watchdog = 0.0  # seconds between two signs of life that are wanted
        if self._address and environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            self.watchdog = _number(environ, "WATCHDOG_USEC") / 2e6

    @property
    def present(self) -> bool:
        return bool(self._address)

    def send(self, *lines: str, patience: float = PATIENCE) -> None:
        """Blocks while the manager's queue is full: a READY=1 or STOPPING=1 that is lost would not be said again."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(patience)
            sock.sendto("\n".join(lines).encode(), address)

    def alive(self) -> None:
        """For the watchdog. Unread signs of life tell as much as one more."""
        self.send("WATCHDOG=1", patience=0)

    def ready(self, status: str) -> None:
        self.send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def loading(self, status: str, seconds: float) -> None:
        """The start goes on: do not lose patience for that long. Is said again and again."""
        self.send(f"EXTEND_TIMEOUT_USEC={seconds * 1e6:.0f}", f"STATUS={status}", patience=0)


def passed_sockets(environ: Mapping[str, str], names: Sequence[str]) -> dict[str, socket.socket]:
    """The listening sockets that came with this process, by FileDescriptorName= or else in the order of `names`.

    Raises StartError when one of them cannot be what it should be.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = _number(environ, "LISTEN_FDS")
    given = environ.get("LISTEN_FDNAMES", "").split(":")
    if not set(given) & set(names):  # without names, systemd gives each the name of its unit
        given = list(names)
    passed: dict[str, socket.socket] = {}
    for position in range(count):
        name = given[position] if position < len(given) else ""
        if name not in names or name in passed:
            raise StartError(
                f"socket {position + 1} of {count} from the service manager has the name {name!r}; "
                f"set FileDescriptorName= to one of {', '.join(names)}"
            )
        try:
            sock = socket.socket(fileno=FIRST_DESCRIPTOR + position)
            listens = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise StartError(f"the {name} socket from the service manager cannot be used: {error.strerror}") from None
        if not listens:
            raise StartError(f"the {name} socket from the service manager does not listen for streams")
        sock.set_inheritable(False)
        passed[name] = sock
    return passed


def _number(environ: Mapping[str, str], name: str) -> int:
    """0 without it."""
    text = environ.get(name) or "0"
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS):
        raise StartError(f"{name} = {text:.40}, from the service manager: a whole number is needed")
    return int(text)


def address_of(sock: socket.socket) -> str:
    """As in the settings: host:port or unix:/path."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"[{name[0]}]:{name[1]}" if sock.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"
