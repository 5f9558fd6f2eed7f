"""The worker's end of its channel: frames are handed out whole, however they lie in its buffer."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from mms import wire
from mms.backend.channel import Channel, requests_of

FACTS = wire.RequestFacts("text/plain", "", b"", False, [b"X-Number", b"1"])


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        yield ours, theirs


@pytest.mark.parametrize("sizes", [[100_000] * 8, [100_000, 200_000] * 3, [70_000] * 10, [300_000, 100_000, 250_000]])
def test_frames_that_are_sent_ahead_keep_their_heads_and_bodies(
    pair: tuple[socket.socket, socket.socket], sizes: list[int]
) -> None:
    """Those that do not fit behind the last one are moved to the front of the buffer."""
    ours, theirs = pair
    for number, size in enumerate(sizes):
        head = wire.Predict(1, [number], [size], [b"%d" % number], [FACTS], [])
        ours.sendall(wire.pack(wire.PREDICT, head, size) + b"%d" % number * size)
    ours.shutdown(socket.SHUT_WR)
    for number, (frame, payload, at) in enumerate(Channel(theirs).predictions()):
        (request,) = requests_of(frame, payload, at, 1 << 20)
        assert (frame.ids, request.id, request.headers["x-number"]) == ([number], str(number), "1")
        assert request.body == b"%d" % number * sizes[number]
    assert number == len(sizes) - 1
