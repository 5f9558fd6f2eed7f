"""Where the server listens: at the addresses of its settings, or on the sockets that its service manager passes."""

from __future__ import annotations

import itertools
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from mms.config import Config
from mms.errors import ConfigError, StartError
from mms.http.listener import bind
from mms.ports import occupied
from mms.systemd import address_of

log = logging.getLogger("mms.server")

LISTENERS = ("inference", "management", "metrics")
ANY_HOST = {"0.0.0.0", "*"}


class Addresses:
    """The public addresses, in the order of LISTENERS. Raises ConfigError when two listeners share one.

    `activated` are the names of those whose sockets the service manager has opened: their settings do not count.
    `sockets` are the front end's when it listens.
    """

    def __init__(self, config: Config, passed: Mapping[str, socket.socket]) -> None:
        self.activated = list(passed)
        self.sockets = dict(passed)
        self.of = _wanted(config) | {name: address_of(sock) for name, sock in passed.items()}
        self._paths: dict[str, str] = {}  # of the front end's Unix sockets, by listener
        self.files: dict[str, tuple[int, int]] = {}  # which file the socket of each is bound to, if it is a Unix one
        self._group: int | None = None  # that may connect to them
        self._missing: set[str] = set()  # those that cannot be made anew
        # found here, it can be said in terms of the settings
        for (one, first), (two, second) in itertools.combinations(self.of.items(), 2):
            if _overlap(first, second):
                where = first if first == second else f"{first} and {second}"
                raise ConfigError(f"{one}_address and {two}_address would both listen on {where}; each needs its own")

    @classmethod
    def inherited(
        cls,
        config: Config,
        of: Mapping[str, str],
        activated: Sequence[str],
        sockets: Mapping[str, socket.socket],
        files: Mapping[str, tuple[int, int]],
    ) -> Addresses:
        """Those of a running server, whose front end listens on `sockets`, bound to `files`: where it has bound one
        anew meanwhile, another file stands. Raises ConfigError for other settings.
        """
        for name, address in _wanted(config).items():
            if name not in activated and address != of[name]:
                raise ConfigError(
                    f"{name}_address = {address}: the running server has {of[name]}, and an upgrade keeps its sockets; "
                    "stop and start instead"
                )
        found = cls(config, {name: sockets[name] for name in activated})
        found.of = dict(of)
        found.sockets = dict(sockets)
        found.files = {name: file for name, file in files.items() if name in sockets}
        return found

    def listen(self, behind_edge: Path | None, group: int | None) -> list[socket.socket]:
        """The front end's sockets: Unix ones in the folder `behind_edge`, else the public ones. Raises StartError."""
        bound: list[socket.socket] = []
        self._group = group
        try:
            for name, public in self.of.items():
                address = public if behind_edge is None else f"unix:{behind_edge / name}.sock"
                bound.append(self.sockets.get(name) or bind(address, group=group))
                if address.startswith("unix:") and name not in self.activated:
                    self._paths[name] = address.removeprefix("unix:")
                    self.files.setdefault(name, _identity(self._paths[name]))
        except StartError:
            for sock in bound:
                sock.close()
            raise
        self.sockets = dict(zip(LISTENERS, bound, strict=True))
        return bound

    def bind_anew(self) -> dict[str, socket.socket]:
        """New sockets for the listeners whose socket file somebody has deleted: nobody could connect any more.

        The file may be there again, of a server that did the same while this one took over from it, and that has ended.
        """
        bound: dict[str, socket.socket] = {}
        for name, file in self._paths.items():
            if _identity(file) == self.files[name] or occupied(file):
                continue
            try:
                self.sockets[name] = bound[name] = bind(f"unix:{file}", group=self._group)
            except StartError as error:  # its folder may be gone, too
                if name not in self._missing:
                    log.error("the socket file of %s was deleted: %s; trying again", name, error.message)
                self._missing.add(name)
            else:
                self.files[name] = _identity(file)
                log.warning("the socket file of %s was deleted; listening anew on %s", name, file)
                self._missing.discard(name)
        return bound


def _wanted(config: Config) -> dict[str, str]:
    addresses = config.inference_address, config.management_address, config.metrics_address
    return dict(zip(LISTENERS, addresses, strict=True))


def _identity(file: str) -> tuple[int, int]:
    """Which file it is; no file is (0, 0)."""
    try:
        facts = os.lstat(file)
    except OSError:
        return 0, 0
    return facts.st_dev, facts.st_ino


def _overlap(one: str, other: str) -> bool:
    """Whether nobody can listen on both addresses."""
    if one.startswith("unix:") or other.startswith("unix:"):
        return one == other
    parts = [address.replace("localhost", "127.0.0.1").rpartition(":") for address in (one, other)]
    hosts, ports = {host for host, _, _ in parts}, {port for _, _, port in parts}
    any_host = bool(hosts & ANY_HOST) and not any(host.startswith("[") for host in hosts)
    return len(ports) == 1 and "0" not in ports and (len(hosts) == 1 or any_host)
