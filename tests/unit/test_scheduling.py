"""Preferred batch sizes, priorities and deadlines in the queue, and what requests may ask for, rule by rule."""

from __future__ import annotations

from typing import Any

import pytest

from mms import wire
from mms.errors import (
    BadRequestError,
    ConfigError,
    DeadlineError,
    HandlerError,
    ObjectiveError,
    QueueBytesError,
    QueueFullError,
    SubstituteError,
)
from mms.http.response import error_response
from mms.model_settings import MAX_TIMEOUT, ModelSettings, merge_settings
from mms.wire import FAIR_TURN
from mms.workers.batching import BatchQueue
from mms.workers.inflight import InFlight
from mms.workers.job import Job, Terms
from mms.workers.scheduling import PLAIN, Scheduling, forming_of, largest_batch, warmup_sizes
from tests.unit.jobs import FACTS, NOW, QUICK, SLOW, Caller, finish, make_worker, numbers, take

HIGH, LOW = Terms(0), Terms(1)


def make_queue(
    *, levels: int = 1, sizes: tuple[int, ...] = (), preferred: tuple[int, ...] = (), **how: Any
) -> BatchQueue:
    scheduling = Scheduling(levels=levels, default_level=levels // 2, level_sizes=sizes, preferred=preferred)
    settings = {"batch_size": 1, "max_batch_delay": 0.0, "capacity": 100, "timeout": 10.0, "retry": 1, **how}
    return BatchQueue(**settings, scheduling=scheduling)


def submit(queue: BatchQueue, *ids: int, terms: Terms | None = None, size: int = 10, arrived: float = NOW) -> list[Job]:
    jobs = [Job(number, FACTS, b"", [b"x"], size, Caller(), arrived, terms) for number in ids]
    for job in jobs:
        queue.submit(job)
    return jobs


# preferred batch sizes


def test_the_largest_preferred_size_for_which_enough_wait_is_taken() -> None:
    queue = make_queue(batch_size=8, preferred=(4, 2))
    submit(queue, *range(1, 8))
    assert take(queue, make_worker(SLOW)) == [1, 2, 3, 4]
    assert take(queue, make_worker(SLOW)) == [5, 6]
    assert take(queue, make_worker(SLOW)) == [7], "without a delay, what is there"


def test_with_a_delay_an_idle_worker_waits_for_a_preferred_size_only() -> None:
    queue, worker = make_queue(batch_size=8, preferred=(4,), max_batch_delay=0.5), make_worker(SLOW)
    submit(queue, 1, 2, 3)
    assert take(queue, worker) == []
    assert queue.wake_at() == NOW + 0.5
    submit(queue, 4)
    assert take(queue, worker) == [1, 2, 3, 4]


def test_after_the_delay_what_is_there_is_taken() -> None:
    queue = make_queue(batch_size=8, preferred=(4,), max_batch_delay=0.5)
    submit(queue, 1, 2, 3)
    assert take(queue, make_worker(SLOW), NOW + 0.5) == [1, 2, 3]


def test_short_batches_of_a_preferred_size_are_sent_several_at_a_time_and_nothing_besides() -> None:
    queue = make_queue(batch_size=8, preferred=(4,))
    submit(queue, *range(1, 12))
    frame = queue.take(make_worker(QUICK), NOW)
    assert frame is not None and frame[0] == 4 and len(frame[1]) == 8


def test_a_worker_that_prepares_is_sent_more_than_a_preferred_size_and_told_the_most() -> None:
    queue, worker = make_queue(batch_size=8, preferred=(2, 4)), InFlight(preprocess_threads=1)
    submit(queue, *range(1, 6))
    assert queue.take(worker, NOW) is not None and worker.count == 4
    submit(queue, *range(6, 30))
    frame = queue.take(worker, NOW)
    assert frame is not None and frame[0] == 8 and worker.count == 2 * 8 + 1


def test_what_a_worker_prepares_waits_there_for_a_fuller_batch() -> None:
    queue, worker = make_queue(batch_size=4, max_batch_delay=0.5), InFlight(threads=2, preprocess_threads=1)
    submit(queue, 1, 2, 3)
    assert take(queue, worker) == []
    submit(queue, 4)
    assert take(queue, worker) == [1, 2, 3, 4]
    submit(queue, 5)
    assert take(queue, worker) == [5]


def test_a_worker_that_forms_batches_itself_is_told_how() -> None:
    jobs = submit(make_queue(), 1, 2)
    jobs[1].arrived -= 1
    assert forming_of(jobs, (), 0.0) is None
    assert forming_of(jobs, (4, 2), 0.5) == wire.Forming((4, 2), 0.5, NOW - 1)


# priorities


def test_the_highest_priority_is_served_first_and_each_in_its_order() -> None:
    queue = make_queue(levels=2, batch_size=2)
    submit(queue, 1, 2, terms=LOW)
    submit(queue, 3, 4, 5, terms=HIGH)
    assert [take(queue, make_worker(SLOW)) for _ in range(3)] == [[3, 4], [5, 1], [2]]


def test_a_request_that_asks_for_none_has_the_default_priority() -> None:
    queue = make_queue(levels=3)
    submit(queue, 1, terms=Terms(2))
    submit(queue, 2)
    submit(queue, 3, terms=Terms(0))
    assert [take(queue, make_worker(SLOW)) for _ in range(3)] == [[3], [2], [1]]


def test_one_batch_in_ten_begins_with_the_longest_waiting_of_the_lower_priorities() -> None:
    queue, worker = make_queue(levels=2), make_worker(SLOW)
    submit(queue, 1001, 1002, 1003, terms=LOW)
    served = []
    for number in range(1, 31):
        submit(queue, number, terms=HIGH)
        served += take(queue, worker)
        finish(worker, served[-1])
    assert [served.index(number) for number in (1001, 1002, 1003)] == [9, 19, 29] and FAIR_TURN == 10


def test_in_a_queue_full_of_low_priority_a_high_one_finds_room_and_is_next() -> None:
    queue, worker = make_queue(levels=2, capacity=4, batch_size=2), make_worker(SLOW)
    low = submit(queue, 1, 2, terms=LOW)
    take(queue, worker)
    low = submit(queue, 3, 4, 5, 6, terms=LOW)
    submit(queue, 7, terms=HIGH)
    assert queue.depth == 4
    [(job, error)] = queue.expire(NOW)
    assert job is low[-1] and isinstance(error, QueueFullError) and error.retry_after
    finish(worker, 1, 2)
    assert take(queue, worker) == [7, 3], "after the batch in hand"


def test_a_worker_with_enough_to_prepare_takes_higher_priorities_still() -> None:
    queue, worker = make_queue(levels=2), InFlight(preprocess_threads=1)
    submit(queue, *range(1, 9), terms=LOW)
    assert take(queue, worker) + take(queue, worker) == [1, 2, 3]
    assert take(queue, worker) == []
    submit(queue, *range(11, 19), terms=HIGH)
    assert take(queue, worker) == [11, 12, 13], "as many as if it had nothing else"
    assert take(queue, worker) == []


def test_nobody_gives_way_to_the_same_or_a_lower_priority() -> None:
    queue = make_queue(levels=2, capacity=2)
    submit(queue, 1, 2, terms=HIGH)
    for terms in (HIGH, LOW):
        with pytest.raises(QueueFullError):
            submit(queue, 3, terms=terms)


def test_bodies_of_lower_priority_give_way_as_far_as_needed() -> None:
    queue = make_queue(levels=2, max_bytes=1000)
    submit(queue, 1, 2, 3, terms=LOW, size=300)
    submit(queue, 4, terms=HIGH, size=500)
    assert numbers(queue.expire(NOW)) == [3, 2] and queue.bytes == 800
    with pytest.raises(QueueBytesError):
        submit(queue, 5, terms=HIGH, size=600)


def test_a_priority_may_have_a_limit_of_its_own() -> None:
    queue = make_queue(levels=2, sizes=(0, 2))
    submit(queue, 1, 2, terms=LOW)
    with pytest.raises(QueueFullError, match=r"2 requests of priority 2 wait \(priority_queue_sizes\)"):
        submit(queue, 3, terms=LOW)
    submit(queue, 4, 5, 6, terms=HIGH)


def test_who_left_does_not_count_and_is_not_served() -> None:
    queue = make_queue(levels=2, sizes=(0, 2))
    submit(queue, 1, 2, terms=LOW)[0].cancel()
    submit(queue, 3, terms=LOW)
    assert queue.depth == 2 and take(queue, make_worker(SLOW)) == [2]


def test_who_leaves_after_giving_way_is_told_nothing() -> None:
    queue = make_queue(levels=2, capacity=1)
    [low] = submit(queue, 1, terms=LOW)
    submit(queue, 2, terms=HIGH)
    low.cancel()
    assert queue.expire(NOW) == [] and queue.depth == 1


# deadlines


def test_a_request_leaves_the_queue_at_its_deadline() -> None:
    queue = make_queue()
    submit(queue, 1)
    submit(queue, 2, terms=Terms(timeout=0.5))
    assert queue.deadlines.next() == NOW + 0.5
    assert queue.expire(NOW + 0.499) == []
    [(job, error)] = queue.expire(NOW + 0.5)
    assert job.id == 2 and isinstance(error, DeadlineError) and "timeout of 500 ms" in error.message
    job.fail(error)
    assert queue.depth == 1 and take(queue, make_worker(), NOW + 0.5) == [1]


def test_what_is_at_a_worker_is_given_up_at_its_deadline_and_the_late_result_is_dropped() -> None:
    queue, worker = make_queue(), make_worker(SLOW)
    submit(queue, 1, terms=Terms(timeout=0.5))
    take(queue, worker)
    [(job, error)] = queue.expire(NOW + 1)
    job.fail(error)
    finish(worker, 1)
    assert queue.depth == 0 and isinstance(job.caller, Caller) and job.caller.outcomes == [error]


def test_a_retry_keeps_its_deadline() -> None:
    queue, worker = make_queue(), make_worker(SLOW)
    submit(queue, 1, terms=Terms(timeout=0.5))
    take(queue, worker)
    assert queue.lose(worker, 1, "signal 6 (SIGABRT)", NOW) == [] and queue.depth == 1
    assert numbers(queue.expire(NOW + 0.5)) == [1] and queue.depth == 0


def test_a_retry_goes_before_higher_priorities_and_what_was_only_sent_ahead_does_not() -> None:
    queue, worker = make_queue(levels=2, batch_size=2), make_worker(QUICK)
    submit(queue, 1, 2, 3, 4, terms=LOW)
    assert take(queue, worker) == [1, 2, 3, 4]
    submit(queue, 5, 6, terms=HIGH)
    assert queue.lose(worker, 1, "signal 6 (SIGABRT)", NOW) == []
    assert [take(queue, make_worker(SLOW)) for _ in range(4)] == [[1], [5, 6], [2, 3], [4]]


def test_requests_without_a_deadline_cost_no_timer() -> None:
    queue = make_queue()
    submit(queue, 1)
    assert queue.deadlines.next() is None


def test_answered_requests_do_not_pile_up_until_their_deadline() -> None:
    queue, worker = make_queue(), make_worker(SLOW)
    for number in range(1000):
        submit(queue, number, terms=Terms(timeout=60.0))
        take(queue, worker)
        finish(worker, number)
    assert len(queue.deadlines.heap) < 100


# what a request may ask for


def test_a_request_that_asks_for_nothing_waits_in_the_plain_way() -> None:
    assert PLAIN.terms(b"", b"") is None


def test_a_request_may_have_a_timeout_and_a_priority() -> None:
    assert Scheduling(levels=3, default_level=1).terms(b"1500.5", b"3") == Terms(2, 1.5005)


@pytest.mark.parametrize("priority", [b"", b"0", b"4", b"999"])
def test_a_priority_that_the_model_does_not_have_is_the_default(priority: bytes) -> None:
    assert Scheduling(levels=3, default_level=1).terms(b"", priority) == Terms(1)


@pytest.mark.parametrize("value", [b"0", b"-5", b"abc", b"1e3", b"nan", b"inf", b"86400001", b"9" * 400, b" ", b"\xff"])
def test_a_timeout_that_is_none_is_refused(value: bytes) -> None:
    with pytest.raises(BadRequestError, match=r"x-request-timeout-ms is '.*'; a number of milliseconds above 0"):
        PLAIN.terms(value, b"")


@pytest.mark.parametrize("value", [b"-1", b"high", b"1.5", b"9" * 400])
def test_a_priority_that_is_no_number_is_refused(value: bytes) -> None:
    with pytest.raises(BadRequestError, match=r"x-request-priority is '.*'; a whole number is needed"):
        PLAIN.terms(b"", value)


def test_a_request_may_shorten_the_models_timeout_but_not_extend_it() -> None:
    scheduling = Scheduling(request_timeout=2.0)
    assert scheduling.terms(b"500", b"") == Terms(timeout=0.5)
    assert scheduling.terms(b"5000", b"") == scheduling.terms(b"", b"") == Terms(timeout=2.0)


@pytest.mark.parametrize(("levels", "default"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_the_default_priority_is_the_middle_one(levels: int, default: int) -> None:
    assert Scheduling.of(ModelSettings(priority_levels=levels)).default_level == default


# settings


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"preferred_batch_sizes": [2, 8], "batch_size": 4}, "preferred_batch_sizes has 8, but batch_size is 4"),
        (
            {"preferred_batch_sizes": [2, 8], "batch_size": 4, "latency_objective_ms": 50},
            "preferred_batch_sizes has 8, but batch_size is 4",
        ),
        ({"preferred_batch_sizes": [0]}, "each must be from 1 to 65536"),
        ({"request_timeout": -1}, "must be at least 0"),
        ({"request_timeout": MAX_TIMEOUT + 1}, "must be at most 86400"),
        ({"priority_levels": 0}, "must be at least 1"),
        ({"priority_levels": 2, "default_priority": 3}, "default_priority 3 is more than priority_levels 2"),
        ({"priority_levels": 3, "priority_queue_sizes": [5, 5]}, "has 2 numbers, but priority_levels is 3"),
        ({"priority_queue_sizes": [-1]}, "numbers from 0"),
        ({"default_on_miss": True, "default_output": "x"}, "default_on_miss needs latency_objective_ms"),
        ({"default_on_miss": True, "latency_objective_ms": 5}, "default_on_miss needs default_output"),
        ({"default_output": {1, 2}.__class__}, "a text or a value that JSON can hold is needed"),
        ({"default_output": "x" * 100_000}, "at most 65536 bytes"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        merge_settings(ModelSettings(), changes, "request", strict=True)


def test_with_an_objective_batch_size_is_the_upper_bound_if_one_is_set() -> None:
    assert largest_batch(ModelSettings(latency_objective_ms=50)) == 256
    assert largest_batch(ModelSettings(latency_objective_ms=50, batch_size=8)) == 8
    assert largest_batch(ModelSettings(batch_size=8)) == 8


# the default output


@pytest.mark.parametrize(
    ("output", "head", "body"),
    [
        ("nothing", b"content-type: text/plain; charset=utf-8\r\n", b"nothing"),
        ({"label": None}, b"content-type: application/json\r\n", b'{"label":null}'),
    ],
)
def test_the_default_output_replaces_what_load_takes(output: Any, head: bytes, body: bytes) -> None:
    settings = ModelSettings(latency_objective_ms=50, default_output=output, default_on_miss=True)
    scheduling = Scheduling.of(settings)
    late, refused = scheduling.outcome(ObjectiveError("late")), scheduling.outcome(QueueFullError("full"))
    assert isinstance(late, SubstituteError)
    assert error_response(late) == (200, head + b"x-mms-default: objective-missed\r\n", body)
    assert error_response(refused) == (200, head + b"x-mms-default: refused\r\n", body)


@pytest.mark.parametrize("error", [HandlerError("bad"), DeadlineError("the client's own")])
def test_other_failures_stay_what_they_are(error: Exception) -> None:
    settings = ModelSettings(latency_objective_ms=50, default_output="x", default_on_miss=True)
    assert Scheduling.of(settings).outcome(error) is error  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, (1,)),
        ({"batch_size": 8}, (1, 8)),
        ({"batch_size": 8, "preferred_batch_sizes": [4, 6]}, (1, 4, 6, 8)),
        ({"batch_size": 6, "cuda_graphs": [2, 4, 8, 16]}, (2, 4, 6)),
        ({"latency_objective_ms": 50, "preferred_batch_sizes": [4]}, (1, 4)),
        ({"latency_objective_ms": 50, "cuda_graphs": [2, 4]}, (2, 4)),
        ({"latency_objective_ms": 50, "cuda_graphs": [2, 4], "batch_size": 3}, (2, 3)),
    ],
)
def test_a_warm_up_runs_the_sizes_that_workers_will_see(settings: dict[str, Any], sizes: tuple[int, ...]) -> None:
    assert warmup_sizes(merge_settings(ModelSettings(), settings, "x", strict=True)) == sizes
