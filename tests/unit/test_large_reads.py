"""Connections that send large bodies, which are read in place; with the transport of http_client."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mms.http import largereads
from mms.http.connection import Connection
from mms.http.largereads import LEAST, MOST, LargeReads
from mms.http.limits import LARGE_BODY
from mms.http.listener import HttpServer
from tests.unit.http_client import GET, LIMITS, Application, Client, chunked, connect, last, post

KIB = 1 << 10
DATA = os.urandom(1 << 20)


def large(size: int = 100 * KIB, *lines: bytes, target: bytes = b"/p") -> bytes:
    return post(DATA[:size], *lines, target=target)


def connected(*, at_once: bool = True, most: int = 1 << 20) -> Client:
    application = Application(at_once)
    client = connect(server=HttpServer(application, replace(LIMITS, max_request_size=most), edge=False))
    client.application = application
    return client


def bodies(client: Client) -> list[bytes]:
    return [answer.body for answer in client.answers()]


def reads_large(client: Client) -> bool:
    return isinstance(client.transport._protocol, LargeReads)


SIZES = (LARGE_BODY - 1, LARGE_BODY, 100 * KIB, MOST, MOST + 1, 1 << 20)


@pytest.mark.parametrize("step", [0, 1999, 16 * KIB, 100_001, MOST + 7])
def test_every_body_is_right_whatever_comes_before_and_in_which_pieces(step: int) -> None:
    client = connected()
    sizes = [*SIZES, 0, 5, *reversed(SIZES), *SIZES[2:4] * 2]
    for size in sizes:
        client.send(large(size), step=step)
    assert bodies(client) == [b"POST /p " + DATA[:size] for size in sizes]


@pytest.mark.parametrize("step", [0, 7777, 100_000])
def test_requests_in_a_row_are_cut_apart(step: int) -> None:
    client = connected()
    requests = [large(), GET, large(200 * KIB), large(70 * KIB), large(300 * KIB), GET, GET, large()]
    client.send(b"".join(requests) * 2, step=step)
    wanted = [b"GET /a " if request == GET else b"POST /p " + request.partition(b"\r\n\r\n")[2] for request in requests]
    assert bodies(client) == wanted * 2


@pytest.mark.parametrize("cut", [0, 20, 90, 120, 5000])
@pytest.mark.parametrize("in_chunks", [False, True], ids=["length", "chunks"])
def test_what_a_read_begins_behind_a_large_body_may_end_anywhere(cut: int, in_chunks: bool) -> None:
    client = connected()
    body = DATA[: 90 * KIB]
    follows = chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)) if in_chunks else post(body)
    client.send(large() + follows[:cut])
    client.send(follows[cut:])
    client.send(GET)
    kind = b"POST /c " if in_chunks else b"POST /p "
    assert bodies(client) == [b"POST /p " + DATA[: 100 * KIB], kind + body, b"GET /a "]


@settings(max_examples=200, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["length", "chunks", "get"]), min_size=1, max_size=6),
    sizes=st.lists(st.sampled_from([10, LARGE_BODY, 90 * KIB, 200 * KIB]), min_size=6, max_size=6),
    cuts=st.lists(st.integers(1, 110 * KIB) | st.integers(100 * KIB, 101 * KIB), max_size=8),
)
def test_requests_of_all_kinds_are_cut_apart_whatever_is_read_at_a_time(
    kinds: list[str], sizes: list[int], cuts: list[int]
) -> None:
    client, data, wanted = connected(), b"", []
    for kind, size in zip(["length", *kinds], [100 * KIB, *sizes], strict=False):
        body = DATA[:size]
        framed = chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (size, body))
        data += {"length": post(body), "chunks": framed, "get": GET}[kind]
        wanted.append({"length": b"POST /p " + body, "chunks": b"POST /c " + body, "get": b"GET /a "}[kind])
    at = 0
    for step in cuts:
        if at < len(data):
            client.send(data[at : at + step])
            at += step
    if at < len(data):
        client.send(data[at:])
    assert bodies(client) == wanted


def test_the_end_of_a_head_is_not_known_as_a_head() -> None:
    client = connected()
    begin, end = (request := large(200 * KIB))[:20], request[20:]
    for data in (large() + begin, end, end):
        client.send(data)
    assert client.statuses() == [200, 200, 400]


def test_a_body_is_not_copied_and_its_head_not_parsed_again() -> None:
    client = connected(at_once=False)
    for _ in range(3):
        client.send(large())
        client.answer(client.application.exchanges[-1])
    first, second, third = client.application.exchanges
    assert [type(part) for part in third.parts] == [memoryview]
    assert third.head is second.head is not first.head


def test_a_connection_that_idles_keeps_no_memory_of_its_last_body() -> None:
    client = connected(at_once=False)
    for _ in range(3):  # by the parser, by its head, at once
        client.send(large())
        client.answer(client.application.exchanges[-1])
        protocol = client.transport._protocol
        assert isinstance(protocol, LargeReads) and not protocol._piece


def test_a_head_that_is_forgotten_is_looked_at_again() -> None:
    client = connected(at_once=False)
    heads = []
    for _ in range(4):
        client.send(large())
        client.answer(client.application.exchanges[-1])
        heads.append(client.application.exchanges[-1].head)
        heads[-1].meaning = "known"
        client.connection.forget_heads()
    assert len(set(map(id, heads))) == 4


def test_what_is_noted_on_the_head_of_a_body_that_is_read_is_forgotten() -> None:
    client = connected(at_once=False)
    for _ in range(2):
        client.send(large())
        client.answer(client.application.exchanges[-1])
    client.application.exchanges[-1].head.meaning = "a version"
    request = large()
    client.send(request[:90_000])
    client.connection.forget_heads()
    client.send(request[90_000:])
    assert client.application.exchanges[-1].head.meaning is None


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n" + bytes(LARGE_BODY),
        b"P",
        b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx" + GET,
        GET,
    ],
    ids=["garbage", "beginning", "small", "get"],
)
def test_what_is_no_large_request_is_for_the_parser(data: bytes) -> None:
    plain, after = connected(), connected()
    after.send(large())
    assert reads_large(after)
    sent = len(after.transport.sent)
    plain.send(data)
    after.send(data)
    assert not reads_large(after)
    assert after.transport.sent[sent:].partition(b"date")[0] == plain.transport.sent.partition(b"date")[0]
    if not after.transport.ended:
        after.send(b"OST /p HTTP/1.1\r\nHost: x\r\n\r\n" if data == b"P" else large())
        assert after.statuses()[-1] == 200


def test_a_body_that_is_too_large_is_refused_by_its_length() -> None:
    client = connected(most=200 * KIB)
    client.send(large())
    client.send(large(200 * KIB + 1)[: 150 * KIB])
    assert client.statuses() == [200, 413]
    client.send(bytes(100 * KIB))
    assert client.statuses() == [200, 413]


def test_what_speaks_against_the_rest_of_a_body_is_asked_once_per_request() -> None:
    client = connected()
    for _ in range(3):
        client.send(large(600 * KIB), step=MOST)
    assert [size for _, size in client.application.asked] == [600 * KIB] * 3
    client.send(large(600 * KIB, target=b"/full"), step=MOST)
    assert client.statuses() == [200, 200, 200, 429]


def test_what_follows_a_refusal_within_a_body_is_dropped_and_counted_once() -> None:
    client = connected()
    client.send(large())
    request = large(900 * KIB)
    client.send(request[: 200 * KIB])
    client.connection.shedding.bytes = 1 << 40  # others have brought so much
    client.send(request[200 * KIB : 250 * KIB])
    assert client.statuses() == [200, 429]
    left = client.connection._lingering
    client.send(request[250 * KIB : 260 * KIB], step=KIB)
    assert client.connection._lingering == left - 10 * KIB


def no_memory(size: int) -> bytearray:
    raise MemoryError


def test_a_body_for_which_memory_runs_out_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connected()
    client.send(large())
    request = large(600 * KIB)
    client.send(request[: 300 * KIB])
    monkeypatch.setattr("mms.http.largereads.buffer", no_memory)
    client.send(request[300 * KIB :], step=LEAST)
    assert client.statuses() == [200, 503]
    assert client.connection.shedding.bytes == 0


def test_without_memory_for_a_large_read_small_requests_are_read_in_the_usual_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = connected()
    client.send(large())
    assert reads_large(client)
    monkeypatch.setattr("mms.http.largereads.buffer", no_memory)
    client.send(GET)
    client.send(GET)
    assert bodies(client)[1:] == [b"GET /a "] * 2 and not reads_large(client)


def test_who_asks_first_is_told_to_continue() -> None:
    client = connected()
    client.send(large())
    head, _, body = large(300 * KIB, b"Expect: 100-continue").partition(b"\r\n\r\n")
    client.send(head + b"\r\n\r\n")
    assert client.transport.sent.endswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    client.transport.sent = b""
    client.send(body, step=MOST)
    assert bodies(client) == [b"POST /p " + body]


def test_what_is_promised_takes_no_memory() -> None:
    """As much room as was sent, and LEAST more."""
    client = connected()
    client.send(large(1 << 20))
    request = large(1 << 20)
    for at in itertools.chain(range(0, 20 * KIB, 1 * KIB), range(20 * KIB, 900 * KIB, 30 * KIB)):
        client.send(request[at : at + (1 * KIB if at < 20 * KIB else 30 * KIB)])
        parts = [part for part in client.connection._reader._parts if isinstance(part, memoryview)]
        held = sum([len(memoryview(piece)) for piece in {id(part.obj): part.obj for part in parts}.values()])
        assert held <= 2 * client.connection._reader.size + LEAST


def test_a_client_that_leaves_within_a_body_leaves_nothing() -> None:
    client = connected()
    client.send(large())
    client.send(large(300 * KIB)[: 200 * KIB])
    shedding = client.connection.shedding
    assert shedding.bytes > 150 * KIB
    protocol = client.transport._protocol
    assert isinstance(protocol, LargeReads)
    protocol.connection_lost(None)
    assert shedding.bytes == 0 and not client.connection._reader._parts


def test_a_client_that_does_not_read_is_not_read_from() -> None:
    client = connected(at_once=False)
    client.send(large())
    protocol = client.transport._protocol
    assert isinstance(protocol, LargeReads)
    protocol.pause_writing()
    assert not client.transport.reading
    protocol.resume_writing()
    assert client.transport.reading
    assert protocol.eof_received()  # an answer is owed


def test_a_server_that_stops_ends_the_connection_with_the_next_answer() -> None:
    client = connected(at_once=False)
    client.send(large())
    client.answer(client.application.exchanges[-1])
    request = large(200 * KIB)
    client.send(request[: 100 * KIB])
    client.connection.drain()
    client.send(request[100 * KIB :])
    client.answer(client.application.exchanges[-1])
    assert client.answers()[-1].headers["connection"] == "close"
    assert client.transport.ended or client.transport.closed


def test_the_time_of_a_small_request_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of what the connection brought before it idled: a deadline is counted from it."""
    client = connected()
    client.send(large())
    later = last(client) + 60
    monkeypatch.setattr(largereads, "monotonic", lambda: later)
    client.send(GET + large())
    assert client.application.exchanges[1].arrived == later


@pytest.mark.parametrize("ending", [Connection.drain, Connection.retire], ids=["drain", "retire"])
def test_what_comes_behind_the_last_request_is_not_begun(ending: Callable[[Connection], object]) -> None:
    client = connected(at_once=False)
    client.send(large())
    ending(client.connection)
    client.send(large() + GET)
    (exchange,) = client.application.exchanges
    client.answer(exchange)
    (answer,) = client.answers()
    assert answer.headers["connection"] == "close"


def test_a_body_that_comes_behind_the_last_answer_is_let_go_of() -> None:
    client = connected(at_once=False)
    client.send(post(b"", b"Connection: keep-alive", version=b"1.0") + large())
    request = large(300 * KIB)
    client.send(request[: 150 * KIB])
    stream = client.application.exchanges[0].begin(200, b"")
    stream.chunk(b"ends with its connection")
    stream.answer(200, b"", b"")
    assert client.transport.ended and not client.connection.shedding.bytes
    client.send(request[150 * KIB :])
    assert len(client.application.exchanges) == 2 and not client.connection._reader._parts
