"""A model version with a cache of its answers. Front end's process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mms.archive import ModelArchive
from mms.caching import CacheSettings
from mms.metrics import VersionFacts
from mms.model_settings import ModelSettings
from mms.models.cache import AnswerCache
from mms.models.version import ModelVersion
from mms.workers.job import Job, Work


class CachedVersion(ModelVersion):
    """A class of its own, so that versions without a cache do nothing for it."""

    alike = False

    def __init__(
        self, name: str, version: str, archive: ModelArchive, settings: ModelSettings, cache: CacheSettings
    ) -> None:
        super().__init__(name, version, archive, settings)
        self.cache = AnswerCache(cache, self.metrics)

    def submit(self, job: Job) -> Work:
        pool = self.pool
        serves = pool is not None and bool(pool.ready_workers or self._can_wait())
        return self.cache.submit(job, super().submit, serves=serves)

    async def unload(self, drain: float) -> None:
        self.cache.clear()
        await super().unload(drain)

    def describe(self) -> dict[str, Any]:
        cache = self.cache
        settings = cache.settings
        return {
            **super().describe(),
            "cache": {
                "size": settings.size,
                "ttl": settings.ttl_s,
                "headers": settings.headers,
                "bytes": cache.bytes,
                "answers": len(cache),
            },
        }

    def facts(self) -> VersionFacts:
        facts = super().facts()
        return replace(facts, cancelled=facts.cancelled + self.cache.cancelled, cache=self.cache.facts())


def new_version(name: str, version: str, archive: ModelArchive, settings: ModelSettings) -> ModelVersion:
    """A version with or without a cache, as its settings say."""
    if settings.cache is None:
        return ModelVersion(name, version, archive, settings)
    return CachedVersion(name, version, archive, settings, settings.cache)
