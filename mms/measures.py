"""What handlers count and measure with `context.metrics`: kinds, names, bounds. Used by both processes.

A series is one metric with one set of labels. A worker gathers what is added to its series and sends that on; the front
end adds it up and shows it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence

SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0,
)  # fmt: skip
DECADES = tuple(10.0**power for power in range(-3, 10))

# the kinds of metrics, with the buckets of those that have any
KINDS: dict[str, tuple[float, ...]] = {"counter": (), "gauge": (), "duration": SECONDS, "histogram": DECADES}

MAX_SERIES = 1000  # lines in /metrics that the handlers of one model version may fill
MAX_LABELS = 16
MAX_LABEL_VALUE = 200  # characters

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OURS = ("mms_", "process_", "python_")  # beginnings of the server's own names
_LABELS_OF_OURS = ("model", "version", "le", "quantile")


class Histogram:
    """Counts per bucket; not cumulative until it is shown."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_since(self, moments: Sequence[float], total: float, now: float) -> None:
        """As `observe` for each of the times from these moments until now. There is at least one, the earliest is the
        first, and `total` is their sum.
        """
        rest = len(moments)
        if rest == 1:
            self.observe(now - total)
            return
        self.total += rest * now - total
        bounds, counts = self.bounds, self.counts
        bucket, longest = bisect_left(bounds, now - moments[-1]), bisect_left(bounds, now - moments[0])
        while bucket < longest:
            earlier = bisect_left(moments, now - bounds[bucket], 0, rest)
            counts[bucket] += rest - earlier
            rest = earlier
            bucket += 1
        counts[longest] += rest

    def observe_all(self, values: Sequence[float]) -> None:
        """As `observe` for each of at least one: what one frame brings mostly falls into one bucket."""
        self.total += sum(values)
        bounds, counts = self.bounds, self.counts
        low = bisect_left(bounds, min(values))
        if low == bisect_left(bounds, max(values)):
            counts[low] += len(values)
        else:
            for value in values:
                counts[bisect_left(bounds, value)] += 1

    def add(self, counts: Sequence[int], total: float) -> None:
        """Take over what a histogram with the same bounds has counted."""
        self.counts = [own + other for own, other in zip(self.counts, counts, strict=True)]
        self.total += total

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, as Prometheus wants them."""
        from prometheus_client.utils import floatToGoString  # workers do without

        shown, running = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += count
            name = str(floatToGoString(bound))  # type: ignore[no-untyped-call]  # not typed in the library
            shown.append((name, float(running)))
        return shown


def is_name(text: str) -> bool:
    """Whether a metric or a label of a handler may be called so."""
    return _NAME.fullmatch(text) is not None and len(text) <= MAX_LABEL_VALUE


def is_ours(name: str) -> bool:
    """Whether this is a name of the server's own metrics, present or future."""
    return name.startswith(_OURS)


def metric_name(text: str, unit: str) -> str:
    """A handler's name for a metric as Prometheus allows it, its base unit last. Raises ValueError."""
    name = _allowed(text)
    if unit and not name.endswith(f"_{unit}"):
        name = f"{name}_{unit}"
    if is_ours(name):
        raise ValueError(f"metric {name[:MAX_LABEL_VALUE]}: names that begin with {', '.join(_OURS)} are the server's")
    if not is_name(name):
        raise ValueError(f"a metric cannot be called {text[:MAX_LABEL_VALUE]!r}")
    return name


def label_name(text: str) -> str:
    """A handler's name for a dimension as Prometheus allows it; one of the server's own labels is set apart.

    Raises ValueError.
    """
    name = _allowed(text)
    if name in _LABELS_OF_OURS or name.startswith("__"):
        name = f"exported_{name.lstrip('_')}"  # as Prometheus does when labels of a target clash
    if not is_name(name):
        raise ValueError(f"a dimension cannot be called {text[:MAX_LABEL_VALUE]!r}")
    return name


def claims(name: str, kind: str) -> frozenset[str]:
    """The names that a metric takes in /metrics, in both formats; no other metric can have one of them."""
    endings = ("total", "created") if kind == "counter" else ("bucket", "sum", "count", "created")
    return frozenset({name, *(f"{name}_{ending}" for ending in endings if kind != "gauge")})


def cost(kind: str) -> int:
    """How many lines a series of this kind fills."""
    return len(KINDS[kind]) + 3 if KINDS[kind] else 1


def _allowed(text: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_]", "_", text)
    return f"_{name}" if name[:1].isdigit() else name
