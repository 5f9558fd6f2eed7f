"""What a worker's frames tell the front end; no process behind them."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from mms import sharedpage, wire
from mms.errors import MMSError
from mms.http.exchange import Exchange
from mms.http.request import Head
from mms.http.response import ResponseHeads
from mms.metrics import VersionMetrics
from mms.model_settings import ModelSettings
from mms.workers.batching import BatchQueue
from mms.workers.forkserver import ForkServerDied, now_since_boot, worker_of
from mms.workers.job import Job, Terms
from mms.workers.lateness import PATIENCE, Lateness
from mms.workers.placement import Place
from mms.workers.process import WorkerProcess
from mms.workers.scheduling import Scheduling
from mms.workers.worker import MAX_FAILURE, Loan, Worker
from tests.waiting import eventually

FACTS = wire.RequestFacts("", "", b"", False, [])
PLAIN_TERMS = Terms()
OK = wire.Outcome(200, b"content-type: text/plain\r\n", "")


class Caller:
    def begin(self, status: int, head: bytes) -> Caller:
        return self

    def chunk(self, data: bytes) -> None: ...

    def answer(self, status: int, head: bytes, body: bytes | memoryview) -> None: ...

    def fail(self, error: MMSError) -> None: ...


class Owner:
    def __init__(self) -> None:
        self.missed: list[float] = []
        self.idle: Callable[[], None] = lambda: None

    def worker_ready(self, worker: Worker, ready: wire.Ready) -> None: ...

    def worker_idle(self) -> None:
        self.idle()

    def worker_free(self, worker: Worker) -> None: ...

    def objective_missed(self, worker: Worker, seconds: float) -> None:
        self.missed.append(seconds)

    def worker_lost(self, worker: Worker) -> None: ...

    def worker_gone(self, worker: Worker) -> None: ...


class Rig:
    """A worker that is ready, and its queue."""

    def __init__(self, ready: wire.Ready, **scheduling: object) -> None:
        self.owner = Owner()
        how = Scheduling(**scheduling)  # type: ignore[arg-type]
        self.queue = BatchQueue(batch_size=8, max_batch_delay=0, capacity=99, timeout=60, retry=1, scheduling=how)
        self.worker = Worker(0, Place(None), self.owner, self.queue, VersionMetrics())
        self.page = mmap.mmap(-1, sharedpage.PAGE)
        self.worker.process = WorkerProcess(0, 0, None, self.page, 0, Path())  # type: ignore[arg-type]
        self.says(wire.READY, ready)

    def says(self, kind: int, head: object, payload: bytes = b"") -> None:
        self.worker.data_received(wire.pack(kind, head, len(payload)) + payload)

    def takes(self, *ids: int, since: float = 0.0, terms: Terms = PLAIN_TERMS) -> list[Job]:
        """Jobs that it was given so many seconds ago."""
        at = time.monotonic() - since
        jobs = [Job(id, FACTS, b"", [], 1, Caller(), at, terms) for id in ids]
        for job in jobs:
            self.queue.submit(job)
        assert self.queue.take(self.worker.in_flight, at) is not None
        return jobs


def test_an_objective_is_for_the_first_chunk_of_a_stream_and_not_for_its_end() -> None:
    rig = Rig(wire.Ready("batch", 0.1), objective=0.05)
    limit = rig.worker.in_flight.batch_limit
    assert limit is not None
    for id in range(1, 9):
        rig.takes(id)
        rig.says(wire.STREAM, wire.Chunks([id], [1], {id: OK}), b"a")
        rig.worker.in_flight.frames[0].taken -= 1.0
        rig.says(wire.RESULT, wire.Result([id], [0], [OK], [], [wire.BatchTimes(1, 0, 1.0, 0, 0, 0)]))
    assert limit.limit > 1 and not rig.owner.missed and limit.seconds < 0.05
    for id in range(11, 14):
        rig.takes(id, since=0.1)
        rig.says(wire.STREAM, wire.Chunks([id], [1], {id: OK}), b"a")
        rig.says(wire.RESULT, wire.Result([id], [0], [OK], [], [wire.BatchTimes(1, 0, 0.1, 0, 0, 0)]))
    assert len(rig.owner.missed) == 1


def test_a_worker_of_several_threads_is_told_who_waits_no_longer() -> None:
    rig = Rig(wire.Ready("batch", 0.1, 3))
    left, late, answered = [job for id in (1, 2, 3) for job in rig.takes(id, terms=Terms(timeout=id))]
    left.cancel()
    assert [job for job, _ in rig.queue.expire(late.arrived + 2)] == [late]
    answered.settled = True
    answered.cancel()
    assert sharedpage.Cancelled(rig.page).look() == {1, 2}
    metrics = rig.worker._metrics
    rig.says(wire.RESULT, wire.Result([1], [0], [wire.Outcome(499, b"", "Cancelled")], [], []))
    assert [job.id for job in rig.worker.in_flight.jobs] == [2, 3] and not metrics.requests and not metrics.errors


class Killed(WorkerProcess):
    def kill(self) -> None: ...


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        (
            wire.RESULT,
            wire.Result([1], [0], [OK], [], [wire.BatchTimes(10**7, 0, 0), wire.BatchTimes(1 - 10**7, 0, 0)]),
        ),
        (wire.RESULT, wire.Result([1], [0], [OK], [], [wire.BatchTimes(-(10**7), 0, 0)])),
        (wire.STREAM, wire.Chunks([1] * 100_000, [0] * 100_000, {1: OK})),
    ],
    ids=["two batches", "a batch", "chunks"],
)
def test_a_worker_that_claims_more_than_it_was_given_is_killed_before_it_costs_anything(
    kind: int, head: object
) -> None:
    rig = Rig(wire.Ready("batch", 0.1))
    (job,) = rig.takes(1)
    rig.worker.process.__class__ = Killed
    rig.says(kind, head)
    assert rig.worker.cause == "sent garbage on its channel"
    assert not job.settled and not rig.worker._metrics.chunks


def test_of_why_a_handler_was_not_loaded_no_more_is_kept_than_can_be_read() -> None:
    rig = Rig(wire.Ready("batch", 0.1))
    rig.says(wire.FAILED, wire.Failed("a" * (1 << 20), "b" * (1 << 20) + "the end"))
    failed = rig.worker.failure
    assert failed is not None and len(failed.message) == len(failed.traceback) == MAX_FAILURE
    assert failed.traceback.endswith("the end")


def test_a_worker_cannot_make_the_count_of_those_who_left_too_large() -> None:
    page = mmap.mmap(-1, sharedpage.PAGE)
    sharedpage.CANCELLED_COUNT.pack_into(page, sharedpage.CANCELLED_AT, (1 << 64) - 1)
    sharedpage.write_cancelled(page, 7)
    assert sharedpage.CANCELLED_COUNT.unpack_from(page, sharedpage.CANCELLED_AT) == (0,)


def ended(descriptors: list[int]) -> bool:
    return not any(Path(f"/proc/self/fd/{descriptor}").exists() for descriptor in descriptors)


def test_a_forked_worker_is_the_process_of_its_pidfd_whatever_the_reply_says() -> None:
    asked = now_since_boot()
    with subprocess.Popen(["true"]) as process:
        pidfd = os.pidfd_open(process.pid)
        assert worker_of(wire.ForkReply(1, ""), [pidfd], asked) == (process.pid, pidfd)
        os.close(pidfd)


@pytest.mark.parametrize(
    ("descriptors", "why"),
    [
        (list[int], "without a pidfd"),
        (lambda: [os.pidfd_open(os.getpid())], "no worker that was forked"),
        (lambda: [os.open("/dev/null", os.O_RDONLY)], "no worker that was forked"),
        (lambda: [os.pidfd_open(os.getpid()), os.pidfd_open(1)], "without a pidfd"),
    ],
    ids=["nothing", "the server", "no pidfd", "two"],
)
def test_a_reply_that_brings_no_worker_is_not_taken(descriptors: Callable[[], list[int]], why: str) -> None:
    given = descriptors()
    with pytest.raises(ForkServerDied, match=why):
        worker_of(wire.ForkReply(1, ""), given, now_since_boot())
    assert ended(given)


def test_a_worker_that_waits_for_a_fuller_batch_is_not_late() -> None:
    rig = Rig(wire.Ready("request", 0.1, 1, 1))
    rig.takes(1)
    rig.queue.max_batch_delay = 5.0
    late = Lateness(ModelSettings(response_timeout=2.0), rig.queue)
    now = time.monotonic()
    assert late.overdue(rig.worker, now) is None and late.overdue(rig.worker, now + 6.9) is None
    assert late.overdue(rig.worker, now + 7.1)


def test_a_full_batch_leaves_before_the_answers_of_the_last_one_are_delivered() -> None:
    rig = Rig(wire.Ready("batch", 0.1))
    (job,) = rig.takes(1)
    seen: list[bool] = []
    rig.owner.idle = lambda: seen.append(job.settled)
    for id in range(2, 10):
        rig.queue.submit(Job(id, FACTS, b"", [], 1, Caller(), 0.0))
    rig.says(wire.RESULT, wire.Result([1], [0], [OK], [], [wire.BatchTimes(1, 0, 0.1, 0, 0, 0)]))
    assert seen == [False] and job.settled


def test_who_leaves_a_worker_of_one_thread_costs_nothing() -> None:
    rig = Rig(wire.Ready("batch", 0.1))
    (job,) = rig.takes(1)
    job.cancel()
    assert not sharedpage.Cancelled(rig.page).look()


class Deaf:
    """A connection that fails when an answer is sent on it."""

    heads = ResponseHeads()

    def __init__(self) -> None:
        self.aborted = False

    def send(self, *answer: object) -> None:
        raise RuntimeError

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize("count", [1, 2])
def test_who_cannot_be_answered_is_not_left_waiting(count: int) -> None:
    rig, connections = Rig(wire.Ready("batch", 0.1)), [Deaf() for _ in range(count)]
    jobs = rig.takes(*range(count))
    for job, connection in zip(jobs, connections, strict=True):
        job.caller = Exchange(cast(Any, connection), Head(), True, b"id", [], 0, 0.0)
    batches = [wire.BatchTimes(count, 0, 0.1, 0, 0, 0)]
    rig.says(wire.RESULT, wire.Result(list(range(count)), [], [OK], [], batches, [b"a"] * count))
    assert all([connection.aborted for connection in connections])


class Shared(Rig):
    """A worker that a further front end uses, too."""

    def __init__(self) -> None:
        super().__init__(wire.Ready("batch", 0.1))
        self.worker.control, self._theirs = socket.socketpair()
        self.other = mmap.mmap(-1, sharedpage.PAGE)
        self.worker.elsewhere[1] = Loan(self.other)

    def knows(self) -> None:
        """The worker has heard of the other one."""
        sharedpage.write_busy(self.other, False)

    def works(self, page: mmap.mmap, done: int, begun_at: float) -> None:
        sharedpage.PROGRESS.pack_into(page, 0, done, done + 1, begun_at)
        for each in (self.page, self.other):
            sharedpage.write_busy(each, True)

    def close(self) -> None:
        assert self.worker.control is not None
        self.worker.control.close()
        self._theirs.close()


@pytest.fixture
def shared() -> Iterator[Shared]:
    made = Shared()
    yield made
    made.close()


LIMIT = 1.0
SETTINGS = ModelSettings(response_timeout=LIMIT)
LONG = LIMIT + PATIENCE + 1


def test_a_worker_that_does_not_know_of_a_front_end_yet_owes_it_nothing(shared: Shared) -> None:
    assert sharedpage.read_busy(shared.other)


@pytest.mark.parametrize("known", [True, False])
def test_a_shared_worker_that_stays_between_two_batches_is_found(shared: Shared, known: bool) -> None:
    """Be it that it never gets to know of the other front end."""
    lateness = Lateness(SETTINGS, shared.queue)
    if known:
        shared.works(shared.other, 1, 0.0)
    assert not lateness.stands_still(shared.worker, 10.0)
    assert not lateness.stands_still(shared.worker, 10.0 + LIMIT)
    assert lateness.stands_still(shared.worker, 10.0 + LONG)


def test_a_shared_worker_that_is_stopped_between_two_batches_has_no_more_than_response_timeout(shared: Shared) -> None:
    lateness = Lateness(SETTINGS, shared.queue)
    shared.works(shared.other, 1, 0.0)
    with subprocess.Popen(["sleep", "60"]) as process:
        shared.worker.process.pid = process.pid
        assert not lateness.stands_still(shared.worker, 10.0)
        assert not lateness.stands_still(shared.worker, 10.1 + LIMIT)
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: shared.worker.process.stopped)
        assert lateness.stands_still(shared.worker, 10.1 + LIMIT)
        assert not lateness.stands_still(shared.worker, 10.0 + LIMIT)
        process.kill()


def test_a_shared_worker_that_idles_or_has_a_batch_or_goes_on_does_not_stand_still(shared: Shared) -> None:
    lateness, now = Lateness(SETTINGS, shared.queue), 10.0

    def later() -> bool:
        nonlocal now
        now += LONG
        return lateness.stands_still(shared.worker, now)

    shared.knows()
    assert not later() and not later()
    for page in (shared.page, shared.other):
        shared.works(page, 1, now)
        assert not later() and not later()
        shared.works(page, 1, 0.0)
    for done in range(3, 6):
        shared.works(shared.other, done, 0.0)
        assert not later()


def test_what_a_worker_has_answered_stays_when_a_front_end_leaves_it(shared: Shared) -> None:
    shared.works(shared.other, 7, 0.0)
    assert shared.worker.answered == 7
    shared.worker.left(1)
    assert shared.worker.answered == 7
