"""How a worker gets a channel for each further front end. Used by the server, its front ends and the workers.

The first byte of a worker's first frame brings a socket along that keeps message borders. On it comes what is lent:
per front end a number, and beside it a channel like the worker's first one and a progress page of its own, on which
places count the jobs of that channel. In each page the worker notes whose frame it is at.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct

OWN = 1  # the number of the main process's channel; those that are lent have higher ones
TURN_AT = 32
_TURN = struct.Struct("<Q")


def read_turn(page: mmap.mmap) -> int:
    """The number of the channel whose frame the worker is at; 0 while it waits."""
    number: int = _TURN.unpack_from(page, TURN_AT)[0]
    return number


def write_turn(page: mmap.mmap, number: int) -> None:
    _TURN.pack_into(page, TURN_AT, number)


def lend(control: socket.socket, number: int, channel: socket.socket, page: int) -> None:
    """Give the worker one more channel. Raises OSError when it has ended."""
    socket.send_fds(control, [_TURN.pack(number)], [channel.fileno(), page])


def borrow(control: socket.socket) -> tuple[int, socket.socket, mmap.mmap] | None:
    """What the server lends, in the worker; None when the server has gone."""
    data, descriptors, _, _ = socket.recv_fds(control, _TURN.size, 2, socket.MSG_CMSG_CLOEXEC)
    if len(data) != _TURN.size or len(descriptors) != 2:
        return None
    channel, page = descriptors
    shared = mmap.mmap(page, 0)
    os.close(page)  # the map keeps a descriptor of its own
    return int(_TURN.unpack(data)[0]), socket.socket(fileno=channel), shared
