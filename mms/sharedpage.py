"""The memory that a worker shares with the server: what each tells the other without a frame. Used by both."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence

# What a worker tells of its progress in the memory page that it shares with the server: how many jobs it has finished
# and how many it has begun since its start, and when it began the batch in hand (time.monotonic(); 0 while idle).
# A worker that runs several batches at a time leaves the last one 0, and has a slot for each of its threads instead:
# when the thread began the work in hand (0 while it waits), and which of the worker's jobs that is, by their places.
PROGRESS = struct.Struct("<QQd")
PAGE = 4096
_SLOT = struct.Struct("<dI")
MAX_PLACES = (PAGE - _SLOT.size) // 8
_write_time = struct.Struct("<d").pack_into

# Where several front ends use a worker, each has a page of this kind, on which places count the jobs that it has sent.
# On all of them stands whether the worker is at work at all: then jobs that it has not begun wait for those of others.
BUSY_AT = 32

# Further on in its first page, what the server tells the worker while it is at work: how many jobs were cancelled so
# far (streams, and those that wait in a worker of several threads), and the last CANCELLED_KEPT of them.
CANCELLED_AT = 64
CANCELLED_KEPT = 256
CANCELLED_COUNT = struct.Struct("<Q")
CANCELLED_JOBS_AT = CANCELLED_AT + CANCELLED_COUNT.size
_CANCELLED_JOBS = struct.Struct(f"<{CANCELLED_KEPT}Q")


def page_size(threads: int, preprocess_threads: int) -> int:
    """Bytes of the memory that a worker shares with the server, with a slot for each thread: one more replies."""
    if threads == 1 and not preprocess_threads:
        return PAGE
    return PAGE * (1 + threads + preprocess_threads + 1)


def write_slot(page: mmap.mmap, thread: int, begun_at: float, places: Sequence[int]) -> None:
    """The work that a thread has in hand. Of more than MAX_PLACES jobs, the last ones are not noted."""
    places = places[:MAX_PLACES]
    at = PAGE * (1 + thread)
    _write_time(page, at, 0.0)  # nothing in between may be taken for the new batch
    struct.pack_into(f"<I{len(places)}Q", page, at + 8, len(places), *places)
    _write_time(page, at, begun_at)


def clear_slot(page: mmap.mmap, thread: int) -> None:
    _write_time(page, PAGE * (1 + thread), 0.0)


def read_slots(page: mmap.mmap) -> Iterator[tuple[float, tuple[int, ...]]]:
    """When each thread that is at work began, and the places of its jobs."""
    for at in range(PAGE, len(page), PAGE):
        begun_at, count = _SLOT.unpack_from(page, at)
        if begun_at:
            places = struct.unpack_from(f"<{min(count, MAX_PLACES)}Q", page, at + _SLOT.size)
            if _SLOT.unpack_from(page, at)[0] == begun_at:  # else the thread has just gone on to other work
                yield begun_at, places


def write_busy(page: mmap.mmap, busy: bool) -> None:
    page[BUSY_AT] = busy


def read_busy(page: mmap.mmap) -> bool:
    return page[BUSY_AT] != 0


def write_cancelled(page: mmap.mmap | bytearray, job: int) -> None:
    """Nobody waits for this job any more. The server is the only one that writes here."""
    count: int = CANCELLED_COUNT.unpack_from(page, CANCELLED_AT)[0]
    CANCELLED_COUNT.pack_into(page, CANCELLED_JOBS_AT + count % CANCELLED_KEPT * CANCELLED_COUNT.size, job)
    # a worker could write here, too: what it cannot do is make the count too large to be written
    CANCELLED_COUNT.pack_into(
        page, CANCELLED_AT, (count + 1) % (1 << 64)
    )  # last: the worker looks at the jobs when this has changed


class Cancelled:
    """The jobs of which the page says that nobody waits for them, as far as it remembers; in the worker."""

    def __init__(self, page: mmap.mmap) -> None:
        self._page = page
        self._seen = 0
        self._jobs: frozenset[int] = frozenset()

    def look(self) -> frozenset[int]:
        """They, by id."""
        count: int = CANCELLED_COUNT.unpack_from(self._page, CANCELLED_AT)[0]
        if count != self._seen:
            self._seen = count
            self._jobs = frozenset(_CANCELLED_JOBS.unpack_from(self._page, CANCELLED_JOBS_AT)[:count])
        return self._jobs
