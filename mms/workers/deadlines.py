"""Until when requests must be answered. Part of the dispatcher: pure, no I/O. Front end's process."""

from __future__ import annotations

import heapq

from mms.workers.job import Job

_SPARE = 64  # settled jobs that may lie in the heap beside as many as live ones


class Deadlines:
    """A heap by time; empty unless requests have deadlines. A job may be in it twice, for its own and the model's."""

    def __init__(self, objective: float = 0.0) -> None:
        """`objective`: the model's, in seconds; 0 for none."""
        self._objective = objective
        self.heap: list[tuple[float, int, bool, Job]] = []
        self._tidy_at = _SPARE

    def watch(self, job: Job, arrived: float) -> None:
        """Note until when one must be answered who waits for the job since then."""
        if job.timeout:
            self._add(arrived + job.timeout, job, False)
        if self._objective:
            self._add(arrived + self._objective, job, True)

    def due(self, now: float) -> list[tuple[Job, bool]]:
        """The jobs whose time has come, and whether it is the objective that they miss."""
        heap = self.heap
        due = []
        while heap and (heap[0][3].settled or heap[0][0] <= now):
            _, _, objective, job = heapq.heappop(heap)
            if not job.settled:
                due.append((job, objective))
        return due

    def next(self) -> float | None:
        """When to look again."""
        return self.heap[0][0] if self.heap else None

    def _add(self, at: float, job: Job, objective: bool) -> None:
        heap = self.heap
        heapq.heappush(heap, (at, job.id, objective, job))
        if len(heap) >= self._tidy_at:  # else those answered long ago would be kept, bodies and all
            heap[:] = [entry for entry in heap if not entry[3].settled]
            heapq.heapify(heap)
            self._tidy_at = 2 * len(heap) + _SPARE
