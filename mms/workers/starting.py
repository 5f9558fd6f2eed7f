"""One worker's start: the interpreter it runs in, its GPU, its environment, its process. Front end's process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import msgspec

from mms import wire
from mms.logs import model_logger
from mms.workers import environment
from mms.workers.forkserver import ForkServerDied, ForkServers
from mms.workers.output import OutputReader
from mms.workers.process import Launch, launch
from mms.workers.settings import PoolSettings
from mms.workers.worker import Worker, WorkerState

PREPROCESS_THREADS = 2  # of a worker on a GPU, unless the model says otherwise; on CPUs they would take its cores


class Starter:
    """Starts workers of one pool."""

    def __init__(self, settings: PoolSettings, forkservers: ForkServers) -> None:
        self.installing = False
        self._settings = settings
        self._forkservers = forkservers
        self._interpreter = ""  # that settings.interpreter has made
        self._log = model_logger(settings.load.model_name)

    @property
    def lacks_interpreter(self) -> bool:
        """Whether `install` comes before the first worker."""
        return self._settings.interpreter is not None and not self._interpreter

    async def install(self) -> None:
        """Make the interpreter; `installing` is set by the caller, before this runs. Raises ModelLoadError."""
        try:
            if self._settings.interpreter is not None:
                self._interpreter = await self._settings.interpreter()
        finally:
            self.installing = False

    def free_gpu(self, workers: Iterable[Worker]) -> int | None:
        """The GPU with the fewest of `workers`."""
        used = Counter(worker.gpu for worker in workers)
        return min((gpu.index for gpu in self._settings.gpus), key=lambda index: used[index], default=None)

    async def start(self, worker: Worker, threads: int) -> None:
        """Launch its process and tell it what to load; if that fails, it has no process, but a cause."""
        load = msgspec.structs.replace(self._settings.load, cpu_threads=threads)
        if load.preprocess_threads < 0:
            load.preprocess_threads = PREPROCESS_THREADS if worker.gpu is not None else 0
        try:
            process = await launch(self._launch_of(worker, load), self._forkservers)
        except (ForkServerDied, OSError) as error:
            worker.cause = f"could not be started: {error}"
            return
        label = f"{self._settings.label} pid {process.pid}"
        await worker.attach(process, OutputReader(self._log, label), load)
        if worker.state is not WorkerState.STARTING:
            worker.kill("stopped")

    def _launch_of(self, worker: Worker, load: wire.Load) -> Launch:
        how = self._settings.launch
        environ = {**how.environ, **environment.thread_counts(load.cpu_threads)}
        for gpu in self._settings.gpus:
            if gpu.index == worker.gpu:
                environ |= gpu.environment()
        return replace(
            how,
            environ=environ,
            interpreter=self._interpreter or how.interpreter,
            threads=load.threads,
            preprocess_threads=load.preprocess_threads,
        )
