"""A server's two folders: the run directory (lock, pid record, sockets, logs) and, on disk, the cache directory."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pwd
import secrets
import shutil
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mms.errors import StartError

log = logging.getLogger("mms.server")


@dataclass(frozen=True)
class Running:
    """What `mms stop` and `mms status` know of the server in a run directory; with TLS, addresses begin with https."""

    pid: int
    inference_address: str
    management_address: str
    metrics_address: str
    stop_limit: float  # seconds in which the server has ended after SIGTERM, if all is well
    management_token_file: str = ""
    inference_token_file: str = ""
    tls_cert: str = ""


@dataclass(frozen=True)
class Reloaded:
    """What became of a reload; `number` counts those of the server in a run directory."""

    number: int
    applied: list[str]
    restart: list[str]  # settings that have changed, but only a restart changes
    failure: str


@dataclass(frozen=True)
class Upgraded:
    """How far an upgrade is; `number` counts those in a run directory."""

    number: int
    progress: str
    failure: str = ""
    pid: int = 0  # of the new server, when it serves


class RunDirectory:
    """Owned by one server at a time, through a lock that ends with its process.

    In an upgrade the new server (of the next `generation`) shares it with the old one, each with its own sockets.
    """

    def __init__(self, path: Path, generation: int = 1) -> None:
        end = f"-{generation}" if generation > 1 else ""
        self.path = path
        self.generation = generation
        self.sockets = path / f"sockets{end}"
        self.nginx = path / f"nginx{end}"
        self.logs = path / "logs"
        self._record = path / "mms.json"
        self._reload = path / "reload.json"
        self._upgrade = path / "upgrade.json"
        self._lock = -1
        self._owned = False  # else another server is the one that runs here

    def prepare(self) -> None:
        """Make it if it is missing. Raises StartError, also when others can write there."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_private(self.path, "run")
        except OSError as error:
            raise StartError(f"cannot use the run directory {self.path}: {error.strerror}") from None

    def acquire(self, edge_user: tuple[str, int] | None) -> None:
        """Make it and lock it; what a killed server left is removed. Raises StartError.

        `edge_user` is the name and group id of the user that nginx's workers run as, if that is not this user.
        """
        edge_group = edge_user[1] if edge_user else None
        self.prepare()
        try:
            self.path.chmod(0o700 if edge_group is None else 0o711)  # nginx's workers pass through it to the sockets
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(f"cannot use the run directory {self.path}: {error.strerror}") from None
        if not _locked(self._lock):
            os.close(self._lock)
            self._lock = -1
            pid = record.pid if (record := self.recorded()) else "unknown"
            raise StartError(
                f"a server (pid {pid}) is running in {self.path}; stop it with mms stop, or choose another --run-dir"
            )
        self._owned = True
        for file in (self._record, self._reload, self._upgrade):
            file.unlink(missing_ok=True)
        for left in (self.sockets, *self.path.glob("sockets-*"), *self.path.glob("nginx-*")):
            shutil.rmtree(left, ignore_errors=True)
        self._make_sockets(edge_user)

    def inherit(self, lock: int, edge_user: tuple[str, int] | None) -> None:
        """Share it with the server whose lock this is, until `take_over`. Raises StartError."""
        self._lock = lock
        self.prepare()
        try:
            mine, there = os.fstat(lock), (self.path / "lock").stat()
        except OSError as error:
            raise StartError(f"cannot use the run directory {self.path}: {error.strerror}") from None
        if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
            raise StartError(
                f"run_dir = {self.path} is not that of the running server; an upgrade keeps it: stop and start instead"
            )
        shutil.rmtree(self.sockets, ignore_errors=True)
        self._make_sockets(edge_user)

    def take_over(self, running: Running) -> None:
        """From now on this is the server that runs here."""
        self.record(running)
        self._owned = True

    def leave(self) -> None:
        """Another server has taken over."""
        self._owned = False

    @property
    def lock(self) -> int:
        """The descriptor that a new server inherits."""
        return self._lock

    def _make_sockets(self, edge_user: tuple[str, int] | None) -> None:
        edge_group = edge_user[1] if edge_user else None
        self.sockets.mkdir(mode=0o700)
        if edge_user is not None:
            check_reachable(self.path, edge_user[0], "run")
        if edge_group is not None:
            os.chown(self.sockets, -1, edge_group)
            self.sockets.chmod(0o710)

    def record(self, running: Running) -> None:
        """Say who is running here; written whole or not at all."""
        _write(self._record, asdict(running))

    def record_reload(self, applied: list[str], restart: list[str], failure: str) -> None:
        """Say what became of a reload, for the command that waits for it."""
        before = self.reloaded()
        _write(self._reload, asdict(Reloaded(before.number + 1 if before else 1, applied, restart, failure)))

    def reloaded(self) -> Reloaded | None:
        """The latest reload."""
        try:
            return Reloaded(**json.loads(self._reload.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def record_upgrade(self, state: Upgraded) -> None:
        """Say how far an upgrade is, for the command that waits for it."""
        _write(self._upgrade, asdict(state))

    def upgraded(self) -> Upgraded | None:
        """The latest upgrade."""
        try:
            return Upgraded(**json.loads(self._upgrade.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def recorded(self) -> Running | None:
        """The server that runs here, or one that was killed: the record of one that ended by itself is gone."""
        try:
            return Running(**json.loads(self._record.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def running(self) -> Running | None:
        """The server that holds the lock, if there is one. Raises StartError when that cannot be known."""
        try:
            check_private(self.path, "run")
            fd = os.open(self.path / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StartError(f"cannot use the run directory {self.path}: {error.strerror}") from None
        try:
            if _locked(fd):
                return None
        finally:
            os.close(fd)
        record = self.recorded()
        if record is None:
            raise StartError(f"a server is just starting or ending in {self.path}; try again")
        return record

    def release(self) -> None:
        """Remove what only a running server needs, and unlock. Without the lock it is another's, and left alone."""
        if self._lock == -1:
            return
        shutil.rmtree(self.sockets, ignore_errors=True)
        if self.generation > 1 or not self._owned:
            shutil.rmtree(self.nginx, ignore_errors=True)
        for file in (self._record, self._reload, self._upgrade) if self._owned else ():
            file.unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = -1


class CacheDirectory:
    """May be used by several servers at a time. What is big and can be made again lies here, not in memory.

    Each server has a folder of its own, with a lock that ends with its process; `venvs` is shared and outlives them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.venvs = path / "venvs"
        self._servers = path / "servers"
        self.own = self._servers / f"{os.getpid()}-{secrets.token_hex(4)}"
        self.models = self.own / "models"
        self.nginx = self.own / "nginx"
        self.scratch = self.own / "scratch"
        self._lock = -1

    def acquire(self, edge_user: tuple[str, int] | None, *, for_others: bool = False) -> None:
        """Make this server's own folder, and remove those of servers that were killed. Raises StartError.

        `edge_user` is the name and group id of the user that nginx's workers run as, if that is not this user. With
        `for_others`, workers run as another user and must reach what lies in here.
        """
        try:
            _make(self.path, parents=True)
            check_private(self.path, "cache")
            _make(self._servers)
            # whoever makes or judges a folder holds this lock, so that one without its lock is a dead server's
            turn = _open_lock(self.path)
            try:
                fcntl.flock(turn, fcntl.LOCK_EX)
                dead = [found for folder in self._servers.iterdir() if (found := _dead(folder)) is not None]
                self.own.mkdir(mode=0o700)
                self._lock = _open_lock(self.own)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(turn)
            for folder, lock in dead:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
            for folder in (self.models, self.nginx, self.scratch):
                folder.mkdir(mode=0o700)
            self.venvs.mkdir(mode=0o700, exist_ok=True)
            if edge_user is not None:
                for folder in (self.own, self.nginx):
                    os.chown(folder, -1, edge_user[1])
                    folder.chmod(0o710)
            for folder in (self.own, self.models, self.scratch, self.venvs) if for_others else ():
                folder.chmod(0o711)
        except OSError as error:
            raise StartError(f"cannot use the cache directory {self.path}: {error.strerror}") from None
        if edge_user is not None:
            check_reachable(self._servers, edge_user[0], "cache")

    def release(self) -> None:
        """Remove this server's own folder."""
        if self._lock != -1:
            shutil.rmtree(self.own, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def note(write: Callable[[], None]) -> None:
    """Write what others read in the run directory; that it fails must not undo or hide what has been done."""
    try:
        write()
    except OSError as error:
        log.error("cannot write into the run directory: %s", error.strerror)


def check_private(path: Path, kind: str) -> None:
    """Nobody but this user and root may change what lies in `path`. Raises StartError, and OSError if it is missing."""
    facts = path.lstat()
    if not stat.S_ISDIR(facts.st_mode):
        raise StartError(f"the {kind} directory {path} is a link or a file, not a folder; choose another --{kind}-dir")
    if facts.st_uid not in (os.geteuid(), 0):
        raise StartError(
            f"the {kind} directory {path} is not a folder of this user, but of {_user(facts.st_uid)}; "
            f"run mms as that user, or choose another --{kind}-dir"
        )
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StartError(
            f"others may write in the {kind} directory {path} (mode {stat.S_IMODE(facts.st_mode):o}); "
            f"chmod go-w it, or choose another --{kind}-dir"
        )
    above = path.absolute().parent
    mode = above.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise StartError(
            f"anybody may rename the {kind} directory {path}: {above} is writable for all and has no sticky bit; "
            f"choose another --{kind}-dir"
        )


def check_reachable(path: Path, user: str, kind: str) -> None:
    """nginx's workers must be able to pass through every folder above `path`'s content. Raises StartError."""
    folders = (path, *path.absolute().parents)
    closed = next((folder for folder in folders if not folder.stat().st_mode & stat.S_IXOTH), None)
    if closed is not None:
        raise StartError(
            f"nginx's workers run as {user} and cannot enter {closed} (mode {closed.stat().st_mode & 0o777:o}); "
            f"choose another --{kind}-dir, or start with --edge none"
        )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _write(file: Path, content: dict[str, object]) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(content))
    temporary.rename(file)


def _make(folder: Path, *, parents: bool = False) -> None:
    """A folder that nginx's workers may pass through; one that is there is left as it is."""
    if not folder.is_dir():
        folder.mkdir(parents=parents, exist_ok=True)
        folder.chmod(0o711)


def _open_lock(folder: Path) -> int:
    return os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _locked(lock: int) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _dead(folder: Path) -> tuple[Path, int] | None:
    """The folder and its lock, if no server has it."""
    try:
        lock = _open_lock(folder)
    except OSError:
        return None
    if _locked(lock):
        return folder, lock
    os.close(lock)
    return None
