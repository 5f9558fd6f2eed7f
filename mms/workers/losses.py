"""What a pool does about workers that died or did not become ready: when the next one starts, when it is FAILED.

Front end's process, event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from mms.errors import MMSError, ModelLoadError
from mms.metrics import VersionMetrics
from mms.workers.restarts import BackOff, Restarts, failed_to_load, last_words, load_error
from mms.workers.settings import PoolSettings
from mms.workers.worker import Worker, WorkerState

log = logging.getLogger("mms.pool")


class Losses:
    """`reconcile` starts what is missing, if `may_start`; `abandon` answers those who wait in vain."""

    def __init__(
        self,
        settings: PoolSettings,
        metrics: VersionMetrics,
        restarts: Restarts,
        reconcile: Callable[[], None],
        abandon: Callable[[MMSError], None],
    ) -> None:
        self.failure: ModelLoadError | None = None  # set while the version is FAILED
        self.last_death = ""  # its cause, while a worker is missing for it
        self.back_off = BackOff(restarts, settings.boot_tries)
        self._settings = settings
        self._metrics = metrics
        self._reconcile = reconcile
        self._abandon = abandon
        self._loop = asyncio.get_running_loop()
        self._retrial: asyncio.TimerHandle | None = None

    @property
    def may_start(self) -> bool:
        """Whether a missing worker is to be started now."""
        return self.failure is None and time.monotonic() >= self.back_off.hold_until

    @property
    def next_start(self) -> float:
        """Seconds until then."""
        at = self.back_off.retry_at if self.failure is not None else self.back_off.hold_until
        return max(0.0, at - time.monotonic())

    def forgive(self) -> None:
        """Somebody wants it to be tried anew, now."""
        self.back_off.reset()
        self.back_off.hold_until = 0.0
        self.failure = None

    def recovered(self, *, wholly: bool) -> None:
        """A worker is ready; `wholly`: none is missing."""
        self.back_off.reset()
        self.failure = None
        if wholly:
            self.last_death = ""

    def died(self, worker: Worker, others: int) -> None:
        """A worker that was ready has ended, and `others` are left."""
        worker.state = WorkerState.FAILED
        self.last_death = worker.cause
        self._metrics.restarts[worker.cause] += 1
        pause = self.back_off.died(worker, others)
        log.error("%s: worker %d (pid %s) died: %s; replacing it%s%s", self._settings.label, worker.slot, worker.pid,
                  worker.cause, f" in {pause:.1f} s" if pause else "", last_words(worker))  # fmt: skip
        self._hold(pause)

    def not_ready(self, worker: Worker, *, others_serve: bool) -> None:
        """A worker has ended before it was ready, or could not be launched."""
        if worker.state is not WorkerState.STARTING:
            self._reconcile()
            return
        worker.state = WorkerState.FAILED
        self.back_off.failed_to_start(worker)
        if self.failure is not None:
            return
        if others_serve:  # only this place stays empty for a while
            pause = self.back_off.pause_beside_others()
            log.error("%s: worker %d did not become ready: %s; next try in %.1f s", self._settings.label, worker.slot,
                      worker.failure.message if worker.failure else worker.cause, pause)  # fmt: skip
            self._hold(pause)
            return
        next_try = self.back_off.pause_of_boot()
        if next_try is not None:
            self._hold(next_try)
            return
        self.fail(load_error(self._settings.label, worker), f" after {self.back_off.failed_starts} tries")

    def fail(self, failure: ModelLoadError, tries: str = "") -> None:
        """The version is FAILED, and tried again after a pause."""
        self.failure = failure
        pause = self.back_off.pause_when_failed()
        log.error("%s: FAILED%s: %s; next try in %g s", self._settings.label, tries, failure.message, pause)
        if self._retrial is not None:  # of a failure before, which somebody did not wait for
            self._retrial.cancel()
        self._retrial = self._loop.call_later(pause, self._retry)
        self._abandon(failed_to_load(self._settings.label, pause))

    def close(self) -> None:
        """Nothing is lost any more; lets go of the pool, as `Feeder._stop_feeding` does."""
        if self._retrial is not None:
            self._retrial.cancel()
        if self.failure is not None:
            self.failure.with_traceback(None)  # who waited for the workers has raised it, in the pool's own frames
        self._reconcile, self._abandon = lambda: None, lambda _: None

    def _retry(self) -> None:
        if self.failure is not None:
            self.failure = None
            self.back_off.try_once()
            self._reconcile()

    def _hold(self, pause: float) -> None:
        """Reconcile after `pause` seconds."""
        if pause:
            self.back_off.hold_until = time.monotonic() + pause
            self._loop.call_later(pause + 0.001, self._reconcile)
        self._reconcile()
