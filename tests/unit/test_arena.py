"""The memory for large bodies: what lies where, until when, and what is left of it."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Iterator

import pytest

from mms import arena
from mms.arena import BLOCK, BLOCKS, KEPT_SECONDS, WHERE, Arena, Half
from mms.errors import FrameError

Both = tuple[Arena, Arena, int]


@pytest.fixture
def both() -> Iterator[Both]:
    """The server's and the worker's end, and their file."""
    file = arena.create(mmap.PAGESIZE)
    ours, theirs = arena.attach(file)[0], arena.attach(file)[0]
    yield ours, theirs, file
    ours.close()
    theirs.close()
    os.close(file)


def put(half: Half, *parts: bytes) -> bytes:
    where = half.put(parts, sum(map(len, parts)))
    assert where is not None
    return where


def test_bodies_are_taken_as_they_were_put_and_their_room_is_free_again(both: Both) -> None:
    ours, theirs, _ = both
    first, second = os.urandom(BLOCK + 1), os.urandom(3 * BLOCK)
    where, behind = put(ours.requests, first[:7], first[7:], b"", second), put(ours.requests, second)
    assert not ours.requests.free
    assert theirs.requests.take(behind, [len(second)]) == [second]
    assert theirs.requests.take(where, [len(first), 0, len(second)]) == [first, b"", second]
    assert ours.requests.free


def test_an_answer_keeps_its_room_until_the_last_view_of_it_is_gone(both: Both) -> None:
    ours, theirs, _ = both
    gc.disable()  # nothing waits for the collector
    try:
        body = os.urandom(2 * BLOCK)
        lent = ours.answers.lend(put(theirs.answers, body), len(body))
        half = lent[BLOCK:]
        del lent
        others = [put(theirs.answers, b"x" * BLOCK) for _ in range(BLOCKS - 2)]
        assert theirs.answers.put([b"x"], 1) is None
        assert half == body[BLOCK:]
        del half
        assert theirs.answers.put([body], len(body)) is not None
        for where in others:
            ours.answers.lend(where, BLOCK)
        assert not ours.answers.free
    finally:
        gc.enable()


def test_what_finds_no_room_is_told_so_and_harms_nothing(both: Both) -> None:
    ours, theirs, _ = both
    size = BLOCK * BLOCKS
    assert ours.requests.put([bytes(size), b"x"], size + 1) is None
    whole = put(ours.requests, bytes(size))
    assert ours.requests.put([b"x"], 1) is None
    put(theirs.answers, b"another half")
    theirs.requests.take(whole, [size])
    assert ours.requests.free


def test_free_room_in_pieces_is_no_room_for_more_than_a_piece(both: Both) -> None:
    ours, theirs, _ = both
    wheres = [put(ours.requests, b"%d" % number) for number in range(BLOCKS)]
    for where in wheres[::2]:
        theirs.requests.take(where, [1])
    assert ours.requests.put([bytes(BLOCK + 1)], BLOCK + 1) is None
    assert put(ours.requests, bytes(BLOCK)) == wheres[0]


@pytest.mark.parametrize("at", [0, BLOCK + 1, BLOCK * (BLOCKS + 1), BLOCK * BLOCKS, 1 << 63])
def test_f33_a_place_outside_of_the_half_is_an_error(both: Both, at: int) -> None:
    with pytest.raises(FrameError):
        both[0].requests.lend(WHERE.pack(at), BLOCK + 1)


@pytest.mark.parametrize(("where", "size"), [(b"", 1), (bytes(9), 1), (WHERE.pack(BLOCK), 0), (WHERE.pack(BLOCK), -1)])
def test_f33_no_place_or_no_size_is_an_error(both: Both, where: bytes, size: int) -> None:
    with pytest.raises(FrameError):
        both[0].requests.lend(where, size)


def test_memory_that_is_not_used_goes_back_to_the_system(both: Both) -> None:
    ours, theirs, file = both

    def held() -> int:
        return os.fstat(file).st_blocks * 512

    ours.tidy(1.0)
    assert held() == 0
    theirs.requests.take(put(ours.requests, bytes(1 << 20)), [1 << 20])
    lent = ours.answers.lend(put(theirs.answers, b"x" * (1 << 20)), 1 << 20)
    ours.tidy(10.0)
    ours.tidy(11.0 + KEPT_SECONDS)  # an answer is on its way
    assert held() >= 2 << 20
    assert lent == b"x" * (1 << 20)
    del lent
    ours.tidy(10.5 + KEPT_SECONDS)
    assert held() <= BLOCK
    ours.tidy(100.0)
    assert theirs.requests.take(put(ours.requests, b"again"), [5]) == [b"again"]


def test_memory_that_is_used_again_is_kept(both: Both) -> None:
    ours, theirs, file = both
    for now in range(10):
        theirs.requests.take(put(ours.requests, bytes(1 << 20)), [1 << 20])
        ours.tidy(now * KEPT_SECONDS * 0.9)
        assert os.fstat(file).st_blocks * 512 >= 1 << 20


def test_a_worker_cannot_cut_the_memory_off(both: Both) -> None:
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(both[2], size)


def test_an_answer_outlives_the_worker(both: Both) -> None:
    ours, theirs, _ = both
    lent = ours.answers.lend(put(theirs.answers, b"x" * BLOCK), BLOCK)
    theirs.close()
    ours.close()
    assert lent == b"x" * BLOCK
