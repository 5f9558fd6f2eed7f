"""The dispatcher under a fake clock: random submits, frames, answers in pieces, kills, stalls, cancellations, drain.

After every event the invariants hold; at the end every job has had exactly one outcome. The seeds are shared between
the cores. `make simulate SEEDS=1000000` runs more of them, `make simulate SEED=n` repeats one; a failure names its seed
and its last events.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import random
import traceback
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import pytest

from mms.errors import (
    DeadlineError,
    MMSError,
    OverloadError,
    ServiceUnavailableError,
    WorkerDiedError,
)
from mms.wire import FAIR_TURN, RequestFacts
from mms.workers.batching import BatchQueue
from mms.workers.job import Job, Terms
from mms.workers.overload import MAX_RETRY_AFTER, STANDING_SECONDS
from mms.workers.scheduling import PLAIN, Scheduling
from tests.unit.simulated import Client, Pipeline, Process, check_reason, deadline, is_full, next_below

SEEDS = int(os.environ.get("SEEDS", "10000"))
SEED = int(os.environ["SEED"]) if "SEED" in os.environ else None
PIECE = 250  # simulations that a process does in one go
STEPS = 40
TIMEOUT = 3.0
RESPONSE_TIMEOUT = 1.0
SERIAL = (1, 0)  # threads and preprocess threads of a worker
RARITIES = (
    "together",
    "passed on",
    "newest first",
    "passed over",
    "several at a time",
    "answered too late",
    "DeadlineError",
    "QueueFullError",
    "ObjectiveError",
)
T = TypeVar("T")
FACTS = RequestFacts("", "", b"", False, [])


class Simulation:
    """One seed: a queue, its workers, its clients, and what must be true of them at any time."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed).random
        self.now = 1000.0
        self.events: list[tuple[object, ...]] = []
        self.retry = int(chance() < 0.8)
        self.queue = BatchQueue(
            batch_size=self.pick((1, 1, 2, 3, 8)),
            max_batch_delay=self.pick((0.0, 0.0, 0.05, 0.5)),
            capacity=self.pick((1, 4, 20, 100)),
            timeout=TIMEOUT,
            retry=self.retry,
            max_bytes=self.pick((1 << 30, 1_000_000)),
            fifo=chance() < 0.3,
            scheduling=self.scheduling(),
        )
        if chance() < 0.9 and not self.queue.fifo:  # too much came before this history begins: it is too short for that
            self.queue._overload.overloaded, self.queue._overload._windows = True, 2
            self.queue._overload._window = float("inf"), 0, 0
        self.speed = self.pick((1e-7, 1e-5, 1e-3, 0.1))
        self.threads = SERIAL if chance() < 0.6 else self.pick(((2, 0), (3, 0), (1, 1), (1, 3), (2, 2)))
        self.workers = [self.new_process() for _ in range(self.pick((1, 1, 2, 3)))]
        self.poison_share = self.pick((0.0, 0.0, 0.1, 0.5))
        self.hang_share = self.pick((0.0, 0.0, 0.1))
        self.clients: dict[int, Client] = {}
        self.numbers = itertools.count(1)
        self.live: set[int] = set()
        self.cancelled: set[int] = set()
        self.seen: Counter[str] = Counter()  # how often the rarer things came to pass
        self.passed: dict[int, int] = {}  # how many frames left a job where it was that was next of the lower ones
        self.mix = (
            (self.submit, self.pick((2, 8))),
            (self.dispatch, 4),
            (self.step, 8),
            (self.receive, 5),
            (self.cancel, self.pick((0, 1))),
            (self.kill, self.pick((0, 0, 1, 3))),
            (self.pass_time, 2),
            (self.stop_late, 1),
            (self.resize, self.pick((0, 0, 1))),
        )

    def new_process(self) -> Process:
        return (Process if self.threads == SERIAL else Pipeline)(self.speed, self.queue, *self.threads)

    def scheduling(self) -> Scheduling:
        if self.chance() < 0.6:
            return PLAIN
        levels = self.pick((1, 2, 3))
        return Scheduling(
            preferred=self.pick(((), (2, 4))),
            levels=levels,
            default_level=levels // 2,
            level_sizes=self.pick(((), (0, 5, 2)[:levels])),
            objective=self.pick((0.0, 0.0, 0.5, 2.0)),
            default_output=self.pick((None, (b"text/plain", b"nothing"))),
        )

    def terms(self) -> Terms | None:
        """As the API makes them: none on a plain queue, unless the client sends a timeout."""
        queue = self.queue
        if queue.scheduling is PLAIN and self.chance() < 0.9:
            return None
        return Terms(int(self.chance() * queue.scheduling.levels), self.pick((0.0, 0.0, 0.2, 1.0, 20.0)))

    def run(self) -> None:
        actions = [action for action, weight in self.mix for _ in range(weight)]
        for _ in range(STEPS):
            self.pick(actions)()
            self.check()
        if self.chance() < 0.7:
            self.drain()
        else:
            self.unload()
        self.at_rest()

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.chance() * len(options))]

    # events

    def submit(self) -> None:
        clients = [self.new_client() for _ in range(self.pick((1, 1, 1, 4, 12)))]
        jobs = [client.job for client in clients]
        plain = not any([job.terms for job in jobs])
        idle = [worker for worker in self.workers if not worker.in_flight.count]
        if plain and idle and self.chance() < 0.3 and self.queue.pass_on(jobs, idle[0].in_flight, self.now):
            self.events.append(("pass on", [job.id for job in jobs], "to", self.workers.index(idle[0])))
            assert not self.queue.closed and not self.queue.depth and len(jobs) <= self.queue.batch_size
            assert not any([client.poison and self.queue._known_poisons for client in clients])
            self.seen["passed on"] += 1
            for client in clients:
                self.accept(client)
            idle[0].receive(self.queue.batch_size, jobs)
        elif plain and self.chance() < 0.5 and self.queue.submit_all(jobs):
            self.events.append(("submit together", [job.id for job in jobs]))
            queue = self.queue
            assert not queue.closed and queue.depth <= queue.room and queue.bytes <= queue.max_bytes
            self.seen["together"] += len(jobs) > 1
            for client in clients:
                self.accept(client)
        else:
            for client in clients:
                self.submit_one(client)

    def new_client(self) -> Client:
        client = Client()
        number = next(self.numbers)
        client.poison = self.chance() < self.poison_share
        client.hangs = self.chance() < self.hang_share
        size = self.pick((10, 10, 10, 10, 700_000))
        body = b"poison" if client.poison else b"%d" % number
        client.job = Job(number, FACTS, b"", [body], size, client, self.now, self.terms())
        self.events.append(("arrives", number, "poison" * client.poison, "hangs" * client.hangs))
        return client

    def submit_one(self, client: Client) -> None:
        queue, job, terms = self.queue, client.job, client.job.terms
        full = queue.depth >= queue.room or bool(queue.depth and queue.bytes + job.size > queue.max_bytes)
        if terms is not None:
            full = is_full(queue, terms, job.size)
            self.events.append(("terms", terms))
        self.events.append(("submit", job.id))
        try:
            queue.submit(job)
        except OverloadError as error:
            assert full and 1 <= error.retry_after <= MAX_RETRY_AFTER
        except ServiceUnavailableError:
            assert queue.closed
        except WorkerDiedError:
            assert client.poison, "a good request is taken for a poison"
        else:
            assert not full and not queue.closed
            self.accept(client)

    def accept(self, client: Client) -> None:
        self.clients[client.job.id] = client
        self.live.add(client.job.id)

    def dispatch(self) -> None:
        """Offer work to every worker, in any order; as the pool does, after what is too late was taken out."""
        self.expire()
        workers = self.workers[:]
        if len(workers) > 1:
            workers.sort(key=lambda worker: self.chance())
        for worker in workers:
            self.feed(worker)

    def feed(self, worker: Process) -> None:
        held = worker.in_flight
        was_idle, was_exclusive, standing = not held.count, held.exclusive, self.queue._overload.standing_since
        below = next_below(self.queue)
        frame = self.queue.take(held, self.now)
        if frame is None:
            wake_at = self.queue.wake_at()
            waits = self.queue.depth and wake_at is not None and wake_at > self.now
            assert not was_idle or not self.queue.depth or waits, "an idle worker gets nothing and nobody wakes it"
            return
        batch_size, jobs = frame
        self.events.append(
            ("send", [job.id for job in jobs], "to", self.workers.index(worker), "batch size", batch_size)
        )
        assert jobs, "an empty frame"
        assert not was_exclusive, "a job shares its frame's worker with a retry"
        if any(job.attempts for job in jobs):
            assert len(jobs) == 1 and was_idle, "a retried job is not alone"
        for job in jobs:
            assert not job.settled, "a job that nobody waits for is sent"
            assert job.arrived + TIMEOUT > self.now, "a job that is too late is sent"
            assert not 0 < deadline(job) <= self.now, "a job is sent after its deadline"
        if not jobs[0].attempts:
            if len(self.queue._waiting) and self.queue.scheduling.levels == 1:
                self.check_order(jobs, standing)
            self.check_fairness(below)
        worker.receive(batch_size, jobs)

    def check_fairness(self, below: Job | None) -> None:
        """Whoever waits longest of the lower levels is served at the latest with the tenth frame since then."""
        if below is None or below.taken:
            self.passed.clear()
            return
        self.passed = {below.id: self.passed.get(below.id, 0) + 1}
        self.seen["passed over"] += 1
        assert self.passed[below.id] < FAIR_TURN, "a job of low priority starves"

    def check_order(self, jobs: list[Job], standing: float | None) -> None:
        """What was sent is the oldest of what waited; or the newest, if the queue stood already at an earlier look."""
        sent = [job.arrived for job in jobs]
        rest = [job.arrived for job in self.queue._waiting if not job.settled]
        if not rest:
            return
        if self.queue.newest_first:
            self.seen["newest first"] += 1
            assert not self.queue.fifo and standing is not None and self.now - standing >= STANDING_SECONDS
            assert min(sent) >= max(rest), "not the newest"
        else:
            assert max(sent) <= min(rest), "not the oldest"

    def step(self) -> None:
        """One worker begins its next batch, or ends the one in hand."""
        worker = self.pick(self.workers)
        self.advance(worker)

    def advance(self, worker: Process) -> None:
        batch = worker.advance(self.now, self.chance, self.hangs)
        if not batch:
            return
        self.events.append(("begin", [job.id for job in batch], "on", self.workers.index(worker)))
        poison = False
        for job in batch:
            client = self.clients[job.id]
            client.runs += 1
            assert client.runs <= 1 + self.retry, f"job {job.id} runs {client.runs} times"
            poison = poison or client.poison
        if poison:
            for job in batch:
                client = self.clients[job.id]
                client.killed += client.poison
                assert client.killed <= 2, f"job {job.id} kills a third worker"
            self.end(worker)

    def hangs(self, job: Job) -> bool:
        return self.clients[job.id].hangs

    def receive(self) -> None:
        """The server reads a piece of what one worker has written."""
        worker = self.pick(self.workers)
        self.read(worker, int(self.chance() * (len(worker.written) + 1)))
        if self.chance() < 0.5:
            self.dispatch()

    def read(self, worker: Process, count: int) -> None:
        if count and worker.batches:
            worker.in_flight.observe(worker.batches, worker.batches * worker.batch_seconds)
            taken = [job.taken for job in itertools.islice(worker.written, count)]
            self.queue.learn(worker.in_flight, self.pick((1, 2, 3)), self.now - min(taken))
            worker.batches = 0
        answered = [worker.written.popleft() for _ in range(count)]
        jobs = worker.in_flight.finish([job.id for job in answered])
        assert jobs == answered, "an answer to a job that the worker does not have"
        for job in jobs:
            if not job.settled:
                job.settled = True
                job.caller.answer(200, b"", memoryview(b"%d" % job.id))
                self.live.discard(job.id)
        assert worker.in_flight.count or not worker.in_flight.exclusive

    def cancel(self) -> None:
        if self.live:
            number = self.pick(sorted(self.live))
            self.events.append(("cancel", number))
            self.clients[number].job.cancel()
            self.live.discard(number)
            self.cancelled.add(number)

    def kill(self) -> None:
        self.end(self.pick(self.workers))

    def end(self, worker: Process) -> None:
        """The process ends; what it has written is read to the end; its jobs are taken back; another one starts."""
        self.events.append(("worker", self.workers.index(worker), "dies; begun jobs:", worker.started))
        self.read(worker, len(worker.written))
        self.lose(worker, "signal 6 (SIGABRT)")

    def lose(self, worker: Process, cause: str) -> None:
        if self.retry:
            for job in worker.finished:
                self.clients[job.id].runs -= 1  # to no avail: it may be run again as if it had not been
        failed = self.queue.lose(worker.in_flight, worker.started, cause, self.now, done=worker.done)
        assert all(isinstance(error, WorkerDiedError) for _, error in failed)
        self.fail(failed)
        held = worker.in_flight
        assert not held.count and not held.exclusive and not held.frames
        self.queue.forget_worker(held)
        self.workers[self.workers.index(worker)] = self.new_process()

    def stop_late(self) -> None:
        """A batch that ran too long fails, and its worker is killed."""
        for worker in self.workers[:]:
            late = {
                n for begun_at, places in worker.running() if self.now - begun_at > RESPONSE_TIMEOUT for n in places
            }
            if not late:
                continue
            self.events.append(("worker", self.workers.index(worker), "timed out; begun jobs:", worker.started))
            if isinstance(worker, Pipeline):
                self.stop_some(worker, late)
            else:
                self.read(worker, len(worker.written))
                held = worker.in_flight
                failed = self.queue.timed_out(held, worker.started, RESPONSE_TIMEOUT, done=worker.done)
                assert all(isinstance(error, DeadlineError) for _, error in failed)
                self.fail(failed)
            self.lose(worker, "response_timeout")

    def stop_some(self, worker: Pipeline, late: set[int]) -> None:
        """Of several batches: the others stay in its hands until it has ended, and it may answer until then."""
        if self.chance() < 0.5:
            self.read(worker, len(worker.written))
        held = worker.in_flight
        failed = self.queue.overdue(held, late, RESPONSE_TIMEOUT)
        assert len(failed) <= len(late) and all(isinstance(error, DeadlineError) for _, error in failed)
        self.fail([(job, error) for job, error in failed if not job.settled])
        if self.chance() < 0.5:
            worker.end_late(late)
        self.seen["several at a time"] += 1
        if {job.id for job in worker.written} <= {job.id for job in held.jobs}:
            self.read(worker, len(worker.written))
        else:
            self.seen["answered too late"] += 1
            assert held.finish([job.id for job in worker.written]) is None
        self.check()

    def pass_time(self) -> None:
        self.now += self.pick((0.01, 0.3, 1.5))
        self.events.append(("it is", round(self.now, 2)))
        self.queue.tick(self.now)
        self.expire()

    def expire(self) -> None:
        expired = self.queue.expire(self.now)
        for job, error in expired:
            self.seen[type(error).__name__] += 1
            check_reason(self.queue, job, error, self.now)
        self.fail(expired)
        overdue = [n for n in self.live if 0 < deadline(self.clients[n].job) <= self.now]
        assert not overdue, f"not answered by their deadline: {overdue}"
        latest, clients = self.now - TIMEOUT, self.clients
        late = [n for n in self.live if clients[n].job.arrived <= latest and not clients[n].job.taken]
        assert not late, f"waits longer than the queue's timeout: {late}"

    def resize(self) -> None:
        """A live change of the batch settings."""
        self.queue.set_batches(self.pick((1, 2, 5)), self.queue.scheduling.preferred)
        self.events.append(("batch size", self.queue.batch_size))

    def fail(self, failed: list[tuple[Job, MMSError]]) -> None:
        for job, error in failed:
            assert not job.settled, f"job {job.id} fails twice"
            job.fail(error)
            self.live.discard(job.id)

    # the end

    def drain(self) -> None:
        """Refuse new jobs, finish those there are."""
        self.queue.close("the model is being unloaded")
        self.submit_one(self.new_client())
        for _ in range(10_000):
            if not self.live:
                return
            self.dispatch()
            for worker in self.workers[:]:
                self.advance(worker)
                if self.threads != SERIAL and worker in self.workers:
                    self.advance(worker)
            for worker in self.workers[:]:
                self.read(worker, len(worker.written))
            self.now += 0.1
            self.queue.tick(self.now)
            self.expire()
            self.stop_late()
            self.check()
        raise AssertionError(f"never settled: {sorted(self.live)}")

    def unload(self) -> None:
        """End it all now."""
        self.queue.close("the server stops")
        for worker in self.workers[:]:
            self.end(worker)
            self.check()
        self.fail(self.queue.abandon(ServiceUnavailableError("the server stops")))
        self.check()

    # what must be true

    def check(self) -> None:
        queue = self.queue
        waiting = [*queue._alone, *queue._waiting]
        given_up = [job.id for job, _ in queue._gave_way]
        sizes = [job.size for job in waiting if not job.settled]
        owned = [job.id for job in waiting] + given_up
        assert not any([job.taken for job in waiting]), "a waiting job counts as taken"
        for worker in self.workers:
            held = worker.in_flight
            owned += [job.id for job in held.jobs]
            in_hand = [len(frame.jobs) or frame.left for frame in held.frames]
            assert all(in_hand) and sum(in_hand) == len(held.jobs) == held.count
            assert held.finished + held.count == worker.sent, "sent is answered or in hand"
            assert not held.exclusive or held.count == 1
        places = set(owned)
        assert len(places) == len(owned), "a job has two owners"
        assert self.live <= places, f"lost: {self.live - places}"
        assert queue.depth == len(sizes), f"depth is {queue.depth}, {len(sizes)} jobs wait"
        assert queue.bytes == sum(sizes), f"bytes is {queue.bytes}, {sum(sizes)} wait"

    def at_rest(self) -> None:
        assert self.queue.depth == self.queue.bytes == 0
        assert self.queue.submitted == len(self.clients)
        outcomes: Counter[str] = Counter()
        for number, client in self.clients.items():
            assert client.job.settled
            if number in self.cancelled:
                assert client.outcome is None, "somebody who left is answered"
                outcomes["cancelled"] += 1
            elif isinstance(client.outcome, bytes):
                assert client.outcome == b"%d" % number and not client.poison and not client.hangs
                outcomes["answered"] += 1
            else:
                assert isinstance(client.outcome, MMSError)
                outcomes["failed"] += 1
        assert outcomes.total() == self.queue.submitted


def simulate(seeds: range) -> tuple[Counter[str], str]:
    """How often the rarer things came to pass; and the first failure, with its seed and its last events."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        simulation = Simulation(seed)
        try:
            simulation.run()
        except Exception as error:
            events = "\n".join(" ".join(map(str, event)) for event in simulation.events[-40:])
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
            return seen, f"seed {seed}: {what}\nlast events:\n{events}\nagain: make simulate SEED={seed}"
        seen += simulation.seen
    return seen, ""


@pytest.mark.timeout(300)
def test_every_job_has_one_owner_and_one_outcome() -> None:
    if SEED is not None:
        _, failure = simulate(range(SEED, SEED + 1))
        assert not failure, failure
        return
    pieces = [range(first, min(first + PIECE, SEEDS)) for first in range(0, SEEDS, PIECE)]
    # frozen, the parent's objects cost the processes no garbage collection
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), gc.freeze) as pool:
        seen: Counter[str] = Counter()
        for some, failure in pool.imap(simulate, pieces):
            assert not failure, failure
            seen += some
    for rarity in RARITIES:
        assert seen[rarity] > SEEDS // 200, f"hardly ever happens: {rarity}"
