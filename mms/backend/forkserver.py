"""The fork server (`python -m mms.backend.forkserver`): it imports heavy modules once and forks workers on request.

It has one thread, imports only, never computes and never touches a GPU. Its only channel is an inherited socket that
keeps message borders; when that ends, so does it. It can die without anybody losing a worker or an exit status.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import socket
import sys
from array import array
from functools import partial

from mms import wire
from mms.backend import loop, process, timeslice
from mms.backend.forking import fork_worker, reseed

MAX_MESSAGE = 256 << 10


def main() -> None:
    """Runs in the fork server's process."""
    parser = argparse.ArgumentParser(prog="python -m mms.backend.forkserver")
    parser.add_argument("--control", type=int, required=True)
    arguments = parser.parse_args()
    process.die_with_parent()
    process.set_name("mms-forkserver")
    timeslice.take(timeslice.LONG)
    control = socket.socket(fileno=arguments.control)
    first = control.recv(MAX_MESSAGE)
    if not first:
        return
    # of what imports make, nearly nothing is garbage: looking for it costs torch 15 % more time, and 0.3 s at the end
    gc.disable()
    errors = preload(wire.decode(wire.Preload, first).modules)
    gc.freeze()  # pages that the collector never writes stay shared, and its first round in a worker is short
    gc.enable()
    sys.stdout.flush()
    sys.stderr.flush()
    control.send(wire.encode(wire.Preloaded(errors, len(os.listdir("/proc/self/task")))))
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE, 8)
        if not message:
            return
        request = wire.decode(wire.ForkRequest, message)
        cores = timeslice.keep_off(request.server)
        fork_worker(partial(_send, control), descriptors, partial(_become_worker, request, descriptors, cores))
        timeslice.spread(cores)


def preload(modules: list[str]) -> list[str]:
    """Import each module; what fails is named and left to the workers."""
    errors = []
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException as error:
            errors.append(f"{name}: {type(error).__name__}: {error}")
    return errors


def _send(control: socket.socket, reply: wire.ForkReply, descriptors: list[int]) -> None:
    passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
    control.sendmsg([wire.encode(reply)], passed)


def _become_worker(request: wire.ForkRequest, descriptors: list[int], cores: set[int]) -> None:
    """Runs in the worker process; never returns."""
    channel, page, output = descriptors
    process.redirect_output(output)
    process.replace_environment(request.environ)
    process.settle_in(
        server=request.server,
        name=request.name,
        directory=request.directory,
        keep=(channel, page),
        scratch=request.scratch,
        box=request.sandbox,
    )
    reseed()
    timeslice.spread(cores)
    loop.main(socket.socket(fileno=channel), page)


if __name__ == "__main__":
    main()
