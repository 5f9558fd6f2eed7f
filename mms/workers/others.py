"""The front ends beside the main process, as its pools know them, and what a model must do without among several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mms.errors import ConfigError
from mms.fronts import Load
from mms.model_settings import ModelSettings
from mms.workers.worker import Worker


class FrontEnds(Protocol):
    """They use the workers that the main process starts. Versions are named by their numbers."""

    count: int  # with the main process

    def lend(self, worker: Worker, number: int) -> None:
        """It is ready: each of them gets a channel to it."""
        ...

    def recall(self, worker: Worker) -> None:
        """It stops: they send it nothing more, and leave it (Worker.left) when it has answered."""
        ...

    def gone(self, worker: Worker) -> None:
        """It has ended."""
        ...

    def leave(self, number: int, reason: str, changed: Callable[[], None]) -> None:
        """The version takes no requests any more; `changed` is called when one of them has answered all of its own."""
        ...

    def unfinished(self, number: int) -> bool:
        """Whether one of them still has requests to a version that takes no more."""
        ...

    def forget(self, number: int) -> None:
        """The version has no workers any more."""
        ...

    def loads(self, number: int) -> list[Load]:
        """What a version that scales by itself has to do there, as they have told lately."""
        ...

    def waiting(self, number: int) -> int:
        """Requests that waited for a worker there when they were last asked."""
        ...

    async def look(self) -> None:
        """Ask them what they have counted."""
        ...

    async def sync(self) -> None:
        """Return when they know all that was changed."""
        ...


def check_shared(settings: ModelSettings, origin: str) -> None:
    """Raises ConfigError when several front ends cannot serve a model with these settings."""
    problem = (
        "cache: each would keep answers of its own"
        if settings.cache is not None
        else "latency_objective_ms: each would see only its own part of a worker's work"
        if settings.latency_objective_ms
        else ""
    )
    if problem:
        raise ConfigError(f"{origin}: with several front ends (front_ends), a model must do without {problem}")
