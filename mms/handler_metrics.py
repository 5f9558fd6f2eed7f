"""`context.metrics`: what a handler counts and measures, by the names that MMS and TorchServe gave it.

Runs in the worker process. What is added is gathered here and leaves with the next answers; request ids (`idx`,
`request_id`) are accepted for their sake and have no meaning: no metric has a label per request.
"""

from __future__ import annotations

import enum
import math
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mms import wire
from mms.measures import (
    KINDS,
    MAX_LABEL_VALUE,
    MAX_LABELS,
    MAX_SERIES,
    Histogram,
    claims,
    cost,
    label_name,
    metric_name,
)

# base unit, and what a value is multiplied with and divided by to be in it
_TIMES = {"ms": ("seconds", 1, 1000), "s": ("seconds", 1, 1)}
_SIZES = {"B": ("bytes", 1, 1), "kB": ("bytes", 10**3, 1), "MB": ("bytes", 10**6, 1), "GB": ("bytes", 10**9, 1)}
_NAMES = {
    "ms": "Milliseconds", "s": "Seconds", "percent": "Percent", "count": "Count", "MB": "Megabytes", "GB": "Gigabytes",
    "kB": "Kilobytes", "B": "Bytes", "": "unit",
}  # fmt: skip
_LONG = {name: unit for unit, name in _NAMES.items()}
_UNITS = {**_TIMES, **_SIZES, "percent": ("ratio", 1, 100)}
_PLAIN = ("", 1, 1)  # counts, and units that only the handler knows

_MAX_NOTICES = 100


class MetricTypes(enum.Enum):
    """TorchServe's names for what a metric is; the words themselves are accepted as well."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Dimension:
    """A name and a value: a label."""

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.value = value

    def __str__(self) -> str:
        return f"{self.name}:{self.value}"


class Units:
    """The units and what MMS and TorchServe call them; either is accepted."""

    def __init__(self) -> None:
        self.units: dict[str | None, str] = {None: "unit"}
        self.units.update(_NAMES)


class _Named(Protocol):
    """A Dimension, of whatever package."""

    name: str
    value: Any


Dimensions = Mapping[str, Any] | Sequence[_Named] | None


class _Series:
    """One metric with one set of labels: what was added since it was last sent."""

    __slots__ = ("changed", "histogram", "kind", "labels", "name", "value")

    def __init__(self, name: str, kind: str, labels: tuple[str, ...]) -> None:
        self.name = name
        self.kind = kind
        self.labels = labels
        self.value = 0.0
        self.histogram = Histogram(KINDS[kind]) if KINDS[kind] else None
        self.changed = False

    def add(self, value: float) -> None:
        if self.histogram is not None:
            self.histogram.observe(value)
        elif self.kind == "counter":
            self.value += value
        else:
            self.value = value

    def take(self) -> wire.Series:
        self.changed = False
        histogram = self.histogram
        if histogram is not None:
            self.histogram = Histogram(histogram.bounds)
            return wire.Series(self.name, self.kind, self.labels, histogram.total, histogram.counts)
        value = self.value
        self.value = 0.0
        return wire.Series(self.name, self.kind, self.labels, value, [])


class Metrics:
    """The handler's own metrics. They are in /metrics once the batch in hand is answered.

    What is no metric (a wrong unit or type, a value that is no number) raises; a value that cannot be counted (negative
    for a counter or a time, infinite, not a number) is left out, which the model's log says once.
    """

    def __init__(self) -> None:
        self.changed: list[_Series] = []  # what there is to send
        self._by_call: dict[tuple[Any, ...], tuple[_Series, int, int]] = {}  # a handler mostly repeats itself
        self._series: dict[tuple[str, tuple[str, ...]], _Series] = {}
        self._kinds: dict[str, tuple[str, str]] = {}  # kind and metric by each name taken in /metrics
        self._cache: dict[tuple[str, str], Metric] = {}  # by type and the handler's name
        self._cost = 0
        self._told: set[str] = set()
        self._lock = threading.Lock()  # a handler may have threads

    def add_counter(self, name: str, value: float, idx: Any = None, dimensions: Dimensions = None) -> None:
        """Count `value` more."""
        self.add(name, value, "count", "counter", dimensions)

    def add_time(
        self,
        name: str,
        value: float,
        idx: Any = None,
        unit: str = "ms",
        dimensions: Dimensions = None,
        metric_type: Any = "histogram",
    ) -> None:
        """A duration in `ms` or `s`, as a histogram of seconds. Raises ValueError."""
        _one_of(name, unit, _TIMES)
        self.add(name, value, unit, metric_type, dimensions)

    def add_size(
        self,
        name: str,
        value: float,
        idx: Any = None,
        unit: str = "MB",
        dimensions: Dimensions = None,
        metric_type: Any = "gauge",
    ) -> None:
        """A size in `B`, `kB`, `MB` or `GB` (powers of 1000), as a gauge of bytes. Raises ValueError."""
        _one_of(name, unit, _SIZES)
        self.add(name, value, unit, metric_type, dimensions)

    def add_percent(
        self, name: str, value: float, idx: Any = None, dimensions: Dimensions = None, metric_type: Any = "gauge"
    ) -> None:
        """A percentage, as a gauge of the ratio: 50 is shown as 0.5."""
        self.add(name, value, "percent", metric_type, dimensions)

    def add_error(self, name: str, value: float | str, dimensions: Dimensions = None) -> None:
        """Count `value` errors, or one, whose text goes to the model's log."""
        if isinstance(value, str):
            sys.stderr.write(f"{name}: {value}\n")
            value = 1
        self.add(name, value, "", "counter", dimensions)

    def add_metric(
        self,
        name: str,
        value: float,
        idx: Any = None,
        unit: Any = None,
        dimensions: Dimensions = None,
        metric_type: Any = None,
    ) -> None:
        """A metric of any unit; without a type, a counter if the unit is `count`, else a gauge.

        In TorchServe's order the unit comes third, before `idx`, and a counter is the default. Raises TypeError.
        """
        default = "gauge"
        if isinstance(idx, str) and not isinstance(unit, str):
            unit, default = idx, "counter"
        if not isinstance(unit, str):
            raise TypeError(f"metric {name}: add_metric needs a unit, such as 'count', 'ms', 'MB' or 'percent'")
        if unit in ("count", "Count"):
            default = "counter"
        self.add(name, value, unit, default if metric_type is None else metric_type, dimensions)

    def add_metric_to_cache(
        self,
        metric_name: str,
        unit: str,
        dimension_names: Sequence[str] = (),
        metric_type: Any = MetricTypes.COUNTER,
    ) -> Metric:
        """A metric to be updated by values of its dimensions. Raises TypeError and ValueError."""
        metric = Metric(self, metric_name, unit, list(dimension_names), metric_type)
        with self._lock:
            self._claim(*_family(metric_name, unit, _type(metric_name, metric_type))[:2])
            self._cache[_type(metric_name, metric_type), metric_name] = metric
        return metric

    def get_metric(self, metric_name: str, metric_type: Any = MetricTypes.COUNTER) -> Metric:
        """A metric that was added before. Raises KeyError."""
        kind = _type(metric_name, metric_type)
        metric = self._cache.get((kind, metric_name))
        if metric is None:
            raise KeyError(f"no {kind} {metric_name}; add_metric_to_cache makes it")
        return metric

    def add(self, name: str, value: Any, unit: str, metric_type: Any, dimensions: Dimensions) -> None:
        """What all the others come to. Raises TypeError and ValueError."""
        if isinstance(value, str | bytes):
            raise TypeError(f"metric {name}: the value {value[:50]!r} is no number")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise TypeError(f"metric {name}: a value of type {type(value).__name__} is no number") from None
        call = (name, unit, metric_type, *_pairs(name, dimensions))
        with self._lock:
            known = self._by_call.get(call) or self._first(call)
            if known is None:
                return
            series, times, by = known
            if not math.isfinite(number) or (number < 0 and series.kind not in ("gauge", "histogram")):
                return self.tell(f"{number:g} cannot be counted as the {series.kind} {name}")
            series.add(number * times / by)
            if not series.changed:
                series.changed = True
                self.changed.append(series)

    def tell(self, notice: str) -> None:
        """Say it in the model's log, once."""
        if notice not in self._told and len(self._told) < _MAX_NOTICES:
            self._told.add(notice)
            sys.stderr.write(f"context.metrics: {notice}; it is left out\n")

    def take(self) -> wire.Measured:
        """What was added since the last call."""
        with self._lock:
            changed, self.changed = self.changed, []
            return wire.Measured([series.take() for series in changed])

    def _first(self, call: tuple[Any, ...]) -> tuple[_Series, int, int] | None:
        """A call that was not made before; None when there are too many series already."""
        # one series more than the front end keeps: so it hears of it, and says so
        if self._cost > MAX_SERIES or len(self._by_call) > MAX_SERIES:
            return None
        name, unit, metric_type, *pairs = call
        kind_of = _type(name, metric_type)
        family, kind, times, by = _family(name, unit, kind_of)
        labels: dict[str, str] = {label_name(key): value[:MAX_LABEL_VALUE] for key, value in pairs}
        if len(labels) != len(pairs) or len(labels) > MAX_LABELS:
            raise ValueError(
                f"metric {name}: {len(pairs)} dimensions; up to {MAX_LABELS} with different names are allowed"
            )
        self._claim(family, kind)
        flat = tuple(word for pair in sorted(labels.items()) for word in pair)
        series = self._series.get((family, flat))
        if series is None:
            series = self._series[family, flat] = _Series(family, kind, flat)
            self._cost += cost(kind)
            if (kind_of, name) not in self._cache:
                self._cache[kind_of, name] = Metric(self, name, unit, [key for key, _ in pairs], metric_type)
        self._by_call[call] = series, times, by
        return series, times, by

    def _claim(self, family: str, kind: str) -> None:
        """Two metrics whose lines in /metrics would be taken for each other's are one too many. Raises ValueError."""
        names = claims(family, kind)
        for name in names:
            if self._kinds.get(name, (kind, family)) != (kind, family):
                taken_kind, taken = self._kinds[name]
                raise ValueError(
                    f"the {kind} {family} cannot be told from the {taken_kind} {taken}; rename one of them"
                )
        self._kinds.update(dict.fromkeys(names, (kind, family)))


class Metric:
    """A metric by name, as TorchServe hands it out."""

    def __init__(self, metrics: Metrics, metric_name: str, unit: str, dimension_names: list[str], metric_type: Any):
        self.metric_name = metric_name
        self.unit = unit
        self.dimension_names = dimension_names
        self.metric_type = metric_type
        self._metrics = metrics

    def add_or_update(self, value: float, dimension_values: Sequence[Any] = (), request_id: str = "") -> None:
        """Count or set `value`; the values of the dimensions in the order of their names."""
        if len(dimension_values) != len(self.dimension_names):
            self._metrics.tell(
                f"{self.metric_name} has the dimensions {self.dimension_names}, but {len(dimension_values)} values came"
            )
            return
        dimensions = dict(zip(self.dimension_names, dimension_values, strict=True))
        self._metrics.add(self.metric_name, value, self.unit, self.metric_type, dimensions)

    def update(self, value: float, request_id: str = "", dimensions: Dimensions = None) -> None:
        """The same with dimensions of its own."""
        self._metrics.add(self.metric_name, value, self.unit, self.metric_type, dimensions)


def _pairs(name: str, dimensions: Dimensions) -> list[tuple[str, str]]:
    if not dimensions:
        return []
    if isinstance(dimensions, Mapping):
        return [(str(key), str(value)) for key, value in dimensions.items()]
    try:
        return [(str(dimension.name), str(dimension.value)) for dimension in dimensions]
    except (AttributeError, TypeError):
        raise ValueError(f"metric {name}: dimensions are a list of Dimension, or a dict") from None


def _one_of(name: str, unit: Any, units: Mapping[str, Any]) -> None:
    if _LONG.get(unit, unit) not in units:
        raise ValueError(f"metric {name}: the unit is one of {', '.join(units)}, not {unit!r}")


def _type(name: str, metric_type: Any) -> str:
    kind = str(getattr(metric_type, "value", metric_type)).lower()
    if kind not in ("counter", "gauge", "histogram"):
        raise ValueError(f"metric {name}: the type is counter, gauge or histogram, not {metric_type!r}")
    return kind


def _family(name: str, unit: str, kind: str) -> tuple[str, str, int, int]:
    """The metric's name and kind in /metrics, and how its values get there."""
    if not isinstance(name, str) or not isinstance(unit, str):
        raise TypeError(f"metric {name!r}: name and unit are strings")
    base, times, by = _UNITS.get(_LONG.get(unit, unit), _PLAIN)
    if kind == "histogram" and base == "seconds":
        kind = "duration"
    return metric_name(name.removesuffix("_total") if kind == "counter" else name, base), kind, times, by
