"""How long requests have waited, as it is counted by the frame: the same as one by one."""

from __future__ import annotations

from typing import Any, cast

import pytest

from mms import wire
from mms.metrics import VersionMetrics
from mms.workers.delivery import count_answers, waits_in_worker
from mms.workers.inflight import Frame
from mms.workers.job import Job

FACTS = wire.RequestFacts("", "", b"", False, [])
OK = wire.Outcome(200, b"", "")
TAKEN, NOW = 100.0, 100.2


def jobs(count: int) -> list[Job]:
    """The later ones have come first, over several buckets."""
    made = [Job(n, FACTS, b"", [], 0, cast(Any, None), TAKEN - 0.004 * (count - n % 7 * 3)) for n in range(count)]
    frame = Frame(0, made, list(range(count)), 0, TAKEN, None)
    for job in made:
        job.frame = frame
    return made


@pytest.mark.parametrize("sizes", [[1], [8], [1] * 8, [5, 3], [32, 13], [32, 0, 13]])
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("whole", [True, False])
def test_waits_are_counted_as_one_by_one(sizes: list[int], overlaps: bool, whole: bool) -> None:
    waiting = jobs(sum(sizes))
    batches = [wire.BatchTimes(size, 0.01 * place, 0.001) for place, size in enumerate(sizes)]
    waits = waits_in_worker(batches, len(waiting))
    metrics, expected = VersionMetrics(), VersionMetrics()
    each = waits * len(waiting) if len(waits) == 1 else waits
    for job, wait in zip(waiting, each, strict=True):
        expected.queued.observe(TAKEN + wait - job.arrived)
        expected.duration.observe(NOW - job.arrived)
    known = batches if whole else []
    count_answers(waiting, [OK], known, waits, NOW, metrics, alike=True, overlaps=overlaps)
    for counted, other in ((metrics.queued, expected.queued), (metrics.duration, expected.duration)):
        assert counted.counts == other.counts and counted.total == pytest.approx(other.total)
    assert metrics.requests[200] == len(waiting)
