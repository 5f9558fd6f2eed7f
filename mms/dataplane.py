"""The data plane: a prediction from its resolved version to its caller. No HTTP in it."""

from __future__ import annotations

import itertools

from mms.models.registry import ModelRegistry
from mms.models.version import ModelVersion
from mms.wire import RequestFacts
from mms.workers.job import Caller, Job, Terms, Work


class DataPlane:
    """What every inference dialect calls."""

    def __init__(self, registry: ModelRegistry) -> None:
        self.registry = registry
        self.next_id = itertools.count(1).__next__  # of a job

    def resolve(self, name: str, version: str = "") -> ModelVersion:
        """Raises ModelNotFoundError or ModelVersionNotFoundError."""
        return self.registry.version(name, version)

    def predict(
        self,
        version: ModelVersion,
        facts: RequestFacts,
        request_id: bytes,
        parts: list[bytes],
        size: int,
        caller: Caller,
        arrived: float,
        terms: Terms | None = None,
    ) -> Work:
        """Queue a request; `caller` is told its one outcome. Raises OverloadError or ServiceUnavailableError instead.

        `parts` are the pieces of its body, `size` their bytes in all, `arrived` is monotonic seconds. `terms`: with
        a deadline or a priority.
        """
        return version.submit(Job(self.next_id(), facts, request_id, parts, size, caller, arrived, terms))
