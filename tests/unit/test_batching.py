"""The dispatcher's rules, one by one: batches, work sent ahead, answers, deaths, deadlines, drain."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from mms.errors import (
    DeadlineError,
    DrainingError,
    MMSError,
    QueueBytesError,
    QueueFullError,
    QueueWaitError,
    ServiceUnavailableError,
    WorkerDiedError,
)
from mms.wire import RequestFacts
from mms.workers.batching import BatchQueue
from mms.workers.inflight import AHEAD_SECONDS, MAX_FRAME_JOBS, InFlight
from mms.workers.job import Job, StreamCaller
from mms.workers.overload import EXCESS_SECONDS, FEWEST_WAITING, MAX_RETRY_AFTER, STANDING_SECONDS
from mms.workers.poison import MAX_POISON_BYTES, RETRY_MINIMUM, RETRY_WINDOW
from mms.workers.scheduling import Scheduling
from mms.workers.waiting import MAX_FRAME_BYTES

NOW = 1000.0
QUICK = 1e-5  # seconds a batch takes: many fit into the time that may be sent ahead
SLOW = 1.0


FACTS = RequestFacts("", "", b"", False, [])


@dataclass
class Caller:
    outcomes: list[object] = field(default_factory=list)

    def begin(self, status: int, head: bytes) -> StreamCaller:
        raise AssertionError("nothing streams here")

    def answer(self, status: int, head: bytes, body: bytes | memoryview) -> None:
        self.outcomes.append(bytes(body))

    def fail(self, error: MMSError) -> None:
        self.outcomes.append(error)


def make_queue(**settings: Any) -> BatchQueue:
    defaults = {"batch_size": 1, "max_batch_delay": 0.0, "capacity": 1000, "timeout": 60.0, "retry": 1}
    return BatchQueue(**{**defaults, **settings})


def make_worker(batch_seconds: float | None = None) -> InFlight:
    worker = InFlight()
    if batch_seconds is not None:
        worker.observe(1, batch_seconds)
    return worker


def make_job(number: int, *, size: int = 10, arrived: float = NOW, facts: RequestFacts = FACTS) -> Job:
    return Job(number, facts, b"r%d" % number, [b"%d" % number], size, Caller(), arrived)


def fill(queue: BatchQueue, count: int, *, first: int = 1, size: int = 10, arrived: float = NOW) -> list[Job]:
    jobs = [make_job(number, size=size, arrived=arrived) for number in range(first, first + count)]
    for job in jobs:
        queue.submit(job)
    return jobs


def take(queue: BatchQueue, worker: InFlight, now: float = NOW) -> list[int]:
    frame = queue.take(worker, now)
    return [] if frame is None else [job.id for job in frame[1]]


def finish(worker: InFlight, *numbers: int) -> None:
    jobs = worker.finish(list(numbers))
    assert jobs is not None
    for job in jobs:
        job.settled = True


def abandon(job: int) -> None:
    """What marks a job as begun to stream."""


def numbers(failed: list[tuple[Job, MMSError]]) -> list[int]:
    return [job.id for job, _ in failed]


# batches


def test_an_idle_worker_takes_what_is_there_at_once() -> None:
    queue, worker = make_queue(batch_size=8), make_worker()
    fill(queue, 3)
    assert queue.take(worker, NOW) is not None
    assert queue.depth == 0 and list(worker.jobs) == [1, 2, 3]


def test_a_frame_says_the_batch_size_it_was_made_for() -> None:
    queue = make_queue(batch_size=4)
    fill(queue, 6)
    frame = queue.take(make_worker(), NOW)
    assert frame is not None and frame[0] == 4 and len(frame[1]) == 4


def test_nothing_waits_nothing_is_taken() -> None:
    assert make_queue().take(make_worker(), NOW) is None


def test_a_worker_of_unknown_speed_gets_one_batch() -> None:
    queue, worker = make_queue(batch_size=2), make_worker()
    fill(queue, 6)
    assert take(queue, worker) == [1, 2]
    assert take(queue, worker) == []


def test_a_slow_worker_gets_nothing_ahead() -> None:
    queue, worker = make_queue(), make_worker(SLOW)
    fill(queue, 5)
    assert take(queue, worker) == [1]
    assert take(queue, worker) == []


def test_a_quick_worker_gets_many_batches_in_one_frame_and_one_more_frame_ahead() -> None:
    queue, worker = make_queue(batch_size=2), make_worker(2e-4)  # ten batches in two milliseconds
    fill(queue, 50)
    assert len(take(queue, worker)) == 20
    assert take(queue, worker) == []
    finish(worker, *range(1, 9))
    assert len(take(queue, worker)) == 8
    assert take(queue, worker) == [], "two unanswered frames are enough"


def test_behind_a_batch_that_fits_into_the_time_ahead_lies_another_one() -> None:
    queue, worker = make_queue(batch_size=2), make_worker(0.7 * AHEAD_SECONDS)
    fill(queue, 6)
    assert take(queue, worker) == [1, 2]
    assert take(queue, worker) == [3, 4]
    assert take(queue, worker) == []


def test_nothing_is_sent_ahead_that_would_not_fill_a_batch() -> None:
    queue, worker = make_queue(batch_size=4), make_worker(QUICK)
    fill(queue, 4)
    take(queue, worker)
    fill(queue, 3, first=5)
    assert take(queue, worker) == []
    fill(queue, 1, first=8)
    assert take(queue, worker) == [5, 6, 7, 8]


def test_the_jobs_of_a_frame_are_bounded() -> None:
    queue, worker = make_queue(), make_worker(0.0)
    fill(queue, MAX_FRAME_JOBS + 1)
    assert len(take(queue, worker)) == MAX_FRAME_JOBS


def test_a_batch_larger_than_a_frames_bound_is_one_frame() -> None:
    queue = make_queue(batch_size=MAX_FRAME_JOBS * 2)
    fill(queue, MAX_FRAME_JOBS * 2)
    assert len(take(queue, make_worker())) == MAX_FRAME_JOBS * 2


def test_the_bytes_of_a_frame_are_bounded_beyond_its_first_batch() -> None:
    queue, worker = make_queue(batch_size=2), make_worker(QUICK)
    fill(queue, 8, size=MAX_FRAME_BYTES)
    assert take(queue, worker) == [1, 2]


def test_the_time_of_a_batch_follows_rises_at_once_and_falls_slowly() -> None:
    worker = make_worker(0.001)
    worker.observe(2, 0.2)
    assert worker.batch_seconds == pytest.approx(0.1)
    worker.observe(1, 0.05)
    assert worker.batch_seconds == pytest.approx(0.09)


# max_batch_delay


def test_an_idle_worker_waits_for_a_fuller_batch_no_longer_than_the_delay() -> None:
    queue, worker = make_queue(batch_size=4, max_batch_delay=0.5), make_worker()
    fill(queue, 2)
    assert take(queue, worker, NOW + 0.4) == []
    assert queue.wake_at() == NOW + 0.5
    assert take(queue, worker, NOW + 0.5) == [1, 2]


def test_a_full_batch_does_not_wait() -> None:
    queue = make_queue(batch_size=2, max_batch_delay=0.5)
    fill(queue, 2)
    assert queue.wake_at() is None
    assert take(queue, make_worker()) == [1, 2]


def test_the_delay_counts_from_the_oldest_job_that_somebody_waits_for() -> None:
    queue = make_queue(batch_size=4, max_batch_delay=0.5)
    first, _ = *fill(queue, 1), *fill(queue, 1, first=2, arrived=NOW + 0.3)
    first.cancel()
    assert queue.wake_at() == NOW + 0.8


def test_without_a_delay_nobody_needs_to_wake() -> None:
    queue = make_queue(batch_size=4)
    fill(queue, 1)
    assert queue.wake_at() is None


# the bound


def test_a_full_queue_refuses_the_next_job() -> None:
    queue = make_queue(capacity=2)
    fill(queue, 2)
    with pytest.raises(QueueFullError, match="2 requests wait") as caught:
        queue.submit(make_job(3))
    assert caught.value.status == 429 and caught.value.retry_after >= 1
    assert queue.depth == queue.submitted == 2


def test_jobs_at_workers_do_not_count_as_waiting() -> None:
    queue = make_queue(capacity=1)
    fill(queue, 1)
    take(queue, make_worker())
    fill(queue, 1, first=2)
    assert queue.depth == 1


def test_a_closed_queue_refuses_and_serves_those_that_wait() -> None:
    queue = make_queue()
    fill(queue, 1)
    queue.close("model cat 1.0 is being unloaded")
    with pytest.raises(DrainingError, match=r"cat 1\.0 is being unloaded"):
        queue.submit(make_job(2))
    assert take(queue, make_worker()) == [1]


def test_the_bytes_that_wait_are_bounded() -> None:
    queue = make_queue(max_bytes=100)
    fill(queue, 2, size=40)
    with pytest.raises(QueueBytesError, match="have 80 bytes, and queue_bytes is 100"):
        queue.submit(make_job(3, size=21))
    fill(queue, 1, first=4, size=20)
    assert queue.bytes == 100


def test_jobs_that_arrive_together_are_taken_together() -> None:
    queue = make_queue(batch_size=2)
    assert queue.submit_all([make_job(1, size=3), make_job(2, size=4)])
    assert (queue.depth, queue.bytes, queue.submitted) == (2, 7, 2)
    assert take(queue, make_worker()) == [1, 2]


@pytest.mark.parametrize("limits", [{"capacity": 2}, {"max_bytes": 11}], ids=["number", "bytes"])
def test_of_jobs_that_arrive_together_none_is_taken_unless_there_is_room_for_all(limits: dict[str, int]) -> None:
    queue = make_queue(**limits)
    assert not queue.submit_all([make_job(number, size=4) for number in (1, 2, 3)])
    assert (queue.depth, queue.bytes, queue.submitted) == (0, 0, 0)
    assert queue.submit_all([make_job(number, size=4) for number in (1, 2)])


def test_jobs_that_have_just_come_pass_an_empty_queue() -> None:
    queue, worker = make_queue(batch_size=2), make_worker()
    assert queue.pass_on([make_job(1), make_job(2)], worker, NOW)
    assert (queue.depth, queue.bytes, queue.submitted, list(worker.jobs)) == (0, 0, 2, [1, 2])
    assert [job.taken for job in worker.finish([1, 2]) or []] == [NOW, NOW]


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 1},
        {"capacity": 1},
        {"max_bytes": 19},
        {"max_batch_delay": 1.0},
        {"scheduling": Scheduling(preferred=(1,))},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_jobs_that_something_is_to_be_decided_of_do_not_pass_the_queue(settings: dict[str, Any]) -> None:
    queue, worker = make_queue(**{"batch_size": 2, **settings}), make_worker()
    assert not queue.pass_on([make_job(1), make_job(2)], worker, NOW)
    assert not worker.jobs and (queue.depth, queue.submitted) == (0, 0)


def test_nobody_passes_those_who_wait() -> None:
    queue, worker = make_queue(batch_size=2), make_worker()
    fill(queue, 1)
    assert not queue.pass_on([make_job(2)], worker, NOW)
    assert take(queue, worker) == [1]


def test_an_empty_queue_takes_a_body_of_any_size() -> None:
    queue = make_queue(max_bytes=100)
    (large,) = fill(queue, 1, size=1000)
    with pytest.raises(QueueBytesError):
        queue.submit(make_job(2))
    large.cancel()
    fill(queue, 1, first=3, size=1000)


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


def test_a_refused_job_is_freed_without_the_collector() -> None:
    queue, job = make_queue(capacity=0), make_job(1)
    with contextlib.suppress(QueueFullError):
        queue.submit(job)
    assert sys.getrefcount(job) == 2  # this function's and its own argument


def test_retry_after_is_the_time_until_the_queue_is_empty_and_some_chance() -> None:
    queue, worker = make_queue(capacity=100), make_worker(0.004)
    now = drain(queue, worker, rate=20, seconds=4, keep=90)
    fill(queue, 100 - queue.depth, first=10_000, arrived=now)
    refusals = [queue.refusal(10) for _ in range(20)]
    seconds = {refusal.retry_after for refusal in refusals if isinstance(refusal, QueueFullError)}
    assert seconds <= {5, 6, 7, 8} and len(seconds) > 1
    queue._overload.rate = 0.01
    assert isinstance(refusal := queue.refusal(10), QueueFullError) and refusal.retry_after == MAX_RETRY_AFTER


# the order


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
        longest = max(longest, *(now - worker.jobs[one].arrived for one in numbers))
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
    finish(worker, *worker.jobs)
    newest = list(queue._waiting)[-1]
    assert take(queue, worker, now + STANDING_SECONDS) == [newest.id]


def test_with_fifo_as_many_may_wait_as_ever() -> None:
    queue, worker = make_queue(capacity=100, fifo=True), make_worker(0.004)
    overload(queue, worker)
    assert queue.room == 100 and queue.depth >= 99


def test_jobs_that_were_cancelled_below_others_do_not_pile_up() -> None:
    queue = make_queue()
    fill(queue, 1)
    for number in range(1000):
        fill(queue, 1, first=number + 2)[0].cancel()
    queue.tick(NOW)
    assert len(queue._waiting) == 1


# answers


def test_an_answer_to_a_job_that_the_worker_does_not_have_is_refused() -> None:
    queue, worker = make_queue(), make_worker()
    fill(queue, 1)
    take(queue, worker)
    assert worker.finish([99]) is None
    finish(worker, 1)
    assert worker.finish([1]) is None


def test_a_frame_is_done_with_its_last_job() -> None:
    queue, worker = make_queue(batch_size=2), make_worker()
    fill(queue, 2)
    take(queue, worker)
    finish(worker, 1)
    assert [frame.left for frame in worker.frames] == [1]
    finish(worker, 2)
    assert not worker.frames and worker.finished == 2


# cancellation


def test_a_cancelled_job_that_waits_never_runs_and_frees_its_place_and_its_body() -> None:
    queue = make_queue(capacity=2)
    first, _ = fill(queue, 2)
    first.cancel()
    assert queue.depth == 1 and first.parts == []
    fill(queue, 1, first=3)
    worker = make_worker()
    assert take(queue, worker) == [2]


def test_a_cancelled_job_at_a_worker_stays_there_until_its_answer() -> None:
    queue, worker = make_queue(), make_worker()
    (job,) = fill(queue, 1)
    take(queue, worker)
    job.cancel()
    assert queue.depth == 0
    assert worker.finish([1]) == [job] and job.settled


def test_cancelling_twice_or_after_the_answer_changes_nothing() -> None:
    queue = make_queue()
    (job,) = fill(queue, 1)
    job.cancel()
    job.cancel()
    assert queue.depth == 0
    settled = make_job(2)
    settled.settled = True
    settled.cancel()
    assert queue.depth == 0


def test_a_job_fails_once() -> None:
    job = make_job(1)
    first, second = DeadlineError("first"), DeadlineError("second")
    job.fail(first)
    job.fail(second)
    assert isinstance(job.caller, Caller) and job.caller.outcomes == [first]


# death of a worker


def test_jobs_sent_ahead_go_back_to_the_front_uncounted() -> None:
    queue, worker = make_queue(), make_worker(QUICK)
    jobs = fill(queue, 3)
    take(queue, worker)
    fill(queue, 1, first=4)
    assert queue.lose(worker, 0, "signal 9", NOW) == []
    assert [job.attempts for job in jobs] == [0, 0, 0]
    assert queue.depth == 4 and queue.retries == 0
    assert take(queue, make_worker(QUICK)) == [1, 2, 3, 4]


def test_the_started_batch_is_run_again_one_by_one_before_anything_else() -> None:
    queue, worker = make_queue(batch_size=2), make_worker(QUICK)
    fill(queue, 4)
    take(queue, worker)
    assert queue.lose(worker, 2, "signal 9", NOW) == []
    other = make_worker(QUICK)
    for number in (1, 2):
        assert take(queue, other) == [number]
        assert take(queue, other) == [], "nothing shares the fate of a retry"
        finish(other, number)
    assert take(queue, other) == [3, 4]
    assert queue.retries == 2


def test_a_retry_waits_for_an_idle_worker() -> None:
    queue, doomed, busy = make_queue(), make_worker(), make_worker(QUICK)
    fill(queue, 2)
    take(queue, busy)
    fill(queue, 1, first=3)
    take(queue, doomed)
    queue.lose(doomed, 1, "signal 9", NOW)
    assert take(queue, busy) == []
    finish(busy, 1, 2)
    assert take(queue, busy) == [3]


def test_f5_what_has_begun_to_stream_is_not_run_again_and_its_batch_neighbours_are() -> None:
    queue, worker = make_queue(batch_size=3), make_worker()
    jobs = fill(queue, 3)
    take(queue, worker)
    jobs[1].abandon = abandon
    ((job, error),) = queue.lose(worker, 3, "signal 11 (SIGSEGV)", NOW, done=0)
    assert job is jobs[1] and error.message.startswith("the worker process died in the middle of this answer")
    assert queue.retries == 2 and queue.depth == 2
    assert [take(queue, make_worker()), take(queue, make_worker())] == [[1], [3]]


def test_f5_a_stream_alone_spends_no_retry() -> None:
    queue = make_queue()
    for number in range(1, 10):
        (job,) = fill(queue, 1, first=number)
        worker = make_worker()
        take(queue, worker)
        job.abandon = abandon
        assert numbers(queue.lose(worker, 1, "signal 9 (SIGKILL)", NOW, done=0)) == [number]
    (job,), worker = fill(queue, 1, first=10), make_worker()
    take(queue, worker)
    assert queue.lose(worker, 1, "signal 9 (SIGKILL)", NOW, done=0) == []


def test_a_worker_that_streams_gets_nothing_ahead_any_more() -> None:
    queue, worker = make_queue(), make_worker(QUICK)
    worker.begins_stream()
    worker.observe(1, QUICK)
    fill(queue, 5)
    assert take(queue, worker) == [1]
    assert take(queue, worker) == []
    finish(worker, 1)
    assert take(queue, worker) == [2]


def test_a_stream_whose_client_leaves_is_abandoned_at_its_worker_once() -> None:
    told: list[int] = []
    queue = make_queue()
    (job,) = fill(queue, 1)
    take(queue, make_worker())
    job.abandon = told.append
    job.cancel()
    job.cancel()
    assert (told, queue.cancelled) == ([1], 1)


def test_a_retry_that_had_not_begun_when_its_worker_died_is_alone_again() -> None:
    queue, doomed = make_queue(batch_size=2), make_worker()
    fill(queue, 1)
    take(queue, doomed)
    queue.lose(doomed, 1, "signal 9", NOW)
    fill(queue, 1, first=2)
    second = make_worker()
    assert take(queue, second) == [1]
    queue.lose(second, 0, "signal 9", NOW)
    assert take(queue, make_worker()) == [1]


def test_answers_that_came_before_the_death_stand() -> None:
    queue, worker = make_queue(batch_size=2), make_worker(QUICK)
    fill(queue, 4)
    take(queue, worker)
    finish(worker, 1, 2)
    queue.lose(worker, 4, "signal 9", NOW)
    other = make_worker()
    assert take(queue, other) == [3]
    finish(other, 3)
    assert take(queue, other) == [4]


def test_a_job_that_kills_two_workers_fails_with_the_cause() -> None:
    queue = make_queue()
    fill(queue, 1)
    for attempt in range(2):
        worker = make_worker()
        take(queue, worker)
        failed = queue.lose(worker, 1, "signal 6", NOW)
        assert numbers(failed) == ([1] if attempt else [])
    error = failed[0][1]
    assert isinstance(error, WorkerDiedError) and error.status == 500
    assert "signal 6" in error.message and "twice" in error.message
    assert queue.depth == 0


def test_with_retry_off_the_started_jobs_fail_at_once() -> None:
    queue, worker = make_queue(retry=0), make_worker(QUICK)
    fill(queue, 2)
    take(queue, worker)
    failed = queue.lose(worker, 1, "signal 9", NOW)
    assert numbers(failed) == [1] and failed[0][1].status == 503
    assert "retry is off" in failed[0][1].message
    assert take(queue, make_worker()) == [2]


def test_cancelled_jobs_are_not_run_again() -> None:
    queue, worker = make_queue(batch_size=2), make_worker(QUICK)
    jobs = fill(queue, 4)
    take(queue, worker)
    jobs[0].cancel()
    jobs[2].cancel()
    queue.lose(worker, 2, "signal 9", NOW)
    assert queue.depth == 2
    other = make_worker()
    assert take(queue, other) == [2]
    finish(other, 2)
    assert take(queue, other) == [4]


def test_retries_stay_within_a_budget_that_recovers_with_time() -> None:
    queue = make_queue()

    def die(number: int, now: float) -> list[tuple[Job, MMSError]]:
        fill(queue, 1, first=number, arrived=now)
        worker = make_worker()
        assert take(queue, worker, now) == [number]
        return queue.lose(worker, 1, "signal 9", now)

    for number in range(1, RETRY_MINIMUM + 1):
        assert die(number, NOW) == []
        other = make_worker()
        take(queue, other)
        finish(other, number)
    failed = die(10, NOW)
    assert numbers(failed) == [10] and failed[0][1].status == 503
    assert "too many requests were retried" in failed[0][1].message
    assert die(11, NOW + RETRY_WINDOW + 1) == []


def test_the_budget_is_a_share_of_recent_requests() -> None:
    queue = make_queue()
    queue.tick(NOW)
    fill(queue, 50)
    retried = []
    for _ in range(8):
        worker = make_worker()
        taken = take(queue, worker)
        failed = queue.lose(worker, 1, "signal 9", NOW)
        retried += [not failed]
        if not failed:
            other = make_worker()
            assert take(queue, other) == taken
            finish(other, *taken)
    assert retried == [True] * 5 + [False] * 3


def test_nothing_is_retried_while_the_version_is_unloaded() -> None:
    queue, worker = make_queue(), make_worker()
    fill(queue, 1)
    take(queue, worker)
    queue.close("model cat 1.0 is being unloaded")
    assert numbers(queue.lose(worker, 1, "signal 9", NOW)) == [1]


@pytest.mark.parametrize(("started", "retried"), [(0, []), (99, [2])])
def test_a_started_counter_from_the_past_or_the_future_does_no_harm(started: int, retried: list[int]) -> None:
    queue, worker = make_queue(), make_worker(QUICK)
    fill(queue, 2)
    take(queue, worker)
    finish(worker, 1)
    queue.lose(worker, started, "signal 9", NOW)
    assert [job.id for job in queue._alone] == retried


# time


def test_a_batch_that_ran_too_long_fails_with_504_and_the_rest_goes_back() -> None:
    queue, worker = make_queue(batch_size=2), make_worker(QUICK)
    fill(queue, 4)
    take(queue, worker)
    failed = queue.timed_out(worker, 2, 120.0)
    assert numbers(failed) == [1, 2]
    assert all(error.status == 504 and "response_timeout (120 s)" in error.message for _, error in failed)
    assert take(queue, make_worker()) == [3, 4]


def test_jobs_expire_after_the_queues_timeout() -> None:
    queue = make_queue(timeout=5.0)
    fill(queue, 1)
    fill(queue, 1, first=2, arrived=NOW + 1)
    failed = queue.expire(NOW + 5)
    assert numbers(failed) == [1] and failed[0][1].status == 504
    assert "queue_timeout (5 s)" in failed[0][1].message
    assert queue.depth == 1


def test_jobs_that_came_back_expire_in_time_whatever_their_order() -> None:
    queue, older, younger = make_queue(timeout=5.0), make_worker(QUICK), make_worker(QUICK)
    fill(queue, 1)
    take(queue, older)
    fill(queue, 1, first=2, arrived=NOW + 1)
    take(queue, younger)
    queue.lose(older, 0, "signal 9", NOW + 2)
    queue.lose(younger, 0, "signal 9", NOW + 2)
    assert numbers(queue.expire(NOW + 5)) == [1]


def test_a_retried_job_expires_too() -> None:
    queue, worker = make_queue(timeout=5.0), make_worker()
    fill(queue, 1)
    take(queue, worker)
    queue.lose(worker, 1, "signal 9", NOW)
    assert numbers(queue.expire(NOW + 5)) == [1]
    assert queue.depth == 0


def test_cancelled_jobs_do_not_expire() -> None:
    queue = make_queue(timeout=5.0)
    (job,) = fill(queue, 1)
    job.cancel()
    assert queue.expire(NOW + 9) == [] and queue.depth == 0


def test_abandoning_names_every_waiting_job_once() -> None:
    queue, worker = make_queue(), make_worker()
    fill(queue, 2)
    take(queue, worker)
    queue.lose(worker, 1, "signal 9", NOW)
    error = ServiceUnavailableError("unloaded")
    assert queue.abandon(error)[0][1] is error
    assert queue.depth == 0 and queue.abandon(error) == []


def test_jobs_done_but_not_yet_answered_are_no_part_of_the_batch_that_timed_out() -> None:
    queue, worker = make_queue(), make_worker(QUICK)
    fill(queue, 4)
    take(queue, worker)
    failed = queue.timed_out(worker, 3, 120.0, done=2)
    assert numbers(failed) == [3]
    assert take(queue, make_worker(QUICK)) == [1, 2, 4]


def test_without_retry_a_job_that_was_done_but_not_answered_does_not_run_again() -> None:
    queue, worker = make_queue(retry=0), make_worker(QUICK)
    fill(queue, 3)
    take(queue, worker)
    failed = queue.lose(worker, 2, "signal 9", NOW, done=1)
    assert numbers(failed) == [1, 2]
    assert take(queue, make_worker(QUICK)) == [3]


def test_jobs_answered_out_of_order_leave_the_others_at_their_places() -> None:
    queue, worker = make_queue(), make_worker(QUICK)
    fill(queue, 4)
    assert take(queue, worker) == [1, 2, 3, 4]
    finish(worker, 2)
    finish(worker, 4)
    assert list(worker.jobs) == [1, 3] and worker.frames[0].left == 2
    assert numbers(queue.lose(worker, 2, "signal 9", NOW)) == []
    assert [job.id for job in queue._alone] == [1] and [job.id for job in queue._waiting] == [3]


def test_answers_of_several_frames_in_turn_leave_the_others_in_hand() -> None:
    queue, worker = make_queue(batch_size=3), InFlight(threads=2)
    fill(queue, 5)
    assert (take(queue, worker), take(queue, worker)) == ([1, 2, 3], [4, 5])
    finish(worker, 1, 4, 2)
    assert [(frame.first, frame.left) for frame in worker.frames] == [(0, 1), (3, 1)]
    finish(worker, 5)
    queue.lose(worker, 5, "signal 9", NOW)
    assert [job.id for job in queue._alone] == [3] and not worker.frames


def test_an_answer_to_an_unknown_job_leaves_those_beside_it_in_hand() -> None:
    queue, worker = make_queue(), make_worker(QUICK)
    fill(queue, 2)
    assert take(queue, worker) == [1, 2]
    assert worker.finish([2, 7]) is None and worker.finish([1, 1]) is None
    queue.lose(worker, 2, "signal 9", NOW)
    assert sorted(job.id for job in queue._alone) == [1, 2]


def test_nothing_is_prepared_behind_streams() -> None:
    queue, worker = make_queue(), InFlight(threads=2, preprocess_threads=2)
    fill(queue, 9)
    assert (take(queue, worker), take(queue, worker)) == ([1], [2])
    worker.begins_stream()
    assert take(queue, worker) == []
    finish(worker, 1)
    assert take(queue, worker) == [3]


def test_the_death_of_a_poisonous_retry_does_not_spend_the_budget() -> None:
    queue = make_queue()
    for number in range(1, 4):
        fill(queue, 1, first=number)
        for _ in range(2):
            worker = make_worker()
            assert take(queue, worker) == [number]
            failed = queue.lose(worker, 1, "signal 6", NOW)
        assert failed[0][1].status == 500


def crash(queue: BatchQueue, job: Job, cause: str = "signal 11 (SIGSEGV)") -> None:
    """The job ends two workers."""
    queue.submit(job)
    for _ in range(2):
        worker = make_worker()
        assert take(queue, worker) == [job.id]
        queue.lose(worker, 1, cause, NOW)


@pytest.mark.parametrize(("cause", "refused"), [("signal 11 (SIGSEGV)", True), ("signal 9 (SIGKILL)", False)])
def test_f7_the_like_of_a_request_that_crashed_two_workers_is_not_run_for_a_while(cause: str, refused: bool) -> None:
    queue = make_queue()
    crash(queue, make_job(1), cause)
    for at in (NOW + 1, NOW + 9):
        if refused:
            with pytest.raises(WorkerDiedError, match="just crashed two worker processes") as caught:
                queue.submit(make_job(1, arrived=at))
            assert caught.value.status == 500
    queue.submit(make_job(2, arrived=NOW + 9))
    queue.submit(make_job(1, arrived=NOW + 11))  # although it came again and again
    assert queue.depth == 2


@pytest.mark.parametrize(
    "facts",
    [
        RequestFacts("", "", b"", False, [b"X-Crash", b"1"]),
        RequestFacts("", "", b"crash", False, []),
        RequestFacts("", "", b"", True, []),
    ],
    ids=["header", "query", "invocation"],
)
def test_f7_a_crash_speaks_against_no_request_that_looks_different_to_a_handler(facts: RequestFacts) -> None:
    queue = make_queue()
    crash(queue, make_job(1, facts=facts))
    queue.submit(make_job(1))
    assert queue.depth == 1
    with pytest.raises(WorkerDiedError):
        queue.submit(make_job(1, facts=facts))


def test_f7_poison_is_forgotten_when_settings_change() -> None:
    queue = make_queue()
    crash(queue, make_job(1))
    queue.apply(capacity=10, max_bytes=1 << 20, timeout=60.0, fifo=False)
    queue.submit(make_job(1))
    assert queue.depth == 1


def test_f7_bodies_of_another_size_than_known_poison_are_not_looked_at() -> None:
    queue = make_queue()
    crash(queue, make_job(1))
    other = make_job(2, size=11)
    other.parts = [None]  # type: ignore[list-item]  # fails if it is looked at
    queue.submit(other)
    assert queue.depth == 1


def test_f7_a_poison_of_many_bytes_is_not_remembered() -> None:
    queue = make_queue()
    crash(queue, make_job(1, size=MAX_POISON_BYTES + 1))
    queue.submit(make_job(1, size=MAX_POISON_BYTES + 1))
    assert queue.depth == 1
