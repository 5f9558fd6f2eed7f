"""Which worker of a pool is to be replaced: it has had its share (max_requests, max_rss), or what lent it its weights
has died. Front end's process.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mms.workers.owners import orphaned
from mms.workers.settings import PoolSettings
from mms.workers.worker import Worker

log = logging.getLogger("mms.pool")

OWNER_DIED = "owner_died"


class Recycling:
    """One worker at a time leaves; it serves until its replacement is ready."""

    def __init__(self, settings: PoolSettings) -> None:
        self.leaving: Worker | None = None
        self.reason = ""  # why it leaves
        self.wanted = bool(settings.max_requests or settings.max_rss or settings.share_weights)
        self._settings = settings
        self._too_big = False  # said that max_rss is less than what a worker needs

    def choose(self, workers: Sequence[Worker]) -> bool:
        """Whether one of them is to leave from now on; called while none does."""
        for worker in workers:
            reason = self._outworn(worker)
            if reason:
                self.leaving, self.reason = worker, reason
                why = "has lost the owner of its weights" if reason == OWNER_DIED else f"has reached {reason}"
                log.info("%s: worker %d (pid %s) %s; replacing it", self._settings.label, worker.slot, worker.pid, why)
                return True
        return False

    def forget(self, worker: Worker) -> None:
        """It stops, or has ended."""
        if self.leaving is worker:
            self.leaving = None

    def _outworn(self, worker: Worker) -> str:
        settings, answered = self._settings, worker.in_flight.finished
        if orphaned(worker):
            return OWNER_DIED
        if settings.max_requests and answered >= settings.max_requests:
            return "max_requests"
        if not settings.max_rss or worker.process.resident_bytes() <= settings.max_rss:
            return ""
        if answered:
            return "max_rss"
        if not self._too_big:  # a new one would be as big
            self._too_big = True
            log.warning("%s: max_rss (%d bytes) is less than what a worker needs before its first request",
                        settings.label, settings.max_rss)  # fmt: skip
        return ""
