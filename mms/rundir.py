"""The run directory: one server's lock, pid record, sockets, extracted archives and logs."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from mms.errors import StartError


@dataclass(frozen=True)
class Running:
    """What `mms stop` and `mms status` know of the server in a run directory; with TLS, addresses begin with https."""

    pid: int
    inference_address: str
    management_address: str
    metrics_address: str
    management_token_file: str = ""
    tls_cert: str = ""


class RunDirectory:
    """Owned by one server at a time, through a lock that ends with its process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sockets = path / "sockets"
        self.models = path / "models"
        self.nginx = path / "nginx"
        self.logs = path / "logs"
        self._record = path / "mms.json"
        self._lock = -1

    def acquire(self, edge_user: tuple[str, int] | None) -> None:
        """Make it and lock it; what a killed server left is removed. Raises StartError.

        `edge_user` is the name and group id of the user that nginx's workers run as, if that is not this user.
        """
        edge_group = edge_user[1] if edge_user else None
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_owner()
            self.path.chmod(0o700 if edge_group is None else 0o711)  # nginx's workers pass through it to the sockets
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartError(f"cannot use the run directory {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = -1
            pid = running.pid if (running := self.running()) else "unknown"
            raise StartError(
                f"a server (pid {pid}) is running in {self.path}; stop it with mms stop, or choose another --run-dir"
            ) from None
        for folder in (self.sockets, self.models):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        if edge_user is not None:
            self._check_reachable(edge_user[0])
        if edge_group is not None:
            os.chown(self.sockets, -1, edge_group)
            self.sockets.chmod(0o710)

    def record(self, running: Running) -> None:
        """Say who is running here; written whole or not at all."""
        temporary = self._record.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(running)))
        temporary.rename(self._record)

    def running(self) -> Running | None:
        """The server that holds the lock, if there is one."""
        try:
            fd = os.open(self.path / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            try:
                return Running(**json.loads(self._record.read_text()))
            except (OSError, ValueError, TypeError):
                return None
        finally:
            os.close(fd)

    def release(self) -> None:
        """Remove what only a running server needs, and unlock. Without the lock it is another's, and left alone."""
        if self._lock == -1:
            return
        for folder in (self.sockets, self.models):
            shutil.rmtree(folder, ignore_errors=True)
        self._record.unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = -1

    def _check_reachable(self, user: str) -> None:
        """nginx's workers must be able to pass through every folder above the sockets."""
        closed = next(
            (folder for folder in self.path.absolute().parents if not folder.stat().st_mode & stat.S_IXOTH), None
        )
        if closed is not None:
            raise StartError(
                f"nginx's workers run as {user} and cannot enter {closed} (mode {closed.stat().st_mode & 0o777:o}); "
                "choose another --run-dir, or start with --edge none"
            )

    def _check_owner(self) -> None:
        facts = self.path.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
            raise StartError(f"the run directory {self.path} is not a folder of this user; choose another --run-dir")
        above = self.path.absolute().parent.stat().st_mode
        if above & stat.S_IWOTH and not above & stat.S_ISVTX:
            raise StartError(
                f"anybody may rename the run directory {self.path}: {self.path.absolute().parent} is writable for all "
                "and has no sticky bit; choose another --run-dir"
            )
