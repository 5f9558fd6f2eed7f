"""Counters and histograms, and their Prometheus form as a scraper would read it."""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import replace

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import mms
from mms.measures import SECONDS, Histogram
from mms.metrics import (
    BATCH_SIZES,
    CacheFacts,
    Collector,
    FrontEndFacts,
    GpuFacts,
    RestartFacts,
    VersionFacts,
    VersionMetrics,
    WorkerFacts,
)
from mms.metrics import registry as make_registry


def facts(metrics: VersionMetrics, *, model: str = "cat") -> VersionFacts:
    workers = [
        WorkerFacts(0, "READY", 1.5, 1000, 500),
        WorkerFacts(1, "READY", 2.5, 2000, 700),
        WorkerFacts(2, "STARTING", 0, 0, None),
    ]
    return VersionFacts(
        model=model,
        version="1.0",
        metrics=metrics,
        queue_depth=3,
        queue_capacity=100,
        queue_bytes=4096,
        newest_first=True,
        drain_rate=12.5,
        cancelled=2,
        retries=1,
        in_flight=4,
        workers=workers,
        failed_workers=3,
        wanted_workers=6,
    )


Samples = dict[tuple[str, str], float]


def scrape(
    *versions: VersionFacts, gpus: list[GpuFacts] | None = None, restarts: tuple[RestartFacts, ...] = ()
) -> Samples:
    """The samples of ours by name and labels (`a=1 b=2`, sorted), read back from the text."""
    failures = Counter({(404, "ModelNotFoundException"): 7, (400, "BadRequestException"): 2})
    front_end = FrontEndFacts(5, 6000, 1)
    collector = Collector(
        lambda: versions, lambda: gpus or [], lambda: front_end, lambda: failures, restarts=lambda: restarts
    )
    known = make_registry(collector)
    text = generate_latest(known).decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, " ".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            assert key not in found, f"{key} stands twice"
            found[key] = sample.value
    return found


@pytest.mark.parametrize(("value", "bucket"), [(0.0, 0), (1.0, 0), (1.5, 1), (2.0, 1), (256.0, 8), (257.0, 9)])
def test_a_value_falls_into_the_bucket_of_the_next_bound(value: float, bucket: int) -> None:
    histogram = Histogram(BATCH_SIZES)
    histogram.observe(value)
    assert histogram.counts.index(1) == bucket and histogram.total == value


def test_times_until_now_are_counted_together_as_each_for_itself() -> None:
    each, together = Histogram((1.0, 2.0, 4.0)), Histogram((1.0, 2.0, 4.0))
    waits = [9.0, 4.5, 4.0, 1.5, 1.25, 1.0, 0.5]
    for wait in waits:
        each.observe(wait)
    moments = [16.0 - wait for wait in waits]
    together.observe_since(moments, sum(moments), 16.0)
    together.observe_since([15.5], 15.5, 16.0)
    each.observe(0.5)
    assert together.counts == each.counts == [3, 2, 1, 2] and together.total == each.total


def test_buckets_are_shown_cumulative() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.5, 1.6, 9.0):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 1.0), ("2.0", 3.0), ("+Inf", 4.0)]


def test_bounds_rise() -> None:
    assert list(SECONDS) == sorted(set(SECONDS)) and list(BATCH_SIZES) == sorted(set(BATCH_SIZES))


def test_a_cache_is_shown_where_there_is_one() -> None:
    cached = replace(facts(VersionMetrics()), cache=CacheFacts({"hit": 5, "miss": 2}, 1, 700, 2))
    found = scrape(cached, facts(VersionMetrics(), model="dog"))
    assert {key: value for key, value in found.items() if key[0].startswith("mms_cache")} == {
        ("mms_cache_requests_total", "model=cat result=hit version=1.0"): 5,
        ("mms_cache_requests_total", "model=cat result=miss version=1.0"): 2,
        ("mms_cache_evictions_total", "model=cat version=1.0"): 1,
        ("mms_cache_bytes", "model=cat version=1.0"): 700,
        ("mms_cache_answers", "model=cat version=1.0"): 2,
    }


def test_a_version_is_shown_in_full() -> None:
    metrics = VersionMetrics()
    metrics.requests.update({200: 10, 500: 1})
    metrics.errors["HandlerException"] += 1
    metrics.restarts["signal 9"] += 1
    metrics.duration.observe(0.003)
    metrics.batch_size.observe(8)
    metrics.load_seconds = 0.25
    found = scrape(facts(metrics))
    cat = "model=cat version=1.0"
    for name, labels, value in (
        ("mms_requests_total", f"code=200 {cat}", 10),
        ("mms_requests_total", f"code=500 {cat}", 1),
        ("mms_requests_total", "code=404 model=unknown version=", 7),
        ("mms_requests_total", "code=400 model=unknown version=", 2),
        ("mms_errors_total", f"cause=HandlerException {cat}", 1),
        ("mms_errors_total", "cause=ModelNotFoundException model=unknown version=", 7),
        ("mms_errors_total", "cause=BadRequestException model=unknown version=", 2),
        ("mms_worker_restarts_total", "model=cat reason=signal 9 version=1.0", 1),
        ("mms_requests_cancelled_total", cat, 2),
        ("mms_retries_total", cat, 1),
        ("mms_request_duration_seconds_count", cat, 1),
        ("mms_request_duration_seconds_sum", cat, 0.003),
        ("mms_request_duration_seconds_bucket", f"le=0.0025 {cat}", 0),
        ("mms_request_duration_seconds_bucket", f"le=0.005 {cat}", 1),
        ("mms_request_duration_seconds_bucket", f"le=+Inf {cat}", 1),
        ("mms_queue_duration_seconds_count", cat, 0),
        ("mms_batch_size_sum", cat, 8),
        ("mms_queue_depth", cat, 3),
        ("mms_queue_capacity", cat, 100),
        ("mms_requests_in_flight", cat, 4),
        ("mms_model_load_duration_seconds", cat, 0.25),
        ("mms_workers", "model=cat state=READY version=1.0", 2),
        ("mms_workers", "model=cat state=STARTING version=1.0", 1),
        ("mms_workers", "model=cat state=FAILED version=1.0", 3),
        ("mms_worker_cpu_seconds_total", f"{cat} worker=1", 2.5),
        ("mms_worker_resident_memory_bytes", f"{cat} worker=1", 2000),
        ("mms_worker_private_memory_bytes", f"{cat} worker=1", 700),
        ("mms_connections", "", 5),
    ):
        assert found[name, labels] == value, f"{name} {labels}"


def test_the_build_and_the_process_are_shown() -> None:
    found = scrape()
    assert found["mms_build_info", f"python={platform.python_version()} version={mms.__version__}"] == 1
    assert found["process_resident_memory_bytes", ""] > 0


def test_gpus_are_shown_where_there_are_any() -> None:
    found = scrape(gpus=[GpuFacts(1, "GPU-a", 0.5, 1 << 30), GpuFacts(2, "MIG-b", None, 1 << 20)])
    assert found["mms_gpu_utilization_ratio", "gpu=1 uuid=GPU-a"] == 0.5
    assert found["mms_gpu_memory_used_bytes", "gpu=1 uuid=GPU-a"] == 1 << 30
    assert found["mms_gpu_memory_used_bytes", "gpu=2 uuid=MIG-b"] == 1 << 20
    assert ("mms_gpu_utilization_ratio", "gpu=2 uuid=MIG-b") not in found, "NVML does not know it of a part"


def test_restarts_are_shown_by_level() -> None:
    def level(name: str, preload: str, causes: dict[str, int], *, spent: bool) -> RestartFacts:
        return RestartFacts(name, preload, causes, 0, 5, 60.0, "", spent, "running")

    found = scrape(
        restarts=(
            level("nginx", "", {"signal 9 (SIGKILL)": 2}, spent=False),
            level("forkserver", "numpy,torch", {"no answer": 1, "exit code 1": 5}, spent=True),
            level("workers", "", {"exit code 1": 7}, spent=False),  # counted by version, too
        )
    )
    assert {key: value for key, value in found.items() if "restarts" in key[0]} == {
        ("mms_nginx_restarts_total", "reason=signal 9 (SIGKILL)"): 2,
        ("mms_forkserver_restarts_total", "preload=numpy,torch reason=no answer"): 1,
        ("mms_forkserver_restarts_total", "preload=numpy,torch reason=exit code 1"): 5,
        ("mms_restarts_held_back", "level=nginx preload="): 0,
        ("mms_restarts_held_back", "level=forkserver preload=numpy,torch"): 1,
        ("mms_restarts_held_back", "level=workers preload="): 0,
    }


def test_several_models_are_shown_side_by_side() -> None:
    found = scrape(facts(VersionMetrics()), facts(VersionMetrics(), model="dog"))
    assert found["mms_queue_depth", "model=dog version=1.0"] == found["mms_queue_depth", "model=cat version=1.0"] == 3
