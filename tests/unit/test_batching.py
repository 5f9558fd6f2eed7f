"""The dispatcher's rules, one by one: batches, work sent ahead, the bound, answers, cancellation, deadlines."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import pytest

from mms.errors import DeadlineError, DrainingError, QueueBytesError, QueueFullError, ServiceUnavailableError
from mms.workers.inflight import AHEAD_SECONDS, MAX_FRAME_JOBS, InFlight
from mms.workers.scheduling import Scheduling
from mms.workers.waiting import MAX_FRAME_BYTES
from tests.unit.jobs import NOW, QUICK, SLOW, Caller, fill, finish, make_job, make_queue, make_worker, numbers, take

# batches


def test_an_idle_worker_takes_what_is_there_at_once() -> None:
    queue, worker = make_queue(batch_size=8), make_worker()
    fill(queue, 3)
    assert queue.take(worker, NOW) is not None
    assert queue.depth == 0 and [job.id for job in worker.jobs] == [1, 2, 3]


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


def test_a_worker_that_streams_gets_nothing_ahead_any_more() -> None:
    queue, worker = make_queue(), make_worker(QUICK)
    worker.begins_stream()
    worker.observe(1, QUICK)
    fill(queue, 5)
    assert take(queue, worker) == [1]
    assert take(queue, worker) == []
    finish(worker, 1)
    assert take(queue, worker) == [2]


def test_nothing_is_prepared_behind_streams() -> None:
    queue, worker = make_queue(), InFlight(threads=2, preprocess_threads=2)
    fill(queue, 9)
    assert (take(queue, worker), take(queue, worker)) == ([1], [2])
    worker.begins_stream()
    assert take(queue, worker) == []
    finish(worker, 1)
    assert take(queue, worker) == [3]


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
    assert (queue.depth, queue.bytes, queue.submitted, worker.frames[0].ids) == (0, 0, 2, [1, 2])
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
    assert not worker.count and (queue.depth, queue.submitted) == (0, 0)


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


def test_a_refused_job_is_freed_without_the_collector() -> None:
    queue, job = make_queue(capacity=0), make_job(1)
    with contextlib.suppress(QueueFullError):
        queue.submit(job)
    assert sys.getrefcount(job) == 2  # this function's and its own argument


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
    assert [frame.left for frame in worker.frames] == [1] and [job.id for job in worker.jobs] == [2]
    finish(worker, 2)
    assert not worker.frames and worker.finished == 2


def test_a_frame_may_be_answered_before_one_that_was_sent_earlier() -> None:
    queue, worker = make_queue(batch_size=2), InFlight(threads=2)
    fill(queue, 4)
    assert (take(queue, worker), take(queue, worker)) == ([1, 2], [3, 4])
    finish(worker, 3, 4)
    assert [frame.ids for frame in worker.frames] == [[1, 2]] and not worker.opened
    finish(worker, 1, 2)
    assert not worker.frames and not worker.count


def test_who_is_answered_is_not_kept_for_the_others_of_the_frame() -> None:
    queue, worker = make_queue(batch_size=2), make_worker()
    job, _ = fill(queue, 2)
    take(queue, worker)
    finish(worker, 1)
    assert sys.getrefcount(job) == 2  # this function's and its own argument


@pytest.mark.parametrize("asked", [False, True])
def test_jobs_that_die_with_their_worker_are_freed_without_the_collector(asked: bool) -> None:
    queue, worker = make_queue(batch_size=2, retry=0), make_worker()
    job, _ = fill(queue, 2)
    take(queue, worker)
    if asked:
        assert worker.get(1) is job
    assert numbers(queue.lose(worker, 1, "signal 9", NOW)) == [1]
    assert sys.getrefcount(job) == 2


def test_jobs_answered_out_of_order_leave_the_others_at_their_places() -> None:
    queue, worker = make_queue(), make_worker(QUICK)
    fill(queue, 4)
    assert take(queue, worker) == [1, 2, 3, 4]
    finish(worker, 2)
    finish(worker, 4)
    assert [job.id for job in worker.jobs] == [1, 3] and worker.count == 2
    assert numbers(queue.lose(worker, 2, "signal 9", NOW)) == []
    assert [job.id for job in queue._alone] == [1] and [job.id for job in queue._waiting] == [3]


def test_answers_of_several_frames_in_turn_leave_the_others_in_hand() -> None:
    queue, worker = make_queue(batch_size=3), InFlight(threads=2)
    fill(queue, 5)
    assert (take(queue, worker), take(queue, worker)) == ([1, 2, 3], [4, 5])
    finish(worker, 1, 4, 2)
    assert [(frame.first, frame.left) for frame in worker.frames] == [(0, 1), (3, 1)]
    assert [job.id for job in worker.jobs] == [3, 5]
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


def test_jobs_that_were_cancelled_below_others_do_not_pile_up() -> None:
    queue = make_queue()
    fill(queue, 1)
    for number in range(1000):
        fill(queue, 1, first=number + 2)[0].cancel()
    queue.tick(NOW)
    assert len(queue._waiting) == 1


def test_a_stream_whose_client_leaves_is_abandoned_at_its_worker_once() -> None:
    told: list[int] = []
    queue = make_queue()
    (job,) = fill(queue, 1)
    take(queue, make_worker())
    job.abandon = told.append
    job.cancel()
    job.cancel()
    assert (told, queue.cancelled) == ([1], 1)


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
