"""What the dispatcher says to those who get no answer. Pure. Front end's process."""

from __future__ import annotations

from mms.errors import (
    DeadlineError,
    MMSError,
    ObjectiveError,
    QueueBytesError,
    QueueFullError,
    QueueWaitError,
    WorkerDiedError,
)
from mms.workers.job import Job
from mms.workers.objective import Objective
from mms.workers.overload import Overload


def no_room(depth: int, capacity: int, timeout: float, objective: Objective | None, overload: Overload) -> MMSError:
    """As many wait as may."""
    if depth >= capacity:
        text = f"the queue is full: {depth} requests wait; try again later"
    elif overload.overloaded:
        text = f"{depth} requests wait, and more come than can be served; try again later"
    else:
        limit = f"queue_timeout ({timeout:g} s)"
        if objective is not None:
            limit = f"latency_objective_ms ({objective.seconds * 1000:g}) allows for"
        text = f"{depth} requests wait, another one would wait longer than {limit}"
        return QueueWaitError(text, retry_after=overload.retry_after(depth))
    return QueueFullError(text, retry_after=overload.retry_after(depth))


def no_bytes(held: int, most: int, retry_after: int) -> QueueBytesError:
    return QueueBytesError(
        f"the queue is full: the requests that wait have {held} bytes, and queue_bytes is {most}; try again later",
        retry_after=retry_after,
    )


def level_full(level: int, most: int, retry_after: int) -> QueueFullError:
    return QueueFullError(
        f"the queue is full: {most} requests of priority {level + 1} wait (priority_queue_sizes); try again later",
        retry_after=retry_after,
    )


def gave_way(retry_after: int) -> QueueFullError:
    return QueueFullError(
        "the queue is full, and a request of higher priority took this one's place; try again later",
        retry_after=retry_after,
    )


def too_late(timeout: float, objective: Objective | None) -> DeadlineError:
    """It has waited too long for a worker."""
    if objective is not None:
        return ObjectiveError(f"no answer within latency_objective_ms ({objective.seconds * 1000:g})")
    return DeadlineError(f"no worker was free within queue_timeout ({timeout:g} s)")


def own_deadline(job: Job) -> DeadlineError:
    return DeadlineError(f"no answer within the request's timeout of {job.timeout * 1000:g} ms")


def stuck(limit: float) -> DeadlineError:
    """Its batch ran for too long."""
    return DeadlineError(f"the handler did not answer within response_timeout ({limit:g} s)")


def death(job: Job, cause: str, *, closed: str, retry: int) -> WorkerDiedError:
    """Its worker died, and it is not run again."""
    if job.streams:
        return WorkerDiedError(f"the worker process died in the middle of this answer ({cause})")
    if job.attempts > 1:
        return WorkerDiedError(f"the worker process died twice running this request ({cause})", status=500)
    why = "too many requests were retried lately"
    if closed or not retry:
        why = closed or "retry is off for this model"
    return WorkerDiedError(f"the worker process died running this request ({cause}); {why}")
