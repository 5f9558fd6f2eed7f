"""The fork server (`python -m mms.backend.forkserver`): it imports heavy modules once and forks workers on request.

It has one thread, imports only, never computes and never touches a GPU. Its only channel is an inherited socket that
keeps message borders; when that ends, so does it. Workers are forked twice, so that the server (a child subreaper)
becomes their parent: the fork server can die without anybody losing a worker or an exit status.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import socket
import sys
import time
import traceback
from array import array

from mms import wire
from mms.backend import loop, process

MAX_MESSAGE = 256 << 10


def main() -> None:
    """Runs in the fork server's process."""
    parser = argparse.ArgumentParser(prog="python -m mms.backend.forkserver")
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--preload", default="")
    arguments = parser.parse_args()
    process.die_with_parent()
    process.set_name("mms-forkserver")
    control = socket.socket(fileno=arguments.control)
    errors = preload([name for name in arguments.preload.split(",") if name])
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()  # pages that the collector never writes stay shared with the workers
    control.send(wire.encode(wire.Preloaded(errors, len(os.listdir("/proc/self/task")))))
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE, 8)
        if not message:
            return
        answer(control, wire.decode(wire.ForkRequest, message), descriptors)


def preload(modules: list[str]) -> list[str]:
    """Import each module; what fails is named and left to the workers."""
    errors = []
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException as error:
            errors.append(f"{name}: {type(error).__name__}: {error}")
    return errors


def answer(control: socket.socket, request: wire.ForkRequest, descriptors: list[int]) -> None:
    """Fork the worker; the process in between sends the reply and ends."""
    try:
        between = os.fork()
    except OSError as error:
        control.send(wire.encode(wire.ForkReply(0, f"fork failed: {error.strerror}")))
    else:
        if between == 0:
            _fork_worker(control, request, descriptors)
        os.waitpid(between, 0)
    for descriptor in descriptors:
        os.close(descriptor)


def _fork_worker(control: socket.socket, request: wire.ForkRequest, descriptors: list[int]) -> None:
    try:
        pid = os.fork()
        if pid == 0:
            _become_worker(request, descriptors)
        pidfd = os.pidfd_open(pid)
        control.sendmsg(
            [wire.encode(wire.ForkReply(pid, ""))],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [pidfd]))],
        )
    except OSError as error:
        control.send(wire.encode(wire.ForkReply(0, f"fork failed: {error.strerror}")))
    finally:
        os._exit(0)


def _become_worker(request: wire.ForkRequest, descriptors: list[int]) -> None:
    """Runs in the worker process; never returns."""
    try:
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
        time.tzset()
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        gc.unfreeze()
        loop.main(socket.socket(fileno=channel), page)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)  # EX_SOFTWARE: loop.main leaves by itself


if __name__ == "__main__":
    main()
