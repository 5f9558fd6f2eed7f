"""The data plane: from what a request names to the version that answers it. No HTTP in it."""

from __future__ import annotations

import itertools

from mms.models.registry import Catalogue
from mms.models.served import ServedVersion


class DataPlane:
    """What every inference dialect asks."""

    def __init__(self, registry: Catalogue) -> None:
        self.registry = registry
        self.next_id = itertools.count(1).__next__  # of a job

    def resolve(self, name: str, version: str = "") -> ServedVersion:
        """Raises ModelNotFoundError or ModelVersionNotFoundError."""
        return self.registry.version(name, version)
