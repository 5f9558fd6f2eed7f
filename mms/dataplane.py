"""The data plane: a prediction from its resolved version to its caller. No HTTP in it."""

from __future__ import annotations

import itertools

from mms.models.registry import ModelRegistry
from mms.models.version import ModelVersion
from mms.wire import JobHead
from mms.workers.batching import Caller, Job


class DataPlane:
    """What every inference dialect calls."""

    def __init__(self, registry: ModelRegistry) -> None:
        self.registry = registry
        self._next_id = itertools.count(1).__next__

    def resolve(self, name: str, version: str = "") -> ModelVersion:
        """Raises ModelNotFoundError or ModelVersionNotFoundError."""
        return self.registry.version(name, version)

    def predict(self, version: ModelVersion, head: JobHead, parts: list[bytes], caller: Caller, arrived: float) -> Job:
        """Queue a request; `caller` is told its one outcome. Raises QueueFullError or ServiceUnavailableError instead.

        `head` describes it (its id is set here), `parts` are the pieces of its body, `arrived` is monotonic seconds.
        """
        head.id = self._next_id()
        job = Job(head, parts, caller, arrived)
        version.submit(job)
        return job
