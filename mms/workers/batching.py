"""The dispatcher of one model version: which job goes to which worker, and what becomes of it when that worker dies.

A pure state machine in the front end's process: events in, decisions out, the clock (`now`, monotonic seconds) passed
in, no I/O. A job is owned by exactly one of the queue, a worker's InFlight or nobody (settled), and is settled once.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

from mms.errors import DeadlineError, DrainingError, MMSError
from mms.workers import refusals
from mms.workers.deadlines import Deadlines
from mms.workers.inflight import MAX_FRAME_JOBS, InFlight
from mms.workers.job import Job, Terms
from mms.workers.objective import BatchLimit, Objective
from mms.workers.overload import Overload
from mms.workers.poison import Poisons, RetryBudget
from mms.workers.scheduling import PLAIN, Scheduling
from mms.workers.waiting import MAX_FRAME_BYTES, Levels, Line, Waiting


class BatchQueue:
    """The waiting jobs of one model version, and the rules by which its workers pull them."""

    def __init__(
        self,
        *,
        batch_size: int,
        max_batch_delay: float,
        capacity: int,
        timeout: float,
        retry: int,
        max_bytes: int = 512 << 20,
        fifo: bool = False,
        scheduling: Scheduling = PLAIN,
    ) -> None:
        self.max_batch_delay = max_batch_delay
        self.capacity = capacity
        self.timeout = timeout
        self.retry = retry
        self.max_bytes = max_bytes
        self.scheduling = scheduling
        self.objective = Objective(scheduling.objective) if scheduling.objective else None
        self.fifo = fifo or scheduling.levels > 1 or self.objective is not None  # oldest first even while overloaded
        self.room = capacity  # jobs that may wait: by number, and by the time they would wait
        self.closed = ""  # why nothing is taken any more; empty while open
        self.depth = 0  # waiting jobs that somebody still waits for
        self.bytes = 0  # of their bodies
        self.submitted = 0
        self.retries = 0
        self.cancelled = 0
        self.deadlines = Deadlines(scheduling.objective)
        self._longest_wait = timeout
        self._waiting: Waiting = (
            Levels(scheduling.levels, scheduling.default_level) if scheduling.levels > 1 else Line()
        )
        self._alone = Line()  # retries: each runs in a frame of its own, before anything else
        self._gave_way: list[tuple[Job, MMSError]] = []  # to others; not told yet
        self._budget = RetryBudget()
        self._poisons = Poisons()
        self._known_poisons = self._poisons.known
        self._overload = Overload(fifo=self.fifo)
        self._handed = 0  # jobs that workers were given
        self.set_batches(batch_size, scheduling.preferred)

    @property
    def rate(self) -> float:
        """Jobs per second that leave while others wait; 0 while that was not measured."""
        return self._overload.rate

    @property
    def newest_first(self) -> bool:
        return self._overload.newest_first

    def set_batches(self, batch_size: int, preferred: tuple[int, ...] = ()) -> None:
        """At most so many jobs in a batch, and of these sizes those that are better than others."""
        self.batch_size = batch_size
        self.preferred = tuple(sorted(preferred, reverse=True))
        self.plain = not preferred and self.objective is None  # then batches of any worker are of up to batch_size
        for limit in self.objective.limits if self.objective is not None else ():
            limit.most = batch_size
            limit.limit = min(limit.limit, batch_size)

    def new_worker(self, threads: int = 1, preprocess_threads: int = 0) -> InFlight:
        """The account of a worker that is ready."""
        worker = InFlight(threads, preprocess_threads)
        if self.objective is not None:
            worker.batch_limit = BatchLimit(self.objective.seconds, self.batch_size, threads)
            self.objective.limits.append(worker.batch_limit)
        return worker

    def forget_worker(self, worker: InFlight) -> None:
        """It has ended."""
        if self.objective is not None and worker.batch_limit in self.objective.limits:
            self.objective.limits.remove(worker.batch_limit)

    def submit(self, job: Job) -> None:
        """Take the job in. Raises OverloadError, DrainingError while closed, or WorkerDiedError for one whose like has
        just crashed two workers.
        """
        if self._known_poisons:
            self._poisons.refuse(job)
        held = self.bytes + job.size
        if self.depth >= self.room or held > self.max_bytes or job.terms is not None:
            refusal = self.refusal(job.size, job.terms)
            if refusal is not None:
                try:
                    raise refusal
                finally:
                    del refusal  # its traceback knows this frame: the cycle would keep the request
            if job.terms is not None:
                self._accept_terms(job, job.terms)
                held = self.bytes + job.size
        self.submitted += 1
        self.depth += 1
        self.bytes = held
        job.queue = self
        self._waiting.append(job)

    def submit_all(self, jobs: list[Job]) -> bool:
        """Take in as many jobs without terms as there are, or none if any of them might be refused."""
        held, depth = self.bytes, self.depth + len(jobs)
        for job in jobs:
            held += job.size
            job.queue = self
        if depth > self.room or held > self.max_bytes or self._known_poisons:
            return False
        self.submitted += len(jobs)
        self.depth = depth
        self.bytes = held
        self._waiting.extend(jobs)
        return True

    def pass_on(self, jobs: list[Job], worker: InFlight, now: float) -> bool:
        """Jobs without terms, just come, go to an idle worker as one batch: what submit_all and take would do while
        nothing waits, and nothing is to be decided. False, and none is taken, when something is.
        """
        count, size = len(jobs), 0
        for job in jobs:
            size += job.size
            job.queue = self
        if (
            self.depth
            or count > self.batch_size
            or count > self.room
            or size > self.max_bytes
            or size > MAX_FRAME_BYTES
            or self.max_batch_delay
            or not self.plain
            or self._known_poisons
        ):
            return False
        self.submitted += count
        self._overload.emptied = True
        self._hand_over(worker, jobs, size, self.batch_size, now)
        return True

    def refusal(self, size: int, terms: Terms | None = None) -> MMSError | None:
        """What speaks against a job with a body of `size` bytes now. An empty queue takes a body of any size, and jobs
        of lower priority give way.
        """
        if self.closed:
            return DrainingError(self.closed)
        if terms is not None and self.scheduling.level_sizes:
            most = self.scheduling.level_sizes[terms.level]
            if most and self._waiting.waiting_at(terms.level) >= most:
                return refusals.level_full(terms.level, most, self._retry_after())
        if self.depth >= self.room and (terms is None or next(self._waiting.below(terms.level), None) is None):
            return refusals.no_room(self.depth, self.capacity, self.timeout, self.objective, self._overload)
        if self.depth and self.bytes + size > self.max_bytes:
            lower = [] if terms is None else [job.size for job in self._waiting.below(terms.level)]
            if len(lower) < self.depth and self.bytes - sum(lower) + size > self.max_bytes:
                return refusals.no_bytes(self.bytes, self.max_bytes, self._retry_after())
        return None

    def apply(self, *, capacity: int, max_bytes: int, timeout: float, fifo: bool) -> None:
        """Change the limits, and whether the newest jobs may be served first, from now on; forgets poison."""
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.timeout = timeout
        self.fifo = self._overload.fifo = fifo or self.scheduling.levels > 1 or self.objective is not None
        self.forget_poison()
        self._make_room()

    def forget_poison(self) -> None:
        """What crashed workers may be well by now: somebody has changed something, or asks for another try."""
        self._known_poisons.clear()

    def forget_rate(self) -> None:
        """There are other workers than those whose rate was measured."""
        self._overload.forget_rate()
        self._make_room()

    def take(self, worker: InFlight, now: float) -> tuple[int, list[Job]] | None:
        """The next frame for `worker`, as (batch size, jobs), or None when it should get nothing now."""
        if worker.exclusive:
            return None
        if self._alone:
            if worker.count:
                return None
            jobs = self._alone.some(1, 1, newest_first=False)
            if jobs:
                self._left(jobs[0])
                worker.exclusive = True
                return self._hand_over(worker, jobs, jobs[0].size, 1, now)
        if not self.depth:
            return None
        batch_size = self.batch_size if self.plain else self.batch_size_of(worker)
        limit = self._limit(worker, batch_size, now)
        if not limit:
            return None
        waiting = self._waiting
        if self.depth == len(waiting) <= limit and self.bytes <= MAX_FRAME_BYTES:  # all that wait, and none is settled
            jobs = list(waiting)
            waiting.clear()
            self._overload.emptied = True
            size = self.bytes
            self.depth = self.bytes = 0
        else:
            jobs = waiting.some(limit, batch_size, self._newest_first(worker, now))
            if not waiting:
                self._overload.emptied = True
            size = sum([job.size for job in jobs])
            self.depth -= len(jobs)
            self.bytes -= size
        if self.preferred and worker.preprocess_threads:  # it takes these sizes itself, of what is prepared
            batch_size = self._most(worker)
        return self._hand_over(worker, jobs, size, batch_size, now)

    def batch_size_of(self, worker: InFlight) -> int:
        """How large a batch may be that the worker gets now: a preferred size if enough wait for one."""
        size = self._most(worker)
        for preferred in self.preferred:
            if preferred <= size and preferred <= self.depth:
                return preferred
        return size

    def learn(self, worker: InFlight, largest: int, seconds: float) -> bool:
        """A frame, in which the largest batch had so many jobs, was answered after so long. Only with an objective.

        Returns whether the objective has just turned out to be out of reach.
        """
        limit = worker.batch_limit
        if limit is None:
            return False
        hopeless = limit.observe(largest, seconds)
        self._make_room()
        return hopeless

    def wake_at(self) -> float | None:
        """When an idle worker should look again, if it waits for a fuller batch."""
        if not self.max_batch_delay or not self.depth or self.depth >= self.batch_size:
            return None
        oldest = self._oldest()
        return None if oldest is None else oldest.arrived + self.max_batch_delay

    def oldest_wait(self, now: float) -> float:
        """Seconds for which the longest waiting job has waited; 0 when none does."""
        oldest = self._oldest() if self.depth else None
        return 0.0 if oldest is None else now - oldest.arrived

    def lose(
        self, worker: InFlight, started: int, cause: str, now: float, *, done: int | None = None
    ) -> list[tuple[Job, MMSError]]:
        """The worker died after it had begun `started` jobs: requeue what can be run again, return what cannot.

        Jobs of the batch in hand are retried once, each alone, within the budget, unless their answers have begun to
        stream; jobs sent ahead go back to the front, and so do those that were `done` but not yet answered.
        """
        lost = self._part(worker, started, done)
        retryable = [job for job in lost if job.attempts < self.retry and not job.streams]
        affordable = bool(retryable) and not self.closed and self._budget.spend(now, self.submitted)
        failed: list[tuple[Job, MMSError]] = []
        again: list[Job] = []
        for job in lost:
            job.attempts += 1
            if not affordable or job.attempts > self.retry or job.streams:
                if job.attempts > 1:
                    self._poisons.remember(job, cause, now)
                failed.append((job, refusals.death(job, cause, closed=self.closed, retry=self.retry)))
            else:
                self.retries += 1
                job.frame = None
                again.append(job)
                self.depth += 1
                self.bytes += job.size
        self._alone.put_back(again)
        return failed

    def timed_out(
        self, worker: InFlight, started: int, limit: float, *, done: int | None = None
    ) -> list[tuple[Job, MMSError]]:
        """The batch in hand ran longer than `limit` seconds: its jobs fail with 504, the others go back."""
        return [(job, refusals.stuck(limit)) for job in self._part(worker, started, done)]

    def overdue(self, worker: InFlight, places: Collection[int], limit: float) -> list[tuple[Job, MMSError]]:
        """The jobs at these places, of a worker that runs several batches, ran longer than `limit` seconds: they fail
        with 504. The worker keeps the others, until it is killed.
        """
        return [(job, refusals.stuck(limit)) for job in worker.take_places(places)]

    def expire(self, now: float) -> list[tuple[Job, MMSError]]:
        """The jobs that are not waited for any longer, at workers, too: too late, or given up for higher priorities."""
        expired: list[tuple[Job, MMSError]] = []
        if self._gave_way:
            expired = [(job, error) for job, error in self._gave_way if not job.settled]
            self._gave_way.clear()
        if self._alone and (late := self._alone.late(now, self.timeout)):
            expired += self._give_up(late, now, self.timeout, refusals.too_late(self.timeout, None))
        if late := self._waiting.late(now, self._longest_wait):
            expired += self._give_up(late, now, self._longest_wait, self._too_late())
        if self.deadlines.heap:
            expired += self._due(now)
        return expired

    def drop(self, job: Job) -> None:
        """It waits no more."""
        self._left(job)
        if not job.attempts:
            self._waiting.drop(job)

    def close(self, reason: str) -> None:
        """Refuse new jobs with `reason`; those that wait are still served."""
        self.closed = reason
        self._make_room()

    def abandon(self, error: MMSError) -> list[tuple[Job, MMSError]]:
        """Every waiting job, to be failed with `error`."""
        gave_way = [job for job, _ in self._gave_way]
        jobs = [job for job in itertools.chain(self._alone, self._waiting, gave_way) if not job.settled]
        self._alone.clear()
        self._waiting.clear()
        self._gave_way.clear()
        self.depth = self.bytes = 0
        return [(job, error) for job in jobs]

    def tick(self, now: float) -> None:
        """Called a few times a second: remembers how many requests there were, and how fast they left."""
        self._budget.tick(now, self.submitted)
        self._waiting.tidy(self.depth)
        if self._overload.measure(now, self.submitted, self._handed, self.depth, self.batch_size):
            self._make_room()

    def _accept_terms(self, job: Job, terms: Terms) -> None:
        """Note its deadlines, and make room: others of lower priority give way."""
        if self.depth >= self.room:
            self._give_way(next(self._waiting.below(terms.level)))
        while self.depth and self.bytes + job.size > self.max_bytes:
            self._give_way(next(self._waiting.below(terms.level)))
        self.deadlines.watch(job, job.arrived)

    def _give_way(self, job: Job) -> None:
        self.drop(job)
        job.queue = None
        self._gave_way.append((job, refusals.gave_way(self._retry_after())))

    def _due(self, now: float) -> list[tuple[Job, MMSError]]:
        """The jobs whose deadlines have come, waiting or at a worker. Of the latter, one that only misses the model's
        objective is answered late, unless there is an answer to be given instead.
        """
        late: list[tuple[Job, MMSError]] = []
        for job, objective in self.deadlines.due(now):
            if job.queue is None:
                continue  # it is in `expired` already
            if job.taken and objective and (self.scheduling.default_output is None or job.streams):
                continue
            error = self._too_late() if objective else refusals.own_deadline(job)
            longest = self.scheduling.objective if objective else job.timeout
            if job.shared is not None and not job.shared.late(now, longest, self.scheduling.outcome(error)):
                continue
            if not job.taken:
                self.drop(job)
                job.parts.clear()
            job.recall()
            job.queue = None
            late.append((job, error))
        return late

    def _give_up(self, late: list[Job], now: float, longest: float, error: MMSError) -> list[tuple[Job, MMSError]]:
        """Of jobs just taken out, those that fail with `error`; where others wait who came later, they go back."""
        failed: list[tuple[Job, MMSError]] = []
        back: list[Job] = []
        for job in late:
            shared = job.shared
            if job.settled:
                continue
            if shared is not None and not shared.late(now, longest, self.scheduling.outcome(error)):
                job.arrived = shared.since
                back.append(job)
                continue
            self._left(job)
            job.queue = None
            failed.append((job, error))
        self._put_back(back)
        return failed

    def _put_back(self, jobs: list[Job]) -> None:
        if jobs:
            self._waiting.put_back([job for job in jobs if not job.attempts])
            self._alone.put_back([job for job in jobs if job.attempts])

    def _part(self, worker: InFlight, started: int, done: int | None) -> list[Job]:
        """Take everything from a worker; returns the batch in hand, all else goes back to the queue's front.

        Without a retry, what was done but not answered must not run again: it counts as in hand.
        """
        finished = done if done is not None and self.retry else 0
        begun: list[Job] = []
        back: list[Job] = []
        for place, job in worker.take_all():
            if not job.settled:
                (begun if finished <= place < started or job.streams else back).append(job)
        for job in back:
            job.frame = None
        self._put_back(back)
        self.depth += len(back)
        self.bytes += sum([job.size for job in back])
        return begun

    def _most(self, worker: InFlight) -> int:
        """Jobs in a batch of this worker."""
        limit = worker.batch_limit
        return limit.limit if limit is not None else self.batch_size

    def _limit(self, worker: InFlight, batch_size: int, now: float) -> int:
        """How many jobs may go to `worker` now: whole batches, more than one only if they are short."""
        ahead = worker.batches_ahead()
        if not worker.count or len(worker.frames) < worker.threads:
            waits = self.max_batch_delay and not (worker.count and worker.preprocess_threads)  # else it waits itself
            if waits and self.depth < batch_size:
                oldest = self._oldest()
                if oldest is not None and oldest.arrived + self.max_batch_delay > now:
                    return 0
            limit = min(max(1, ahead) * batch_size, max(MAX_FRAME_JOBS, batch_size))
        elif worker.preprocess_threads and not worker.streams:
            # a batch more for the preprocess threads, and what they have in hand
            most = self._most(worker)
            window = max(most * (worker.threads + 1) + worker.preprocess_threads, ahead * most)
            room = window - worker.count
            if room <= 0 and self.scheduling.levels > 1:
                room = self.scheduling.room_above(self._waiting, worker.jobs, window)
            return max(0, min(room, MAX_FRAME_JOBS))
        elif len(worker.frames) > worker.threads or self.depth < batch_size:
            return 0
        else:
            most = max(ahead, 2) if ahead else 0  # behind a batch that fits into AHEAD_SECONDS lies another one
            room = most * worker.threads * batch_size - worker.count
            limit = min(room, MAX_FRAME_JOBS) if room >= batch_size else 0
        if self.preferred and limit > batch_size:
            limit = min(limit, max(1, self.depth // batch_size) * batch_size)
        return limit

    def _hand_over(
        self, worker: InFlight, jobs: list[Job], size: int, batch_size: int, now: float
    ) -> tuple[int, list[Job]]:
        worker.add(jobs, size, now)
        self._handed += len(jobs)
        return batch_size, jobs

    def _left(self, job: Job) -> None:
        self.depth -= 1
        self.bytes -= job.size

    def _newest_first(self, worker: InFlight, now: float) -> bool:
        if self.fifo or self.depth > self.room:  # those who are too many for that are served first, in their order
            self._overload.newest_first = False
            return False
        oldest = self._waiting.oldest()
        waited = now - oldest.arrived if oldest is not None else 0.0
        return self._overload.is_standing(waited, worker.batch_seconds or 0.0, now)

    def _oldest(self) -> Job | None:
        """The longest waiting job; retries are older than others."""
        return self._alone.oldest() or self._waiting.oldest()

    def _make_room(self) -> None:
        wait, room = self.timeout, self.capacity
        if self.objective is not None:
            wait = min(wait, self.objective.longest_wait())
            room = min(room, self.objective.room() or room)
        self._longest_wait = wait
        self.room = 0 if self.closed else self._overload.room(room, self.batch_size, self.timeout)

    def _too_late(self) -> DeadlineError:
        return refusals.too_late(self.timeout, self.objective)

    def _retry_after(self) -> int:
        return self._overload.retry_after(self.depth)
