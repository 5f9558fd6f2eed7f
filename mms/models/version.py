"""One version of one model: its archive, its settings, its queue, its pool, its state."""

from __future__ import annotations

import asyncio
import enum
import shutil
import time
from pathlib import Path
from typing import Any

import psutil

from mms.archive import ModelArchive
from mms.config import ModelSettings
from mms.errors import DrainingError, LoadingError, MMSError, ServiceUnavailableError
from mms.metrics import VersionFacts, VersionMetrics, WorkerFacts
from mms.workers.batching import BatchQueue
from mms.workers.job import Job
from mms.workers.pool import WorkerPool, failed_to_load
from mms.workers.worker import describe_worker


class VersionState(enum.StrEnum):
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    UNLOADED = "UNLOADED"
    FAILED = "FAILED"


class ModelVersion:
    """What a request is answered by."""

    def __init__(self, name: str, version: str, archive: ModelArchive, settings: ModelSettings) -> None:
        self.name = name
        self.version = version
        self.archive = archive
        self.settings = settings
        self.at_start = False
        self.handler = archive.manifest.handler  # unless the registration chooses another
        self.loaded_at = time.time()
        self.directory: Path | None = None  # a folder of ours with the extracted archive, removed at the end
        self.sandbox: dict[str, Any] = {}  # what its workers give up, as it is described
        self.metrics = VersionMetrics(self.label)
        self.queue = BatchQueue(
            batch_size=settings.batch_size,
            max_batch_delay=settings.max_batch_delay,
            capacity=settings.queue_size,
            timeout=settings.queue_timeout,
            retry=settings.retry,
            max_bytes=settings.queue_bytes,
            fifo=settings.queue_order == "fifo",
        )
        self.pool: WorkerPool | None = None
        self.private_memory: dict[int, int] = {}  # bytes by pid, when they were last read
        self._leaving = VersionState.READY

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def state(self) -> VersionState:
        if self._leaving is not VersionState.READY:
            return self._leaving
        pool = self.pool
        if pool is None:
            return VersionState.LOADING
        if pool.failure is not None:
            return VersionState.FAILED
        return VersionState.READY if pool.was_ready else VersionState.LOADING

    def submit(self, job: Job) -> None:
        """Queue the job. Raises OverloadError, or ServiceUnavailableError with the reason; both are counted."""
        pool = self.pool
        try:
            if pool is None or not (pool.ready_workers or self._can_wait()):
                raise self._unavailable()
            pool.submit(job)
        except MMSError as error:
            self.count(error)
            raise

    def refusal(self, size: int) -> MMSError | None:
        """Why a request with a body of `size` bytes would be refused now, before the body is read."""
        pool = self.pool
        if pool is None or not (pool.ready_workers or self._can_wait()):
            return self._unavailable()
        return self.queue.refusal(size)

    def count(self, error: MMSError) -> None:
        """A request to this version was refused."""
        self.metrics.requests[error.status] += 1
        self.metrics.errors[error.type] += 1

    @property
    def held(self) -> int:
        """Bytes of the bodies that wait or are at workers."""
        return self.queue.bytes + (self.pool.bytes_in_flight if self.pool is not None else 0)

    def apply(self, settings: ModelSettings) -> None:
        """Take over what can change while the version is served: batching and queue limits."""
        self.settings = settings
        self.queue.batch_size = settings.batch_size
        self.queue.max_batch_delay = settings.max_batch_delay
        self.queue.apply(
            capacity=settings.queue_size,
            max_bytes=settings.queue_bytes,
            timeout=settings.queue_timeout,
            fifo=settings.queue_order == "fifo",
        )
        if self.pool is not None:
            self.pool.wake()

    async def unload(self, drain: float) -> None:
        """Answer what is in hand, for up to `drain` seconds, then end the workers and remove the extracted files."""
        self._leaving = VersionState.DRAINING
        self.queue.close(f"model {self.label} is being unloaded")
        if self.pool is not None:
            await self.pool.close(drain)
            for job, error in self.queue.abandon(DrainingError(f"model {self.label} was unloaded")):
                self.pool.fail(job, error)
        self._leaving = VersionState.UNLOADED
        if self.directory is not None:
            await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)

    async def read_memory(self) -> None:
        """Bring `private_memory` up to date, in a thread: the kernel walks through all pages for it."""
        processes = [worker.process for worker in (self.pool.workers if self.pool else ()) if worker.pid]
        self.private_memory = await asyncio.to_thread(
            lambda: {process.pid: process.private_bytes() for process in processes}
        )

    def describe(self) -> dict[str, Any]:
        """The version as MMS describes it, and what users of MMS missed."""
        settings, pool, archive = self.settings, self.pool, self.archive
        failure = pool.failure if pool is not None else None
        return {
            "modelName": self.name,
            "modelVersion": self.version,
            "modelUrl": archive.path.name,
            "runtime": archive.manifest.runtime,
            "handler": self.handler,
            **({"signedBy": archive.signed_by} if archive.signed_by else {}),
            "state": str(self.state),
            "minWorkers": settings.min_workers,
            "maxWorkers": settings.worker_limit,
            "batchSize": settings.batch_size,
            "maxBatchDelay": round(settings.max_batch_delay * 1000, 3),
            "responseTimeout": settings.response_timeout,
            "startupTimeout": settings.startup_timeout,
            "queueSize": settings.queue_size,
            "queueBytes": settings.queue_bytes,
            "queueTimeout": settings.queue_timeout,
            "queueOrder": settings.queue_order,
            **({"cpuThreads": pool.cpu_threads} if pool is not None else {}),
            **({"maxRequests": settings.max_requests} if settings.max_requests else {}),
            **({"maxRss": settings.max_rss} if settings.max_rss else {}),
            **({"sandbox": self.sandbox} if self.sandbox else {}),
            "loadedAtStartup": self.at_start,
            "loadedAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.loaded_at)),
            **({"template": _describe_template(pool.template.pid)} if pool and pool.template else {}),
            "workers": [
                describe_worker(worker, _memory(worker.pid), self.private_memory.get(worker.pid or 0))
                for worker in (pool.workers if pool else ())
            ],
            "jobQueueStatus": {
                "remainingCapacity": max(0, self.queue.capacity - self.queue.depth),
                "pendingRequests": self.queue.depth,
            },
            **self._troubles(),
            **({"failure": {"message": failure.message, "traceback": failure.traceback}} if failure else {}),
        }

    def _troubles(self) -> dict[str, Any]:
        """The latest death or failed start, and when missing workers are started; nothing while all was well."""
        pool = self.pool
        if pool is None:
            return {}
        troubles: dict[str, Any] = {"forkServerDeaths": pool.forkserver_deaths} if pool.forkserver_deaths else {}
        if pool.forkserver_back_in:
            troubles["forkServerBackIn"] = round(pool.forkserver_back_in, 1)
        if pool.back_off.last_failure is None:
            return troubles
        failure, wait = pool.back_off.last_failure, pool.next_start
        return {
            **troubles,
            "lastFailure": {
                "cause": failure.cause,
                "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(failure.at)),
                "output": list(failure.output),
            },
            "deathsInWindow": pool.back_off.deaths,
            **({"nextStartIn": round(wait, 1)} if wait is not None else {}),
        }

    def facts(self) -> VersionFacts:
        """For the metrics collector."""
        pool = self.pool
        return VersionFacts(
            model=self.name,
            version=self.version,
            metrics=self.metrics,
            queue_depth=self.queue.depth,
            queue_capacity=self.queue.capacity,
            queue_bytes=self.queue.bytes,
            newest_first=self.queue.newest_first,
            drain_rate=self.queue.rate,
            cancelled=self.queue.cancelled,
            retries=self.queue.retries,
            in_flight=pool.in_flight if pool else 0,
            workers=[
                WorkerFacts(
                    worker.slot,
                    str(worker.state),
                    _cpu(worker.pid),
                    _memory(worker.pid),
                    self.private_memory.get(worker.pid or 0),
                )
                for worker in (pool.workers if pool else ())
            ],
            failed_workers=pool.missing if pool else 0,
        )

    def _can_wait(self) -> bool:
        """No worker is ready at the moment, but one that was is being replaced: its requests may wait."""
        return self.state is VersionState.READY and self.pool is not None and self.pool.target > 0

    def _unavailable(self) -> ServiceUnavailableError:
        state = self.state
        if state is VersionState.FAILED and self.pool is not None and self.pool.failure is not None:
            return failed_to_load(self.label)
        if state is VersionState.LOADING:
            return LoadingError(f"model {self.label} is still loading; try again soon")
        if state is VersionState.READY:
            return ServiceUnavailableError(f"model {self.label} has no workers; scale it up on the management port")
        return DrainingError(f"model {self.label} is {state.lower()}")


def _describe_template(pid: int | None) -> dict[str, Any]:
    """Of the process that workers are forked from, while there is one."""
    return {"pid": pid, "memoryUsage": _memory(pid)} if pid is not None else {}


def _memory(pid: int | None) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss) if pid else 0
    except psutil.Error:
        return 0


def _cpu(pid: int | None) -> float:
    try:
        times = psutil.Process(pid).cpu_times() if pid else None
        return times.user + times.system if times else 0.0
    except psutil.Error:
        return 0.0
