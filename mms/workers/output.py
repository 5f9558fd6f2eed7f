"""What workers print: line by line into the model's log, bounded however much it is. Front end's process."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque

READ_SIZE = 64 << 10
MAX_LINE = 8 << 10
MAX_PER_SECOND = 256 << 10
KEPT_LINES = 20


class OutputReader:
    """Reads one worker's standard output and error, and owns the pipe that they are.

    Not a pipe transport of uvloop's: that closes the descriptor twice, and in between a thread may have opened a file
    that got the same number.
    """

    def __init__(self, log: logging.Logger, label: str) -> None:
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._log = log
        self._label = label
        self._rest = b""
        self._pipe = -1
        self._second = 0
        self._budget = MAX_PER_SECOND
        self._dropped = 0

    def start(self, pipe: int) -> None:
        """Read from `pipe` from now on, which is closed at its end or by `finish`."""
        self._pipe = pipe
        os.set_blocking(pipe, False)
        asyncio.get_running_loop().add_reader(pipe, self._read)

    def finish(self) -> None:
        """Read what a process that has ended left in its pipe: these are its last words. Then close it."""
        while self._pipe != -1 and self._read() and self._budget >= 0:  # a helper may go on writing
            continue
        self._close()

    def _read(self) -> bool:
        """Whether there may be more."""
        try:
            data = os.read(self._pipe, READ_SIZE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if data:
            self.feed(data)
        else:
            self._close()
        return bool(data)

    def _close(self) -> None:
        if self._pipe != -1:
            asyncio.get_running_loop().remove_reader(self._pipe)
            os.close(self._pipe)
            self._pipe = -1
        if self._rest:
            self._write(self._rest)
            self._rest = b""

    def feed(self, data: bytes) -> None:
        """Something that the worker has printed."""
        self._refill()
        self._budget -= len(data)
        if self._budget < 0:
            self._dropped += len(data)
            self._rest = b""
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._write(line)
        if len(self._rest) > MAX_LINE:
            self._write(self._rest)
            self._rest = b""

    def _write(self, line: bytes) -> None:
        for start in range(0, len(line) or 1, MAX_LINE):
            text = line[start : start + MAX_LINE].decode("utf-8", "backslashreplace").rstrip("\r")
            if not text.isprintable():
                text = "".join(char if char.isprintable() or char == "\t" else repr(char)[1:-1] for char in text)
            self.last_lines.append(text)
            self._log.info("[%s] %s", self._label, text)

    def _refill(self) -> None:
        second = int(time.monotonic())
        if second != self._second:
            self._second = second
            self._budget = MAX_PER_SECOND
            if self._dropped:
                self._log.warning(
                    "[%s] %d bytes of output dropped: more than %d per second",
                    self._label,
                    self._dropped,
                    MAX_PER_SECOND,
                )
                self._dropped = 0
