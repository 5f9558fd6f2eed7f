"""One version of one model: its archive, its settings, its queue, its pool, its state."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

import psutil

from mms.archive import ModelArchive
from mms.errors import DrainingError
from mms.metrics import VersionFacts, WorkerFacts
from mms.model_settings import ModelSettings
from mms.models.served import ServedVersion, VersionState
from mms.workers.gpus import Gpu, memory_by_process
from mms.workers.pool import WorkerPool
from mms.workers.worker import describe_worker


class ModelVersion(ServedVersion):
    """What a request is answered by, and where that comes from."""

    pool: WorkerPool | None

    def __init__(
        self, name: str, version: str, archive: ModelArchive, settings: ModelSettings, front_ends: int = 1
    ) -> None:
        super().__init__(name, version, settings, front_ends)
        self.archive = archive
        self.at_start = False
        self.handler = archive.manifest.handler  # unless the registration chooses another
        self.loaded_at = time.time()
        self.directory: Path | None = None  # a folder of ours with the extracted archive, removed at the end
        self.sandbox: dict[str, Any] = {}  # what its workers give up, as it is described
        self.private_memory: dict[int, int] = {}  # bytes by pid, when they were last read
        self.gpu_memory: dict[int, int] = {}
        self._leaving = VersionState.READY

    @property
    def gpus(self) -> list[Gpu]:
        """Those that its workers run on now."""
        workers = self.pool.workers if self.pool is not None else ()
        return list({worker.place.gpu for worker in workers if worker.place.gpu is not None})

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

    @property
    def can_wait(self) -> bool:
        pool = self.pool
        return self.state is VersionState.READY and pool is not None and (pool.target > 0 or pool.scaling.asleep)

    @property
    def next_start(self) -> float:
        return self.pool.losses.next_start if self.pool is not None else 0.0

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
        """Bring what is known of its workers' memory up to date, in a thread: the kernel walks all pages for it."""
        processes = [worker.process for worker in (self.pool.workers if self.pool else ()) if worker.pid]
        self.private_memory = await asyncio.to_thread(
            lambda: {process.pid: process.private_bytes() for process in processes}
        )
        if self.gpus:
            self.gpu_memory = await asyncio.to_thread(memory_by_process, self.gpus)

    def describe(self) -> dict[str, Any]:
        """The version as MMS describes it, and what users of MMS missed; memory is as it was last read."""
        settings, pool, archive = self.settings, self.pool, self.archive
        failure = pool.failure if pool is not None else None
        waiting = self.queue.depth + (pool.waiting_elsewhere if pool is not None else 0)
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
            **(_scaling(pool, settings) if pool is not None else {}),
            "batchSize": settings.batch_size,
            "maxBatchDelay": round(settings.max_batch_delay * 1000, 3),
            "responseTimeout": settings.response_timeout,
            "startupTimeout": settings.startup_timeout,
            "queueSize": settings.queue_size,
            "queueBytes": settings.queue_bytes,
            "queueTimeout": settings.queue_timeout,
            "queueOrder": "fifo" if self.queue.fifo else settings.queue_order,
            **({} if settings.retry else {"retry": 0}),
            **self._scheduling_described(),
            **({"cpuThreads": pool.cpu_threads} if pool is not None else {}),
            **({"maxRequests": settings.max_requests} if settings.max_requests else {}),
            **({"maxRss": settings.max_rss} if settings.max_rss else {}),
            **({"sandbox": self.sandbox} if self.sandbox else {}),
            "loadedAtStartup": self.at_start,
            "loadedAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.loaded_at)),
            **({"instances": pool.placement.describe()} if pool is not None else {}),
            **self._helpers_described(),
            "workers": [
                describe_worker(
                    worker,
                    _memory(worker.pid),
                    self.private_memory.get(worker.pid or 0),
                    self.gpu_memory.get(worker.pid or 0),
                )
                for worker in (pool.workers if pool else ())
            ],
            "jobQueueStatus": {
                "remainingCapacity": max(0, self.queue.capacity * self.front_ends - waiting),
                "pendingRequests": waiting,
            },
            **self._troubles(),
            **({"failure": {"message": failure.message, "traceback": failure.traceback}} if failure else {}),
        }

    def _helpers_described(self) -> dict[str, Any]:
        """The processes beside the workers: the template, and those that lend their weights to workers on GPUs."""
        pool = self.pool
        if pool is None:
            return {}
        template, owners = pool.starter.template, pool.starter.owners
        described: dict[str, Any] = {"template": _describe_template(template.pid)} if template is not None else {}
        if owners is not None and pool.placement.gpus:
            described["weightOwners"] = lending = owners.describe()
            for owner in lending:
                owner["memoryUsage"] = _memory(owner["pid"])
                if owner["pid"] in self.gpu_memory:
                    owner["gpuMemoryUsage"] = self.gpu_memory[owner["pid"]]
        return described

    def _scheduling_described(self) -> dict[str, Any]:
        """The settings of scheduling that differ from the plain queue's."""
        settings, scheduling, objective = self.settings, self.scheduling, self.queue.objective
        described: dict[str, Any] = {}
        if settings.preferred_batch_sizes:
            described["preferredBatchSizes"] = settings.preferred_batch_sizes
        if settings.request_timeout:
            described["requestTimeout"] = settings.request_timeout
        if scheduling.levels > 1:
            described["priorityLevels"] = scheduling.levels
            described["defaultPriority"] = scheduling.default_level + 1
            if settings.priority_queue_sizes:
                described["priorityQueueSizes"] = settings.priority_queue_sizes
        if objective is not None:
            described["latencyObjective"] = {
                "objectiveMs": settings.latency_objective_ms,
                "attainable": objective.attainable,
                "defaultOnMiss": settings.default_on_miss,
            }
        return described

    def _troubles(self) -> dict[str, Any]:
        """The latest death or failed start, and when missing workers are started; nothing while all was well."""
        pool = self.pool
        if pool is None:
            return {}
        starter = pool.starter
        troubles: dict[str, Any] = {"forkServerDeaths": starter.forkserver_deaths} if starter.forkserver_deaths else {}
        if starter.forkserver_back_in:
            troubles["forkServerBackIn"] = round(starter.forkserver_back_in, 1)
        if pool.losses.back_off.last_failure is None:
            return troubles
        failure, wait = pool.losses.back_off.last_failure, pool.next_start
        return {
            **troubles,
            "lastFailure": {
                "cause": failure.cause,
                "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(failure.at)),
                "output": list(failure.output),
            },
            "deathsInWindow": pool.losses.back_off.deaths,
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
                    limit.limit if (limit := worker.in_flight.batch_limit) is not None else None,
                    self.gpu_memory.get(worker.pid or 0),
                    worker.borrowed,
                )
                for worker in (pool.workers if pool else ())
            ],
            failed_workers=pool.missing if pool else 0,
            wanted_workers=pool.target if pool else 0,
        )


def _scaling(pool: WorkerPool, settings: ModelSettings) -> dict[str, Any]:
    """How many workers are wanted now, if that may change by itself."""
    bounds = pool.scaling.bounds
    return {
        **({"targetWorkers": pool.target} if bounds.automatic else {}),
        **({"scaleToZeroAfter": settings.scale_to_zero_after} if settings.scale_to_zero_after else {}),
        **({"loadOnRequest": True, "asleep": pool.scaling.asleep} if bounds.on_request else {}),
    }


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
