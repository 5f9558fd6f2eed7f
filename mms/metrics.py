"""What is counted on the hot path (plain integers in preallocated slots), and its Prometheus form, made at a scrape."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

import mms
from mms.errors import MMSError, SubstituteError
from mms.measures import SECONDS, Histogram
from mms.tallies import Tallies, families

BATCH_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


Parts = tuple[dict[int, int], dict[str, int], dict[str, tuple[list[int], float]], dict[str, int]]


class VersionMetrics:
    """The counters of one model version. The front end's event loop is the only writer."""

    def __init__(self, label: str = "") -> None:
        self.requests: Counter[int] = Counter()  # by status
        self.errors: Counter[str] = Counter()  # by cause: the error's type
        self.restarts: Counter[str] = Counter()  # by cause
        self.scalings: Counter[str] = Counter()  # by direction
        self.duration = Histogram(SECONDS)
        self.queued = Histogram(SECONDS)
        self.handler = Histogram(SECONDS)
        self.preprocess = Histogram(SECONDS)
        self.inference = Histogram(SECONDS)
        self.postprocess = Histogram(SECONDS)
        self.batch_size = Histogram(BATCH_SIZES)
        self.first_chunk = Histogram(SECONDS)
        self.streams = 0  # answers that came in chunks
        self.chunks = 0
        self.streams_cut = 0  # that did not come to their end
        self.load_seconds = 0.0
        self.tallies = Tallies(label)  # of the handler
        self.defaults = 0  # requests that got the default output

    def parts(self) -> Parts:
        """What front ends count, each for itself."""
        histograms: dict[str, Histogram] = {name: getattr(self, name) for name in HISTOGRAMS}
        return (
            self.requests,
            self.errors,
            {name: (histogram.counts, histogram.total) for name, histogram in histograms.items()},
            {name: getattr(self, name) for name in NUMBERS},
        )

    def add(
        self,
        requests: Mapping[int, int],
        errors: Mapping[str, int],
        histograms: Mapping[str, tuple[list[int], float]],
        numbers: Mapping[str, int],
    ) -> None:
        """The `parts` of another front end."""
        self.requests.update(requests)
        self.errors.update(errors)
        for name, (counts, total) in histograms.items():
            getattr(self, name).add(counts, total)
        for name, number in numbers.items():
            setattr(self, name, getattr(self, name) + number)

    def copy(self) -> VersionMetrics:
        """To be added to: its `parts` are its own."""
        copied = VersionMetrics()
        copied.restarts, copied.scalings = self.restarts, self.scalings
        copied.load_seconds, copied.tallies = self.load_seconds, self.tallies
        copied.add(*self.parts())
        return copied

    def count(self, error: MMSError) -> None:
        """A request ended with `error`."""
        self.requests[error.status] += 1
        if isinstance(error, SubstituteError):
            self.defaults += 1
        else:
            self.errors[error.type] += 1


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """One worker at scrape time; `slot` is its number in the pool, stable over restarts. `batch_limit`: with a latency
    objective.
    """

    slot: int
    state: str
    cpu_seconds: float
    resident_bytes: int
    private_bytes: int | None  # None if it was not there when this was read
    batch_limit: int | None = None
    gpu_bytes: int | None = None  # as private_bytes
    borrowed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """The cache of one model version at scrape time; `results` counts its requests by what became of them."""

    results: dict[str, int]
    evictions: int
    bytes: int
    answers: int


@dataclass(frozen=True, slots=True)
class VersionFacts:
    """One model version at scrape time; `failed_workers` have no process and wait for their next start."""

    model: str
    version: str
    metrics: VersionMetrics
    queue_depth: int
    queue_capacity: int
    queue_bytes: int
    newest_first: bool
    drain_rate: float
    cancelled: int
    retries: int
    in_flight: int
    workers: list[WorkerFacts]
    failed_workers: int
    wanted_workers: int
    cache: CacheFacts | None = None


@dataclass(frozen=True, slots=True)
class FrontEndFacts:
    """The inference port at scrape time."""

    connections: int
    bytes_in_flight: int
    shedding_step: int


@dataclass(frozen=True, slots=True)
class RestartFacts:
    """One level of what is started again when it dies: nginx, a fork server, the workers of all versions together."""

    level: str  # nginx, frontend, forkserver or workers
    preload: str  # of a fork server
    causes: Mapping[str, int]  # of all deaths there were, with their numbers
    recent: int  # deaths within the last `window` seconds, of which `limit` are put up with
    limit: int
    window: float
    last_cause: str
    spent: bool
    state: str  # in words


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One GPU at scrape time: index, ratio 0 to 1 (None where it is not known), bytes."""

    index: int
    uuid: str
    utilization: float | None
    memory_used: int


WORKER_STATES = ("STARTING", "READY", "STOPPING", "FAILED")

_HISTOGRAMS = (
    ("mms_request_duration_seconds", "From the request's last byte to its answer.", "duration"),
    ("mms_queue_duration_seconds", "From the request's last byte to the start of its batch.", "queued"),
    (
        "mms_handler_duration_seconds",
        "One batch in the handler, all stages; with preprocess_threads, those after preprocess.",
        "handler",
    ),
    ("mms_preprocess_duration_seconds", "Preprocess of one batch (request-style handlers).", "preprocess"),
    ("mms_inference_duration_seconds", "Inference of one batch (request-style handlers).", "inference"),
    ("mms_postprocess_duration_seconds", "Postprocess of one batch (request-style handlers).", "postprocess"),
    ("mms_batch_size", "Requests per batch.", "batch_size"),
    ("mms_first_chunk_seconds", "From the request's last byte to the first chunk of a streamed answer.", "first_chunk"),
)

# What every front end counts for itself, by attribute of VersionMetrics.
HISTOGRAMS = tuple(attribute for _, _, attribute in _HISTOGRAMS)
NUMBERS = ("streams", "chunks", "streams_cut", "defaults")


class Collector:
    """Turns the facts of the moment into Prometheus families."""

    def __init__(
        self,
        versions: Callable[[], Iterable[VersionFacts]],
        gpus: Callable[[], Iterable[GpuFacts]],
        front_end: Callable[[], FrontEndFacts],
        failures: Callable[[], Mapping[tuple[int, str], int]],
        unsaved: Callable[[], bool] = lambda: False,
        restarts: Callable[[], Iterable[RestartFacts]] = lambda: (),
    ) -> None:
        self._versions = versions
        self._gpus = gpus
        self._front_end = front_end
        self._unsaved = unsaved
        self._restarts = restarts
        self._failures = failures  # of requests that reached no model, by status and cause

    def collect(self) -> Iterator[Metric]:
        versions = list(self._versions())
        yield from self._counters(versions)
        for name, text, attribute in _HISTOGRAMS:
            family = HistogramMetricFamily(name, text, labels=["model", "version"])
            for facts in versions:
                histogram: Histogram = getattr(facts.metrics, attribute)
                family.add_metric([facts.model, facts.version], histogram.buckets(), histogram.total)
            yield family
        yield from self._gauges(versions)
        yield from self._cache_families(versions)
        yield from self._worker_families(versions)
        yield from self._restart_families()
        yield from self._host()
        yield from families((facts.model, facts.version, facts.metrics.tallies) for facts in versions)

    def _counters(self, versions: list[VersionFacts]) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "mms_requests", "Requests answered, by HTTP status.", labels=["model", "version", "code"]
        )
        errors = CounterMetricFamily(
            "mms_errors", "Requests that failed, by cause.", labels=["model", "version", "cause"]
        )
        restarts = CounterMetricFamily(
            "mms_worker_restarts",
            "Workers that died or were recycled, by cause.",
            labels=["model", "version", "reason"],
        )
        scalings = CounterMetricFamily(
            "mms_scalings", "Changes of the number of workers by autoscaling.", labels=["model", "version", "direction"]
        )
        cancelled = CounterMetricFamily(
            "mms_requests_cancelled", "Requests whose client left before the answer.", labels=["model", "version"]
        )
        retries = CounterMetricFamily(
            "mms_retries", "Requests run again because their worker died.", labels=["model", "version"]
        )
        defaults = CounterMetricFamily(
            "mms_default_outputs",
            "Requests answered with default_output, because their objective was missed.",
            labels=["model", "version"],
        )
        streams = CounterMetricFamily("mms_streams", "Answers that were begun in chunks.", labels=["model", "version"])
        chunks = CounterMetricFamily("mms_stream_chunks", "Chunks of such answers.", labels=["model", "version"])
        cut = CounterMetricFamily(
            "mms_streams_cut", "Such answers that ended with an error: they were cut.", labels=["model", "version"]
        )
        for facts in versions:
            labels = [facts.model, facts.version]
            streams.add_metric(labels, facts.metrics.streams)
            chunks.add_metric(labels, facts.metrics.chunks)
            cut.add_metric(labels, facts.metrics.streams_cut)
            for status, count in sorted(facts.metrics.requests.items()):
                requests.add_metric([*labels, str(status)], count)
            for cause, count in sorted(facts.metrics.errors.items()):
                errors.add_metric([*labels, cause], count)
            for reason, count in sorted(facts.metrics.restarts.items()):
                restarts.add_metric([*labels, reason], count)
            for direction, count in sorted(facts.metrics.scalings.items()):
                scalings.add_metric([*labels, direction], count)
            cancelled.add_metric(labels, facts.cancelled)
            retries.add_metric(labels, facts.retries)
            defaults.add_metric(labels, facts.metrics.defaults)
        statuses: Counter[int] = Counter()
        causes: Counter[str] = Counter()
        for (status, cause), count in self._failures().items():
            statuses[status] += count
            causes[cause] += count
        for status, count in sorted(statuses.items()):
            requests.add_metric(["unknown", "", str(status)], count)
        for cause, count in sorted(causes.items()):
            errors.add_metric(["unknown", "", cause], count)
        yield from (requests, errors, restarts, scalings, cancelled, retries, defaults, streams, chunks, cut)

    def _gauges(self, versions: list[VersionFacts]) -> Iterator[Metric]:
        gauges: tuple[tuple[str, str, Callable[[VersionFacts], float]], ...] = (
            ("mms_queue_depth", "Requests that wait for a worker.", lambda facts: facts.queue_depth),
            ("mms_queue_capacity", "Requests that may wait; one more is refused.", lambda facts: facts.queue_capacity),
            ("mms_queue_bytes", "Bytes of the bodies that wait for a worker.", lambda facts: facts.queue_bytes),
            (
                "mms_queue_newest_first",
                "1 while the newest requests are served first, because the queue does not empty any more.",
                lambda facts: facts.newest_first,
            ),
            (
                "mms_queue_drain_rate",
                "Requests per second that left the queue while others waited; 0 if that never was.",
                lambda facts: facts.drain_rate,
            ),
            ("mms_requests_in_flight", "Requests at a worker.", lambda facts: facts.in_flight),
            ("mms_workers_wanted", "Worker processes that are wanted.", lambda facts: facts.wanted_workers),
            (
                "mms_model_load_duration_seconds",
                "Load time of the version's latest worker.",
                lambda facts: facts.metrics.load_seconds,
            ),
        )
        for name, text, value in gauges:
            family = GaugeMetricFamily(name, text, labels=["model", "version"])
            for facts in versions:
                family.add_metric([facts.model, facts.version], value(facts))
            yield family

    def _cache_families(self, versions: list[VersionFacts]) -> Iterator[Metric]:
        labels = ["model", "version"]
        requests = CounterMetricFamily(
            "mms_cache_requests", "Requests to a version with a cache, by result.", labels=[*labels, "result"]
        )
        evictions = CounterMetricFamily(
            "mms_cache_evictions", "Answers that made room for newer ones in the cache.", labels=labels
        )
        size = GaugeMetricFamily("mms_cache_bytes", "Bytes that the kept answers fill.", labels=labels)
        answers = GaugeMetricFamily("mms_cache_answers", "Answers that are kept.", labels=labels)
        for facts in versions:
            if facts.cache is not None:
                named = [facts.model, facts.version]
                for result, count in facts.cache.results.items():
                    requests.add_metric([*named, result], count)
                evictions.add_metric(named, facts.cache.evictions)
                size.add_metric(named, facts.cache.bytes)
                answers.add_metric(named, facts.cache.answers)
        yield from (requests, evictions, size, answers)

    def _worker_families(self, versions: list[VersionFacts]) -> Iterator[Metric]:
        labels = ["model", "version", "worker"]
        states = GaugeMetricFamily("mms_workers", "Worker processes, by state.", labels=["model", "version", "state"])
        cpu = CounterMetricFamily("mms_worker_cpu_seconds", "CPU time of a worker process.", labels=labels)
        memory = GaugeMetricFamily(
            "mms_worker_resident_memory_bytes", "Resident memory of a worker process.", labels=labels
        )
        limits = GaugeMetricFamily(
            "mms_worker_batch_limit", "Batch size of a worker that follows latency_objective_ms.", labels=labels
        )
        private = GaugeMetricFamily(
            "mms_worker_private_memory_bytes",
            "Memory of a worker process that it shares with no other: what one more costs.",
            labels=labels,
        )
        gpu = GaugeMetricFamily(
            "mms_worker_gpu_memory_bytes",
            "GPU memory that a worker process holds, where NVML tells: what one more costs.",
            labels=labels,
        )
        borrowed = GaugeMetricFamily(
            "mms_worker_borrowed_weights_bytes",
            "Weights that a worker on a GPU uses and another process holds, with share_weights.",
            labels=labels,
        )
        for facts in versions:
            for state in WORKER_STATES:
                count = facts.failed_workers if state == "FAILED" else 0
                count += sum(worker.state == state for worker in facts.workers)
                states.add_metric([facts.model, facts.version, state], count)
            for worker in facts.workers:
                cpu.add_metric([facts.model, facts.version, str(worker.slot)], worker.cpu_seconds)
                memory.add_metric([facts.model, facts.version, str(worker.slot)], worker.resident_bytes)
                if worker.private_bytes is not None:
                    private.add_metric([facts.model, facts.version, str(worker.slot)], worker.private_bytes)
                if worker.gpu_bytes is not None:
                    gpu.add_metric([facts.model, facts.version, str(worker.slot)], worker.gpu_bytes)
                if worker.borrowed_bytes:
                    borrowed.add_metric([facts.model, facts.version, str(worker.slot)], worker.borrowed_bytes)
                if worker.batch_limit is not None:
                    limits.add_metric([facts.model, facts.version, str(worker.slot)], worker.batch_limit)
        yield from (states, cpu, memory, private, gpu, borrowed, limits)

    def _restart_families(self) -> Iterator[Metric]:
        nginx = CounterMetricFamily("mms_nginx_restarts", "Deaths of nginx, by cause.", labels=["reason"])
        forkservers = CounterMetricFamily(
            "mms_forkserver_restarts", "Deaths of fork servers, by cause.", labels=["preload", "reason"]
        )
        frontends = CounterMetricFamily(
            "mms_frontend_restarts", "Deaths of further front ends, by cause.", labels=["reason"]
        )
        held_back = GaugeMetricFamily(
            "mms_restarts_held_back",
            "1 while more has died than is put up with, so that it is started again later or otherwise.",
            labels=["level", "preload"],
        )
        for facts in self._restarts():
            held_back.add_metric([facts.level, facts.preload], facts.spent)
            for cause, count in sorted(facts.causes.items()):
                if facts.level == "nginx":
                    nginx.add_metric([cause], count)
                elif facts.level == "frontend":
                    frontends.add_metric([cause], count)
                elif facts.level == "forkserver":
                    forkservers.add_metric([facts.preload, cause], count)
        yield from (nginx, forkservers, frontends, held_back)

    def _host(self) -> Iterator[Metric]:
        front = self._front_end()
        yield GaugeMetricFamily("mms_connections", "Open connections on the inference port.", front.connections)
        yield GaugeMetricFamily(
            "mms_bytes_in_flight", "Bytes of requests and answers in the front end.", front.bytes_in_flight
        )
        yield GaugeMetricFamily(
            "mms_shedding_step",
            "What the front end does without: 0 nothing, 1 keep-alive, 2 requests, 3 connections.",
            front.shedding_step,
        )
        yield GaugeMetricFamily("mms_state_unsaved", "1 while what is registered cannot be saved.", self._unsaved())
        build = GaugeMetricFamily("mms_build_info", "Always 1.", labels=["version", "python"])
        build.add_metric([mms.__version__, platform.python_version()], 1)
        utilization = GaugeMetricFamily("mms_gpu_utilization_ratio", "GPU utilisation, 0 to 1.", labels=["gpu", "uuid"])
        used = GaugeMetricFamily("mms_gpu_memory_used_bytes", "GPU memory in use.", labels=["gpu", "uuid"])
        for gpu in self._gpus():
            labels = [str(gpu.index), gpu.uuid]
            if gpu.utilization is not None:
                utilization.add_metric(labels, gpu.utilization)
            used.add_metric(labels, gpu.memory_used)
        yield from (build, utilization, used)


def registry(collector: Collector) -> CollectorRegistry:
    """The server's families and those of its own process."""
    known = CollectorRegistry(auto_describe=False)
    known.register(collector)
    ProcessCollector(registry=known)
    PlatformCollector(registry=known)
    GCCollector(registry=known)
    return known
