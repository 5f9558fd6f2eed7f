"""The loop of a worker that several front ends use: a frame of each channel in turn. Runs in the worker process."""

from __future__ import annotations

import mmap
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from mms import lending
from mms.backend.channel import Channel


class Predicts(Protocol):
    """The loop of one channel (Loop)."""

    def predict(self, frame: Any, payload: bytearray, at: int) -> None: ...


class LentChannel(Channel):
    """A further front end's; what the handler has counted goes to the main process."""

    def __init__(self, sock: socket.socket, main: Channel) -> None:
        super().__init__(sock)
        self._main = main

    def send_metrics(self) -> None:
        self._main.send_metrics()


class _Source:
    def __init__(self, number: int, channel: Channel, page: mmap.mmap, loop: Predicts) -> None:
        self.number = number
        self.page = page
        self.channel = channel
        self.loop = loop
        self.frames: Iterator[tuple[Any, bytearray, int]] = channel.predictions()


class Turns:
    """Waits for all channels, and for more of them on the `control` socket."""

    def __init__(
        self,
        channel: Channel,
        control: socket.socket,
        page: mmap.mmap,
        make: Callable[[Channel, mmap.mmap], Predicts],
    ) -> None:
        self._main = channel
        self._control = control
        self._make = make
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._sources: dict[int, _Source] = {}  # by descriptor
        self._add(_Source(lending.OWN, channel, page, make(channel, page)))

    def run(self) -> None:
        """Until the main process closes its channel or says STOP."""
        control = self._control.fileno()
        while True:
            begun = {number for number, source in self._sources.items() if source.channel.pending}
            events = dict(self._poll.poll(0 if begun else None))
            if events.pop(control, 0) and not self._borrow():
                return
            for number in begun.union(events):
                source = self._sources[number]
                lent = source.number != lending.OWN
                if lent and events.get(number, 0) & (select.POLLHUP | select.POLLERR):
                    self._drop(source)  # that front end has gone: nobody waits for what it has sent
                elif not self._serve(source):
                    if not lent:
                        return
                    self._drop(source)

    def _serve(self, source: _Source) -> bool:
        """Run one frame; False when its channel has ended."""
        try:
            frame = next(source.frames, None)
            if frame is not None:
                self._note(source.number)
                source.loop.predict(*frame)
        except (BrokenPipeError, ConnectionResetError):
            if source.number == lending.OWN:
                raise
            frame = None
        finally:
            self._note(0)
        return frame is not None

    def _borrow(self) -> bool:
        lent = lending.borrow(self._control)
        if lent is None:
            return False
        number, sock, page = lent
        channel = LentChannel(sock, self._main)
        self._add(_Source(number, channel, page, self._make(channel, page)))
        return True

    def _note(self, turn: int) -> None:
        for source in self._sources.values():
            lending.write_turn(source.page, turn)

    def _add(self, source: _Source) -> None:
        number = source.channel.fileno()
        self._sources[number] = source
        self._poll.register(number, select.POLLIN)

    def _drop(self, source: _Source) -> None:
        number = source.channel.fileno()
        self._poll.unregister(number)
        del self._sources[number]
        source.channel.close()
