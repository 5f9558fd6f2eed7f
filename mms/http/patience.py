"""How long a connection waits for its client, who may idle, send slowly or not read its answers. Data plane, front end.

Looked at once a second, so that no request pays for it. What a client does not read is accounted for meanwhile, and
while it does not, nothing more of it is read.
"""

from __future__ import annotations

from abc import abstractmethod
from time import monotonic
from typing import TYPE_CHECKING

from mms.errors import DeadlineError
from mms.http.largereads import LargeBodies
from mms.http.limits import LEAST_BROUGHT, LEAST_READ, LINGER_SECONDS

if TYPE_CHECKING:
    from mms.http.limits import Limits
    from mms.http.shedding import Shedding

IDLE_WHILE_SHEDDING = 1.0


class Patience(LargeBodies):
    """What a connection does about a slow client; a base class, so that a request passes no further object.

    It is no special case of its own base: slots allow of one line of bases only.
    """

    __slots__ = (
        "_brought", "_brought_at", "_edge", "_kept", "_limits", "_linger_until", "_lingering", "_taken_at", "_untaken",
        "_write_paused", "shedding",
    )  # fmt: skip

    shedding: Shedding
    _brought: int  # bytes of the body that had arrived when the client last brought LEAST_BROUGHT of it
    _brought_at: float
    _edge: bool  # nginx is on the other side: it closes idle connections, and its end of stream is a goodbye
    _kept: int  # bytes of streamed answers whose turn it is not yet
    _limits: Limits
    _linger_until: float
    _lingering: int  # bytes that may still be read and dropped; -1 while none are
    _taken_at: float
    _untaken: int  # bytes of answers that were unsent when the client last took LEAST_READ of them
    _write_paused: bool

    def pause_writing(self) -> None:
        self._write_paused = True
        self._untaken, self._taken_at = self._unsent, monotonic()
        self.shedding.slow.add(self)
        self._steer_reading()

    def resume_writing(self) -> None:
        self._write_paused = False
        self.last_activity = self._brought_at = monotonic()
        if not self._kept:
            self.shedding.slow.discard(self)
        self._steer_reading()

    def keep(self, size: int) -> None:
        """So much more, or less, of streamed answers waits for its turn."""
        self._kept += size
        if self._kept:
            self.shedding.slow.add(self)
            if self._kept > self._limits.max_response_size:
                self._transport.abort()
        elif not self._write_paused:
            self.shedding.slow.discard(self)

    @property
    def unsent(self) -> int:
        return self._unsent + self._kept

    @property
    def _unsent(self) -> int:
        return self._transport.get_write_buffer_size()

    def sweep(self, now: float) -> None:
        """Called about once a second: close the connection if its client sends, or takes its answers, too slowly."""
        silent = now - self.last_activity
        limits = self._limits
        if self._write_paused:
            self._look_at_taking(now)
        elif self._lingering >= 0:
            if self._unsent:
                self._linger_until = now + LINGER_SECONDS
                self._look_at_taking(now)
            elif now > self._linger_until:
                self._transport.abort()
        elif self._alone is not None or self._pending:
            self._brought_at = now  # until then it was not the client who made the body wait
        elif self._transport.is_closing():  # as soon as all is sent
            if silent > limits.keepalive_timeout + limits.body_timeout:
                self._transport.abort()
        elif self._reader.in_head and not self._reader.idle:
            if now - self._reader.begun > limits.header_timeout:
                self._refuse(_late(f"did not arrive within {limits.header_timeout:g} s"))
        elif self._reader.in_body:
            self._look_at_bringing(now)
        elif not self._edge and silent > (IDLE_WHILE_SHEDDING if self.shedding.step else limits.keepalive_timeout):
            self._transport.close()

    def _look_at_bringing(self, now: float) -> None:
        """Refuse a body of which less than LEAST_BROUGHT arrives within body_timeout."""
        size, limit = self._reader.size, self._limits.body_timeout
        if size < self._brought:  # another request's
            self._brought = 0
        if size - self._brought >= LEAST_BROUGHT:
            self._brought, self._brought_at = size, now
        elif now - max(self._brought_at, self._reader.begun) > limit:
            self._refuse(_late(f"brought less than {LEAST_BROUGHT >> 10} KiB of its body within {limit:g} s"))

    def _look_at_taking(self, now: float) -> None:
        """Cut off a client that takes less than LEAST_READ of its answers within body_timeout."""
        unsent = self._unsent
        if unsent <= self._untaken - LEAST_READ:
            self._untaken, self._taken_at = unsent, now
        elif now - self._taken_at > self._limits.body_timeout:
            self._transport.abort()
        elif unsent > self._untaken:  # more has been answered
            self._untaken = unsent

    def _drop(self, size: int) -> None:
        """So much was read after the last request."""
        if self._lingering >= 0:
            self._lingering -= size
            if self._lingering < 0:
                self._transport.abort()

    @abstractmethod
    def _steer_reading(self) -> None: ...


def _late(what: str) -> DeadlineError:
    return DeadlineError(f"the request {what}", status=408)
