"""The server's side of the owners of a pool: on each GPU a process that has loaded, and lends its weights to workers.

A worker uses the memory of its owner for as long as it lives. When the owner dies, its workers are replaced.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import msgspec

from mms import wire
from mms.workers.forkserver import ForkServers
from mms.workers.gpus import Gpu
from mms.workers.process import Launch
from mms.workers.settings import PoolSettings
from mms.workers.template import Kept, LoadedProcess
from mms.workers.worker import Worker, WorkerState

log = logging.getLogger("mms.template")


class Owner(Kept):
    """The owner of the weights on one GPU."""

    role = "owner"

    def __init__(self, gpu: Gpu, settings: PoolSettings, forkservers: ForkServers) -> None:
        super().__init__(settings, forkservers)
        self._gpu = gpu
        self._weights = wire.Weights([], [])

    async def lend(self, how: Launch) -> tuple[LoadedProcess, wire.Weights] | None:
        """Its process, and what a worker on its GPU needs; None if that cannot be. Raises TemplateFailed or OSError."""
        owner = await self._loaded(how) if self.usable else None
        return None if owner is None or self._unfit else (owner, self._weights)

    def refused(self, cause: str) -> None:
        """A worker could not use what it was lent, and neither could others."""
        if not self._unfit:
            self._unfit = True
            log.warning("%s: share_weights cannot be on GPU %d: %s; workers keep what they load",
                        self._settings.label, self._gpu.index, cause)  # fmt: skip

    def describe(self) -> dict[str, Any]:
        return {"gpuId": self._gpu.index, "pid": self.pid, "weights": self._weights.size}

    def _load_of(self, load: wire.Load) -> wire.Load:
        wanted = msgspec.structs.replace(load.preparation, owner=True)
        return msgspec.structs.replace(load, gpu=0, cpu_threads=1, preparation=wanted)  # the only GPU that it sees

    def _fault_of(self, loaded: wire.Preloaded) -> str:
        self._weights = loaded.weights or wire.Weights([], [], "its handler says nothing of its weights")
        return self._weights.fault


class Owners:
    """Those of a pool, one for each GPU on which there may be several workers."""

    def __init__(self, settings: PoolSettings, forkservers: ForkServers) -> None:
        self._settings = settings
        self._forkservers = forkservers
        self._owners: dict[Gpu, Owner] = {}

    @property
    def pids(self) -> set[int]:
        return {pid for owner in self._owners.values() for pid in owner.pids}

    async def lend(self, worker: Worker, most: int, how: Launch) -> wire.Weights | None:
        """What the worker is lent in a pool of up to `most`; nothing if it is to load by itself.

        Raises TemplateFailed or OSError.
        """
        gpu = worker.place.gpu
        if gpu is None or gpu not in self._settings.placement.crowded(most):
            return None
        owner = self._owners.setdefault(gpu, Owner(gpu, self._settings, self._forkservers))
        lent = await owner.lend(how)
        if lent is None:
            return None
        worker.lender, weights = lent
        return weights

    def ready(self, worker: Worker, ready: wire.Ready) -> bool:
        """Whether the worker, which is ready, does without what it was lent."""
        lender, gpu = worker.lender, worker.place.gpu
        if lender is None or gpu is None or not ready.unshared:
            return False
        worker.lender = None
        if not lender.gone.is_set():  # else that was why
            self._owners[gpu].refused(ready.unshared)
        return True

    def release(self, workers: Iterable[Worker]) -> None:
        """End the owners whose weights none of `workers` has, or is about to get: it costs memory to keep them."""
        used = {worker.place.gpu for worker in workers if worker.lender or worker.state is WorkerState.STARTING}
        for gpu, owner in self._owners.items():
            if gpu not in used:
                owner.release()

    def describe(self) -> list[dict[str, Any]]:
        return [owner.describe() for owner in self._owners.values() if owner.pid is not None]

    async def close(self) -> None:
        """After the last worker has ended."""
        for owner in self._owners.values():
            await owner.close()


def orphaned(worker: Worker) -> bool:
    """Whether the owner of its weights has died: from then on, CUDA promises nothing about them."""
    return worker.lender is not None and worker.lender.gone.is_set()
