"""A live worker as the front end sees it: its channel, its state, the jobs it has in hand."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import mmap
import socket
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Protocol, cast

from mms import sharedpage, wire
from mms.errors import FrameError
from mms.metrics import VersionMetrics
from mms.workers.batching import BatchQueue
from mms.workers.delivery import count_answers, count_batches, deliver, seconds_of, waits_in_worker
from mms.workers.inflight import InFlight
from mms.workers.job import Caller, Job
from mms.workers.largeframe import LARGE, LARGEST, LargeFrame
from mms.workers.output import OutputReader
from mms.workers.placement import Place
from mms.workers.process import WorkerProcess
from mms.workers.scheduling import forming_of

log = logging.getLogger("mms.worker")

MAX_FAILURE = 64 << 10  # characters of why a handler was not loaded: it is logged, and kept
LAST_WORDS = 0.05  # seconds between a process's end and its channel's end, in either order


class WorkerState(enum.StrEnum):
    STARTING = "STARTING"
    READY = "READY"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"


class Owner(Protocol):
    """The pool, as its workers know it."""

    def worker_ready(self, worker: Worker, ready: wire.Ready) -> None: ...

    def worker_idle(self) -> None:
        """A worker has nothing left to do, and a full batch waits; the answers it has sent are not delivered yet."""
        ...

    def worker_free(self, worker: Worker) -> None: ...

    def objective_missed(self, worker: Worker, seconds: float) -> None:
        """One request alone has just turned out to take longer than the latency objective."""
        ...

    def worker_lost(self, worker: Worker) -> None: ...

    def worker_gone(self, worker: Worker) -> None: ...


class Loan:
    """A worker's use by a further front end, and the page that this has."""

    def __init__(self, page: mmap.mmap) -> None:
        self.jobs = 0  # that it has in hand from there, if its version scales by itself
        self._page = page
        sharedpage.write_busy(page, True)  # until the worker has come to know it, which says then what it does

    @property
    def busy(self) -> bool:
        """As WorkerProcess.busy; also while the worker does not know of the loan."""
        return sharedpage.read_busy(self._page)

    @property
    def answered(self) -> int:
        done: int = sharedpage.PROGRESS.unpack_from(self._page)[0]
        return done

    @property
    def begun_at(self) -> float:
        """When the oldest of the work in hand was begun (monotonic; 0 without any)."""
        begun_at: float = sharedpage.PROGRESS.unpack_from(self._page)[2]
        return begun_at or min([at for at, _ in sharedpage.read_slots(self._page)], default=0.0)


class Lender(Protocol):
    """The owner of weights that workers use."""

    gone: asyncio.Event


class Worker(asyncio.Protocol):
    """Speaks with one worker process from LOAD to the end of its channel."""

    def __init__(self, slot: int, place: Place, owner: Owner, queue: BatchQueue, metrics: VersionMetrics) -> None:
        self.slot = slot
        self.place = place
        self.state = WorkerState.STARTING
        self.in_flight = InFlight()
        self.started_at = time.time()
        self.launched = time.monotonic()
        self.failure: wire.Failed | None = None
        self.cause = ""  # how it ended, or why it is being killed
        self.output: OutputReader | None = None
        self.lender: Lender | None = None  # whose weights it has
        self.borrowed = 0  # bytes of them
        self.process: WorkerProcess = cast(WorkerProcess, None)
        self._owner = owner
        self._queue = queue
        self._metrics = metrics
        self._reader = wire.FrameReader()
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._early = 0  # jobs that were answered before their batch was reported (streams), or without any (cancelled)
        self._exit: str | None = None
        self._patience: asyncio.TimerHandle | None = None  # with a worker that was told to leave
        self._channel_ended = False
        self._gone = False
        self.control: socket.socket | None = None  # on which it is given channels for further front ends
        self.elsewhere: dict[int, Loan] = {}  # by the numbers of the front ends that use it, too
        self._answered_before = 0  # for those that do not use it any more

    async def attach(
        self, process: WorkerProcess, output: OutputReader, load: wire.Load, *, shared: bool = False
    ) -> None:
        """Take over a process that was just started, and tell it what to load.

        With `shared`, further front ends can use it.
        """
        loop = asyncio.get_running_loop()
        self.process = process
        self.output = output
        output.start(process.output)
        loop.add_reader(process.pidfd, self._process_ended)
        frame = wire.pack(wire.LOAD, load)
        if shared:
            frame = self._share(process, frame)
        try:  # shielded: the end of a process is seen through this connection, too
            await asyncio.shield(loop.create_task(loop.create_connection(lambda: self, sock=process.channel)))
        except asyncio.CancelledError:
            self.kill("stopped")
            raise
        if not self._transport.is_closing():
            self._transport.write(frame)

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None

    @property
    def gpu(self) -> int | None:
        """The number of its GPU."""
        return self.place.gpu.index if self.place.gpu is not None else None

    @property
    def answered(self) -> int:
        """Jobs that it has answered since it started."""
        elsewhere = sum(loan.answered for loan in self.elsewhere.values())
        return self.in_flight.finished + self._answered_before + elsewhere

    @property
    def jobs(self) -> int:
        """That it has in hand from all front ends; those of further ones are known if its version scales by itself."""
        return self.in_flight.count + sum(loan.jobs for loan in self.elsewhere.values())

    def left(self, front_end: int) -> None:
        """That one does not use it any more."""
        loan = self.elsewhere.pop(front_end, None)
        if loan is None:
            return
        self._answered_before += loan.answered
        if not self._gone:
            self._owner.worker_free(self)

    @property
    def between_batches(self) -> bool:
        """Whether it says that it is at work for one of several front ends, but has no batch of any in hand."""
        process, loans = self.process, self.elsewhere.values()
        if not (process.busy or any(loan.busy for loan in loans)):
            return False
        return not (process.progress()[2] or process.running() or any(loan.begun_at for loan in loans))

    @property
    def connected(self) -> bool:
        """Whether what is sent to it may arrive."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, batch_size: int, jobs: list[Job]) -> None:
        """One PREDICT frame with all of `jobs`, which were the last to be added to those in flight."""
        sent = self.in_flight.frames[-1]
        if len(jobs) == 1:  # then it is the frame that costs, so its columns are made without loops
            (job,) = jobs
            frame = wire.Predict(batch_size, sent.ids, [], [job.request_id], [job.facts], [])
        else:
            request_ids = [job.request_id for job in jobs]
            frame = wire.Predict(batch_size, sent.ids, [], request_ids, *wire.share([job.facts for job in jobs]))
        if self.in_flight.preprocess_threads:
            queue = self._queue
            frame.forming = forming_of(jobs, queue.preferred, queue.max_batch_delay)
            if queue.scheduling.levels > 1:
                frame.levels = list(map(queue.scheduling.level_of, jobs))
        if sent.size < wire.INLINE_BELOW:
            frame.bodies = [b"".join(job.parts) for job in jobs]
            self._transport.write(wire.pack(wire.PREDICT, frame))
            return
        frame.sizes = [job.size for job in jobs]
        size = sum(frame.sizes)
        parts = [part for job in jobs for part in job.parts]
        arena = self.process.arena
        where = arena.requests.put(parts, size) if arena is not None else None
        if where is not None:
            self._transport.write(wire.pack(wire.PREDICT | wire.SHARED, frame, len(where)) + where)
        else:
            self._transport.writelines([wire.pack(wire.PREDICT, frame, size), *parts])

    def stop(self, grace: float) -> None:
        """Take no more jobs, leave when those in hand are answered; killed when that takes over `grace` seconds."""
        if self.state in (WorkerState.STARTING, WorkerState.READY):
            self.state = WorkerState.STOPPING
        if not self.in_flight.count and self.connected:
            self._transport.write(wire.pack(wire.STOP, None))
        if self._patience is None and not self._gone:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(grace, self.kill, "did not stop in time")

    def kill(self, cause: str) -> None:
        """End the process now; `cause` is what is reported."""
        self.cause = self.cause or cause
        if self.process is not None and self._exit is None:
            self.process.kill()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes | bytearray) -> None:
        try:
            frame = self._reader.whole(data)
            if frame is not None and frame[0] == wire.RESULT:
                self._results(wire.decode(wire.Result, frame[1]), frame[2])
                return
            for kind, head, payload in self._reader.feed(data):
                if kind == wire.RESULT:
                    self._results(wire.decode(wire.Result, head), payload)
                elif kind == wire.RESULT | wire.SHARED and self.process.arena is not None:
                    result = wire.decode(wire.Result, head)
                    self._results(result, self.process.arena.answers.lend(payload, sum(result.sizes)))
                elif kind == wire.STREAM:
                    self._chunks(wire.decode(wire.Chunks, head), payload)
                elif kind == wire.MEASURED:
                    self._measured(wire.decode(wire.Measured, head))
                elif kind == wire.READY:
                    self._ready(wire.decode(wire.Ready, head))
                elif kind == wire.FAILED:
                    failed = wire.decode(wire.Failed, head)
                    self.failure = wire.Failed(failed.message[:MAX_FAILURE], failed.traceback[-MAX_FAILURE:])
                else:
                    raise FrameError(f"a worker sent a frame of kind {kind}")
            if LARGE < self._reader.missing <= LARGEST:
                LargeFrame(self, self._transport, *self._reader.take())
        except FrameError as error:
            if not self.cause:  # else it is killed already, and may have answered what was taken from it meanwhile
                log.error("worker %s: %s; killing it", self.pid, error.message)
                self.kill("sent garbage on its channel")

    def connection_lost(self, error: Exception | None) -> None:
        self._channel_ended = True
        self._owner.worker_lost(self)
        if self._exit is not None:
            self._finish()
        else:
            asyncio.get_running_loop().call_later(LAST_WORDS, self._kill_silent)

    def _share(self, process: WorkerProcess, frame: bytes) -> bytes:
        """Send the first byte and beside it a socket for further channels; returns the other bytes."""
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.setblocking(False)
        with theirs, contextlib.suppress(OSError):  # it has ended: that is seen soon
            socket.send_fds(process.channel, [frame[:1]], [theirs.fileno()])
        return frame[1:]

    def _ready(self, ready: wire.Ready) -> None:
        if self.state is WorkerState.STARTING:
            self.state = WorkerState.READY
            self.borrowed = ready.borrowed
            self.in_flight = self._queue.new_worker(ready.threads, ready.preprocess_threads)
            if self.in_flight.overlaps:
                self.in_flight.cancel = self.process.cancel
            self._owner.worker_ready(self, ready)

    def _measured(self, measured: wire.Measured) -> None:
        for series in measured.series:
            self._metrics.tallies.add(series.name, series.kind, series.labels, series.value, series.counts)

    def _results(self, result: wire.Result, payload: memoryview) -> None:
        now = time.monotonic()
        ids, outcomes, batches = result.ids, result.outcomes, result.batches
        bodies: Sequence[bytes | memoryview] = result.bodies
        if result.sizes:
            bodies = wire.cut(result.sizes, payload)
        count = len(ids)
        alike = len(outcomes) == 1 and not result.outcome_of and not outcomes[0].error
        if not alike:
            outcomes = wire.spread(outcomes, result.outcome_of, count)
        reported = batches[0].jobs if len(batches) == 1 else sum([batch.jobs for batch in batches])
        self._early += count - reported
        if not count or len(bodies) != count or self._early < 0:
            raise FrameError(f"a RESULT frame with {count} jobs whose sizes or batches do not fit")
        jobs = self.in_flight.finish(ids)
        if jobs is None:
            raise FrameError(f"answers to jobs {ids}, which this worker does not have")
        if batches:
            self.in_flight.observe(len(batches), seconds_of(batches))
            whole = reported == count  # they are the batches of these jobs and of no others
            if self.in_flight.batch_limit is not None and whole and not any([job.streams for job in jobs]):
                self._learn(max([batch.jobs for batch in batches]), now - min([job.taken for job in jobs]))
        if not self.in_flight.count and self._queue.depth >= self._queue.batch_size:
            self._owner.worker_idle()
        waits = waits_in_worker(batches, count)
        callers = [job.caller for job in jobs if not job.settled]
        if len(callers) < count:
            places = [place for place, job in enumerate(jobs) if not job.settled]
            jobs, bodies = [jobs[place] for place in places], [bodies[place] for place in places]
            outcomes = outcomes if alike else [outcomes[place] for place in places]
            waits = waits if len(waits) == 1 else [waits[place] for place in places]
        if jobs:
            deliver(jobs, callers, outcomes, bodies, self._metrics, alike=alike)
            theirs = batches if reported == len(jobs) == count else []
            overlaps = self.in_flight.overlaps
            count_answers(jobs, outcomes, theirs, waits, now, self._metrics, alike=alike, overlaps=overlaps)
        if batches:
            count_batches(batches, self._metrics)
        self._owner.worker_free(self)

    def _chunks(self, chunks: wire.Chunks, payload: memoryview) -> None:
        """Pieces of answers; a job whose answer has begun stays in hand until its RESULT, and is not run again."""
        metrics, held, now = self._metrics, self.in_flight, time.monotonic()
        if not len(chunks.sizes) == len(chunks.ids) <= held.count or not chunks.first.keys() <= set(chunks.ids):
            raise FrameError(f"a STREAM frame with {len(chunks.ids)} jobs whose sizes or outcomes do not fit")
        metrics.chunks += len(chunks.ids)
        if chunks.first:
            self.in_flight.begins_stream()
        at, taken = 0, now
        for id, size in zip(chunks.ids, chunks.sizes, strict=True):
            data, at = bytes(payload[at : at + size]), at + size
            job, outcome = held.get(id), chunks.first.get(id)
            if job is None or (outcome is None) is not job.streams:
                raise FrameError(f"a chunk of job {id}, which this worker does not have or has not begun")
            if outcome is not None:
                taken = min(taken, job.taken)
                job.abandon = self.process.cancel
                metrics.streams += 1
                metrics.first_chunk.observe(now - job.arrived)
            if job.settled:
                self.process.cancel(id)  # it was told before it had begun, or so many were that it did not see all
                continue
            try:
                if outcome is not None:
                    job.stream = job.caller = cast(Caller, job.caller).begin(outcome.status, outcome.head)
                if job.stream is not None:
                    job.stream.chunk(data)
            except Exception:  # one caller's fault must not cost the other jobs their worker
                log.exception("a part of the answer to job %d could not be delivered", id)
        if chunks.first and self.in_flight.batch_limit is not None:
            self._learn(len(chunks.first), now - taken)

    def _learn(self, largest: int, seconds: float) -> None:
        """Let the batch size follow the latency objective, which for a stream is that of its first chunk."""
        if self._queue.learn(self.in_flight, largest, seconds):
            self._owner.objective_missed(self, seconds)

    def _process_ended(self) -> None:
        exit_status = self.process.reap()
        if exit_status is None:
            return
        asyncio.get_running_loop().remove_reader(self.process.pidfd)
        self._exit = exit_status
        if self._channel_ended:
            self._finish()
        else:
            asyncio.get_running_loop().call_later(LAST_WORDS, self._finish)

    def _kill_silent(self) -> None:
        if self._exit is None:
            self.kill("closed its channel")

    def _finish(self) -> None:
        if self._gone:
            return
        self._gone = True
        if self._patience is not None:  # it would keep this worker, and with it its model, until it rings
            self._patience.cancel()
        self.cause = self.cause or self._exit or "unknown"
        if self.output is not None:
            self.output.finish()
        if self._transport is not None:
            self._transport.close()
        self._owner.worker_gone(self)
        self.process.close()
        if self.control is not None:
            self.control.close()


def describe_worker(worker: Worker, memory: int, private: int | None, gpu_memory: int | None) -> dict[str, Any]:
    """One entry of `workers` in a model's description; what is not known of its memory is left out."""
    gpu = worker.place.gpu
    return {
        "id": str(worker.slot),
        "startTime": datetime.fromtimestamp(worker.started_at, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
        "status": str(worker.state),
        "kind": worker.place.kind,
        "gpu": gpu is not None,
        **({"gpuId": gpu.index, "gpuUuid": gpu.uuid} if gpu is not None else {}),
        "threads": worker.place.threads,
        **({"preprocessThreads": count} if (count := worker.in_flight.preprocess_threads) else {}),
        "memoryUsage": memory,
        **({"privateMemory": private} if private is not None else {}),
        **({"gpuMemoryUsage": gpu_memory} if gpu_memory is not None else {}),
        **({"borrowedWeights": worker.borrowed} if worker.borrowed else {}),
        "pid": worker.pid,
        **({"batchLimit": limit.limit} if (limit := worker.in_flight.batch_limit) is not None else {}),
    }
