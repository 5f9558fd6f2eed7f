"""What can be known before nginx runs: whether it takes the configuration, and whether the ports are free."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

from mms.errors import StartError
from mms.ports import cannot_listen, check_unused

CHECK_TIMEOUT = 10.0
BACKLOG = 511  # as nginx asks for

_LISTEN = re.compile(r'^\s*listen "((?:[^"\\]|\\.)*)"', re.MULTILINE)
_PROCESSES = re.compile(r"^worker_processes (\d+);", re.MULTILINE)
_VERSION = re.compile(r"^nginx version: \S*/(\S+).*", re.MULTILINE)
_REASON = re.compile(r"\[(?:emerg|alert|crit)\](?: \d+#\d+:)? (.*)")


def listen_addresses(text: str) -> list[str]:
    """The public addresses in a rendered configuration."""
    return [re.sub(r"\\(.)", r"\1", match) for match in _LISTEN.findall(text)]


def worker_count(text: str) -> int:
    """How many workers a rendered configuration asks for."""
    match = _PROCESSES.search(text)
    return int(match[1]) if match else 1


def nginx_command(program: str, directory: Path, file: Path, *, log: str = "stderr") -> list[str]:
    """How nginx is called for this run directory; `log` is what it writes to before it has read the file."""
    return [program, "-p", f"{directory}/", "-c", str(file), "-e", log]


def check_file(program: str, directory: Path, file: Path) -> str:
    """Runs `nginx -t` on the file, returns nginx's version. Raises StartError with nginx's own reason in one line."""
    command = [*nginx_command(program, directory, file), "-v", "-t"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=nginx_environment(), timeout=CHECK_TIMEOUT
        )
    except OSError as error:
        raise StartError(f"{program}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise StartError(f"{program} -t gave no answer in {CHECK_TIMEOUT:g} s") from None
    output = done.stderr.decode(errors="replace")
    if done.returncode != 0:
        raise StartError(f"{program} refused its configuration: {_reason(output)}")
    match = _VERSION.search(output)
    return match[1] if match else ""


def _reason(output: str) -> str:
    match = _REASON.search(output)
    lines = _VERSION.sub("", output).strip().splitlines()
    return match[1].strip() if match else lines[0] if lines else "it gave no reason"


def nginx_environment() -> dict[str, str]:
    """Ours without NGINX, by which an nginx hands its listening sockets to its successor."""
    return {name: value for name, value in os.environ.items() if name != "NGINX"}


def socket_address(address: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """What `socket.connect` and `socket.bind` take for a public address; `*` is every IPv4 address."""
    if address.startswith("unix:"):
        return socket.AF_UNIX, address.removeprefix("unix:")
    host, _, port = address.rpartition(":")
    if host.startswith("["):
        return socket.AF_INET6, (host.strip("[]"), int(port))
    return socket.AF_INET, ("0.0.0.0" if host == "*" else host, int(port))


def accepts(address: str) -> bool:
    """Whether somebody takes connections there now."""
    family, target = socket_address(address)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(target)
        except OSError:
            return False
    return True


def listen(address: str) -> socket.socket:
    """A listening socket on a public address, for nginx to inherit; the socket file that a dead server left gives way.

    Raises StartError that names the address if it is taken.
    """
    family, target = socket_address(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    # nginx leaves this as it finds it: else a worker whose connection another one has taken would wait for the next
    sock.setblocking(False)
    try:
        if isinstance(target, str):
            check_unused(target)
            Path(target).unlink(missing_ok=True)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(target)
        if isinstance(target, str):
            Path(target).chmod(0o666)  # as nginx does
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise cannot_listen(address, error) from None
    except StartError:
        sock.close()
        raise
    return sock


def check_free(address: str) -> None:
    """Raises StartError that names the address if it is taken."""
    sock = listen(address)
    sock.close()
    remove_socket_file(address)


def has_lost_its_file(address: str) -> bool:
    """Whether somebody has deleted the file of a Unix socket: nobody can connect to it any more."""
    return address.startswith("unix:") and not os.path.lexists(address.removeprefix("unix:"))


def remove_socket_file(address: str) -> None:
    if address.startswith("unix:"):
        Path(address.removeprefix("unix:")).unlink(missing_ok=True)
