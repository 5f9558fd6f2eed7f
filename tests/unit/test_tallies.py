"""What handlers have counted, added up in the front end: sums, bounds, frames that no honest worker sends, the text."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from mms.errors import FrameError
from mms.measures import MAX_SERIES, SECONDS, cost
from mms.tallies import Tallies, families

NO_COUNTS = [0] * (len(SECONDS) + 1)
ONE_QUICK = [1, *NO_COUNTS[1:]]


class Scraped:
    """A collector of what is given."""

    def __init__(self, *tallies: Tallies) -> None:
        self._tallies = tallies

    def collect(self) -> list[Metric]:
        return list(families(("cat", f"{number}.0", tallies) for number, tallies in enumerate(self._tallies, 1)))


def scrape(*tallies: Tallies) -> dict[str, float]:
    """The samples by name and labels, the same from both formats; each tallies is a version of the model cat."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Scraped(*tallies))
    text = generate_openmetrics(registry).decode()  # type: ignore[no-untyped-call]  # not typed in the library
    list(parse_openmetrics(text))  # type: ignore[no-untyped-call]  # nor is this
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            assert f"{sample.name} {labels}" not in found
            found[f"{sample.name} {labels}"] = sample.value
    return found


def test_workers_are_added_up_and_of_a_gauge_the_latest_value_counts() -> None:
    tallies = Tallies("cat 1.0")
    for value in (2.0, 3.0):
        tallies.add("hits", "counter", ("animal", 'a "dog"\n'), value, [])
        tallies.add("size_bytes", "gauge", (), value, [])
        tallies.add("look_seconds", "duration", (), value / 10000, ONE_QUICK)
    found = scrape(tallies)
    assert found['hits_total animal=a "dog"\n,model=cat,version=1.0'] == 5
    assert found["size_bytes model=cat,version=1.0"] == 3
    assert found["look_seconds_count model=cat,version=1.0"] == 2
    assert found["look_seconds_bucket le=0.0005,model=cat,version=1.0"] == 2
    assert found["look_seconds_sum model=cat,version=1.0"] == pytest.approx(0.0005)


def test_versions_stand_side_by_side_also_with_other_labels() -> None:
    first, second = Tallies("cat 1.0"), Tallies("cat 2.0")
    first.add("hits", "counter", ("a", "b"), 1, [])
    second.add("hits", "counter", (), 2, [])
    assert scrape(first, second) == {
        "hits_total a=b,model=cat,version=1.0": 1,
        "hits_total model=cat,version=2.0": 2,
    }


@pytest.mark.parametrize(("name", "kind"), [("hits", "gauge"), ("hits_total", "gauge"), ("hits", "duration")])
def test_of_two_kinds_by_one_name_the_first_is_shown(name: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Tallies("cat 1.0"), Tallies("cat 2.0")
    first.add("hits", "counter", (), 1, [])
    second.add(name, kind, (), 2, NO_COUNTS if kind == "duration" else [])
    with caplog.at_level(logging.WARNING, "mms.metrics"):
        assert scrape(first, second) == scrape(first, second) == {"hits_total model=cat,version=1.0": 1}
    (record,) = caplog.records
    assert (
        record.getMessage() == f"model cat 2.0: its handler's {kind} {name} is not shown: another metric has that name"
    )


@pytest.mark.parametrize("kind", ["counter", "duration"])
def test_series_are_bounded_and_those_there_are_go_on(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    tallies = Tallies("cat 1.0")
    counts = NO_COUNTS if kind == "duration" else []
    with caplog.at_level(logging.WARNING, "mms.metrics"):
        for number in range(MAX_SERIES + 10):
            tallies.add("hits", kind, ("id", str(number)), 1, counts)
    tallies.add("hits", kind, ("id", "0"), 1, counts)
    assert len(tallies.values) + len(tallies.histograms) == MAX_SERIES // cost(kind)
    assert len(scrape(tallies)) <= MAX_SERIES
    (record,) = caplog.records
    assert "further sets of dimensions, such as one of hits, are left out" in record.getMessage()


@pytest.mark.parametrize(
    "series",
    [
        ("hits", "summary", (), 1.0, []),
        ("a b", "counter", (), 1.0, []),
        ("a" * 300, "counter", (), 1.0, []),
        ("mms_requests", "counter", (), 1.0, []),
        ("hits", "counter", ("a",), 1.0, []),
        ("hits", "counter", ("a}", "b"), 1.0, []),
        ("hits", "counter", ("a", "b", "a", "c"), 1.0, []),
        ("hits", "counter", ("model", "dog"), 1.0, []),
        ("hits", "counter", ("a", "b" * 300), 1.0, []),
        ("hits", "counter", tuple(f"a{number}" for number in range(40)), 1.0, []),
        ("hits", "counter", (), -1.0, []),
        ("hits", "counter", (), float("inf"), []),
        ("hits", "gauge", (), float("nan"), []),
        ("hits", "gauge", (), 1.0, [1]),
        ("hits", "duration", (), 1.0, []),
        ("hits", "duration", (), 1.0, [-1, *NO_COUNTS[1:]]),
        ("hits", "duration", (), -1.0, NO_COUNTS),
    ],
)
def test_what_no_honest_worker_sends_is_a_frame_error(series: Any) -> None:
    with pytest.raises(FrameError):
        Tallies("cat 1.0").add(*series)
