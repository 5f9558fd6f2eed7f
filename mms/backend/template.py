"""A template: it has loaded the handler, runs nothing, and forks the workers, which share its memory. Its own process.

It comes into being as any worker does, in the same sandbox and environment, and speaks with the server on its channel.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from array import array
from collections.abc import Callable
from functools import partial

from mms import wire
from mms.backend import process, timeslice
from mms.backend.forking import fork_worker, reseed
from mms.backend.loader import limit_threads
from mms.backend.stages import Stages

READ_SIZE = 256 << 10
_Live = Callable[[socket.socket, int], None]


def serve(channel: socket.socket, live: _Live, forked: Callable[[], object]) -> int:
    """Fork a worker per FORK frame until the server closes the channel; each worker's life is `live`.

    `forked` is called after each fork: what only one worker is to inherit is let go of here.
    """
    timeslice.pause()
    gc.collect()
    gc.freeze()  # pages that the collector never writes stay shared
    threads = len(os.listdir("/proc/self/task"))
    channel.sendall(wire.pack(wire.LOADED, wire.Preloaded([], threads)))
    while (received := _receive(channel)) is not None:
        request, descriptors = received
        sys.stdout.flush()
        sys.stderr.flush()
        fork_worker(partial(_send, channel), descriptors, partial(_become, channel, request, descriptors, live))
        forked()
    return 0


def inherit(stages: Stages, load: wire.Load) -> None:
    """In a forked worker: the CPU threads that the template did without, and the handler's own `after_fork`."""
    limit_threads(load.cpu_threads)
    after_fork = getattr(stages.handler, "after_fork", None)
    if after_fork is not None:
        after_fork(stages.context)


def _receive(channel: socket.socket) -> tuple[wire.ForkRequest, list[int]] | None:
    frames = wire.FrameReader()
    descriptors: list[int] = []
    while True:
        data, received, _, _ = socket.recv_fds(channel, READ_SIZE, 8)
        descriptors += received
        if not data:
            return None
        for _, head, _ in frames.feed(data):
            return wire.decode(wire.ForkRequest, head), descriptors


def _send(channel: socket.socket, reply: wire.ForkReply, descriptors: list[int]) -> None:
    passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
    channel.sendmsg([wire.pack(wire.FORKED, reply)], passed)


def _become(channel: socket.socket, request: wire.ForkRequest, descriptors: list[int], live: _Live) -> None:
    """Runs in the worker process; never returns. What the handler has opened stays open."""
    own, page, output = descriptors
    channel.close()
    process.redirect_output(output)
    os.close(output)
    process.replace_environment(request.environ)
    process.settle_again(server=request.server, name=request.name, scratch=request.scratch, box=request.sandbox)
    reseed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    live(socket.socket(fileno=own), page)
