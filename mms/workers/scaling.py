"""How many workers a pool is to have: what was asked for, and what its autoscaler makes of it. Front end's process."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mms.fronts import Load
from mms.metrics import VersionMetrics
from mms.workers.autoscaler import Autoscaler, Bounds, Seen
from mms.workers.batching import BatchQueue
from mms.workers.worker import Worker

log = logging.getLogger("mms.pool")


class Scaling:
    """`target` is the number of workers wanted now. It moves within `bounds`, which are one number unless asked."""

    def __init__(self, label: str, queue: BatchQueue, metrics: VersionMetrics) -> None:
        self.target = 0
        self.minimum = 0  # fewer ready workers are an outage: all that were ready and asked for since
        self.bounds = Bounds(0, 0)
        self._label = label
        self._queue = queue
        self._metrics = metrics
        self._autoscaler = Autoscaler()

    @property
    def owed(self) -> int:
        """How many of the workers were asked for; the others are there because there is work for them."""
        return min(self.target, self.bounds.low)

    @property
    def asleep(self) -> bool:
        """There is no worker, and the first request starts one."""
        return not self.target and self.bounds.on_request

    @property
    def most(self) -> int:
        """How many workers may share the machine."""
        return max(self.target, self.bounds.high)

    def ask(self, bounds: Bounds, target: int) -> None:
        self.bounds = bounds
        self._aim(target)

    def adjusted(self, bounds: Bounds) -> int:
        """The target that fits new bounds: as many as there are, as far as that may be."""
        return min(max(self.target, bounds.low), bounds.high)

    def had(self, ready: int) -> None:
        """So many workers are ready."""
        self.minimum = max(self.minimum, min(ready, self.owed))

    def rouse(self) -> bool:
        """A request has come; whether it brings the first worker."""
        if not self.asleep:
            return False
        self._queue.forget_rate()
        self._move(1, "a request came")
        return True

    def look(self, now: float, workers: Sequence[Worker], others: Sequence[Load]) -> bool:
        """Whether another number of workers is wanted from now on; `workers` are those that are ready, `others` what
        further front ends have for them.
        """
        if not self.bounds.automatic:
            return False
        seen = self._see(now, workers, others)
        target = self._autoscaler.decide(now, self.target, self.bounds, seen)
        if target == self.target:
            return False
        waiting = self._queue.depth + sum(load.waiting for load in others)
        self._move(target, f"{seen.busy:.1f} of {seen.ready} busy, {waiting} requests wait")
        return True

    def _see(self, now: float, workers: Sequence[Worker], others: Sequence[Load]) -> Seen:
        queue, batch_size = self._queue, self._queue.batch_size
        loads = [worker.in_flight for worker in workers]
        limits = [load.batch_limit for load in loads]
        sizes = [batch_size if limit is None else limit.limit for limit in limits]
        rooms = [size * load.threads for size, load in zip(sizes, loads, strict=True)]
        waiting = queue.depth + sum(load.waiting for load in others)
        batch_seconds = [load.batch_seconds or 0.0 for load in loads]
        return Seen(
            ready=len(workers),
            busy=sum(min(1.0, worker.jobs / room) for worker, room in zip(workers, rooms, strict=True)),
            waiting=waiting * (len(loads) / sum(rooms) if loads else 1 / batch_size),
            oldest_wait=max([queue.oldest_wait(now), *(load.oldest_wait for load in others)]),
            batch_seconds=max([*batch_seconds, *(load.batch_seconds for load in others)], default=0.0),
            submitted=queue.submitted + sum(load.submitted for load in others),
        )

    def _move(self, target: int, why: str) -> None:
        log.info("%s: %d instead of %d workers: %s", self._label, target, self.target, why)
        self._metrics.scalings["up" if target > self.target else "down"] += 1
        self._aim(target)

    def _aim(self, target: int) -> None:
        self.target = target
        self.minimum = min(self.minimum, self.owed)
