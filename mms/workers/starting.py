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
from mms.workers.process import Launch, WorkerProcess, launch
from mms.workers.settings import PoolSettings
from mms.workers.template import Template, TemplateFailed
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
        self.template = Template(settings, forkservers) if settings.share_weights else None

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
            process = await self._launch(worker, self._launch_of(worker, load))
        except TemplateFailed as error:
            worker.cause, worker.failure, worker.output = str(error), error.failure, error.output
            return
        except (ForkServerDied, OSError) as error:
            worker.cause = f"could not be started: {error}"
            return
        label = f"{self._settings.label} pid {process.pid}"
        await worker.attach(process, OutputReader(self._log, label), load)
        if worker.state is not WorkerState.STARTING:
            worker.kill("stopped")

    async def close(self) -> None:
        """After the last worker has ended."""
        if self.template is not None:
            await self.template.close()

    async def _launch(self, worker: Worker, how: Launch) -> WorkerProcess:
        process = None
        if self.template is not None and worker.gpu is None:
            process = await self.template.launch(how)
        return process or await launch(how, self._forkservers)

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
