"""What becomes of a dead worker's jobs: back to the queue, run again within a budget, failed, refused as poison."""

from __future__ import annotations

import pytest

from mms.errors import MMSError, WorkerDiedError
from mms.wire import RequestFacts
from mms.workers.batching import BatchQueue
from mms.workers.job import Job
from mms.workers.poison import MAX_POISON_BYTES, RETRY_MINIMUM, RETRY_WINDOW
from tests.unit.jobs import NOW, QUICK, fill, finish, make_job, make_queue, make_worker, numbers, take


def abandon(job: int) -> None:
    """What marks a job as begun to stream."""


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


def test_without_retry_a_job_that_was_done_but_not_answered_does_not_run_again() -> None:
    queue, worker = make_queue(retry=0), make_worker(QUICK)
    fill(queue, 3)
    take(queue, worker)
    failed = queue.lose(worker, 2, "signal 9", NOW, done=1)
    assert numbers(failed) == [1, 2]
    assert take(queue, make_worker(QUICK)) == [3]


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


# poison


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
