"""What one client may cost the front end. All of it is checked before or while bytes arrive, never after."""

from __future__ import annotations

from dataclasses import dataclass

MAX_LINE = 8 << 10  # request line
MAX_HEAD = 32 << 10  # request line and headers
MAX_FIELDS = 100
MAX_CHUNK_EXTRA = 16 << 10  # chunk extensions and trailers of one body, beyond plain framing
CHUNK_FRAMING = 20  # a 16-digit size and two CRLFs
MAX_CHUNK_DIGITS = 16
MAX_LEADING = 4  # CRLFs before a request line, in bytes
MAX_PIPELINED = 16  # requests of one connection that are served at a time
MAX_BACKLOG = 4096  # requests of one connection that wait for these
READ_ANYWAY = 64 << 10  # a body of which less is missing is read before it is refused: its connection can be kept
LARGE_BODY = 64 << 10  # from here on a body is read into the memory in which it stays
LINGER_BYTES = 64 << 10  # read and dropped after the last answer, so that it is not reset (RFC 9112, 9.6)
LINGER_BODY_BYTES = 4 << 20  # the same where the rest of a refused body may be on its way: most clients send first
LINGER_SECONDS = 1.0  # in all, from when the answer has left
LEAST_BROUGHT = 64 << 10  # of a large body a client must send so much within body_timeout
LEAST_READ = 64 << 10  # of a large answer a client must take so much within body_timeout


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits that are settings; sizes in bytes, durations in seconds."""

    max_request_size: int
    max_connections: int
    header_timeout: float
    body_timeout: float
    keepalive_timeout: float
    max_bytes_in_flight: int = 1 << 30
    max_response_size: int = 100 << 20  # of a streamed answer, what may wait for its client
