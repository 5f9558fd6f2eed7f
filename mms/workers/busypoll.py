"""Staying awake for the answer of a quick worker, as to be woken takes longer. Front end's process, event loop.

While one request alone is at a worker whose batches take less than QUICK, the event loop does not sleep. That takes CPU
time, PATIENCE at most, which other workers may have to do without, and no request waits until this process runs again.
"""

from __future__ import annotations

import asyncio
from time import monotonic

from mms.workers import environment
from mms.workers.inflight import InFlight

QUICK = 50e-6  # seconds that a batch takes
PATIENCE = 200e-6  # seconds; an answer that takes longer was not worth it ...
PAUSE = 15  # ... and so many further requests are not tried


class BusyPoll:
    """Of one version's workers. On one CPU alone the worker could not run meanwhile: there it does nothing."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._useful = environment.cores() > 1
        self._paused = 0
        self._until = 0.0
        self._watched: InFlight | None = None

    def sent(self, worker: InFlight, now: float) -> None:
        """One job, the only one it has, was sent to a worker."""
        seconds = worker.batch_seconds
        if seconds is None or seconds > QUICK or not self._useful:
            return
        if self._paused:
            self._paused -= 1
            return
        self._until = now + PATIENCE
        if self._watched is None:
            self._loop.call_soon(self._look)
        self._watched = worker

    def _look(self) -> None:
        worker = self._watched
        if worker is not None and worker.count == 1:
            if monotonic() < self._until:
                self._loop.call_soon(self._look)
                return
            self._paused = PAUSE
        self._watched = None
