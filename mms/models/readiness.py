"""Whether this server should get requests now, and what is missing if not: what /readyz says on both ports."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from mms.metrics import RestartFacts
from mms.models.registry import ModelRegistry
from mms.models.served import VersionState
from mms.models.version import ModelVersion


class Phase(enum.StrEnum):
    """Of the server's life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class Health(Protocol):
    """What the inference port says of the server."""

    def health(self) -> str:
        """As MMS has it: Healthy when every version has all its workers, Unhealthy when there are none at all."""
        ...

    def report(self, *, details: bool) -> tuple[int, dict[str, Any]]:
        """HTTP status and body; with `details`, what may be for the operator only: reasons in full, restarts."""
        ...


class Readiness:
    """Computed from the workers' states at the moment of asking.

    A version is missing while it has fewer ready workers than it had before, or than it was started with. One that is
    registered or scaled up on a running server does not count before its workers have become ready.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        obstacle: Callable[[], tuple[str, str]],
        restarts: Callable[[], Iterable[RestartFacts]],
    ) -> None:
        self.phase = Phase.STARTING
        self._registry = registry
        self._obstacle = obstacle  # why no connections are taken, in a word and in a sentence; empty while they are
        self._restarts = restarts

    def health(self) -> str:
        versions = self._registry.versions()
        wanted = sum(version.pool.owed for version in versions if version.pool)
        ready = sum(min(version.pool.ready, version.pool.owed) for version in versions if version.pool)
        if (
            ready == wanted
            and not self._registry.announced
            and all(version.state is not VersionState.LOADING for version in versions)
        ):
            return "Healthy"
        return "Partial Healthy" if ready else "Unhealthy"

    def report(self, *, details: bool) -> tuple[int, dict[str, Any]]:
        status, body = self._report(details)
        restarts = [_restart(facts) for facts in self._restarts() if _tells(facts)] if details else []
        return status, {**body, "restarts": restarts} if restarts else body

    def _report(self, details: bool) -> tuple[int, dict[str, Any]]:
        missing = [
            _missing(name, number, VersionState.FAILED if why else VersionState.LOADING, 0, 1,
                     (why if details else "it could not be restored") if why else "it is about to be loaded")
            for (name, number), why in self._registry.announced.items()
        ] + [
            entry(version, details=details)
            for version in self._registry.versions()
            if version.pool is not None and version.pool.ready < version.pool.scaling.minimum
        ]  # fmt: skip
        if self.phase is Phase.SERVING:
            word, why = self._obstacle()
            if word:
                return _answer(word, False, missing, why)
            return _answer("incomplete", not missing, missing)
        return _answer(str(self.phase), False, missing)

    def of_version(self, version: ModelVersion) -> tuple[int, dict[str, Any]]:
        """As `report`, for one version: it is ready when it has a worker, or a request brings one, and not fewer than
        it had.
        """
        pool = version.pool
        ready = (
            version.state is VersionState.READY
            and pool is not None
            and pool.ready >= max(pool.scaling.minimum, not pool.scaling.bounds.on_request)
        )
        word = "incomplete" if version.state is VersionState.READY else str(version.state)
        return _answer(word, ready, [] if ready else [entry(version, details=True)])


def refusing(why: str) -> tuple[str, str]:
    """The obstacle that a front end is which takes no connections."""
    return "overloaded", f"the front end refuses connections: {why}"


def unready(word: str, why: str) -> tuple[int, dict[str, Any]]:
    """What is reported because of one obstacle."""
    return _answer(word, False, [], why)


def entry(version: ModelVersion, *, details: bool) -> dict[str, Any]:
    """One line of `missing`."""
    pool = version.pool
    ready, wanted = (pool.ready, pool.target) if pool is not None else (0, 0)
    return _missing(version.name, version.version, version.state, ready, wanted, _reason(version, details))


def _missing(name: str, number: str, state: VersionState, ready: int, wanted: int, reason: str) -> dict[str, Any]:
    return {
        "model": name, "version": number, "state": str(state), "ready": ready, "wanted": wanted, "reason": reason,
    }  # fmt: skip


def _reason(version: ModelVersion, details: bool) -> str:
    pool = version.pool
    if pool is None:
        return "it is being registered"
    if pool.failure is not None:
        return pool.failure.message if details else "it failed to load"
    if pool.installing:
        return "its requirements are being installed"
    if pool.losses.last_death:
        return f"a worker died: {pool.losses.last_death}"
    return "its workers are loading" if pool.target else "it is scaled to 0"


def _tells(facts: RestartFacts) -> bool:
    """Whether it is worth a line: single deaths of workers are in the descriptions of their versions."""
    return facts.spent or (facts.recent > 0 and facts.level != "workers")


def _restart(facts: RestartFacts) -> dict[str, Any]:
    """One line of `restarts`."""
    return {
        "level": facts.level, **({"preload": facts.preload} if facts.preload else {}), "deaths": facts.recent,
        "limit": facts.limit, "window": facts.window, "lastCause": facts.last_cause, "state": facts.state,
    }  # fmt: skip


def _answer(status: str, ready: bool, missing: list[dict[str, Any]], why: str = "") -> tuple[int, dict[str, Any]]:
    if ready:
        return 200, {"status": "ready", "missing": missing}
    lines = [
        f"{line['model']} {line['version']} has {line['ready']} of {line['wanted']} workers ({line['reason']})"
        for line in missing
    ]
    lines = [why, *lines] if why else lines
    message = f"{status}: {'; '.join(lines)}" if lines else f"the server is {status}"
    error = {"code": 503, "type": "ServiceUnavailableException", "message": message}
    return 503, {**error, "status": status, "missing": missing}
