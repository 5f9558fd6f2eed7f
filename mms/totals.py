"""What all front ends have counted, added up: the main process's part, and what the others have told. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from mms.fronts import Counted, Counts
from mms.metrics import FrontEndFacts, VersionFacts, VersionMetrics


class Totals:
    """`told` are the latest counts of the other front ends; of those that have ended, the last ones are kept."""

    def __init__(self, told: Callable[[], Iterable[Counts]]) -> None:
        self._told = told
        self._past: dict[int, VersionMetrics] = {}
        self._past_cancelled: Counter[int] = Counter()
        self._past_retries: Counter[int] = Counter()
        self._past_failures: Counter[tuple[int, str]] = Counter()

    def waiting(self, number: int) -> int:
        """Requests to that version that wait for a worker in other front ends."""
        return sum(each.queue_depth for each in self._counted(number))

    def version(self, own: VersionFacts, number: int, front_ends: int) -> VersionFacts:
        counted = self._counted(number)
        metrics = own.metrics.copy()
        for parts in (each.parts for each in counted):
            metrics.add(*parts)
        if number in self._past:
            metrics.add(*self._past[number].parts())
        return replace(
            own,
            metrics=metrics,
            queue_depth=own.queue_depth + sum(each.queue_depth for each in counted),
            queue_capacity=own.queue_capacity * front_ends,
            queue_bytes=own.queue_bytes + sum(each.queue_bytes for each in counted),
            newest_first=own.newest_first or any(each.newest_first for each in counted),
            drain_rate=own.drain_rate + sum(each.drain_rate for each in counted),
            cancelled=own.cancelled + self._past_cancelled[number] + sum(each.cancelled for each in counted),
            retries=own.retries + self._past_retries[number] + sum(each.retries for each in counted),
            in_flight=own.in_flight + sum(each.in_flight for each in counted),
        )

    def front_ends(self, own: FrontEndFacts) -> FrontEndFacts:
        told = list(self._told())
        return FrontEndFacts(
            own.connections + sum(each.connections for each in told),
            own.bytes_in_flight + sum(each.bytes_in_flight for each in told),
            max([own.shedding_step, *(each.shedding_step for each in told)]),
        )

    def failures(self, own: Mapping[tuple[int, str], int]) -> Mapping[tuple[int, str], int]:
        """Of requests that reached no model, by status and cause."""
        found = Counter(own) + self._past_failures
        for each in self._told():
            found.update(_failures(each))
        return found

    def keep(self, counts: Counts) -> None:
        """The front end that told them has ended."""
        self._past_failures.update(_failures(counts))
        for number, counted in counts.versions.items():
            self._past.setdefault(number, VersionMetrics()).add(*counted.parts)
            self._past_cancelled[number] += counted.cancelled
            self._past_retries[number] += counted.retries

    def forget(self, number: int) -> None:
        """That version is not shown any more."""
        self._past.pop(number, None)
        del self._past_cancelled[number], self._past_retries[number]

    def _counted(self, number: int) -> list[Counted]:
        return [each.versions[number] for each in self._told() if number in each.versions]


def _failures(counts: Counts) -> dict[tuple[int, str], int]:
    return {(status, cause): count for status, cause, count in counts.failures}
