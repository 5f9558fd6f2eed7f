"""The channels of a worker that several front ends use: a frame of each in turn. Runs in the worker process."""

from __future__ import annotations

import mmap
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from mms import lending, sharedpage
from mms.arena import Arena
from mms.backend.channel import Channel

_poll = select.poll  # a handler may replace it

_MAIN_THREAD = -1  # others count from 0
_SENDER = -2


class Source(Protocol):
    """What takes the frames of one channel (Loop, or the pipeline's)."""

    def predict(self, frame: Any, payload: bytearray, at: int) -> None: ...

    def close(self) -> None:
        """The front end has gone: nobody waits for what it has sent."""
        ...


class Busy:
    """Says on the pages of all front ends whether any thread of the worker is at work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: list[mmap.mmap] = []
        self._threads: set[int] = set()

    def add(self, page: mmap.mmap) -> None:
        with self._lock:
            self._pages.append(page)
            sharedpage.write_busy(page, bool(self._threads))

    def remove(self, page: mmap.mmap) -> None:
        with self._lock:
            self._pages.remove(page)

    def begin(self, thread: int) -> None:
        with self._lock:
            if not self._threads:
                self._write(True)
            self._threads.add(thread)

    def end(self, thread: int) -> None:
        with self._lock:
            self._threads.discard(thread)
            if not self._threads:
                self._write(False)

    def _write(self, busy: bool) -> None:
        for page in self._pages:
            sharedpage.write_busy(page, busy)


class Sending:
    """The lock of a pipeline's threads that write to front ends. Who has it is at work: one that does not read lets it
    wait, and with it all others.
    """

    def __init__(self, busy: Busy) -> None:
        self._busy = busy
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._busy.begin(_SENDER)

    def __exit__(self, *_: object) -> None:
        self._busy.end(_SENDER)
        self._lock.release()


class LentChannel(Channel):
    """A further front end's; what the handler has counted goes to the main process."""

    lent = True

    def __init__(self, sock: socket.socket, arena: Arena, main: Channel) -> None:
        super().__init__(sock, arena)
        self._main = main
        self._hang_up = _poll()
        self._hang_up.register(sock, 0)

    @property
    def gone(self) -> bool:
        return bool(self._hang_up.poll(0))

    def send_metrics(self) -> None:
        self._main.send_metrics()


class _Line:
    def __init__(self, channel: Channel, page: mmap.mmap, source: Source) -> None:
        self.channel = channel
        self.page = page
        self.source = source
        self.frames: Iterator[tuple[Any, bytearray, int]] = channel.predictions()


class Turns:
    """Waits for all channels, and for more of them on the `control` socket."""

    def __init__(
        self,
        channel: Channel,
        control: socket.socket,
        page: mmap.mmap,
        make: Callable[[Channel, mmap.mmap], Source],
        busy: Busy,
    ) -> None:
        self._main = channel
        self._control = control
        self._make = make
        self._busy = busy
        self._poll = _poll()
        self._poll.register(control, select.POLLIN)
        self._lines: dict[int, _Line] = {}  # by descriptor
        self._add(channel, page)

    def run(self) -> None:
        """Until the main process closes its channel or says STOP; then all others are closed."""
        try:
            self._run()
        finally:
            self._control.close()
            for line in self._lines.values():
                if line.channel.lent:
                    line.source.close()

    def _run(self) -> None:
        control = self._control.fileno()
        while True:
            begun = {number for number, line in self._lines.items() if line.channel.pending}
            events = dict(self._poll.poll(0 if begun else None))
            if events.pop(control, 0) and not self._borrow():
                return
            for number in begun.union(events):
                line = self._lines[number]
                lent = line.channel.lent
                if lent and events.get(number, 0) & (select.POLLHUP | select.POLLERR):
                    self._drop(line)
                elif not self._serve(line):
                    if not lent:
                        return
                    self._drop(line)

    def _serve(self, line: _Line) -> bool:
        """Take one frame; False when its channel has ended."""
        self._busy.begin(_MAIN_THREAD)  # also while it reads: it may have to wait for the rest of a frame
        try:
            frame = next(line.frames, None)
            if frame is not None:
                line.source.predict(*frame)
        except ConnectionError:
            if not line.channel.lent:
                raise
            frame = None
        finally:
            self._busy.end(_MAIN_THREAD)
        return frame is not None

    def _borrow(self) -> bool:
        lent = lending.borrow(self._control)
        if lent is None:
            return False
        sock, arena, page = lent
        self._add(LentChannel(sock, arena, self._main), page)
        return True

    def _add(self, channel: Channel, page: mmap.mmap) -> None:
        number = channel.fileno()
        self._busy.add(page)
        self._lines[number] = _Line(channel, page, self._make(channel, page))
        self._poll.register(number, select.POLLIN)

    def _drop(self, line: _Line) -> None:
        number = line.channel.fileno()
        self._poll.unregister(number)
        del self._lines[number]
        self._busy.remove(line.page)
        line.source.close()
