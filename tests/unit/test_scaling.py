"""What a pool is asked for and what its autoscaler makes of it, without workers or with made-up ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from mms.fronts import Load
from mms.metrics import VersionMetrics
from mms.workers.autoscaler import Bounds
from mms.workers.inflight import InFlight
from mms.workers.scaling import Scaling
from mms.workers.scheduling import Scheduling
from mms.workers.worker import Worker
from tests.unit.jobs import NOW, make_job, make_queue

SLEEPY = Bounds(0, 1, zero_after=10, on_request=True)


class Busy:
    """As much of a worker as is looked at."""

    def __init__(self, jobs: int, threads: int = 1) -> None:
        self.in_flight = InFlight(threads)
        self.in_flight.add([make_job(number) for number in range(jobs)], 0, NOW)

    @property
    def jobs(self) -> int:
        return self.in_flight.count


def make(bounds: Bounds, target: int = 0, **queue: Any) -> Scaling:
    scaling = Scaling("cat 1.0", make_queue(**queue), VersionMetrics())
    scaling.ask(bounds, target)
    return scaling


def look(scaling: Scaling, seconds: float, *workers: Busy, others: Sequence[Load] = ()) -> int:
    """The target after so many seconds in which the workers are as they are."""
    for step in range(int(seconds * 4) + 1):
        scaling.look(NOW + step / 4, cast("list[Worker]", workers), others)
    return scaling.target


def test_a_request_wakes_what_sleeps_and_nothing_else() -> None:
    scaling = make(SLEEPY)
    assert scaling.asleep and scaling.rouse()
    assert (scaling.target, scaling.asleep, scaling.rouse()) == (1, False, False)
    assert not make(Bounds(0, 1)).rouse()


def test_a_load_that_takes_longer_than_the_idle_time_is_finished_for_who_waits() -> None:
    scaling = make(SLEEPY, 1)
    scaling._queue.submit(make_job(1))
    assert look(scaling, 60) == 1


def test_a_load_that_nobody_waits_for_any_more_is_given_up() -> None:
    assert look(make(SLEEPY, 1), 60) == 0


@pytest.mark.parametrize(
    ("workers", "target"),
    [
        ([Busy(1)], 2),
        ([Busy(0)], 1),
        ([Busy(2, threads=4)], 1),
        ([Busy(4, threads=4)], 2),
        ([Busy(9, threads=4)], 2),
    ],
)
def test_a_worker_is_as_busy_as_its_threads(workers: list[Busy], target: int) -> None:
    assert look(make(Bounds(1, 8), 1), 2.5, *workers) == target


@pytest.mark.parametrize(("jobs", "threads", "target"), [(2, 1, 1), (8, 1, 2), (8, 2, 1)])
def test_a_worker_whose_batches_are_half_empty_needs_no_other(jobs: int, threads: int, target: int) -> None:
    assert look(make(Bounds(1, 8), 1, batch_size=8), 2.5, Busy(jobs, threads)) == target


@pytest.mark.parametrize(("waiting", "oldest_wait", "target"), [(3, 0.2, 2), (3, 0.05, 1), (0, 0.0, 1)])
def test_what_waits_at_another_front_end_counts(waiting: int, oldest_wait: float, target: int) -> None:
    other = Load(1, {}, waiting, oldest_wait, 0.01, submitted=9)
    assert look(make(Bounds(1, 8), 1), 2.5, Busy(0), others=[other]) == target


@pytest.mark.parametrize(("jobs", "target"), [(3, 2), (1, 1)])
def test_with_a_latency_objective_a_full_batch_is_one_of_the_limit(jobs: int, target: int) -> None:
    scaling = make(Bounds(1, 8), 1, batch_size=256, scheduling=Scheduling(objective=0.05))
    worker = Busy(0)
    worker.in_flight = scaling._queue.new_worker()
    assert worker.in_flight.batch_limit is not None
    worker.in_flight.batch_limit.limit = 3
    worker.in_flight.add([make_job(number) for number in range(jobs)], 0, NOW)
    assert look(scaling, 2.5, worker) == target


def test_only_those_that_were_asked_for_are_missed() -> None:
    scaling = make(Bounds(2, 8), 5)
    scaling.had(5)
    assert (scaling.owed, scaling.minimum, scaling.most) == (2, 2, 8)
    scaling.ask(Bounds(1, 8), 5)
    assert (scaling.owed, scaling.minimum) == (1, 1)


@pytest.mark.parametrize(
    ("bounds", "target"), [(Bounds(1, 8), 5), (Bounds(6, 8), 6), (Bounds(1, 3), 3), (Bounds(2, 2), 2)]
)
def test_new_bounds_keep_the_workers_as_far_as_they_may(bounds: Bounds, target: int) -> None:
    assert make(Bounds(2, 8), 5).adjusted(bounds) == target


def test_each_change_is_counted() -> None:
    scaling = make(SLEEPY)
    scaling.rouse()
    look(scaling, 20)
    assert scaling._metrics.scalings == {"up": 1, "down": 1}
