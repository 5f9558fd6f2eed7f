"""One worker's start: the interpreter it runs in, its place, its environment, its process. Front end's process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import msgspec

from mms import wire
from mms.logs import model_logger
from mms.workers import environment
from mms.workers.forkserver import ForkServerDied, ForkServers
from mms.workers.output import OutputReader
from mms.workers.owners import Owners
from mms.workers.placement import Place
from mms.workers.process import Launch, WorkerProcess, launch
from mms.workers.settings import PoolSettings
from mms.workers.template import Template, TemplateFailed
from mms.workers.worker import Worker, WorkerState

PREPROCESS_THREADS = 2  # of a worker on a GPU, unless the model says otherwise; on CPUs they would take its cores


class Starter:
    """Starts workers of one pool."""

    def __init__(self, settings: PoolSettings, forkservers: ForkServers, *, shared: bool = False) -> None:
        self.installing = False
        self._shared = shared  # among several front ends
        self._settings = settings
        self._forkservers = forkservers
        self._interpreter = ""  # that settings.interpreter has made
        self._log = model_logger(settings.load.model_name)
        sharing = settings.share_weights
        self.template = Template(settings, forkservers) if sharing else None  # what workers are forked from
        self.owners = Owners(settings, forkservers) if sharing else None  # what lends its weights to workers on GPUs

    @property
    def lacks_interpreter(self) -> bool:
        """Whether `install` comes before the first worker."""
        return self._settings.interpreter is not None and not self._interpreter

    @property
    def forkserver_deaths(self) -> int:
        """How often the fork server of these workers has died lately."""
        return self._forkservers.deaths(self._settings.launch.preload)

    @property
    def forkserver_back_in(self) -> float:
        """Seconds for which they start as fresh interpreters, because it has died too often; mostly 0."""
        return self._forkservers.spent_for(self._settings.launch.preload)

    @property
    def helpers(self) -> set[int]:
        """The pids of what is kept beside the workers: they are no workers."""
        kept = self.template, self.owners
        return {pid for one in kept if one is not None for pid in one.pids}

    async def install(self) -> None:
        """Make the interpreter; `installing` is set by the caller, before this runs. Raises ModelLoadError."""
        try:
            if self._settings.interpreter is not None:
                self._interpreter = await self._settings.interpreter()
        finally:
            self.installing = False

    def free_place(self, workers: Iterable[Worker]) -> Place:
        """Where one more runs beside `workers`."""
        return self._settings.placement.next(worker.place for worker in workers)

    def surplus(self, workers: Sequence[Worker]) -> Worker:
        """Which of `workers` goes first: of those at the place that was filled last, one that does not serve yet, else
        the busiest, as it takes the longest to leave.
        """
        place = self._settings.placement.last(worker.place for worker in workers)
        return min(
            (worker for worker in workers if worker.place == place),
            key=lambda worker: (worker.state is WorkerState.READY, -worker.in_flight.count),
        )

    async def start(self, worker: Worker, threads: int, most: int) -> None:
        """Launch its process and tell it what to load; if that fails, it has no process, but a cause.

        It gets `threads` CPU threads per batch, in a pool of up to `most` workers.
        """
        place = worker.place
        load = msgspec.structs.replace(
            self._settings.load,
            gpu=None if place.gpu is None else 0,  # the only one that it sees
            cpu_threads=threads,
            threads=place.threads,
        )
        if load.preprocess_threads < 0:
            load.preprocess_threads = PREPROCESS_THREADS if place.gpu is not None else 0
        try:
            how = self._launch_of(worker, load)
            if self.owners is not None and worker.gpu is not None:
                load.weights = await self.owners.lend(worker, most, how)
                worker.launched = time.monotonic()  # its owner had the same time to load
            process = await self._launch(worker, how)
        except TemplateFailed as error:
            worker.cause, worker.failure, worker.output = str(error), error.failure, error.output
            return
        except (ForkServerDied, OSError) as error:
            worker.cause = f"could not be started: {error}"
            return
        label = f"{self._settings.label} pid {process.pid}"
        await worker.attach(process, OutputReader(self._log, label), load, shared=self._shared)
        if worker.state is not WorkerState.STARTING:
            worker.kill("stopped")

    async def close(self) -> None:
        """After the last worker has ended."""
        if self.template is not None:
            await self.template.close()
        if self.owners is not None:
            await self.owners.close()

    def release(self, workers: Iterable[Worker], *, target: int) -> None:
        """Give back what is kept for the start of workers, if none of it is needed beside `workers`."""
        if self.template is not None and not target:
            self.template.release()
        if self.owners is not None:
            self.owners.release(workers)

    async def _launch(self, worker: Worker, how: Launch) -> WorkerProcess:
        process = None
        if self.template is not None and worker.gpu is None:
            process = await self.template.launch(how)
        return process or await launch(how, self._forkservers)

    def _launch_of(self, worker: Worker, load: wire.Load) -> Launch:
        how = self._settings.launch
        place = worker.place
        return replace(
            how,
            environ={**how.environ, **environment.thread_counts(load.cpu_threads), **place.environment()},
            sandbox=msgspec.structs.replace(how.sandbox, gpu=how.sandbox.gpu and place.gpu is not None),
            interpreter=self._interpreter or how.interpreter,
            threads=load.threads,
            preprocess_threads=load.preprocess_threads,
        )
