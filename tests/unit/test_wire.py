"""Frames: both codecs against each other, in fragments of every size, and against garbage."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mms import wire
from mms.errors import FrameError
from mms.wire import FrameReader

FACTS = wire.RequestFacts("application/json", "gzip", b"a=1", True, [b"Host", b"x", b"X-A", b"\xff"])
LOAD = wire.Load("cat", "1.0", "/m", "h:H", {"a": 1}, {"b": [2]}, 8, "auto", None, 2, 100, 200)
RESULT = wire.Result(
    [7, 8],
    [3, 4],
    [wire.Outcome(200, b"content-type: a/b\r\n", ""), wire.Outcome(500, b"", "HandlerException")],
    [0, 1],
    [wire.BatchTimes(2, 0.1, 0.2, 0.0, 0.0, 0.0)],
)
READ_KINDS = (wire.Load, wire.PredictView, wire.Result, wire.Measured, wire.Ready, wire.Failed, wire.Preloaded,
              wire.ForkRequest)  # fmt: skip


def frames(data: bytes, *, step: int) -> list[tuple[int, bytes, bytes]]:
    """What a reader makes of `data`, fed in pieces of `step` bytes."""
    reader = FrameReader()
    pieces = (data[at : at + step] for at in range(0, len(data), step))
    return [(kind, bytes(head), bytes(payload)) for piece in pieces for kind, head, payload in reader.feed(piece)]


@pytest.mark.parametrize(
    "message",
    [
        LOAD,
        RESULT,
        wire.Measured(
            [wire.Series("hits", "counter", ("a", "b"), 1.0, []), wire.Series("t", "duration", (), 2.0, [1])]
        ),
        wire.Ready("request", 0.25),
        wire.Failed("no", "Traceback\n"),
        wire.Preload(["torch"]),
        wire.Preloaded(["torch: ImportError: no"], 1),
        wire.ForkRequest({"A": "b"}, "cat", "/m", 42, "/tmp/x", wire.Sandbox(uid=9, groups=(1, 2), read=("/r",))),
        wire.ForkReply(43, ""),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_survive_the_trip(message: Any) -> None:
    assert wire.decode(type(message), wire.encode(message)) == message


def test_a_worker_reads_a_job_without_its_headers_until_it_asks() -> None:
    frame = wire.decode(wire.PredictView, wire.encode(wire.Predict(4, [7], [5], [b"id-7"], [FACTS], [])))
    assert (frame.batch_size, frame.ids, frame.sizes, frame.request_ids, frame.facts_of) == (4, [7], [5], [b"id-7"], [])
    (facts,) = frame.facts
    assert (facts.content_type, facts.encoding, facts.query, facts.query_is_input) == (
        "application/json", "gzip", b"a=1", True,
    )  # fmt: skip
    assert wire.decode_headers(facts.headers) == FACTS.headers
    assert wire.decode_headers(wire.EMPTY_HEADERS) == []


@given(st.lists(st.sampled_from([wire.Outcome(status, b"", "") for status in (200, 400, 500)]), min_size=1))
def test_shared_values_spread_to_what_they_were(values: list[wire.Outcome]) -> None:
    distinct, places = wire.share(values)
    assert len(distinct) == len(set(values))
    assert bool(places) == (len(distinct) > 1)
    assert wire.spread(distinct, places, len(values)) == values


@pytest.mark.parametrize(
    ("distinct", "places", "count"),
    [([], [], 1), (["a", "b"], [], 2), (["a"], [0, 1], 2), (["a", "b"], [0, 1], 3)],
)
def test_columns_that_do_not_fit_together_are_a_frame_error(distinct: list[str], places: list[int], count: int) -> None:
    with pytest.raises(FrameError, match=f"a frame with {count} jobs"):
        wire.spread(distinct, places, count)


def test_a_frame_is_header_head_and_payload() -> None:
    block = wire.pack(wire.RESULT, RESULT, 7)
    kind, head, payload = wire.parse_header(block)
    assert (kind, payload) == (wire.RESULT, 7)
    assert len(block) == wire.HEADER.size + head


@pytest.mark.parametrize("step", range(1, 60))
def test_frames_come_whole_out_of_fragments_of_every_size(step: int) -> None:
    data = wire.pack(wire.READY, wire.Ready("batch", 1.0)) + wire.pack(wire.RESULT, RESULT, 7) + b"abcdefg"
    data += wire.pack(wire.STOP, None)
    assert frames(data, step=step) == frames(data, step=len(data))
    assert [kind for kind, _, _ in frames(data, step=step)] == [wire.READY, wire.RESULT, wire.STOP]
    assert frames(data, step=step)[1][2] == b"abcdefg"


@given(st.lists(st.binary(max_size=3000), max_size=6), st.integers(1, 4000))
def test_payloads_survive_any_cut(payloads: list[bytes], step: int) -> None:
    data = b"".join(wire.pack(wire.RESULT, number, len(body)) + body for number, body in enumerate(payloads))
    read = frames(data, step=step)
    assert [payload for _, _, payload in read] == payloads
    assert [msgspec.msgpack.decode(head) for _, head, _ in read] == list(range(len(payloads)))


def test_a_frame_that_arrives_whole_is_not_copied() -> None:
    data = wire.pack(wire.RESULT, RESULT, 7) + b"abcdefg"
    ((_, head, payload),) = FrameReader().feed(data)
    assert head.obj is data and payload.obj is data


@given(st.lists(st.binary(max_size=30), max_size=3), st.integers(0, 40), st.integers(0, 3))
@example([b"", b""], wire.HEADER.size, 0)  # as much is missing as before a frame begins
def test_a_whole_frame_is_all_that_the_stream_yields(payloads: list[bytes], cut: int, begun: int) -> None:
    data = b"".join(wire.pack(wire.RESULT, RESULT, len(body)) + body for body in payloads)[: -cut or None]
    reader = FrameReader()
    if begun:
        assert not list(reader.feed(data[:begun]))
    whole = reader.whole(data[begun:])
    yielded = list(reader.feed(data[begun:]))
    if whole is None:
        assert begun or len(yielded) != 1 or len(data) > wire.HEADER.size + sum(map(len, yielded[0][1:]))
    else:
        assert [whole] == yielded and not begun and reader.missing == wire.HEADER.size


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"XX" + b"\0" * 14, id="magic"),
        pytest.param(wire.HEADER.pack(wire.MAGIC, 9, wire.READY, 0, 0), id="version"),
        pytest.param(wire.HEADER.pack(wire.MAGIC, wire.VERSION, wire.READY, wire.MAX_HEAD + 1, 0), id="head"),
        pytest.param(wire.HEADER.pack(wire.MAGIC, wire.VERSION, wire.READY, 0, wire.MAX_PAYLOAD + 1), id="payload"),
        pytest.param(b"hello from a print in the handler\n", id="text"),
    ],
)
def test_s6_what_is_no_frame_is_refused_at_its_header(data: bytes) -> None:
    with pytest.raises(FrameError):
        list(FrameReader().feed(data))


def test_s6_garbage_behind_a_frame_is_refused_after_it() -> None:
    stream = FrameReader().feed(wire.pack(wire.STOP, None) + b"garbage of more than a header")
    assert next(stream)[0] == wire.STOP
    with pytest.raises(FrameError):
        next(stream)


def test_a_frame_that_has_begun_can_be_finished_by_somebody_else() -> None:
    reader, payload = FrameReader(), bytes(range(250))
    data = wire.pack(wire.RESULT, RESULT, len(payload)) + payload
    assert not list(reader.feed(data[:40])) and not list(reader.feed(data[40:99]))
    assert reader.missing == len(data) - 99
    assert reader.take() == (data[:99], len(data))
    assert [bytes(found) for _, _, found in reader.feed(bytearray(data))] == [payload]


@given(st.binary(max_size=200), st.integers(1, 50))
def test_s6_garbage_is_nothing_but_a_frame_error(data: bytes, step: int) -> None:
    try:
        for kind, _, _ in frames(data, step=step):
            assert kind <= 255
    except FrameError as error:
        assert error.message


@settings(max_examples=200)
@given(st.sampled_from(READ_KINDS), st.binary(max_size=80))
def test_s6_a_garbled_head_is_nothing_but_a_frame_error(kind: type, block: bytes) -> None:
    try:
        assert isinstance(wire.decode(kind, block), kind)
    except FrameError as error:
        assert kind.__name__ in error.message


@given(st.integers(0, len(wire.encode(RESULT)) - 1), st.integers(0, 255))
def test_s6_a_head_with_one_wrong_byte_is_nothing_but_a_frame_error(at: int, byte: int) -> None:
    block = bytearray(wire.encode(RESULT))
    block[at] = byte
    try:
        assert isinstance(wire.decode(wire.Result, bytes(block)), wire.Result)
    except FrameError as error:
        assert "Result" in error.message
