"""The cache of answers: what is kept, given and joined, under a clock of the tests' own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mms.caching import CacheSettings, parse_cache
from mms.errors import HandlerError, MMSError, QueueFullError, SubstituteError
from mms.metrics import VersionMetrics
from mms.models.cache import HIT, JOINED, MAX_BODY, OVERHEAD, AnswerCache
from mms.wire import RequestFacts
from mms.workers.batching import BatchQueue
from mms.workers.job import Job, Terms, Work
from mms.workers.scheduling import Scheduling

HEAD = b"content-type: text/plain\r\n"
PLAIN = RequestFacts("text/plain", "", b"", False, [b"Host", b"here", b"X-Tenant", b"a"])


@dataclass
class Client:
    outcomes: list[Any] = field(default_factory=list)

    def answer(self, status: int, head: bytes, body: bytes | memoryview) -> None:
        self.outcomes.append((status, head, bytes(body)))

    def fail(self, error: MMSError) -> None:
        self.outcomes.append(error)

    def begin(self, status: int, head: bytes) -> Client:
        self.outcomes.append((status, head))
        return self

    def chunk(self, data: bytes | memoryview) -> None:
        self.outcomes.append(bytes(data))


class Rig:
    """A cache, and the jobs that it has run."""

    def __init__(self, **changes: Any) -> None:
        self.now = 1000.0
        self.metrics = VersionMetrics()
        self.cache = AnswerCache(CacheSettings(**changes), self.metrics, lambda: self.now)
        self.jobs: list[Job] = []
        self.serves = True
        self.refusal: MMSError | None = None
        self.queue: BatchQueue | None = None

    def send(self, body: bytes = b"x", facts: RequestFacts = PLAIN, terms: Terms | None = None) -> tuple[Client, Work]:
        client = Client()
        job = Job(len(self.jobs), facts, b"id", [body], len(body), client, self.now, terms)
        return client, self.cache.submit(job, self._run, serves=self.serves)

    def ask(self, body: bytes = b"x", facts: RequestFacts = PLAIN) -> Client:
        return self.send(body, facts)[0]

    def reply(self, number: int = -1, *, status: int = 200, head: bytes = HEAD, body: bytes = b"y") -> None:
        """What a worker does when it has an answer."""
        job = self.jobs[number]
        if not job.settled:
            job.settled = True
            self.metrics.requests[status] += 1
            job.caller.answer(status, head, body)

    def _run(self, job: Job) -> Work:
        if self.refusal is not None:
            raise self.refusal
        self.jobs.append(job)
        if self.queue is not None:
            self.queue.submit(job)
        return job


def test_an_answer_is_kept_and_given_again() -> None:
    rig = Rig()
    first = rig.ask()
    rig.reply()
    assert first.outcomes == [(200, HEAD, b"y")]
    assert rig.ask().outcomes == [(200, HEAD + HIT, b"y")]
    assert len(rig.jobs) == 1 and rig.metrics.requests == {200: 2}
    assert rig.cache.facts().results == {"hit": 1, "joined": 0, "miss": 1, "passed": 0}


def test_a_kept_answer_grows_old() -> None:
    rig = Rig(ttl_s=5.0)
    rig.ask()
    rig.now += 2
    rig.reply()
    rig.now += 4.9
    assert rig.ask().outcomes
    rig.now += 0.1
    assert not rig.ask().outcomes
    assert (len(rig.jobs), len(rig.cache), rig.cache.bytes) == (2, 0, 0)


@pytest.mark.parametrize(
    "other",
    [
        RequestFacts("text/html", "", b"", False, []),
        RequestFacts("text/plain", "gzip", b"", False, []),
        RequestFacts("text/plain", "", b"a=1", False, []),
        RequestFacts("text/plain", "", b"", True, []),
    ],
)
def test_what_the_handler_goes_by_makes_another_request(other: RequestFacts) -> None:
    rig = Rig()
    rig.ask()
    rig.reply()
    assert not rig.ask(facts=other).outcomes


def test_bodies_are_compared_as_a_whole_however_they_came() -> None:
    rig = Rig()
    rig.ask(b"ab")
    rig.reply()
    client = Client()
    rig.cache.submit(Job(9, PLAIN, b"id", [b"a", b"b"], 2, client, rig.now), rig._run, serves=True)
    assert client.outcomes
    assert not rig.ask(b"abc").outcomes


def test_headers_count_where_the_setting_names_them() -> None:
    other = RequestFacts("text/plain", "", b"", False, [b"Host", b"there", b"x-tenant", b"b"])
    for headers, hit in (((), True), (("x-tenant",), False), (("accept",), True)):
        rig = Rig(headers=headers)
        rig.ask()
        rig.reply()
        assert bool(rig.ask(facts=other).outcomes) is hit
        assert rig.ask().outcomes


@pytest.mark.parametrize(
    ("status", "head"),
    [
        (201, HEAD),
        (404, HEAD),
        (200, HEAD + b"cache-control: max-age=0, No-Store\r\n"),
        (200, HEAD + b"cache-control: private\r\n"),
        (200, HEAD + b"set-cookie: a=b\r\n"),
    ],
)
def test_what_is_not_kept(status: int, head: bytes) -> None:
    rig = Rig()
    client = rig.ask()
    rig.reply(status=status, head=head)
    assert client.outcomes == [(status, head, b"y")]
    assert not rig.ask().outcomes and not len(rig.cache)


def test_the_least_recently_used_makes_room() -> None:
    rig = Rig(size=2 * (OVERHEAD + len(HEAD + HIT) + 1))
    for body in (b"a", b"b"):
        rig.ask(body)
        rig.reply()
    rig.ask(b"a")
    rig.ask(b"c")
    rig.reply()
    assert rig.cache.bytes == rig.cache.settings.size and rig.cache.evictions == 1
    assert rig.ask(b"a").outcomes and rig.ask(b"c").outcomes and not rig.ask(b"b").outcomes


def test_an_answer_that_is_larger_than_all_room_evicts_nothing() -> None:
    rig = Rig(size=1000)
    rig.ask(b"a")
    rig.reply()
    rig.ask(b"b")
    rig.reply(body=bytes(1000))
    assert rig.ask(b"a").outcomes and rig.cache.evictions == 0


def test_a_large_body_is_passed_by() -> None:
    rig = Rig()
    for _ in range(2):
        rig.ask(bytes(MAX_BODY + 1))
    assert len(rig.jobs) == 2 and rig.cache.passed == 2
    assert isinstance(rig.jobs[0].caller, Client)


def test_requests_in_flight_are_joined_and_all_get_the_answer() -> None:
    rig = Rig()
    clients = [rig.ask() for _ in range(100)]
    assert len(rig.jobs) == 1
    rig.reply()
    assert clients[0].outcomes == [(200, HEAD, b"y")]
    assert all(client.outcomes == [(200, HEAD + JOINED, b"y")] for client in clients[1:])
    assert rig.metrics.requests == {200: 100} and rig.cache.joined == 99


def test_who_joins_keeps_no_body() -> None:
    rig = Rig()
    rig.ask(b"body")
    parts: list[bytes | memoryview] = [b"body"]
    rig.cache.submit(Job(9, PLAIN, b"id", parts, 4, Client(), rig.now), rig._run, serves=True)
    assert parts == [] and rig.jobs[0].parts == [b"body"]


def test_a_failure_is_everybodys_and_is_not_kept() -> None:
    rig = Rig()
    clients = [rig.ask() for _ in range(3)]
    error = HandlerError("broken")
    rig.metrics.requests[500] += 1
    rig.metrics.errors[error.type] += 1
    rig.jobs[0].fail(error)
    assert [client.outcomes for client in clients] == [[error]] * 3
    assert rig.metrics.requests == {500: 3} and rig.metrics.errors == {error.type: 3}
    rig.ask()
    assert len(rig.jobs) == 2


def test_a_refusal_leaves_nothing_to_join() -> None:
    rig = Rig()
    rig.refusal = QueueFullError("full")
    for _ in range(2):
        with pytest.raises(QueueFullError):
            rig.ask()
    rig.refusal = None
    rig.ask()
    assert len(rig.jobs) == 1 and rig.cache.misses == 1


def test_the_job_goes_on_while_anybody_waits() -> None:
    rig = Rig()
    (leader, leads), (follower, _), (third, follows) = rig.send(), rig.send(), rig.send()
    leads.cancel()
    follows.cancel()
    follows.cancel()
    assert not rig.jobs[0].settled and rig.cache.cancelled == 2
    rig.reply()
    assert (leader.outcomes, third.outcomes) == ([], [])
    assert follower.outcomes == [(200, HEAD + JOINED, b"y")]
    assert rig.metrics.requests == {200: 1} and rig.ask().outcomes


def test_the_last_to_leave_takes_the_job_along() -> None:
    rig = Rig()
    (_, first), (_, second) = rig.send(), rig.send()
    first.cancel()
    second.cancel()
    assert rig.jobs[0].settled
    rig.ask()
    assert len(rig.jobs) == 2


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("leaves", [False, True])
def test_joined_requests_have_their_own_deadlines(taken: bool, leaves: bool) -> None:
    rig, prompt = Rig(), Terms(timeout=1.0)
    queue = rig.queue = BatchQueue(batch_size=1, max_batch_delay=0.0, capacity=9, timeout=60.0, retry=1)
    leader, leads = rig.send(terms=prompt)
    if taken:
        queue.take(queue.new_worker(), rig.now)
    rig.now += 0.5
    follower, _ = rig.send(terms=prompt)
    if leaves:
        leads.cancel()
    assert queue.expire(1001.0) == [] and not follower.outcomes and not rig.jobs[0].settled
    assert [str(error) for error in leader.outcomes] == (
        [] if leaves else ["no answer within the request's timeout of 1000 ms"]
    )
    assert rig.metrics.requests == ({} if leaves else {504: 1})
    ((job, error),) = queue.expire(1001.5)
    job.fail(error)
    assert follower.outcomes == [error] and queue.depth == 0


def test_joined_requests_wait_for_a_worker_as_long_as_others() -> None:
    rig = Rig()
    queue = rig.queue = BatchQueue(batch_size=1, max_batch_delay=0.0, capacity=9, timeout=1.0, retry=1)
    leader, _ = rig.send()
    rig.now += 0.5
    follower, _ = rig.send()
    rig.now += 0.1
    rig.ask(b"other")
    assert queue.expire(1001.0) == [] and queue.depth == 2 and not follower.outcomes
    assert [str(error) for error in leader.outcomes] == ["no worker was free within queue_timeout (1 s)"]
    assert [job.id for job, _ in queue.expire(1001.5)] == [0] and queue.depth == 1
    assert [job.id for job, _ in queue.expire(1001.6)] == [1] and queue.depth == 0


@pytest.mark.parametrize("taken", [False, True])
def test_joined_requests_have_their_own_objectives(taken: bool) -> None:
    rig, terms = Rig(), Terms()
    scheduling = Scheduling(objective=1.0, default_output=(b"text/plain", b"none"))
    how: dict[str, Any] = {"batch_size": 8, "max_batch_delay": 0.0, "capacity": 9, "timeout": 60.0, "retry": 1}
    queue = rig.queue = BatchQueue(**how, scheduling=scheduling)
    leader, _ = rig.send(terms=terms)
    if taken:
        queue.take(queue.new_worker(), rig.now)
    rig.now += 0.5
    follower, _ = rig.send(terms=terms)
    assert queue.expire(1001.0) == [] and not follower.outcomes
    assert [type(error) for error in leader.outcomes] == [SubstituteError]
    assert len(queue.expire(1001.5)) == 1


def test_one_callers_fault_is_its_own() -> None:
    class Broken(Client):
        def answer(self, status: int, head: bytes, body: bytes | memoryview) -> None:
            raise RuntimeError

    rig = Rig()
    rig.cache.submit(Job(9, PLAIN, b"id", [b"x"], 1, Broken(), rig.now), rig._run, serves=True)
    follower = rig.ask()
    rig.reply()
    assert follower.outcomes


def test_a_caller_that_leaves_while_others_are_told() -> None:
    class Last(Client):
        def answer(self, status: int, head: bytes, body: bytes | memoryview) -> None:
            super().answer(status, head, body)
            follows.cancel()  # its connection closes, and with it the requests behind

    rig, leader = Rig(), Last()
    rig.cache.submit(Job(9, PLAIN, b"id", [b"x"], 1, leader, rig.now), rig._run, serves=True)
    _, follows = rig.send()
    rig.reply()
    assert len(leader.outcomes) == 1 and rig.ask().outcomes


def test_a_stream_goes_to_all_that_wait_for_it_and_is_not_kept() -> None:
    rig = Rig()
    (leader, leads), (follower, _) = rig.send(), rig.send()
    stream = rig.jobs[0].caller.begin(200, HEAD)  # type: ignore[union-attr]
    late = rig.ask()
    stream.chunk(b"a")
    leads.cancel()
    stream.chunk(b"b")
    stream.answer(200, HEAD, b"")
    assert leader.outcomes == [(200, HEAD), b"a"] and late.outcomes == []
    joined = HEAD + JOINED
    assert follower.outcomes == [(200, joined), b"a", b"b", (200, joined, b"")]
    assert len(rig.jobs) == 2 and len(rig.cache) == 0


def test_who_asks_for_events_joins_nobody_else() -> None:
    rig = Rig()
    rig.ask()
    rig.ask(facts=RequestFacts("text/plain", "", b"", False, [b"Accept", b"text/event-stream"]))
    assert len(rig.jobs) == 2


def test_what_was_cleared_comes_back_neither_from_memory_nor_from_a_worker() -> None:
    rig = Rig()
    rig.ask(b"kept")
    rig.reply()
    under_way = rig.ask()
    assert rig.cache.clear() == 1
    later = rig.ask()
    rig.reply(1, body=b"old")
    assert under_way.outcomes == [(200, HEAD, b"old")] and later.outcomes == []
    rig.reply(2, body=b"new")
    assert rig.ask().outcomes == [(200, HEAD + HIT, b"new")]
    assert not rig.ask(b"kept").outcomes


def test_a_version_that_does_not_serve_gives_nothing() -> None:
    rig = Rig()
    rig.ask()
    rig.reply()
    rig.serves = False
    assert not rig.ask().outcomes and len(rig.jobs) == 2
    rig.reply(body=b"new")
    assert (len(rig.cache), rig.cache.bytes) == (1, OVERHEAD + len(HEAD + HIT) + 3)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(("send", "send", "send", "reply", "fail", "leave", "clear", "pass")), st.integers(0, 1 << 16)
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.integers(0, 4))
def test_any_history(events: list[tuple[str, int]], room: int) -> None:
    """Whatever happens: one outcome each, the right one, not too old; never two jobs alike; bytes that add up."""
    rig = Rig(size=room * (OVERHEAD + 60), ttl_s=3.0)
    clients: list[tuple[Client, Work, bytes]] = []
    left: set[int] = set()
    cleared = 0
    made: dict[bytes, float] = {}  # answer -> when it was made
    epochs: list[int] = []  # of each job: how often all was cleared before it
    for what, value in events:
        running = [number for number, job in enumerate(rig.jobs) if not job.settled]
        if what == "send":
            body = b"%d" % (value % 5)
            client, work = rig.send(body)
            clients.append((client, work, body))
            epochs += [cleared] * (len(rig.jobs) - len(epochs))
            if client.outcomes:
                assert made[client.outcomes[0][2]] > rig.now - 3.0
        elif what == "pass":
            rig.now += value % 4
        elif what == "clear":
            rig.cache.clear()
            cleared += 1
        elif what == "leave" and clients:
            number = value % len(clients)
            client, work, _ = clients[number]
            if not client.outcomes:
                left.add(number)
                work.cancel()
        elif running and what in ("reply", "fail"):
            number = running[value % len(running)]
            if what == "reply":
                answer = bytes(rig.jobs[number].parts[0]) + b" by %d" % number
                made[answer] = rig.now
                rig.reply(number, body=answer)
            else:
                rig.jobs[number].fail(HandlerError(""))
        alike = [
            (bytes(rig.jobs[number].parts[0]), epochs[number])
            for number in range(len(rig.jobs))
            if not rig.jobs[number].settled
        ]
        assert len(set(alike)) == len(alike)
        assert 0 <= rig.cache.bytes <= rig.cache.settings.size and (rig.cache.bytes > 0) is (len(rig.cache) > 0)
    for number in range(len(rig.jobs)):
        rig.reply(number, body=bytes(rig.jobs[number].parts[0]) + b" at last" if rig.jobs[number].parts else b"")
    for number, (client, _, body) in enumerate(clients):
        assert len(client.outcomes) == (number not in left)
        assert all(isinstance(one, MMSError) or one[2].split()[0] == body for one in client.outcomes)


# the setting


def test_the_setting_is_read_from_yaml_and_from_a_query() -> None:
    expected = CacheSettings(1 << 20, 5.0, ("x-tenant",))
    assert parse_cache({"size": "1MiB", "ttl_s": 5, "headers": ["X-Tenant", "x-tenant"]}) == expected
    assert parse_cache('{"size": 1048576, "ttl_s": 5, "headers": ["x-tenant"]}') == expected
    assert parse_cache({}) == CacheSettings(64 << 20, 60.0, ())
    assert [parse_cache(value) for value in (None, False, "", "off", "none")] == [None] * 5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "a mapping is needed, such as"),
        ("64MiB", "a mapping is needed, such as"),
        ([], "a mapping is needed, such as"),
        ({"size": "much"}, "size: a size is needed, such as 1048576, 100MiB or 2GB"),
        ({"size": -1}, "size: a size is needed"),
        ({"ttl_s": 0}, r"Expected `float` > 0.0 \(ttl_s\)"),
        ({"ttl_s": float("inf")}, r"\(ttl_s\)"),
        ({"ttl": 5}, "Object contains unknown field `ttl`"),
        ({"headers": "accept"}, r"Expected `array`, got `str` \(headers\)"),
        ({"headers": ["x_y"]}, "headers: 'x_y' is no name of a header"),
    ],
)
def test_a_wrong_setting_says_what_is_wrong(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_cache(value)
