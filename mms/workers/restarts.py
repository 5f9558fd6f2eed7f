"""How long a lost worker's replacement waits: by the deaths and failed starts of its pool, and of all pools together.

Front end's process.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass

from mms.errors import ModelLoadError, ServiceUnavailableError
from mms.metrics import RestartFacts
from mms.workers.budget import Budget
from mms.workers.oom import OutOfMemoryKills
from mms.workers.worker import Worker

log = logging.getLogger("mms.workers")

MAX_BOOT_FAILURES = 3
BOOT_PAUSES = (0.1, 0.3)  # between the tries before a version is FAILED
FAILED_PAUSE = 5.0  # doubles up to FAILED_PAUSE_LIMIT
FAILED_PAUSE_LIMIT = 300.0
DEATH_WINDOW = 10.0  # the first death in it is replaced at once, further ones with back-off
DEATH_PAUSE = 0.1
DEATH_PAUSE_LIMIT = 10.0
RESTART_WINDOW = 10.0  # over all pools of the server: more deaths than MAX_RESTARTS in it, and each waits RESTART_PAUSE
MAX_RESTARTS = 20
RESTART_PAUSE = 1.0
KILLED = "signal 9 (SIGKILL)"
LAST_WORDS = 3  # lines of output in the log's line about a death


@dataclass(frozen=True, kw_only=True)
class LastFailure:
    """The latest worker that died or did not become ready: why, when (time.time()), what it printed last."""

    cause: str
    at: float
    output: tuple[str, ...]


class Restarts:
    """How many workers have died lately in all pools of a server: what they share is the machine."""

    def __init__(self) -> None:
        self._memory_kills = OutOfMemoryKills()
        self._budget = Budget(MAX_RESTARTS, RESTART_WINDOW)
        self._held_back = False

    def cause(self, worker: Worker) -> str:
        """How a worker ended; of one that was killed, whether the kernel did it for want of memory."""
        return "killed (out of memory)" if worker.cause == KILLED and self._memory_kills.claim() else worker.cause

    def pause(self, cause: str) -> float:
        """Seconds that a worker's replacement has to wait because so many others have died; counts this death."""
        self._budget.count(cause)
        self._note()
        return RESTART_PAUSE if self._held_back else 0.0

    def tick(self, now: float) -> None:
        self._memory_kills.look(now)
        self._note()

    def facts(self) -> RestartFacts:
        state = f"each replacement waits {RESTART_PAUSE:g} s" if self._budget.spent else "replaced at once"
        return self._budget.facts("workers", state)

    def _note(self) -> None:
        """One line in the log when replacements are held back, and one when they are no more."""
        if self._budget.spent is self._held_back:
            return
        self._held_back = not self._held_back
        if self._held_back:
            log.error("more than %d workers died within %g s: each replacement waits %g s, until fewer do",
                      MAX_RESTARTS, RESTART_WINDOW, RESTART_PAUSE)  # fmt: skip
        else:
            log.info("fewer workers die: their replacements are no longer held back")


class BackOff:
    """The losses of one pool, and how long its next start waits for them."""

    def __init__(self, restarts: Restarts, boot_tries: int) -> None:
        self.last_failure: LastFailure | None = None
        self.failed_starts = 0  # in a row
        self.hold_until = 0.0
        self.retry_at = 0.0  # of a FAILED pool
        self._restarts = restarts
        self._boot_tries = boot_tries
        self._failed_pause = FAILED_PAUSE
        self._deaths: deque[float] = deque()

    @property
    def deaths(self) -> int:
        """Workers that died in the last DEATH_WINDOW seconds."""
        _forget_before(self._deaths, time.monotonic() - DEATH_WINDOW)
        return len(self._deaths)

    def reset(self) -> None:
        """A worker is ready, or somebody wants it to be tried anew: failed starts count from none."""
        self.failed_starts = 0
        self._failed_pause = FAILED_PAUSE

    def died(self, worker: Worker, others: int) -> float:
        """A worker that was ready has died, and `others` are left; how long its replacement waits."""
        self._deaths.append(time.monotonic())
        self._note(worker)
        recent = self.deaths
        pause = 0.0 if recent <= others + 1 else _doubled(recent - 2)
        return max(pause, self._restarts.pause(worker.cause))

    def failed_to_start(self, worker: Worker) -> None:
        self.failed_starts += 1
        self._note(worker)

    def pause_beside_others(self) -> float:
        """How long the place of a worker that did not become ready stays empty, while others serve."""
        return _doubled(self.failed_starts)

    def pause_of_boot(self) -> float | None:
        """How long the next try waits when no other serves; None when there were enough tries."""
        return BOOT_PAUSES[self.failed_starts - 1] if self.failed_starts < self._boot_tries else None

    def pause_when_failed(self) -> float:
        """How long the next try of a FAILED pool waits; each time twice as long."""
        pause = self._failed_pause
        self.retry_at = time.monotonic() + pause
        self._failed_pause = min(pause * 2, FAILED_PAUSE_LIMIT)
        return pause

    def try_once(self) -> None:
        """One more failed start, and the pool is FAILED again."""
        self.failed_starts = self._boot_tries - 1

    def _note(self, worker: Worker) -> None:
        failed, output = worker.failure, worker.output
        cause = f"failed to load: {failed.message}" if failed is not None else worker.cause
        self.last_failure = LastFailure(
            cause=cause, at=time.time(), output=tuple(output.last_lines) if output is not None else ()
        )


def _doubled(times: int) -> float:
    """DEATH_PAUSE, doubled so often, up to its limit: of a start that fails for hours, no float holds the power."""
    return min(DEATH_PAUSE * 2.0 ** min(times, 32), DEATH_PAUSE_LIMIT)


def last_words(worker: Worker) -> str:
    """What it printed last, for the log's line about its death."""
    lines = list(worker.output.last_lines)[-LAST_WORDS:] if worker.output is not None else []
    return f"; it last printed: {' | '.join(line[:200] for line in lines)}" if lines else ""


def load_error(label: str, worker: Worker) -> ModelLoadError:
    """Why a worker did not become ready."""
    if worker.failure is not None:
        return ModelLoadError(
            f"the handler of {label} failed to load: {worker.failure.message}", traceback=worker.failure.traceback
        )
    output = "\n".join(worker.output.last_lines) if worker.output else ""
    return ModelLoadError(f"a worker of {label} ended before it was ready: {worker.cause}", traceback=output)


def failed_to_load(label: str, wait: float) -> ServiceUnavailableError:
    """What is said to whoever asks a FAILED version, or waits for it as it becomes one; `wait`: until its next try."""
    return ServiceUnavailableError(
        f"model {label} failed to load; its description on the management port has the traceback",
        retry_after=max(1, math.ceil(wait)),
    )


def no_workers(label: str) -> ServiceUnavailableError:
    """What is said to whoever asks a version that is scaled to 0, or waits for it as it becomes one."""
    return ServiceUnavailableError(f"model {label} has no workers; scale it up on the management port")


def _forget_before(times: deque[float], limit: float) -> None:
    while times and times[0] < limit:
        times.popleft()
