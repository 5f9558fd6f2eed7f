"""Which of the prepared requests make up the next batch of a pipeline, and when."""

from __future__ import annotations

import itertools
import mmap
import threading
from typing import Any

import pytest

from mms import sharedpage, wire
from mms.backend.forming import Ready
from mms.backend.sources import Source, Ticket
from mms.backend.stages import Prepared
from mms.handler import Request

NOW = 1000.0
FACTS = wire.RequestFactsView("", "", b"", False, wire.EMPTY_HEADERS)


class Rig:
    """What is ready, of a front end whose frames say how batches are formed."""

    def __init__(self, batch_size: int, preferred: tuple[int, ...] = (), delay: float = 0.0) -> None:
        self.ready = Ready()
        self.page = mmap.mmap(-1, sharedpage.PAGE)
        self.source = self.front_end(batch_size, preferred, delay)
        self._numbers = itertools.count(1)

    def front_end(self, batch_size: int, preferred: tuple[int, ...] = (), delay: float = 0.0) -> Source:
        nothing: Any = None  # is read or sent
        source = Source(nothing, self.page, None, threading.Lock(), nothing)
        source.batch_size, source.forming = batch_size, wire.Forming(preferred, delay, NOW)
        return source

    def add(
        self,
        count: int,
        bucket: object = None,
        *,
        source: Source | None = None,
        above: int = 0,
        arrived: float = NOW,
        received: float | None = None,
    ) -> None:
        for number in itertools.islice(self._numbers, count):
            request = Request(FACTS, b"", bytearray(), 1)
            received = arrived if received is None else received
            ticket = Ticket(source or self.source, number, number - above, number, request, received, arrived)
            ticket.prepared = Prepared(request, None, bucket)
            self.ready.add(ticket)

    def take(self, now: float = NOW, *, coming: bool = False) -> list[int]:
        batch, _ = self.ready.take(now, coming=coming)
        return [ticket.id for ticket in batch]


def test_without_a_delay_what_is_there_is_taken_at_once() -> None:
    rig = Rig(4)
    rig.add(6)
    assert [rig.take(coming=True) for _ in range(3)] == [[1, 2, 3, 4], [5, 6], []]
    assert not rig.ready


def test_the_largest_preferred_size_that_is_ready_is_taken() -> None:
    rig = Rig(8, preferred=(4, 2))
    rig.add(7)
    assert [rig.take() for _ in range(3)] == [[1, 2, 3, 4], [5, 6], [7]]


def test_a_preferred_size_above_the_limit_of_the_moment_is_none() -> None:
    rig = Rig(3, preferred=(4, 2))
    rig.add(5)
    assert [rig.take() for _ in range(3)] == [[1, 2], [3, 4], [5]]


@pytest.mark.parametrize(("preferred", "missing"), [((), 2), ((4, 6), 0), ((4, 3), 0), ((6,), 2)])
def test_with_a_delay_too_few_for_any_size_wait(preferred: tuple[int, ...], missing: int) -> None:
    rig = Rig(6, preferred=tuple(sorted(preferred, reverse=True)), delay=0.5)
    rig.add(2)
    rig.add(2, arrived=NOW + 0.3)
    assert bool(rig.take(NOW + 0.49)) != bool(missing)
    if missing:
        assert rig.ready.goes_at(False) == NOW + 0.5
        rig.add(missing, arrived=NOW + 0.49)
        assert rig.take(NOW + 0.49) == [1, 2, 3, 4, 5, 6]


def test_after_the_delay_of_the_oldest_what_is_there_is_taken() -> None:
    rig = Rig(6, preferred=(4,), delay=0.5)
    rig.add(1, arrived=NOW + 0.2)
    rig.add(2)
    assert rig.take(NOW + 0.4) == []
    assert rig.take(NOW + 0.5, coming=False) == [1, 2, 3]


def test_those_left_behind_wait_for_their_own_time() -> None:
    rig = Rig(2, delay=0.5)
    rig.add(2)
    rig.add(1, arrived=NOW + 0.4)
    assert rig.take(NOW + 0.4) == [1, 2]
    assert rig.take(NOW + 0.5) == [] and rig.ready.goes_at(False) == NOW + 0.9


def test_who_was_sent_after_the_delay_waits_as_long_for_what_is_being_prepared() -> None:
    rig = Rig(6, delay=0.5)
    rig.add(1, arrived=NOW - 0.5, received=NOW)
    assert rig.take(NOW + 0.4, coming=True) == [] and rig.ready.goes_at(True) == NOW + 0.5
    assert rig.take(NOW + 0.4, coming=False) == [1]
    rig.add(1, arrived=NOW - 0.5, received=NOW)
    assert rig.take(NOW + 0.5, coming=True) == [2]


def test_a_full_batch_of_another_bucket_does_not_wait() -> None:
    rig = Rig(2, delay=0.5)
    rig.add(1, "wide")
    rig.add(4, "tall")
    assert rig.take() == [2, 3]
    assert rig.take(NOW + 0.5) == [1], "its time has come"
    assert rig.take(NOW + 0.5) == [4, 5]


def test_higher_priorities_go_first_and_the_oldest_says_when() -> None:
    rig = Rig(2, delay=0.5)
    rig.add(1)
    rig.add(1, arrived=NOW + 0.4, above=100)
    assert rig.take(NOW + 0.4) == [2, 1]
    rig.add(1)
    rig.add(2, "other", arrived=NOW + 0.4, above=100)
    assert rig.take(NOW + 0.5) == [4, 5]
    assert rig.take(NOW + 0.5) == [3]


def test_who_is_not_waited_for_any_more_fills_no_batch() -> None:
    rig = Rig(4, preferred=(2,), delay=0.5)
    rig.add(2)
    sharedpage.write_cancelled(rig.page, 1)
    batch, gone = rig.ready.take(NOW, coming=False)
    assert not batch and [ticket.id for ticket in gone] == [1]
    rig.add(1, arrived=NOW + 0.1)
    assert rig.take(NOW + 0.1) == [2, 3]


def test_front_ends_have_batches_and_times_of_their_own() -> None:
    rig = Rig(2, delay=0.5)
    other = rig.front_end(2)
    rig.add(1)
    rig.add(1, source=other)
    assert rig.take() == [2]
    rig.add(1, source=other)
    other.gone = True
    batch, gone = rig.ready.take(NOW, coming=False)
    assert not batch and [ticket.id for ticket in gone] == [3]
    assert rig.take(NOW + 0.5) == [1]
