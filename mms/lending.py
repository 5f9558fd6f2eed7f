"""How a worker gets a channel for each further front end. Used by the server and the workers.

The first byte of a worker's first frame brings a socket along that keeps message borders. On it comes what is lent:
per front end a channel like the worker's first one, and a file in memory with an arena and a page of its own.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket

from mms.arena import Arena, attach

_LENT = b"L"

# A handler may replace functions of these modules; a worker keeps the ones that this was imported with.
_socket = socket.socket
_recv_fds = socket.recv_fds


def lend(control: socket.socket, channel: socket.socket, file: int) -> None:
    """Give the worker one more channel. Raises OSError when it has ended."""
    socket.send_fds(control, [_LENT], [channel.fileno(), file])


def borrow(control: socket.socket) -> tuple[socket.socket, Arena, mmap.mmap] | None:
    """What the server lends, in the worker; None when it has gone. Raises OSError when no descriptor is left."""
    data, descriptors, _, _ = _recv_fds(control, len(_LENT), 2, socket.MSG_CMSG_CLOEXEC)
    if data != _LENT:
        return None
    if len(descriptors) != 2:
        raise OSError(errno.EMFILE, "no descriptor is left for a channel to a further front end")
    channel, file = descriptors
    arena, page = attach(file)
    os.close(file)  # the maps keep descriptors of their own
    return _socket(fileno=channel), arena, page
