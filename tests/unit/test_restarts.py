"""What all pools of a server share: their workers' deaths hold back each other's replacements."""

from __future__ import annotations

import logging
import time

import pytest

from mms.workers import restarts
from mms.workers.restarts import DEATH_PAUSE_LIMIT, MAX_RESTARTS, RESTART_PAUSE, BackOff, Restarts
from tests.waiting import eventually


def test_too_many_deaths_hold_replacements_back_and_are_one_line_each_way(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "RESTART_WINDOW", 0.2)

    def calm() -> bool:
        shared.tick(time.monotonic())
        return not shared.facts().spent

    with caplog.at_level(logging.INFO, "mms"):
        shared = Restarts()
        assert {shared.pause("exit code 1") for _ in range(MAX_RESTARTS)} == {0.0}
        assert {shared.pause("exit code 1") for _ in range(3)} == {RESTART_PAUSE}
        assert shared.facts().state == "each replacement waits 1 s"
        eventually(calm)
        assert shared.pause("exit code 1") == 0.0
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "more than 20 workers died within 0.2 s",
        "fewer workers die",
    ]


def test_a_start_that_fails_for_hours_beside_others_is_tried_on() -> None:
    back_off = BackOff(Restarts(), 3)
    back_off.failed_starts = 5000
    assert back_off.pause_beside_others() == DEATH_PAUSE_LIMIT
