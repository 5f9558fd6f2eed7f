"""The data plane: a prediction from its resolved version to its caller. No HTTP in it."""

from __future__ import annotations

import itertools

from mms.models.registry import ModelRegistry
from mms.models.version import ModelVersion
from mms.wire import JobHead
from mms.workers.batching import Caller, Job

_job_ids = itertools.count(1)


class DataPlane:
    """What every inference dialect calls."""

    def __init__(self, registry: ModelRegistry) -> None:
        self.registry = registry

    def resolve(self, name: str, version: str = "") -> ModelVersion:
        """Raises ModelNotFoundError or ModelVersionNotFoundError."""
        return self.registry.version(name, version)

    def predict(
        self,
        version: ModelVersion,
        caller: Caller,
        *,
        request_id: str,
        content_type: str,
        encoding: str,
        query: bytes,
        query_is_input: bool,
        headers: list[bytes],
        parts: list[bytes],
        size: int,
        arrived: float,
    ) -> Job:
        """Queue the request; `caller` is told its one outcome. Raises QueueFullError or ServiceUnavailableError instead.

        `parts` are the pieces of the body, `arrived` is the event loop's clock, `headers` as wire.JobHead has them.
        """
        head = JobHead(next(_job_ids), request_id, content_type, encoding, query, query_is_input, headers, size)
        job = Job(head, parts, caller, arrived)
        version.submit(job)
        return job
