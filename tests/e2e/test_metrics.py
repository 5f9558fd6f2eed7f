"""`/metrics` of a real server: valid Prometheus text, the families there are, and counts that are right."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator

import psutil
import pytest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.asking import fetch
from tests.conftest import MakeArchive, MakeGate
from tests.servers import Server, server
from tests.traffic import Answering
from tests.waiting import eventually

FAMILIES = {
    "mms_requests": "counter",
    "mms_errors": "counter",
    "mms_requests_cancelled": "counter",
    "mms_retries": "counter",
    "mms_worker_restarts": "counter",
    "mms_request_duration_seconds": "histogram",
    "mms_queue_duration_seconds": "histogram",
    "mms_handler_duration_seconds": "histogram",
    "mms_preprocess_duration_seconds": "histogram",
    "mms_inference_duration_seconds": "histogram",
    "mms_postprocess_duration_seconds": "histogram",
    "mms_batch_size": "histogram",
    "mms_queue_depth": "gauge",
    "mms_queue_capacity": "gauge",
    "mms_requests_in_flight": "gauge",
    "mms_model_load_duration_seconds": "gauge",
    "mms_workers": "gauge",
    "mms_worker_cpu_seconds": "counter",
    "mms_worker_resident_memory_bytes": "gauge",
    "mms_worker_private_memory_bytes": "gauge",
    "mms_connections": "gauge",
    "mms_build_info": "gauge",
    "process_cpu_seconds": "counter",
    "process_resident_memory_bytes": "gauge",
    "process_open_fds": "gauge",
}


@pytest.fixture(scope="module")
def empty(make_archive: MakeArchive) -> Iterator[Server]:
    spare = (make_archive(name) for name in ("echo", "rows", "measures"))
    with server(spare=(*spare, make_archive("gate", batch_size=4))) as started:
        yield started


@pytest.fixture
def running(empty: Server) -> Iterator[Server]:
    """The models of each test are new: what was counted goes with a model."""
    for name in ("echo", "rows", "gate"):
        assert empty.manage("POST", f"/models?url={name}-1.0.mar").status == 200
    yield empty
    empty.unregister_all()


def families(running: Server) -> dict[str, Metric]:
    return {family.name: family for family in parse_text(fetch(running.metrics, "GET", "/metrics").body.decode())}


def test_it_is_prometheus_text_with_every_family(running: Server) -> None:
    running.predict("echo", b"x")
    reply = fetch(running.metrics, "GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    assert "charset=utf-8" in reply.headers["content-type"]
    found = {family.name: family for family in parse_text(reply.body.decode())}
    assert {name: found[name].type for name in FAMILIES if name in found} == FAMILIES
    for family in found.values():
        assert family.documentation, family.name
        labels = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(set(labels)) == len(labels), f"{family.name} has a sample twice"
        assert all(math.isfinite(sample.value) for sample in family.samples)


def test_errors_have_the_form_of_all_ports(running: Server) -> None:
    for method, path, status in (("GET", "/nope", 404), ("POST", "/metrics", 405)):
        reply = fetch(running.metrics, method, path)
        assert reply.status == status and "refer to API document" in reply.message


def test_openmetrics_is_served_to_those_who_ask(running: Server) -> None:
    reply = fetch(running.metrics, "GET", "/metrics", None, {"Accept": "application/openmetrics-text; version=1.0.0"})
    assert reply.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = parse_openmetrics(reply.body.decode())  # type: ignore[no-untyped-call]  # the library's parser is untyped
    assert "mms_requests" in {family.name for family in families}


def test_requests_are_counted_by_model_version_and_status(running: Server) -> None:
    unknown = running.metric("mms_requests_total", model="unknown", code="404")
    for _ in range(3):
        running.predict("echo", b"x")
    running.predict("rows", b"{", Content_Type="application/json")
    running.predict("dog", b"x")
    assert running.metric("mms_requests_total", model="echo", version="1.0", code="200") == 3
    assert running.metric("mms_requests_total", model="rows", version="1.0", code="400") == 1
    assert running.metric("mms_requests_total", model="rows", code="200") == 0
    assert running.metric("mms_errors_total", model="rows", cause="BadRequestException") == 1
    assert running.metric("mms_requests_total", model="unknown", code="404") == unknown + 1


def test_histograms_count_every_request_once(running: Server) -> None:
    for _ in range(5):
        running.predict("echo", b"x")
    for name in ("request", "queue", "handler", "preprocess", "inference", "postprocess"):
        assert running.metric(f"mms_{name}_duration_seconds_count", model="echo") == 5, name
        buckets = [
            sample
            for sample in families(running)[f"mms_{name}_duration_seconds"].samples
            if sample.name.endswith("_bucket") and sample.labels["model"] == "echo"
        ]
        counts = [sample.value for sample in sorted(buckets, key=lambda sample: float(sample.labels["le"]))]
        assert counts == sorted(counts)
        assert (counts[-1], buckets[-1].labels["le"]) == (5, "+Inf")
    assert 0 < running.metric("mms_request_duration_seconds_sum", model="echo") < 5
    stages = sum(
        running.metric(f"mms_{name}_duration_seconds_sum", model="echo")
        for name in ("preprocess", "inference", "postprocess")
    )
    assert stages <= running.metric("mms_handler_duration_seconds_sum", model="echo")
    assert running.metric("mms_inference_duration_seconds_count", model="rows") == 0


def test_waiting_running_and_batches_are_seen(running: Server, make_gate: MakeGate) -> None:
    first, rest, answering = make_gate(), [make_gate() for _ in range(3)], Answering()
    answering.send(running, "gate", first.body)
    eventually(first.begun)
    for gate in rest:
        answering.send(running, "gate", gate.body)
    eventually(lambda: running.metric("mms_queue_depth", model="gate") == 3)
    assert running.metric("mms_requests_in_flight", model="gate") == 1
    assert running.metric("mms_queue_capacity", model="gate") == 100
    assert running.metric("mms_connections") == 4
    for gate in (first, *rest):
        gate.open()
    answering.results()
    eventually(lambda: running.metric("mms_requests_in_flight", model="gate") == 0)
    assert running.metric("mms_batch_size_bucket", model="gate", le="1.0") == 1
    assert running.metric("mms_batch_size_bucket", model="gate", le="4.0") == 2
    assert running.metric("mms_batch_size_sum", model="gate") == 4
    eventually(lambda: running.metric("mms_connections") == 0)


def test_workers_and_their_resources_are_seen(running: Server) -> None:
    assert running.metric("mms_workers", model="echo", state="READY") == 1
    assert running.metric("mms_workers", model="echo", state="STARTING") == 0
    (pid,) = running.workers("echo")
    resident = running.metric("mms_worker_resident_memory_bytes", model="echo", worker="0")
    assert resident == pytest.approx(psutil.Process(pid).memory_info().rss, rel=0.2)
    private = running.metric("mms_worker_private_memory_bytes", model="echo", worker="0")
    assert 0 < private < resident
    assert running.describe("echo")["workers"][0]["privateMemory"] == pytest.approx(private, rel=0.2)
    eventually(
        lambda: running.predict("echo", bytes(1 << 20)) and running.metric("mms_worker_cpu_seconds_total", model="echo")
    )
    assert running.metric("mms_model_load_duration_seconds", model="echo") > 0


def test_deaths_are_counted_by_cause_and_counters_never_fall(running: Server) -> None:
    running.predict("echo", b"x")
    before = running.metric("mms_requests_total")
    (pid,) = running.workers("echo")
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: running.workers("echo") not in ([], [pid]))
    assert running.metric("mms_worker_restarts_total", model="echo", reason="signal 9 (SIGKILL)") == 1
    assert running.metric("mms_requests_total") >= before


def test_what_a_handler_measures_is_shown_survives_its_worker_and_goes_with_its_model(running: Server) -> None:
    assert running.manage("POST", "/models?url=measures-1.0.mar&min_workers=1").status == 200
    assert running.metric("ModelSize_bytes", model="measures", version="1.0") == 3e6
    running.predict("measures", b"cat")
    (pid,) = running.workers("measures")
    os.kill(pid, signal.SIGKILL)
    for animal in (b"cat", b"a dog"):
        assert running.predict("measures", animal).body == b"seen"
    found = families(running)
    assert {name: found[name].type for name in ("Seen", "Look_seconds", "Length_bytes", "ModelSize_bytes")} == {
        "Seen": "counter", "Look_seconds": "histogram", "Length_bytes": "histogram", "ModelSize_bytes": "gauge",
    }  # fmt: skip
    assert running.metric("Seen_total", model="measures", Animal="cat") == 2
    assert running.metric("Seen_total", model="measures", Animal="a dog") == 1
    assert running.metric("Look_seconds_bucket", model="measures", le="0.005") == 3
    assert running.metric("Length_bytes_sum", model="measures", Field="body") == 11
    assert running.manage("DELETE", "/models/measures").status == 200
    assert "Seen" not in families(running)


def test_a_model_that_is_gone_is_no_longer_shown(running: Server) -> None:
    running.predict("echo", b"x")
    assert running.manage("DELETE", "/models/echo").status == 200
    assert running.metric("mms_requests_total", model="echo") == 0
    assert all(
        sample.labels.get("model") != "echo" for family in families(running).values() for sample in family.samples
    )
