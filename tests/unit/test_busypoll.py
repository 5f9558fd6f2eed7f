"""The event loop stays awake for the answer of a quick worker, and for no other; its clock is the test's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from mms.workers import busypoll, environment
from mms.workers.busypoll import PATIENCE, PAUSE, QUICK, BusyPoll
from mms.workers.inflight import InFlight


class Loop:
    """Runs what was called for one turn at a time."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def turn(self) -> bool:
        """Whether it does not sleep afterwards."""
        due, self.soon = self.soon, []
        for callback in due:
            callback()
        return bool(self.soon)


class Rig:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: int = 2) -> None:
        monkeypatch.setattr(environment, "cores", lambda: cores)
        self.now = 100.0
        monkeypatch.setattr(busypoll, "monotonic", lambda: self.now)
        self.loop = Loop()
        self.poll = BusyPoll(cast(asyncio.AbstractEventLoop, cast(Any, self.loop)))
        self.worker = InFlight()
        self.worker.batch_seconds = QUICK / 2

    def send(self) -> None:
        self.worker.count = 1
        self.poll.sent(self.worker, self.now)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def test_the_loop_stays_awake_until_the_answer_is_there(rig: Rig) -> None:
    rig.send()
    assert [rig.loop.turn() for _ in range(3)] == [True] * 3
    rig.worker.count = 0
    assert not rig.loop.turn()


def test_it_sleeps_once_others_wait_behind_the_request(rig: Rig) -> None:
    rig.send()
    rig.worker.count = 2
    assert not rig.loop.turn()


def test_requests_in_a_row_are_watched_by_one_look_per_turn(rig: Rig) -> None:
    for _ in range(3):
        rig.send()
        rig.now += PATIENCE / 2
        rig.loop.turn()
    assert len(rig.loop.soon) == 1


def test_an_answer_that_takes_long_is_slept_for_and_the_next_ones_too(rig: Rig) -> None:
    rig.send()
    rig.now += PATIENCE
    assert not rig.loop.turn()
    for _ in range(PAUSE):
        rig.send()
        assert not rig.loop.soon
    rig.send()
    assert rig.loop.soon


@pytest.mark.parametrize("seconds", [None, QUICK * 2])
def test_a_worker_that_is_slow_or_not_known_yet_is_slept_for(rig: Rig, seconds: float | None) -> None:
    rig.worker.batch_seconds = seconds
    rig.send()
    assert not rig.loop.soon


def test_on_one_cpu_the_worker_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, cores=1)
    rig.send()
    assert not rig.loop.soon
