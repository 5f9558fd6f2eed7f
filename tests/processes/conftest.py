"""A worker without a server, in a thread and as a process, so that the same assertions hold for both.

As a process it shares memory for large bodies with the test; in a thread these go through the socket.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mms import arena, lending, sharedpage, wire
from mms.archive import ModelArchive
from mms.arena import Arena
from mms.backend import loop
from mms.workers.process import WorkerProcess
from tests.conftest import MakeArchive

HEADERS: list[bytes] = [b"X-Asked", b"this"]


class FrontEnd:
    """A front end's end of its channel to a worker."""

    def __init__(self, sock: socket.socket, progress: mmap.mmap, arena: Arena | None) -> None:
        sock.settimeout(20)
        self.progress = progress
        self._arena = arena
        self._sock = sock
        self._ids = 0

    def frame(self) -> tuple[int, Any, bytes]:
        """The next frame: kind, head, payloads."""
        kind, head_size, size = wire.parse_header(self._exactly(wire.HEADER.size))
        head = self._exactly(head_size)
        kinds = {
            wire.READY: wire.Ready,
            wire.FAILED: wire.Failed,
            wire.RESULT: wire.Result,
            wire.STREAM: wire.Chunks,
            wire.MEASURED: wire.Measured,
        }
        message = wire.decode(kinds[kind & ~wire.SHARED], head)
        payload = self._exactly(size)
        if kind & wire.SHARED:
            assert self._arena is not None
            payload = bytes(self._arena.answers.lend(payload, sum(message.sizes)))
        return kind & ~wire.SHARED, message, payload

    def ready(self) -> wire.Ready:
        kind, head, _ = self.frame()
        assert kind == wire.READY, head
        assert isinstance(head, wire.Ready)
        return head

    def send(
        self,
        *bodies: bytes,
        batch_size: int = 8,
        content_type: str = "",
        encoding: str = "",
        level: int | None = None,
        forming: wire.Forming | None = None,
    ) -> list[int]:
        first, self._ids = self._ids + 1, self._ids + len(bodies)
        ids, sizes = list(range(first, self._ids + 1)), list(map(len, bodies))
        facts = wire.RequestFacts(content_type, encoding, b"", False, HEADERS)
        frame = wire.Predict(batch_size, ids, sizes, [b"id-%d" % number for number in ids], [facts], [])
        frame.levels = [] if level is None else [level] * len(ids)
        frame.forming = forming
        if sum(sizes) < wire.INLINE_BELOW:
            frame.sizes, frame.bodies, bodies = [], list(bodies), ()
        elif self._arena is not None:
            where = self._arena.requests.put(bodies, sum(sizes))
            assert where is not None
            self._sock.sendall(wire.pack(wire.PREDICT | wire.SHARED, frame, len(where)) + where)
            return ids
        self._sock.sendall(wire.pack(wire.PREDICT, frame, sum(frame.sizes)) + b"".join(bodies))
        return ids

    def results(self, count: int) -> dict[int, tuple[wire.Outcome, bytes]]:
        """The next `count` outcomes by job."""
        found: dict[int, tuple[wire.Outcome, bytes]] = {}
        while len(found) < count:
            kind, head, payload = self.frame()
            assert kind == wire.RESULT
            assert sum(head.sizes) == len(payload)
            outcomes = wire.spread(head.outcomes, head.outcome_of, len(head.ids))
            bodies = head.bodies or wire.cut(head.sizes, payload)
            for number, outcome, body in zip(head.ids, outcomes, bodies, strict=True):
                found[number] = (outcome, body)
        return found

    def predict(self, *bodies: bytes, **how: Any) -> list[tuple[wire.Outcome, bytes]]:
        ids = self.send(*bodies, **how)
        results = self.results(len(ids))
        return [results[number] for number in ids]

    def cancel(self, id: int) -> None:
        WorkerProcess(0, 0, self._sock, self.progress, 0, Path()).cancel(id)

    def raw(self, data: bytes) -> None:
        self._sock.sendall(data)

    def ended(self) -> bool:
        """Whether the worker has closed its end without another word."""
        try:
            return self._sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def stop(self) -> None:
        self._sock.sendall(wire.pack(wire.STOP, None))

    def close(self) -> None:
        self._sock.close()

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self._sock.recv(size - len(data))
            assert chunk, "the channel ended"
            data += chunk
        return data


class Backend(FrontEnd):
    """The main process's end. With `shared`, others get channels, too."""

    def __init__(
        self,
        sock: socket.socket,
        progress: mmap.mmap,
        arena: Arena | None,
        folder: Path,
        *,
        shared: bool = False,
        **load: Any,
    ) -> None:
        super().__init__(sock, progress, arena)
        defaults = {
            "model_name": "m", "version": "1.0", "directory": str(folder), "handler": "", "manifest": {},
            "model_config": {}, "batch_size": 8, "isolate_errors": "auto", "gpu": None, "cpu_threads": 1,
            "max_request_size": 1 << 20, "max_response_size": 1 << 20,
        }  # fmt: skip
        frame = wire.pack(wire.LOAD, wire.Load(**{**defaults, **load}))
        if shared:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                socket.send_fds(sock, [frame[:1]], [theirs.fileno()])
            frame = frame[1:]
        sock.sendall(frame)

    def lend(self) -> FrontEnd:
        """Another front end with a channel of its own; close it."""
        ours, theirs = socket.socketpair()
        page = arena.create(len(self.progress))
        with theirs:
            lending.lend(self._control, theirs, page)
        bodies, progress = arena.attach(page)
        os.close(page)
        return FrontEnd(ours, progress, bodies)

    def close(self) -> None:
        super().close()
        if hasattr(self, "_control"):
            self._control.close()


Start = Callable[..., Backend]


@pytest.fixture(params=["thread", "process"])
def start(request: pytest.FixtureRequest, make_archive: MakeArchive, tmp_path: Path) -> Iterator[Start]:
    """Starts a worker on one of tests/archives; all end with their test."""
    with contextlib.ExitStack() as stack:

        def begin(name: str, **load: Any) -> Backend:
            folder = tmp_path / name
            archive = ModelArchive.open(make_archive(name))
            archive.extract(folder)
            ours, theirs = socket.socketpair()
            page = arena.create(sharedpage.page_size(load.get("threads", 1), load.get("preprocess_threads", 0)))
            bodies, progress = arena.attach(page)
            run = in_thread if request.param == "thread" else in_process
            stack.callback(bodies.close)
            stack.callback(progress.close)
            stack.callback(os.close, page)
            stack.enter_context(run(theirs, page, folder))
            shared = bodies if request.param == "process" else None
            backend = Backend(ours, progress, shared, folder, **{"handler": archive.manifest.handler, **load})
            stack.callback(backend.close)
            return backend

        yield begin


@contextlib.contextmanager
def in_thread(theirs: socket.socket, page: int, folder: Path) -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    bodies, view = arena.attach(page)
    bodies.close()

    def run() -> None:
        with contextlib.suppress(OSError), theirs:
            loop.serve(theirs, view)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(10)
        assert not thread.is_alive()
        view.close()
        gc.unfreeze()
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
        shutil.rmtree(folder)


@contextlib.contextmanager
def in_process(theirs: socket.socket, page: int, folder: Path) -> Iterator[None]:
    words = ["--channel", str(theirs.fileno()), "--page", str(page), "--server", str(os.getpid()), "--name", "m"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "mms.backend", *words],
        pass_fds=(theirs.fileno(), page),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    theirs.close()
    try:
        yield
        assert process.wait(10) in (0, 1, 70)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
