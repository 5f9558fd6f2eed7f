"""`context.metrics`: the calls that handlers of MMS and TorchServe make, what is refused, what is left out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from mms import wire
from mms.backend import oldnames
from mms.handler_metrics import Dimension, Metrics, MetricTypes
from mms.measures import MAX_SERIES, SECONDS

Seen = dict[tuple[str, str, tuple[str, ...]], float]


def seen(metrics: Metrics) -> Seen:
    """The values that are sent now."""
    return {(series.name, series.kind, series.labels): series.value for series in metrics.take().series}


@pytest.mark.parametrize(
    ("call", "name", "kind", "value"),
    [
        (lambda metrics: metrics.add_counter("Hits", 2), "Hits", "counter", 2),
        (lambda metrics: metrics.add_counter("hits_total", 2, 0), "hits", "counter", 2),
        (lambda metrics: metrics.add_time("Look", 5), "Look_seconds", "duration", 0.005),
        (lambda metrics: metrics.add_time("Look", 5, 0, "s"), "Look_seconds", "duration", 5),
        (lambda metrics: metrics.add_time("Look", 5, metric_type="gauge"), "Look_seconds", "gauge", 0.005),
        (lambda metrics: metrics.add_size("Image", 3), "Image_bytes", "gauge", 3e6),
        (lambda metrics: metrics.add_size("image_bytes", 3, None, "B"), "image_bytes", "gauge", 3),
        (lambda metrics: metrics.add_percent("Load", 50), "Load_ratio", "gauge", 0.5),
        (lambda metrics: metrics.add_error("Bad", 3), "Bad", "counter", 3),
        (lambda metrics: metrics.add_error("Bad", "it broke"), "Bad", "counter", 1),
        (lambda metrics: metrics.add_metric("a b-c", 7, 0, "tokens"), "a_b_c", "gauge", 7),
        (lambda metrics: metrics.add_metric("7up", 7, None, "count"), "_7up", "counter", 7),
        (lambda metrics: metrics.add_metric("x", 7, "Milliseconds", 0), "x_seconds", "counter", 0.007),
        (lambda metrics: metrics.add_metric("x", 7, "", 0, [], MetricTypes.GAUGE), "x", "gauge", 7),
        (lambda metrics: metrics.add_metric("x", 7, unit="MB", metric_type="HISTOGRAM"), "x_bytes", "histogram", 7e6),
    ],
)
def test_calls_in_both_dialects(call: Callable[[Metrics], None], name: str, kind: str, value: float) -> None:
    metrics = Metrics()
    call(metrics)
    assert seen(metrics) == {(name, kind, ()): value}


def test_counters_add_up_gauges_keep_the_latest_and_times_fall_into_buckets() -> None:
    metrics = Metrics()
    for value in (1, 2, 4):
        metrics.add_counter("c", value)
        metrics.add_size("g", value, unit="B")
        metrics.add_time("t", value)
    found = {series.name: series for series in metrics.take().series}
    assert (found["c"].value, found["g_bytes"].value) == (7, 4)
    counts = dict(zip(SECONDS, found["t_seconds"].counts, strict=False))
    assert (counts[0.001], counts[0.0025], counts[0.005]) == (1, 1, 1)
    assert not metrics.changed and seen(metrics) == {}
    metrics.add_counter("c", 1)
    assert seen(metrics) == {("c", "counter", ()): 1}, "only what was added since"


@pytest.mark.parametrize(
    "dimensions",
    [
        [Dimension("Animal", "cat"), Dimension("model", 3)],
        [Dimension("model", "3"), Dimension("Animal", "cat")],
        {"Animal": "cat", "model": 3},
    ],
)
def test_dimensions_are_labels_and_those_of_the_server_are_set_apart(dimensions: Any) -> None:
    metrics = Metrics()
    metrics.add_counter("c", 1, None, dimensions)
    assert seen(metrics) == {("c", "counter", ("Animal", "cat", "exported_model", "3")): 1}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda metrics: metrics.add_time("x", 1, unit="min"), ValueError, "the unit is one of ms, s, not 'min'"),
        (lambda metrics: metrics.add_size("x", 1, unit="ms"), ValueError, "the unit is one of B, kB, MB, GB"),
        (lambda metrics: metrics.add_metric("x", 1), TypeError, "add_metric needs a unit, such as 'count'"),
        (lambda metrics: metrics.add_counter("x", "1"), TypeError, "metric x: the value '1' is no number"),
        (lambda metrics: metrics.add_counter("x", None), TypeError, "a value of type NoneType is no number"),
        (lambda metrics: metrics.add_counter(7, 1), TypeError, "name and unit are strings"),
        (lambda metrics: metrics.add_counter("", 1), ValueError, "cannot be called ''"),
        (lambda metrics: metrics.add_counter("mms_requests", 1), ValueError, "begin with mms_, process_, python_ are"),
        (lambda metrics: metrics.add_metric("x", 1, unit="B", metric_type="sum"), ValueError, "the type is counter,"),
        (lambda metrics: metrics.add_counter("x", 1, None, ["Level"]), ValueError, "a list of Dimension, or a dict"),
        (lambda metrics: metrics.add_counter("x", 1, None, {"": 1}), ValueError, "a dimension cannot be called"),
        (lambda metrics: metrics.add_counter("x", 1, None, {"a-b": 1, "a.b": 2}), ValueError, "with different names"),
        (lambda metrics: metrics.get_metric("x"), KeyError, "no counter x; add_metric_to_cache makes it"),
    ],
)
def test_what_is_no_metric_is_refused(call: Callable[[Metrics], None], error: type[Exception], text: str) -> None:
    metrics = Metrics()
    with pytest.raises(error, match=text):
        call(metrics)
    assert seen(metrics) == {}


def test_a_metric_that_would_be_taken_for_another_is_refused() -> None:
    metrics = Metrics()
    metrics.add_time("x", 1)
    with pytest.raises(ValueError, match="the gauge x_seconds_sum cannot be told from the duration x_seconds"):
        metrics.add_metric("x_seconds_sum", 1, unit="")
    metrics.add_counter("x", 1)
    assert set(seen(metrics)) == {("x_seconds", "duration", ()), ("x", "counter", ())}


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_a_value_that_cannot_be_counted_is_left_out_and_told_once(
    value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.add_counter("c", value)
    assert seen(metrics) == {}
    assert capsys.readouterr().err == f"context.metrics: {value:g} cannot be counted as the counter c; it is left out\n"


def test_a_metric_object_counts_by_the_values_of_its_dimensions(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics()
    made = metrics.add_metric_to_cache("Hits", "count", ["ModelName", "Level"], MetricTypes.COUNTER)
    assert metrics.get_metric("Hits") is made
    made.add_or_update(2, ["cat", "Model"], "id-1")
    made.add_or_update(1, ["cat"])
    assert seen(metrics) == {("Hits", "counter", ("Level", "Model", "ModelName", "cat")): 2}
    assert "has the dimensions ['ModelName', 'Level'], but 1 values came" in capsys.readouterr().err
    metrics.add_percent("Load", 1)
    metrics.get_metric("Load", MetricTypes.GAUGE).update(20)
    assert seen(metrics) == {("Load_ratio", "gauge", ()): 0.2}


def test_a_worker_remembers_no_more_series_than_are_shown() -> None:
    metrics = Metrics()
    for number in range(MAX_SERIES * 2):
        metrics.add_counter("c", 1, None, {"id": number})
    assert len(metrics.take().series) == MAX_SERIES + 1, "the front end hears that there are more"


def test_names_of_mms_and_torchserve_can_be_imported() -> None:
    oldnames.provide()
    for root in ("mms", "ts"):
        dimension = importlib.import_module(f"{root}.metrics.dimension").Dimension("a", 1)
        assert (dimension.name, dimension.value, str(dimension)) == ("a", 1, "a:1")
        assert importlib.import_module(f"{root}.metrics.unit").Units().units["ms"] == "Milliseconds"


def test_the_frame_survives_the_trip() -> None:
    metrics = Metrics()
    metrics.add_time("t", 5, None, "ms", {"a": "b"})
    sent = metrics.take()
    assert wire.decode(wire.Measured, wire.encode(sent)) == sent
