"""The data plane: from what a request names to the version that answers it. No HTTP in it."""

from __future__ import annotations

import itertools

from mms.models.registry import ModelRegistry
from mms.models.version import ModelVersion


class DataPlane:
    """What every inference dialect asks."""

    def __init__(self, registry: ModelRegistry) -> None:
        self.registry = registry
        self.next_id = itertools.count(1).__next__  # of a job

    def resolve(self, name: str, version: str = "") -> ModelVersion:
        """Raises ModelNotFoundError or ModelVersionNotFoundError."""
        return self.registry.version(name, version)
