"""Why nobody can listen on an address: for the front end's sockets and for the edge."""

from __future__ import annotations

import contextlib
import errno

import psutil

from mms.errors import StartError


def cannot_listen(address: str, error: OSError) -> StartError:
    """The error to raise when binding host:port has failed: with whoever holds the port, where that can be seen."""
    reason = ""
    if isinstance(error, PermissionError):
        reason = "ports below 1024 need root"
    elif error.errno == errno.EADDRINUSE:
        reason = _owner(int(address.rpartition(":")[2]))
    return StartError(f"cannot listen on {address}: {error.strerror}{f' ({reason})' if reason else ''}")


def _owner(port: int) -> str:
    """`held by NAME (pid N)`."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,) and connection.pid:
                return f"held by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""
