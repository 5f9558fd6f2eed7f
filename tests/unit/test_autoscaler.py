"""The autoscaler's decisions on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mms.workers.autoscaler import Autoscaler, Bounds, Seen

LOOK = 0.25  # seconds between two looks
BOUNDS = Bounds(1, 8, up_after=2.0, down_after=60.0)


class Rig:
    """A pool that has at once the workers that are decided on, unless `loading` seconds pass before."""

    def __init__(self, bounds: Bounds = BOUNDS, *, target: int = 1, loading: float = 0.0) -> None:
        self.now = 100.0
        self.bounds = bounds
        self.target = target
        self.ready = target
        self.changes: list[tuple[float, int]] = []
        self._loading = loading
        self._ready_at = 0.0
        self._autoscaler = Autoscaler()
        self._submitted = 0

    def run(
        self,
        seconds: float,
        work: float | Callable[[float], float] = 0.0,
        *,
        waiting: float = 0.0,
        wait: float = 0.0,
        arriving: bool = True,
    ) -> list[int]:
        """The targets that were decided on while `work` workers would be busy."""
        begun, first = self.now, len(self.changes)
        while self.now < begun + seconds:
            self.now += LOOK
            if self.ready < self.target and self.now >= self._ready_at:
                self.ready = self.target
            amount = work(self.now - begun) if callable(work) else work
            self._submitted += arriving and amount > 0
            seen = Seen(self.ready, min(amount, self.ready), waiting, wait, 0.02, self._submitted)
            target = self._autoscaler.decide(self.now, self.target, self.bounds, seen)
            assert target == self.target or self.bounds.low <= target <= self.bounds.high
            if target != self.target:
                self.changes.append((self.now, target))
                self._ready_at = self.now + self._loading
                self.ready = min(self.ready, target) if self._loading else target
                self.target = target
        return [target for _, target in self.changes[first:]]


def test_a_quiet_pool_stays_as_it_is() -> None:
    assert Rig().run(300, 0.3) == []


def test_busy_workers_get_another_one_after_a_while() -> None:
    rig = Rig()
    assert rig.run(1.75, 0.9) == []
    assert rig.run(1, 0.9) == [2]


def test_a_queue_that_stands_brings_more_at_most_twice_as_many_in_a_step() -> None:
    assert Rig().run(12, 1.0, waiting=50, wait=3.0) == [2, 4, 8]


@pytest.mark.parametrize("wait", [0.0, 0.09])
def test_requests_that_wait_for_a_moment_are_no_reason(wait: float) -> None:
    assert Rig().run(60, 0.5, waiting=5, wait=wait) == []


def test_a_wait_of_one_slow_batch_is_no_reason() -> None:
    assert Seen(1, 0.5, 5.0, 1.9, 2.0, 1).work == 0.5
    assert Seen(1, 0.5, 5.0, 2.1, 2.0, 1).work == 5.5


def test_a_burst_that_is_shorter_than_the_mean_is_no_reason() -> None:
    assert Rig().run(60, lambda at: 1.0 if at % 10 < 1 else 0.2) == []


def test_there_are_never_more_than_the_upper_bound() -> None:
    rig = Rig(Bounds(1, 3))
    rig.run(60, 9.0, waiting=100, wait=9.0)
    assert rig.target == 3


def test_nothing_more_is_started_while_workers_load() -> None:
    rig = Rig(loading=30)
    assert rig.run(30, 9.0, waiting=100, wait=9.0) == [2]
    assert rig.run(5, 9.0, waiting=100, wait=9.0) == [4]


def test_a_worker_that_never_loads_is_given_up_when_nothing_needs_it() -> None:
    rig = Rig(loading=1e9)
    assert rig.run(30, 0.9) == [2]
    assert rig.run(70, 0.3) == [1]


def test_fewer_run_after_a_minute_in_which_fewer_were_enough() -> None:
    rig = Rig(target=4)
    assert rig.run(60, 1.0) == []
    assert rig.run(5, 1.0) == [2], "one worker would be too busy"


def test_the_busiest_moment_of_the_minute_says_how_many_stay() -> None:
    rig = Rig(target=8)
    rig.run(63, lambda at: 3.0 if 30 < at < 40 else 0.1)
    assert rig.target == 5


def test_a_busy_moment_begins_the_minute_anew() -> None:
    rig = Rig(target=2)
    assert rig.run(50, 0.1) == rig.run(5, 1.3) == rig.run(55, 0.1) == []
    assert rig.run(10, 0.1) == [1]


@pytest.mark.parametrize("work", [0.5 + step / 20 for step in range(60)])
def test_steady_work_settles(work: float) -> None:
    """Whatever the work, up and down do not follow each other: what is left after a step is not changed again."""
    rig = Rig()
    rig.run(120, work)
    assert rig.run(600, work) == []


def test_work_that_sways_around_a_threshold_changes_nothing_after_the_first_step() -> None:
    rig = Rig()
    assert rig.run(900, lambda at: 0.75 if at % 30 < 15 else 0.65) == [2]


def test_the_last_worker_goes_after_its_idle_time_only() -> None:
    rig = Rig(Bounds(0, 2, zero_after=300))
    assert rig.run(290) == []
    assert rig.run(1, 0.1) == rig.run(299) == []
    assert rig.run(5) == [0]
    assert rig.run(1000) == []


def test_all_go_to_zero_at_once_if_that_comes_before_the_calm() -> None:
    assert Rig(Bounds(0, 4, zero_after=10), target=4).run(12) == [0]


def test_without_an_idle_time_the_last_worker_stays() -> None:
    rig = Rig(Bounds(0, 4), target=4)
    assert rig.run(1000) == [1]


def test_one_long_request_is_not_idleness() -> None:
    assert Rig(Bounds(0, 1, zero_after=10)).run(100, 1.0, arriving=False) == []


def test_a_raised_lower_bound_is_kept() -> None:
    rig = Rig(target=2)
    rig.bounds = Bounds(2, 8)
    assert rig.run(300) == []
