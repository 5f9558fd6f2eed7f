"""Why nobody can listen on an address: for the front end's sockets and for the edge."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct

import psutil

from mms.errors import StartError

MAX_UNIX_PATH = 107  # unix(7): sun_path without its final zero
_PEER = struct.Struct("3i")  # unix(7): pid, uid and gid of who listens


def check_unused(path: str) -> None:
    """Raises StartError if no Unix socket can be made at `path`; one that a dead server has left does not matter."""
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise StartError(f"the socket path {path} is longer than {MAX_UNIX_PATH} bytes; choose a shorter run_dir")
    reason = occupied(path)
    if reason:
        raise StartError(f"cannot listen on unix:{path}: {reason}, or choose another address")


def occupied(path: str) -> str:
    """Why a socket must not replace what is at `path`, and what to do; empty when it may, or nothing is there."""
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:  # missing; or binding will fail, too
        return ""
    if not is_socket:
        return "a file that is no socket is there; remove it"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)  # a full backlog is an answer, too
        failure = sock.connect_ex(path)
        if failure in (errno.ECONNREFUSED, errno.ENOENT):
            return ""
        if failure == errno.EACCES:
            return "a socket of another user is there; remove it"
        pid = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0] if not failure else 0
    return f"{_process(pid)} listens there; stop it"


def cannot_listen(address: str, error: OSError) -> StartError:
    """The error to raise when binding host:port has failed: with whoever holds the port, where that can be seen."""
    reason = ""
    port = not address.startswith("unix:")
    if port and isinstance(error, PermissionError):
        reason = "ports below 1024 need root"
    elif port and error.errno == errno.EADDRINUSE:
        reason = _owner(int(address.rpartition(":")[2]))
    return StartError(f"cannot listen on {address}: {error.strerror}{f' ({reason})' if reason else ''}")


def _owner(port: int) -> str:
    """`held by NAME (pid N)`."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f"held by {_process(connection.pid)}"
    return ""


def _process(pid: int) -> str:
    with contextlib.suppress(psutil.Error, ValueError):
        return f"{psutil.Process(pid).name()} (pid {pid})" if pid else "another process"
    return "another process"
