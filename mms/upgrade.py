"""An upgrade: the running server starts its successor and hands it the listening sockets. In both server processes.

The successor is a child process with the same command line. It is told of everything in a memory file, and talks to the
old server on a channel: lines of progress, then that it serves, or why it cannot. Until it serves, the end of the
channel ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING

import msgspec

from mms.errors import ConfigError, MMSError, StartError
from mms.models.readiness import Phase, Readiness
from mms.rundir import RunDirectory, Upgraded, note
from mms.state import State
from mms.systemd import Notifier

if TYPE_CHECKING:
    from mms.addresses import Addresses
    from mms.controlplane import ControlPlane
    from mms.edge import Edge
    from mms.reload import Reloads

log = logging.getLogger("mms.server")

SCHEMA = 1
SILENCE = 60.0  # seconds without a word after which a successor is given up: while it loads, it speaks every two
END_TIMEOUT = 4.0  # twice that is within the margin of a stop
MAX_TEXT = 8192  # characters of one line to the old server: of many models there is more to say
_HANDOVER = "_MMS_HANDOVER"
_OLD_ONLY = {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"}  # these mean the old server's process
_PROGRESS, _SERVES, _FAILED = "progress", "serves", "failed"


class Handover(msgspec.Struct, kw_only=True):
    """What the successor is told. It may be of another version of MMS: fields may be added, none change their meaning.

    `sockets` are descriptors by name (inference, management, metrics), or behind nginx by nginx's public address.
    Those of the front end that are bound to a file say in `files` to which one.
    Those whose names are in `activated` came from the service manager. `loaded` are the models and versions that have
    workers now, and must have some in the successor. `workers` is how many these are to have.
    `environ` are variables that the old server has taken out of its own environment, because they hold secrets.
    """

    schema: int = SCHEMA
    generation: int
    daemon: bool
    edge: bool
    addresses: dict[str, str]
    activated: list[str]
    sockets: dict[str, int]
    files: dict[str, tuple[int, int]] = {}
    lock: int
    channel: int
    state: State
    loaded: list[tuple[str, str]]
    workers: list[tuple[str, str, int]] = []
    environ: dict[str, str] = {}


class Predecessor:
    """The old server as its successor sees it."""

    def __init__(self, handover: Handover) -> None:
        self.handover = handover
        self.sockets = {name: socket.socket(fileno=number) for name, number in handover.sockets.items()}
        self._channel = socket.socket(fileno=handover.channel)

    def watch(self, given_up: Callable[[], None]) -> None:
        """Call it when the old server has ended, or wants no successor any more."""

        def ended() -> None:
            asyncio.get_running_loop().remove_reader(self._channel)
            log.error("the old server has given up this upgrade; stopping")
            given_up()

        asyncio.get_running_loop().add_reader(self._channel, ended)

    def stand_alone(self) -> None:
        """From now on its end does not matter."""
        asyncio.get_running_loop().remove_reader(self._channel)

    def progress(self, text: str) -> None:
        self._tell(_PROGRESS, text)

    def served(self, text: str) -> None:
        """The last word: the old server leaves the field."""
        self._tell(_SERVES, text)
        self._channel.close()

    def failed(self, reason: str) -> None:
        self._tell(_FAILED, reason)

    def _tell(self, kind: str, text: str) -> None:
        with contextlib.suppress(OSError):
            self._channel.sendall(f"{kind} {' '.join(text.split())[:MAX_TEXT]}\n".encode(errors="backslashreplace"))


def predecessor(environ: MutableMapping[str, str]) -> Predecessor | None:
    """The server that started this process as its successor, if one did. Raises StartError when it is too different."""
    number = environ.pop(_HANDOVER, None)
    if number is None:
        return None
    with open(int(number), "rb") as file:
        try:
            handover = msgspec.json.decode(file.read(), type=Handover)
        except msgspec.DecodeError as error:
            raise StartError(f"cannot take over from this version of MMS: {error}; stop and start instead") from None
    for descriptor in (handover.lock, handover.channel, *handover.sockets.values()):
        os.set_inheritable(descriptor, False)
    environ.update(handover.environ)
    found = Predecessor(handover)
    if handover.schema != SCHEMA:
        reason = "cannot take over from this version of MMS; stop and start instead"
        found.failed(reason)
        raise StartError(reason)
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
        """Return the new server's ready line when it serves. Raises StartError with the reason when it cannot."""
        reader, writer = await asyncio.open_connection(sock=self._channel)
        try:
            return await self._outcome(reader, progress)
        finally:
            writer.close()

    async def end(self) -> None:
        """It ends by itself, or has lost its channel, or is told to; at last it is killed."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
            if await self._ended():
                break
        self._reap()

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

    def _reap(self) -> None:
        os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        os.close(self._pidfd)
        self.pid = 0

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


class Upgrades:
    """One upgrade at a time. `leave` is called when another process serves in the place of this one.

    Whoever started a server that is no `daemon`, and is no service manager, would see it end: it is not upgraded.
    """

    def __init__(
        self,
        readiness: Readiness,
        control: ControlPlane,
        edge: Edge,
        addresses: Addresses,
        reloads: Reloads,
        manager: Notifier,
        run_dir: RunDirectory,
        leave: Callable[[], None],
        *,
        daemon: bool,
        environ: dict[str, str],
    ) -> None:
        self.handed_over = False
        self._readiness = readiness
        self._control = control
        self._edge = edge
        self._addresses = addresses
        self._reloads = reloads
        self._manager = manager
        self._run_dir = run_dir
        self._leave = leave
        self._daemon = daemon
        self._environ = environ
        self._successor = Successor()
        self._task: asyncio.Task[None] | None = None

    @property
    def pids(self) -> set[int]:
        return {self._successor.pid}

    def begin(self) -> None:
        """If one is under way, it is the one that is meant."""
        if self._task is None:
            self._task = asyncio.create_task(self._hand_over())

    def check_none(self) -> None:
        """Raises ConfigError while the successor loads: it has read the settings already."""
        if self._task is not None:
            raise ConfigError("the server is being upgraded; try again when that is done")

    def cancel(self) -> None:
        """The server stops: so does the successor, unless it serves already."""
        if self._task is not None:
            self._task.cancel()

    async def ended(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _hand_over(self) -> None:
        """Start a new server and end when it serves; when it does not come to that, all stays as it is."""
        before = self._run_dir.upgraded()
        number = before.number + 1 if before else 1

        def tell(progress: str, *, failure: str = "", pid: int = 0) -> None:
            note(lambda: self._run_dir.record_upgrade(Upgraded(number, progress, failure, pid)))

        tell("the new server starts")
        try:
            self._check_upgradable()
            await self._reloads.ended()
            self._control.frozen = True
            line = await self._succeed(tell)
        except Exception as error:  # whatever it is, this server serves on, and must not stay frozen
            known = isinstance(error, MMSError | OSError)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            log.error("not upgraded, everything stays as it was: %s", reason, exc_info=not known)
            try:
                await self._control.thaw()
            finally:
                self._task = None
                tell("", failure=reason)
            return
        pid = self._successor.pid
        self.handed_over = True
        self._run_dir.leave()
        self._edge.share()
        self._manager.send(f"MAINPID={pid}", "READY=1", f"STATUS={line}")
        tell(line, pid=pid)
        log.info("upgraded: pid %d serves from now on", pid)
        self._leave()

    def _check_upgradable(self) -> None:
        if self._readiness.phase is not Phase.SERVING:
            raise StartError(f"the server is {self._readiness.phase}; try again when it serves")
        if not self._daemon and not self._manager.present:
            raise StartError(
                "the server runs in the foreground, and whoever started it would see it end; "
                "start it with --daemon, or from systemd with Type=notify"
            )

    async def _succeed(self, tell: Callable[[str], None]) -> str:
        """The ready line of the successor, which serves; in any other case it is gone. Raises StartError."""
        self._successor.start(self._handover)
        try:
            line = await self._successor.serves(tell)
            if self._readiness.phase is not Phase.SERVING:
                raise StartError("the server is stopped")
        except BaseException:
            await self._successor.end()
            raise
        return line

    def _handover(self, channel: int) -> Handover:
        served = [
            (version.name, version.version, version.pool.target)
            for version in self._control.registry.versions()
            if version.pool is not None and version.pool.ready
        ]
        sockets = self._edge.sockets if self._edge.wanted else self._addresses.sockets
        return Handover(
            generation=self._run_dir.generation + 1,
            daemon=self._daemon,
            edge=self._edge.wanted,
            addresses=self._addresses.of,
            activated=self._addresses.activated,
            sockets={name: sock.fileno() for name, sock in sockets.items()},
            files=self._addresses.files,
            lock=self._run_dir.lock,
            channel=channel,
            state=self._control.snapshot(),
            loaded=[(name, number) for name, number, _ in served],
            workers=served,
            environ=self._environ,
        )
