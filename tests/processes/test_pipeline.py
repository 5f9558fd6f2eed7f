"""Several batches at a time in one worker, and stages that overlap."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mms import sharedpage, wire
from mms.backend.channel import ANSWER_WITHIN
from tests.processes.conftest import Backend, FrontEnd, Start
from tests.waiting import eventually


class Held:
    """A request to the archive `held`, stopped in some stages until it is let go."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def body(self) -> bytes:
        return str(self.path).encode()

    def hold(self, *stages: str) -> Held:
        for stage in stages:
            Path(f"{self.path}.{stage}.held").touch()
        return self

    def let_go(self) -> None:
        for file in self.path.parent.glob(f"{self.path.name}.*.held"):
            file.unlink()

    def reached(self, stage: str) -> bool:
        return Path(f"{self.path}.{stage}").exists()


class Requests:
    """Makes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.made: list[Held] = []

    def __call__(self, name: str = "") -> Held:
        self.made.append(Held(self._folder / f"{len(self.made)}{name}"))
        return self.made[-1]


@pytest.fixture
def request_(tmp_path: Path) -> Iterator[Requests]:
    """Makes requests; at the end, all are let go."""
    folder = tmp_path / "held-requests"
    folder.mkdir()
    make = Requests(folder)
    yield make
    for held in make.made:
        held.let_go()


def begin(start: Start, name: str = "held", **load: Any) -> Backend:
    backend = start(name, **load)
    ready = backend.ready()
    assert (ready.threads, ready.preprocess_threads) == (load.get("threads", 1), load.get("preprocess_threads", 0))
    return backend


def reaches(held: Held, stage: str) -> None:
    eventually(lambda: held.reached(stage))


def passes(at: float) -> None:
    eventually(lambda: time.monotonic() > at)


@pytest.mark.parametrize("preprocess_threads", [0, 2])
def test_threads_run_as_many_batches_at_a_time(start: Start, request_: Requests, preprocess_threads: int) -> None:
    backend = begin(start, threads=3, preprocess_threads=preprocess_threads)
    all_held = [request_().hold("inference") for _ in range(3)]
    for held in all_held:
        (id,) = backend.send(held.body, batch_size=1)
        reaches(held, "inference")
    for held, expected in zip(reversed(all_held), (3, 2, 1), strict=True):
        held.let_go()
        assert list(backend.results(1)) == [expected]
    assert id == 3


def test_requests_are_prepared_while_a_batch_runs_and_make_up_the_next_one(start: Start, request_: Requests) -> None:
    backend = begin(start, preprocess_threads=1)
    first, second, third = request_().hold("inference"), request_(), request_()
    backend.send(first.body)
    reaches(first, "inference")
    backend.send(second.body)
    backend.send(third.body)
    reaches(third, "preprocess")
    assert not second.reached("inference")
    first.let_go()
    results = backend.results(3)
    assert [body for _, body in results.values()] == [b"1", b"2", b"2"]


def test_batches_are_of_preferred_sizes(start: Start, request_: Requests) -> None:
    backend = begin(start, preprocess_threads=1)
    first, others = request_().hold("inference"), [request_() for _ in range(7)]
    backend.send(first.body)
    reaches(first, "inference")
    backend.send(*[held.body for held in others], forming=wire.Forming((4, 2), 0.0, 0.0))
    reaches(others[-1], "preprocess")
    first.let_go()
    assert [body for _, body in backend.results(8).values()] == [b"1", *[b"4"] * 4, *[b"2"] * 2, b"1"]


def test_a_batch_waits_to_be_full_while_its_oldest_may_wait(start: Start, request_: Requests) -> None:
    backend = begin(start, threads=3, preprocess_threads=1)
    for _ in range(2):
        first, second = request_(), request_()
        backend.send(first.body, batch_size=2, forming=wire.Forming((), 60.0, time.monotonic()))
        reaches(first, "preprocess")
        assert not first.reached("inference")
        backend.send(second.body, batch_size=2, forming=wire.Forming((), 60.0, time.monotonic()))
        assert [body for _, body in backend.results(2).values()] == [b"2", b"2"]
    begun = time.monotonic()
    backend.send(request_().body, forming=wire.Forming((), 0.05, begun))
    assert next(iter(backend.results(1).values()))[1] == b"1" and time.monotonic() - begun >= 0.05


@pytest.mark.parametrize("name", ["", "bad"])
def test_what_came_together_after_the_delay_is_waited_for_until_it_is_prepared(
    start: Start, request_: Requests, name: str
) -> None:
    backend = begin(start, preprocess_threads=1)
    requests = [request_(), request_().hold("preprocess"), request_(name).hold("preprocess")]
    ids = backend.send(*[held.body for held in requests], forming=wire.Forming((), 60.0, time.monotonic() - 60.0))
    for held in requests[1:]:
        reaches(held, "preprocess")
        assert not requests[0].reached("inference")
        held.let_go()
    results = backend.results(3)
    assert {results[id][1] for id in ids[:2]} == {b"2" if name else b"3"}


def test_a_batch_runs_while_the_one_before_is_postprocessed(start: Start, request_: Requests) -> None:
    backend = begin(start, preprocess_threads=1)
    first, second = request_().hold("postprocess"), request_()
    backend.send(first.body)
    reaches(first, "postprocess")
    backend.send(second.body)
    reaches(second, "inference")
    first.let_go()
    assert set(backend.results(2)) == {1, 2}


def test_an_answer_does_not_wait_for_the_postprocess_of_the_next_batch(start: Start, request_: Requests) -> None:
    backend = begin(start, preprocess_threads=1)
    first, second, third = (request_().hold("postprocess") for _ in range(3))
    for held in first, second, third:
        backend.send(held.body, batch_size=1)
    reaches(third, "inference")
    for id, held in enumerate((first, second, third), 1):
        reaches(held, "postprocess")
        enough = time.monotonic() + ANSWER_WITHIN  # a quicker answer is kept for the next one
        while time.monotonic() <= enough:
            pass
        held.let_go()
        assert list(backend.results(1)) == [id]


@pytest.mark.parametrize("preprocess_threads", [0, 1])
def test_only_requests_of_one_bucket_share_a_batch(start: Start, request_: Requests, preprocess_threads: int) -> None:
    backend = begin(start, preprocess_threads=preprocess_threads)
    first = request_("@wide").hold("inference")
    backend.send(first.body)
    reaches(first, "inference")
    names = ["@wide", "@tall", "@wide", "@tall", "@tall"]
    others = [request_(name) for name in names]
    backend.send(*[held.body for held in others])
    if preprocess_threads:
        reaches(others[-1], "preprocess")
    first.let_go()
    sizes = {id: body for id, (_, body) in backend.results(6).items()}
    assert [sizes[id] for id in range(1, 7)] == [b"1", b"2", b"3", b"2", b"3", b"3"]


def test_a_bucket_that_does_not_equal_itself_holds_nobody_up(start: Start, request_: Requests) -> None:
    backend = begin(start, preprocess_threads=1)
    outcomes = backend.predict(request_("@nan").body, request_("@nan").body)
    assert [body for _, body in outcomes] == [b"1", b"1"]


def test_an_inference_that_yields_stays_in_its_thread(start: Start) -> None:
    backend = begin(start, "streams_requests", threads=2, preprocess_threads=1)
    (id,) = backend.send(b"thread " * 50)
    names = b""
    while (frame := backend.frame())[0] == wire.STREAM:
        names += frame[2]
    assert frame[1].ids == [id] and names.count(b"execute-") == 50
    assert len(set(names.split(b"execute-"))) == 2  # what is before the first, and the number


def test_a_request_that_cannot_be_prepared_is_answered_while_others_run(start: Start, request_: Requests) -> None:
    backend = begin(start, preprocess_threads=1)
    first, bad = request_().hold("inference"), request_("bad")
    backend.send(first.body)
    reaches(first, "inference")
    (number,) = backend.send(bad.body)
    results = backend.results(1)
    assert results[number][0].error == "HandlerException"
    first.let_go()
    assert backend.results(1)[1][1] == b"1"


def test_the_guilty_request_of_a_batch_fails_alone(start: Start, request_: Requests) -> None:
    backend = begin(start, preprocess_threads=1)
    first = request_().hold("inference")
    backend.send(first.body)
    reaches(first, "inference")
    others = [request_(), request_("guilty"), request_()]
    backend.send(*[held.body for held in others])
    reaches(others[-1], "preprocess")
    first.let_go()
    outcomes = backend.results(4)
    assert [outcomes[id][0].status for id in (1, 2, 3, 4)] == [200, 200, 500, 200]


def test_each_threads_work_is_told_to_the_server(start: Start, request_: Requests) -> None:
    backend = begin(start, threads=2, preprocess_threads=1)
    running, preparing = request_().hold("inference"), request_().hold("preprocess")
    backend.send(running.body)
    reaches(running, "inference")
    backend.send(preparing.body)
    reaches(preparing, "preprocess")
    slots = dict((places, begun_at) for begun_at, places in sharedpage.read_slots(backend.progress))
    assert set(slots) == {(0,), (1,)}
    assert slots[0,] <= slots[1,] <= time.monotonic()
    assert sharedpage.PROGRESS.unpack_from(backend.progress)[:2] == (0, 2)
    preparing.let_go()
    backend.results(1)
    eventually(lambda: sharedpage.PROGRESS.unpack_from(backend.progress)[:2] == (0, 2))
    running.let_go()
    backend.results(1)
    eventually(lambda: not list(sharedpage.read_slots(backend.progress)))
    assert sharedpage.PROGRESS.unpack_from(backend.progress)[:2] == (2, 2)


def test_the_time_limit_of_a_batch_counts_all_its_stages(start: Start, request_: Requests) -> None:
    backend = begin(start, preprocess_threads=1)
    held = request_().hold("preprocess", "inference", "postprocess")
    backend.send(held.body)
    for spent, stage in enumerate(("preprocess", "inference", "postprocess")):
        reaches(held, stage)
        at = time.monotonic()
        ((begun_at, _),) = sharedpage.read_slots(backend.progress)
        assert at - begun_at >= spent * 0.02
        passes(at + 0.02)
        Path(f"{held.path}.{stage}.held").unlink()
    backend.results(1)


def test_times_of_the_stages_are_told_for_each_batch(start: Start, request_: Requests) -> None:
    backend = begin(start, preprocess_threads=2)
    backend.send(*[request_().body for _ in range(3)])
    batches: list[wire.BatchTimes] = []
    while sum(batch.jobs for batch in batches) < 3:
        batches += backend.frame()[1].batches
    for batch in batches:
        assert min(batch.preprocess, batch.inference, batch.postprocess) > 0
        assert batch.inference + batch.postprocess <= batch.handler + 1e-9 and batch.waited >= 0


def test_batch_style_handlers_run_in_threads_with_answers_of_their_own(start: Start) -> None:
    backend = begin(start, "status_and_headers", threads=2)
    for _ in range(5):
        ids = backend.send(b"a", b"b", batch_size=1)
        assert set(backend.results(2)) == set(ids)


@pytest.mark.parametrize("preprocess_threads", [0, 1])
def test_who_was_cancelled_while_it_waited_is_not_run(
    start: Start, request_: Requests, preprocess_threads: int
) -> None:
    backend = begin(start, threads=2, preprocess_threads=preprocess_threads)
    held = [request_().hold("inference") for _ in range(2)]
    for one in held:
        backend.send(one.body, batch_size=1)
        reaches(one, "inference")
    cancelled, last = request_(), request_()
    ids = backend.send(cancelled.body, last.body, batch_size=1)
    if preprocess_threads:
        reaches(last, "preprocess")
    backend.cancel(ids[0])
    for one in held:
        one.let_go()
    results = backend.results(4)
    assert [results[id][0].status for id in ids] == [499, 200]
    assert not cancelled.reached("inference")
    eventually(lambda: sharedpage.PROGRESS.unpack_from(backend.progress)[:2] == (4, 4))


def test_who_was_cancelled_before_its_preprocess_is_not_run(start: Start, request_: Requests) -> None:
    backend = begin(start, preprocess_threads=1)
    held, cancelled = request_().hold("preprocess"), request_()
    backend.send(held.body)
    reaches(held, "preprocess")
    (id,) = backend.send(cancelled.body)
    backend.cancel(id)
    held.let_go()
    assert backend.results(2)[id][0].error and not cancelled.reached("preprocess")


def test_a_higher_priority_overtakes_what_is_prepared_but_not_for_ever(start: Start, request_: Requests) -> None:
    backend = begin(start, preprocess_threads=1)
    held = request_().hold("inference")
    backend.send(held.body, batch_size=1)
    reaches(held, "inference")
    low = backend.send(request_().body, request_().body, batch_size=1, level=1)
    high = backend.send(*[request_().body for _ in range(30)], batch_size=1, level=0)
    reaches(request_.made[-1], "preprocess")
    held.let_go()
    order = list(backend.results(33))
    assert order[0] == 1 and order[1] == high[0] and order[-1] == high[-1]
    assert 10 < order.index(low[0]) < order.index(low[1]) < 30


@pytest.mark.parametrize("preprocess_threads", [0, 1])
def test_the_context_of_initialize_shows_each_thread_its_requests(start: Start, preprocess_threads: int) -> None:
    backend = begin(start, "keeps_context", threads=2, preprocess_threads=preprocess_threads)
    for number in range(1, 6):
        ((_, body),) = backend.predict(b"a")
        assert json.loads(body) == [[f"id-{number}"], [f"id-{number}"], "this", [f"id-{number}"]]


def test_front_ends_that_share_a_pipeline_have_batches_and_accounts_of_their_own(
    start: Start, request_: Requests
) -> None:
    backend = begin(start, preprocess_threads=1, shared=True)
    other = backend.lend()
    first = request_().hold("inference")
    backend.send(first.body)
    reaches(first, "inference")
    other.send(request_().body)
    backend.send(request_().body)
    other.send(request_().body)
    reaches(request_.made[-1], "preprocess")
    eventually(lambda: len(list(sharedpage.read_slots(backend.progress))) == 1)
    assert not list(sharedpage.read_slots(other.progress)) and sharedpage.read_busy(other.progress)
    first.let_go()
    assert [body for _, body in other.results(2).values()] == [b"2", b"2"]
    assert [body for _, body in backend.results(2).values()] == [b"1", b"1"]
    pages = backend.progress, other.progress
    eventually(lambda: all(sharedpage.PROGRESS.unpack_from(page)[:2] == (2, 2) for page in pages))
    eventually(lambda: not any(map(sharedpage.read_busy, pages)))
    other.close()


def test_a_front_end_that_ends_takes_only_its_own_requests_along(start: Start, request_: Requests) -> None:
    backend = begin(start, preprocess_threads=1, shared=True)
    other = backend.lend()
    running, waiting, last = request_().hold("inference"), request_(), request_()
    other.send(running.body, batch_size=1)
    reaches(running, "inference")
    other.send(waiting.body, batch_size=1)
    reaches(waiting, "preprocess")
    other.close()
    backend.send(last.body, batch_size=1)
    reaches(last, "preprocess")
    running.let_go()
    assert backend.results(1)[1][1] == b"1"
    assert not waiting.reached("inference")


def test_a_front_end_that_does_not_read_lets_others_wait_and_they_know_it(start: Start) -> None:
    backend = start("poison", threads=2, shared=True)
    backend.ready()
    other, count = backend.lend(), 20
    for _ in range(count):
        other.send(bytes(60_000), batch_size=1)
    eventually(lambda: 2 < sharedpage.PROGRESS.unpack_from(other.progress)[0] < count and not runs(other, backend))
    backend.send(b"x")
    eventually(lambda: not runs(other, backend) and sharedpage.read_busy(backend.progress))
    assert len(other.results(count)) == count
    assert backend.results(1)[1][1] == b"x"
    other.close()


def runs(*front_ends: FrontEnd) -> bool:
    return any(list(sharedpage.read_slots(one.progress)) for one in front_ends)


def test_a_worker_of_many_threads_ends_when_it_is_told_to(start: Start, request_: Requests) -> None:
    backend = begin(start, threads=2, preprocess_threads=2)
    backend.predict(request_().body)
    backend.stop()
    assert backend.ended()
