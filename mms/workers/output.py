"""What workers print: line by line into the model's log, bounded however much it is. Front end's process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque

MAX_LINE = 8 << 10
MAX_PER_SECOND = 256 << 10
KEPT_LINES = 20


class OutputReader(asyncio.Protocol):
    """Reads one worker's standard output and error."""

    def __init__(self, log: logging.Logger, label: str) -> None:
        self.last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._log = log
        self._label = label
        self._rest = b""
        self._ended = False
        self._second = 0
        self._budget = MAX_PER_SECOND
        self._dropped = 0

    def data_received(self, data: bytes) -> None:
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

    def drain(self, pipe: int) -> None:
        """Read now what a process that has ended left in its pipe (which does not block): these are its last words."""
        with contextlib.suppress(OSError):
            while not self._ended and (data := os.read(pipe, MAX_PER_SECOND)):
                self.data_received(data)
                self._ended = self._budget < 0  # a helper may go on writing
        self._flush()

    def eof_received(self) -> None:
        self._ended = True

    def connection_lost(self, error: Exception | None) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._rest:
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
