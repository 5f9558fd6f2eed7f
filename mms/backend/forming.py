"""What a pipeline may run, and which of it makes up the next batch. Runs in the worker process.

The rules are those of the front end's queue (workers/batching), for requests that are prepared. Neither threads nor
I/O: the pipeline holds its lock around all of it, and passes the clock in (monotonic seconds).
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from operator import attrgetter

from mms.backend.sources import Source, Ticket

_RANK = attrgetter("rank")


class Ready:
    """The requests that may run, in a line for each front end and bucket."""

    def __init__(self) -> None:
        self._lines: dict[tuple[Source, object], _Line] = {}

    def __bool__(self) -> bool:
        return bool(self._lines)

    def add(self, ticket: Ticket) -> None:
        key = ticket.source, ticket.prepared.bucket if ticket.prepared is not None else None
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(ticket.source)
        line.add(ticket)

    def take(self, now: float, *, coming: bool) -> tuple[list[Ticket], list[Ticket]]:
        """A batch, and those for which nobody waits any more; the batch is empty while all wait for fuller ones.

        `coming`: the worker has requests that are not prepared yet.
        """
        gone: list[Ticket] = []
        for key, line in sorted(self._lines.items(), key=_first_rank):
            if line.goes_at(coming) > now:
                continue
            dropped = line.drop_gone()
            gone += dropped
            batch = line.take() if not dropped or line.goes_at(coming) <= now else []
            if not line.tickets:
                del self._lines[key]
            if batch:
                return batch, gone
        return [], gone

    def goes_at(self, coming: bool) -> float | None:
        """When the next batch runs if no other request comes; None if there is none."""
        return min([line.goes_at(coming) for line in self._lines.values()], default=None)


class _Line:
    """Requests that may share a batch, by rank; some may have gone meanwhile."""

    __slots__ = ("_arrived", "_received", "_source", "tickets")

    def __init__(self, source: Source) -> None:
        self.tickets: deque[Ticket] = deque()
        self._source = source
        self._arrived = self._received = math.inf  # the earliest: at the front end, here

    def add(self, ticket: Ticket) -> None:
        line_up(self.tickets, ticket)
        if ticket.arrived < self._arrived:
            self._arrived = ticket.arrived
        if ticket.received < self._received:
            self._received = ticket.received

    def goes_at(self, coming: bool) -> float:
        """When its next batch runs if nothing is added; the past if it is to run at once.

        An idle worker was sent what it has after the front end's wait: then it waits for what is being prepared, too.
        """
        forming = self._source.forming
        if forming is None or not forming.delay or len(self.tickets) >= self._size():
            return 0.0
        return (self._received if coming else self._arrived) + forming.delay

    def drop_gone(self) -> list[Ticket]:
        source, tickets = self._source, self.tickets
        cancelled = source.cancelled.look()
        if not cancelled and not source.gone:
            return []
        gone = [ticket for ticket in tickets if source.gone or ticket.id in cancelled]
        if gone:
            self._keep([ticket for ticket in tickets if not (source.gone or ticket.id in cancelled)])
        return gone

    def take(self) -> list[Ticket]:
        """A batch of those that are here."""
        tickets = list(self.tickets)
        size = self._size()
        self._keep(tickets[size:])
        return tickets[:size]

    def _keep(self, tickets: list[Ticket]) -> None:
        self.tickets = deque(tickets)
        if tickets:
            self._arrived = min([ticket.arrived for ticket in tickets])
            self._received = min([ticket.received for ticket in tickets])

    def _size(self) -> int:
        """Of a batch: the largest preferred size for which enough are here, else as many as may be in one."""
        source, count = self._source, len(self.tickets)
        if source.forming is not None:
            for preferred in source.forming.preferred:
                if preferred <= source.batch_size and preferred <= count:
                    return preferred
        return source.batch_size


def line_up(line: deque[Ticket], ticket: Ticket) -> None:
    """By rank; mostly it is the last."""
    if line and ticket.rank < line[-1].rank:
        bisect.insort(line, ticket, key=_RANK)
    else:
        line.append(ticket)


def _first_rank(line: tuple[object, _Line]) -> int:
    return line[1].tickets[0].rank
