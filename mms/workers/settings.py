"""What a pool and its parts need to know of their version. Front end's process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from mms import wire
from mms.workers.placement import Placement
from mms.workers.process import Launch
from mms.workers.restarts import MAX_BOOT_FAILURES


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """Durations in seconds.

    With `load.cpu_threads` 0, each worker gets its share of the cores when it starts; `load.gpu` and `load.threads`
    are its place's. `interpreter` makes the Python
    that the workers run in, before the first one starts; it raises ModelLoadError.
    """

    label: str
    load: wire.Load
    launch: Launch
    interpreter: Callable[[], Awaitable[str]] | None
    placement: Placement
    response_timeout: float
    startup_timeout: float
    stop_grace: float
    boot_tries: int = MAX_BOOT_FAILURES
    max_requests: int = 0
    max_rss: int = 0
    share_weights: bool = False
    number: int = 0  # of the version
