"""What a request may ask of the queue, and what a model's settings make of it. Front end's process."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from mms import wire
from mms.errors import BadRequestError, MMSError, ObjectiveError, OverloadError, SubstituteError
from mms.model_settings import MAX_TIMEOUT, ModelSettings
from mms.workers.inflight import MAX_FRAME_JOBS
from mms.workers.job import Job, Terms
from mms.workers.waiting import Waiting

TIMEOUT_HEADER = "x-request-timeout-ms"
PRIORITY_HEADER = "x-request-priority"
DEFAULT_HEADER = b"x-mms-default"
_NUMBER = re.compile(rb"\d{1,12}(\.\d{1,6})?")
_PRIORITY = re.compile(rb"\d{1,9}")


@dataclass(frozen=True, kw_only=True)
class Scheduling:
    """How a queue differs from the plain one. Seconds; levels count from 0."""

    preferred: tuple[int, ...] = ()
    levels: int = 1
    default_level: int = 0
    level_sizes: tuple[int, ...] = ()
    request_timeout: float = 0.0
    objective: float = 0.0
    default_output: tuple[bytes, bytes] | None = None  # content type and body of what replaces a missing answer

    @classmethod
    def of(cls, settings: ModelSettings) -> Scheduling:
        default = settings.default_priority or settings.priority_levels // 2 + 1
        return cls(
            preferred=settings.preferred_batch_sizes,
            levels=settings.priority_levels,
            default_level=default - 1,
            level_sizes=settings.priority_queue_sizes,
            request_timeout=settings.request_timeout,
            objective=settings.latency_objective_ms / 1000,
            default_output=_encoded(settings.default_output) if settings.default_on_miss else None,
        )

    def terms(self, timeout: bytes, priority: bytes) -> Terms | None:
        """What the values of the two headers ask for (empty: not sent). Raises BadRequestError.

        A request may shorten the model's `request_timeout`, not extend it. A priority that the model does not have
        counts as none, as with Triton.
        """
        level, seconds = self.default_level, self.request_timeout
        if timeout:
            asked = float(timeout) / 1000 if _NUMBER.fullmatch(timeout) else 0.0
            if not 0.0 < asked <= MAX_TIMEOUT:
                raise BadRequestError(
                    f"the header {TIMEOUT_HEADER} is {_shown(timeout)}; a number of milliseconds above 0 "
                    f"and up to {MAX_TIMEOUT * 1000} is needed"
                )
            seconds = min(asked, seconds) if seconds else asked
        if priority:
            if not _PRIORITY.fullmatch(priority):
                raise BadRequestError(
                    f"the header {PRIORITY_HEADER} is {_shown(priority)}; a whole number is needed, 1 for the highest"
                )
            if 1 <= int(priority) <= self.levels:
                level = int(priority) - 1
        if self.levels == 1 and not seconds and not self.objective:
            return None
        return Terms(level, seconds)

    def level_of(self, job: Job) -> int:
        return job.terms.level if job.terms is not None else self.default_level

    def room_above(self, waiting: Waiting, held: Iterable[Job], window: int) -> int:
        """A worker that has enough to prepare takes jobs of higher priority still, which it runs first."""
        first = next(iter(waiting), None)
        if first is None:
            return 0
        level = self.level_of(first)
        rivals = [job for job in held if not job.settled and self.level_of(job) <= level]
        return min(window - len(rivals), waiting.waiting_at(level))

    def outcome(self, error: MMSError) -> MMSError:
        """What a request gets that fails so: the default output, if load is the reason and the model has one."""
        if self.default_output is None or not isinstance(error, ObjectiveError | OverloadError):
            return error
        media, body = self.default_output
        why = b"objective-missed" if isinstance(error, ObjectiveError) else b"refused"
        return SubstituteError(b"content-type: %b\r\n%b: %b\r\n" % (media, DEFAULT_HEADER, why), body)


PLAIN = Scheduling()


def largest_batch(settings: ModelSettings) -> int:
    """Most requests in a batch: `batch_size`, but with an objective instead of one, what fits into a frame."""
    if settings.latency_objective_ms and settings.batch_size == 1:
        return MAX_FRAME_JOBS
    return settings.batch_size


def warmup_sizes(settings: ModelSettings) -> tuple[int, ...]:
    """The batch sizes that a warm-up runs: those that workers will see."""
    sizes = settings.cuda_graphs or (*settings.preferred_batch_sizes, 1, settings.batch_size)
    return tuple(sorted({min(size, largest_batch(settings)) for size in sizes}))


def forming_of(jobs: list[Job], preferred: tuple[int, ...], delay: float) -> wire.Forming | None:
    """What a worker that forms batches itself is to know of a frame with these jobs; None if it need not."""
    if not preferred and not delay:
        return None
    return wire.Forming(preferred, delay, min([job.arrived for job in jobs]))


def _encoded(output: Any) -> tuple[bytes, bytes]:
    if isinstance(output, str):
        return b"text/plain; charset=utf-8", output.encode()
    return b"application/json", msgspec.json.encode(output)


def _shown(value: bytes) -> str:
    return repr(value[:40].decode("latin-1"))
