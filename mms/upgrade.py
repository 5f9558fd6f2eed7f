"""An upgrade: the running server starts its successor and hands it the listening sockets. In both server processes.

The successor is a child process with the same command line. It is told of everything in a memory file, and talks to the
old server on a channel: lines of progress, then that it serves, or why it cannot. Until it serves, the end of the
channel ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping

import msgspec

from mms.errors import StartError
from mms.state import State

SCHEMA = 1
SILENCE = 60.0  # seconds without a word after which a successor is given up: while it loads, it speaks every two
END_TIMEOUT = 15.0
_HANDOVER = "_MMS_HANDOVER"
_OLD_ONLY = {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"}  # these mean the old server's process
_PROGRESS, _SERVES, _FAILED = "progress", "serves", "failed"


class Handover(msgspec.Struct, kw_only=True):
    """What the successor is told. It may be of another version of MMS: fields may be added, none change their meaning.

    `sockets` are descriptors by name (inference, management, metrics), or behind nginx by nginx's public address.
    `loaded` are the models and versions that have workers now, and must have some in the successor.
    """

    schema: int = SCHEMA
    generation: int
    daemon: bool
    edge: bool
    addresses: dict[str, str]
    activated: bool  # the sockets came from the service manager: addresses in the settings do not count
    sockets: dict[str, int]
    lock: int
    channel: int
    state: State
    loaded: list[tuple[str, str]]


class Predecessor:
    """The old server as its successor sees it."""

    def __init__(self, handover: Handover) -> None:
        self.handover = handover
        self.sockets = {name: socket.socket(fileno=number) for name, number in handover.sockets.items()}
        self.channel = socket.socket(fileno=handover.channel)  # it ends with the old server, or when that gives us up

    def progress(self, text: str) -> None:
        self._tell(_PROGRESS, text)

    def served(self, text: str) -> None:
        self._tell(_SERVES, text)

    def failed(self, reason: str) -> None:
        self._tell(_FAILED, reason)

    def _tell(self, kind: str, text: str) -> None:
        with contextlib.suppress(OSError):
            self.channel.sendall(f"{kind} {' '.join(text.split())}\n".encode())


def predecessor(environ: Mapping[str, str]) -> Predecessor | None:
    """The server that started this process as its successor, if one did. Raises StartError when it is too different."""
    if _HANDOVER not in environ:
        return None
    with open(int(environ[_HANDOVER]), "rb") as file:
        try:
            handover = msgspec.json.decode(file.read(), type=Handover)
        except msgspec.DecodeError as error:
            raise StartError(f"cannot take over from this version of MMS: {error}; stop and start instead") from None
    for number in (handover.lock, handover.channel, *handover.sockets.values()):
        os.set_inheritable(number, False)
    found = Predecessor(handover)
    if handover.schema != SCHEMA:
        found.failed("cannot take over from this version of MMS; stop and start instead")
        raise StartError("cannot take over from this version of MMS; stop and start instead")
    return found


class Successor:
    """The new server as the old one sees it, until it serves."""

    def __init__(self) -> None:
        self.pid = 0
        self._pidfd = -1

    def start(self, tell: Callable[[int], Handover]) -> None:
        """`tell` makes the handover for the channel's descriptor. Raises StartError."""
        ours, theirs = socket.socketpair()
        memory = os.memfd_create("mms-handover")
        try:
            handover = tell(theirs.fileno())
            os.write(memory, msgspec.json.encode(handover))
            os.lseek(memory, 0, os.SEEK_SET)
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mms.cli", *sys.argv[1:]],
                stdin=subprocess.DEVNULL,
                pass_fds=(memory, theirs.fileno(), handover.lock, *handover.sockets.values()),
                env={name: value for name, value in os.environ.items() if name not in _OLD_ONLY}
                | {_HANDOVER: str(memory)},
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise StartError(f"cannot start the new server: {error.strerror}") from None
        finally:
            theirs.close()
            os.close(memory)
        self.pid = process.pid
        self._channel = ours
        self._pidfd = os.pidfd_open(process.pid)
        process.returncode = 0  # the pidfd is waited for, not this object

    async def serves(self, progress: Callable[[str], None]) -> str:
        """Return the new server's ready line when it serves; from then on it is on its own.

        Raises StartError with the reason when it cannot; it is gone then.
        """
        reader, writer = await asyncio.open_connection(sock=self._channel)
        try:
            text = await self._outcome(reader, progress)
        except BaseException:
            writer.close()
            await self._end()
            raise
        writer.close()
        return text

    async def _outcome(self, reader: asyncio.StreamReader, progress: Callable[[str], None]) -> str:
        while True:
            try:
                line = await asyncio.wait_for(reader.readline(), SILENCE)
            except TimeoutError:
                raise StartError(f"the new server said nothing for {SILENCE:g} s and was ended") from None
            kind, _, text = line.decode().rstrip().partition(" ")
            if kind == _SERVES:
                return text
            if kind == _FAILED:
                raise StartError(text)
            if not line:
                raise StartError("the new server ended before it was ready; its own words are in the log")
            progress(text)

    async def _end(self) -> None:
        """It ends by itself, or has lost its channel, or is told to; at last it is killed."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
            if await self._ended():
                break
        self._reap()

    def _reap(self) -> None:
        os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        os.close(self._pidfd)

    async def _ended(self) -> bool:
        """Whether its process ends in time."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._pidfd, over.set)
        try:
            await asyncio.wait_for(over.wait(), END_TIMEOUT)
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self._pidfd)
        return True
