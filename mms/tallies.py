"""What the handlers of each model version have counted and measured, added up, and its Prometheus form.

Front end's process: what a handler's worker has sent stays when the worker dies.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator

from prometheus_client.core import Metric

from mms.errors import FrameError
from mms.measures import KINDS, MAX_LABEL_VALUE, MAX_LABELS, MAX_SERIES, Histogram, claims, cost, is_name, is_ours

log = logging.getLogger("mms.metrics")

Key = tuple[str, str, tuple[str, ...]]  # name, kind, labels (name, value, name, value, ...)


class Tallies:
    """The series of one model version. The front end's event loop is the only writer."""

    def __init__(self, label: str) -> None:
        self.values: dict[Key, float] = {}
        self.histograms: dict[Key, Histogram] = {}
        self._label = label
        self._lines = 0
        self._told: set[str] = set()

    def add(self, name: str, kind: str, labels: tuple[str, ...], value: float, counts: list[int]) -> None:
        """What a worker has added to one series. Raises FrameError: handlers' code could have written the frame."""
        key = name, kind, labels
        if key not in self.values and key not in self.histograms and not self._room(key):
            return
        histogram = self.histograms.get(key)
        fits = len(counts) == (len(histogram.counts) if histogram else 0) and not any(count < 0 for count in counts)
        if not fits or not math.isfinite(value) or (kind in ("counter", "duration") and value < 0):
            raise FrameError(f"a handler's {kind} {name} with a value that cannot be added")
        if histogram is not None:
            histogram.add(counts, value)
        elif kind == "counter":
            self.values[key] += value
        else:
            self.values[key] = value

    def tell(self, subject: str, notice: str) -> None:
        """Say it in the log, once per subject."""
        if subject not in self._told:
            self._told.add(subject)
            log.warning("model %s: %s", self._label, notice)

    def _room(self, key: Key) -> bool:
        """Make place for a series that is new, unless there are too many."""
        name, kind, labels = key
        names = labels[::2]
        if (
            kind not in KINDS
            or not is_name(name)
            or is_ours(name)
            or len(labels) % 2
            or len(names) > MAX_LABELS
            or len(set(names)) != len(names)
            or not all(is_name(label) and label not in ("model", "version", "le") for label in names)
            or any(len(value) > MAX_LABEL_VALUE for value in labels)
        ):
            raise FrameError(f"a handler's metric that cannot be shown: {kind[:20]} {name[:100]!r}")
        if self._lines + cost(kind) > MAX_SERIES:
            self.tell(
                "",
                f"its handler's metrics fill {self._lines} of {MAX_SERIES} lines; further sets of dimensions, "
                f"such as one of {name}, are left out",
            )
            return False
        self._lines += cost(kind)
        if KINDS[kind]:
            self.histograms[key] = Histogram(KINDS[kind])
        else:
            self.values[key] = 0.0
        return True


def families(versions: Iterable[tuple[str, str, Tallies]]) -> Iterator[Metric]:
    """The handlers' metrics of (model, version, tallies). Of two that share a name but not a kind, the first."""
    found: dict[tuple[str, str], Metric] = {}
    taken: set[str] = set()
    for model, version, tallies in versions:
        for key in [*tallies.values, *tallies.histograms]:
            name, kind, labels = key
            family = found.get((name, kind))
            if family is None:
                names = claims(name, kind)
                if not taken.isdisjoint(names):
                    tallies.tell(name, f"its handler's {kind} {name} is not shown: another metric has that name")
                    continue
                taken |= names
                family = found[name, kind] = _family(name, kind)
            shown = {"model": model, "version": version, **dict(zip(labels[::2], labels[1::2], strict=True))}
            if kind == "counter":
                family.add_sample(f"{name}_total", shown, tallies.values[key])
            elif kind == "gauge":
                family.add_sample(name, shown, tallies.values[key])
            else:
                _show(family, shown, tallies.histograms[key])
    return iter(found.values())


def _family(name: str, kind: str) -> Metric:
    shown = "histogram" if KINDS[kind] else kind
    verb = "Counted" if kind == "counter" else "Measured"
    return Metric(name, f"{verb} by the model's handler.", shown)


def _show(family: Metric, labels: dict[str, str], histogram: Histogram) -> None:
    buckets = histogram.buckets()
    for bound, count in buckets:
        family.add_sample(f"{family.name}_bucket", {**labels, "le": bound}, count)
    family.add_sample(f"{family.name}_count", labels, buckets[-1][1])
    family.add_sample(f"{family.name}_sum", labels, histogram.total)
