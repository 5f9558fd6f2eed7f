"""What becomes of a worker's answers, a frame at a time: counted, and told to those who wait. Front end's process."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mms import wire
from mms.errors import HandlerError
from mms.metrics import VersionMetrics
from mms.workers.job import Caller, Job, StreamCaller

log = logging.getLogger("mms.worker")

FEW = 4  # jobs per batch from which on they are counted by the batch


def deliver(
    jobs: list[Job],
    callers: list[Caller | StreamCaller],
    outcomes: list[wire.Outcome],
    bodies: Sequence[bytes | memoryview],
    metrics: VersionMetrics,
    *,
    alike: bool,
) -> None:
    """Tell each caller its job's outcome. `alike`: there is one for all, and it is no error."""
    for job in jobs:
        job.settled = True
    if alike:
        if len(callers) == 1 or len(set(map(type, callers))) == 1:
            answer_all = getattr(callers[0], "answer_all", None)
            if answer_all is not None:
                answer_all(callers, outcomes[0].status, outcomes[0].head, bodies)
                return
        outcomes = outcomes * len(jobs)
    for job, outcome, body in zip(jobs, outcomes, bodies, strict=True):
        try:
            if outcome.error:
                metrics.streams_cut += job.streams
                job.caller.fail(_remote_error(outcome, bytes(body)))
            else:
                job.caller.answer(outcome.status, outcome.head, body)
        except Exception:  # one caller's fault must not cost the other jobs their worker
            log.exception("the answer to job %d could not be delivered", job.id)


def seconds_of(batches: list[wire.BatchTimes]) -> float:
    """That they took in the handler."""
    return batches[0].handler if len(batches) == 1 else sum([batch.handler for batch in batches])


def count_batches(batches: list[wire.BatchTimes], metrics: VersionMetrics) -> None:
    if len(batches) == 1:
        (batch,) = batches
        metrics.handler.observe(batch.handler)
        metrics.batch_size.observe(batch.jobs)
        if batch.inference:
            metrics.preprocess.observe(batch.preprocess)
            metrics.inference.observe(batch.inference)
            metrics.postprocess.observe(batch.postprocess)
        return
    metrics.handler.observe_all([batch.handler for batch in batches])
    metrics.batch_size.observe_all([batch.jobs for batch in batches])
    if batches[0].inference:
        metrics.preprocess.observe_all([batch.preprocess for batch in batches])
        metrics.inference.observe_all([batch.inference for batch in batches])
        metrics.postprocess.observe_all([batch.postprocess for batch in batches])


def waits_in_worker(batches: list[wire.BatchTimes], count: int) -> list[float]:
    """How long each of `count` jobs has waited in the worker: one figure for each, or one for all."""
    if len(batches) == 1 and batches[0].jobs == count:
        return [batches[0].waited]
    waits: list[float] = []
    for batch in batches:
        waits += [batch.waited] * batch.jobs
    return waits if len(waits) == count else [0.0]  # of a batch with streams: an idle worker has begun it at once


def count_answers(
    jobs: list[Job],
    outcomes: list[wire.Outcome],
    batches: list[wire.BatchTimes],
    waits: list[float],
    now: float,
    metrics: VersionMetrics,
    *,
    alike: bool,
    overlaps: bool,
) -> None:
    """Of jobs that somebody still waits for. `batches` are theirs, all in order, or none where others are missing;
    `overlaps`: they may have been sent in several frames.
    """
    arrived = [job.arrived for job in jobs]
    if overlaps or len(waits) > 1:
        _count_waits(jobs, arrived, batches, waits, metrics, overlaps=overlaps)
    arrived.sort()  # they mostly are
    total = sum(arrived)
    metrics.duration.observe_since(arrived, total, now)
    if len(waits) == 1 and not overlaps:
        metrics.queued.observe_since(arrived, total, waits[0] + jobs[0].taken)
    if alike:
        metrics.requests[outcomes[0].status] += len(jobs)
        return
    for outcome in outcomes:
        metrics.requests[outcome.status] += 1
        if outcome.error:
            metrics.errors[outcome.error] += 1


def _count_waits(
    jobs: list[Job],
    arrived: list[float],
    batches: list[wire.BatchTimes],
    waits: list[float],
    metrics: VersionMetrics,
    *,
    overlaps: bool,
) -> None:
    """Of jobs that did not all begin at the same time."""
    taken = jobs[0].taken
    if overlaps:
        waits = waits * len(jobs) if len(waits) == 1 else waits
        metrics.queued.observe_all([wait + job.taken - job.arrived for job, wait in zip(jobs, waits, strict=True)])
    elif batches and FEW * len(batches) <= len(jobs):
        at = 0
        for batch in batches:
            some = sorted(arrived[at : at + batch.jobs])
            at += batch.jobs
            if some:
                metrics.queued.observe_since(some, sum(some), batch.waited + taken)
    else:
        metrics.queued.observe_all([wait + taken - at for wait, at in zip(waits, arrived, strict=True)])


def _remote_error(outcome: wire.Outcome, message: bytes) -> HandlerError:
    error = HandlerError(str(message, "utf-8", "replace"), status=outcome.status)
    error.type = outcome.error
    return error
