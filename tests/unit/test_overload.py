"""The queue while more come than can be served: how fast jobs leave, how many may wait, who is served first."""

from __future__ import annotations

import pytest

from mms.errors import QueueFullError, QueueWaitError
from mms.workers.batching import BatchQueue
from mms.workers.inflight import InFlight
from mms.workers.overload import EXCESS_SECONDS, FEWEST_WAITING, MAX_RETRY_AFTER, STANDING_SECONDS
from tests.unit.jobs import NOW, fill, finish, make_job, make_queue, make_worker, take


def drain(queue: BatchQueue, worker: InFlight, *, rate: int, seconds: float, keep: int) -> float:
    """Jobs leave at `rate` per second while `keep` others wait; returns when it is."""
    now = NOW
    fill(queue, keep, first=1_000_000, arrived=NOW)
    for number in range(int(rate * seconds)):
        now = NOW + (number + 1) / rate
        fill(queue, 1, first=number + 1, arrived=now)
        finish(worker, *take(queue, worker, now))
        if not number % max(1, rate // 4):
            queue.tick(now)
    queue.tick(now)
    return now


@pytest.mark.parametrize("rate", [8, 200])
def test_the_rate_is_that_at_which_jobs_leave_while_others_wait(rate: int) -> None:
    queue, worker = make_queue(), make_worker(0.004)
    drain(queue, worker, rate=rate, seconds=4, keep=5)
    assert queue.rate == pytest.approx(rate, rel=0.15)


def test_an_idle_queue_tells_nothing_of_the_rate() -> None:
    queue, worker = make_queue(), make_worker(0.004)
    drain(queue, worker, rate=100, seconds=3, keep=0)
    assert queue.rate == 0 and queue.room == queue.capacity


def test_a_job_that_would_wait_longer_than_the_timeout_is_refused() -> None:
    queue, worker = make_queue(timeout=0.5), make_worker(0.004)
    now = drain(queue, worker, rate=100, seconds=2, keep=40)
    assert queue.room == pytest.approx(50, rel=0.1)
    fill(queue, queue.room - queue.depth, first=10_000, arrived=now)
    with pytest.raises(QueueWaitError, match=r"longer than queue_timeout \(0.5 s\)"):
        queue.submit(make_job(20_000))
    queue.forget_rate()
    assert queue.room == queue.capacity


def test_retry_after_is_the_time_until_the_queue_is_empty_and_some_chance() -> None:
    queue, worker = make_queue(capacity=100), make_worker(0.004)
    now = drain(queue, worker, rate=20, seconds=4, keep=90)
    fill(queue, 100 - queue.depth, first=10_000, arrived=now)
    refusals = [queue.refusal(10) for _ in range(20)]
    seconds = {refusal.retry_after for refusal in refusals if isinstance(refusal, QueueFullError)}
    assert seconds <= {5, 6, 7, 8} and len(seconds) > 1
    queue._overload.rate = 0.01
    assert isinstance(refusal := queue.refusal(10), QueueFullError) and refusal.retry_after == MAX_RETRY_AFTER


def overload(queue: BatchQueue, worker: InFlight, seconds: float = 2.0) -> float:
    """Twice as many come as leave, for so long. Returns when that is."""
    now = NOW
    for number in range(int(200 * seconds)):
        now = NOW + number * 0.005
        for job in (make_job(2 * number, arrived=now), make_job(2 * number + 1, arrived=now)):
            if queue.refusal(10) is None:
                queue.submit(job)
        finish(worker, *take(queue, worker, now))
        if not number % 20:
            queue.tick(now)
    queue.tick(now)
    return now


@pytest.mark.parametrize("fifo", [False, True])
def test_the_newest_job_is_served_first_while_more_come_than_leave(fifo: bool) -> None:
    queue, worker = make_queue(fifo=fifo), make_worker(0.004)
    now = overload(queue, worker)
    assert queue.newest_first is not fifo
    fill(queue, 1, first=10_000, arrived=now)
    assert (take(queue, worker, now) == [10_000]) is not fifo


def patient(queue: BatchQueue, clients: int, *, batch_seconds: float, seconds: float) -> tuple[float, int]:
    """Clients that all come at once, and then send again when they are answered: the longest wait, and refusals."""
    worker, now, ticked, number = make_worker(batch_seconds), NOW, NOW, clients
    fill(queue, clients)
    longest, refused = 0.0, 0
    while now < NOW + seconds:
        numbers = take(queue, worker, now)
        longest = max(longest, *(now - job.arrived for job in worker.jobs))
        now += batch_seconds
        while ticked + 0.25 <= now:
            ticked += 0.25
            queue.tick(ticked)
            refused += len(queue.expire(ticked))
        finish(worker, *numbers)
        for _ in numbers:
            number += 1
            refused += queue.refusal(10) is not None
            queue.submit(make_job(number, arrived=now))
    return longest, refused


@pytest.mark.parametrize(("clients", "batch_size", "batch_seconds"), [(64, 8, 0.08), (100, 1, 0.005), (50, 4, 2.0)])
def test_patient_clients_are_all_served_in_their_order(clients: int, batch_size: int, batch_seconds: float) -> None:
    queue = make_queue(batch_size=batch_size, capacity=100, timeout=1000)
    longest, refused = patient(queue, clients, batch_seconds=batch_seconds, seconds=100 * batch_seconds + 5)
    assert refused == 0 and not queue.newest_first
    assert longest <= (clients / batch_size + 1) * batch_seconds + 1e-6


def test_a_slow_handler_makes_nobody_overloaded() -> None:
    queue, worker = make_queue(), make_worker(10.0)
    fill(queue, 3)
    for number, wait in ((1, 0.0), (2, 10.0), (3, 20.0)):
        assert take(queue, worker, NOW + wait) == [number]
        finish(worker, number)


def test_an_empty_queue_ends_the_overload() -> None:
    queue, worker = make_queue(), make_worker(0.004)
    now = overload(queue, worker)
    while numbers := take(queue, worker, now):
        finish(worker, *numbers)
    fill(queue, 2, first=10_000, arrived=now)
    assert take(queue, worker, now + 0.05) == [10_000]
    queue.tick(now + 0.05)
    assert not queue.newest_first


def test_while_more_come_than_leave_few_may_wait() -> None:
    queue, worker = make_queue(capacity=100), make_worker(0.004)
    now = overload(queue, worker)
    assert queue.newest_first and queue.room == FEWEST_WAITING and queue.depth <= FEWEST_WAITING
    fill(queue, queue.room - queue.depth, first=10_000, arrived=now)
    with pytest.raises(QueueFullError, match="more come than can be served"):
        queue.submit(make_job(20_000))
    for _ in range(2):  # the first of these windows has some of the overload in it
        for _ in range(8):
            finish(worker, *take(queue, worker, now))
        now += 1.1 * EXCESS_SECONDS
        queue.tick(now)
    assert queue.room == 100 and queue.depth, "more left than came"


def test_who_waits_when_the_overload_is_noticed_is_served_before_the_newest() -> None:
    queue, worker = make_queue(capacity=1000), make_worker(0.004)
    now = overload(queue, worker, seconds=1.4)
    assert queue._overload.overloaded and queue.depth > queue.room == FEWEST_WAITING
    while queue.depth > queue.room:
        oldest = next(iter(queue._waiting))
        assert take(queue, worker, now) == [oldest.id]
        finish(worker, oldest.id)
    take(queue, worker, now)
    finish(worker, *(job.id for job in worker.jobs))
    newest = list(queue._waiting)[-1]
    assert take(queue, worker, now + STANDING_SECONDS) == [newest.id]


def test_with_fifo_as_many_may_wait_as_ever() -> None:
    queue, worker = make_queue(capacity=100, fifo=True), make_worker(0.004)
    overload(queue, worker)
    assert queue.room == 100 and queue.depth >= 99
