"""Clients that idle, send slowly or do not read: what a connection does about them. No sockets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mms.http.limits import LEAST_READ
from mms.http.listener import HttpServer
from tests.unit.http_client import GET, LIMITS, Application, Client, connect, last, post


@pytest.mark.parametrize("begun", [b"GET /a", b"GET /a HTTP/1.1\r\nHost:", b"\r\n"])
def test_a_head_that_does_not_arrive_is_408(begun: bytes) -> None:
    client = connect()
    client.send(begun)
    client.connection.sweep(last(client) + 9)
    assert client.statuses() == []
    client.connection.sweep(last(client) + 11)
    assert client.statuses() == [408] and client.transport.ended


def test_a_body_that_does_not_arrive_is_408() -> None:
    client = connect()
    client.send(post(b"abc")[:-1])
    client.connection.sweep(last(client) + 59)
    assert client.statuses() == []
    client.connection.sweep(last(client) + 61)
    assert client.statuses() == [408]


def drip(client: Client, monkeypatch: pytest.MonkeyPatch, body: bytes, step: int) -> None:
    """So many bytes every 9 seconds, until the server says something."""
    now = last(client)
    for at in range(0, len(body), step):
        now += 9
        monkeypatch.setattr("mms.http.connection.monotonic", lambda now=now: now)
        client.send(body[at : at + step])
        client.connection.sweep(now)
        if client.transport.sent:
            break


def test_a_body_that_drips_in_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect()
    head, _, body = post(b"a" * 1000).partition(b"\r\n\r\n")
    client.send(head + b"\r\n\r\n")
    drip(client, monkeypatch, body, 1)
    assert client.statuses() == [408]
    assert "brought less than 64 KiB of its body within 60 s" in client.answers()[0].body.decode()


def test_a_large_body_that_comes_steadily_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(server=HttpServer(Application(True), replace(LIMITS, max_request_size=1 << 20), edge=False))
    head, _, body = post(b"a" * 300_000).partition(b"\r\n\r\n")
    client.send(head + b"\r\n\r\n")
    drip(client, monkeypatch, body, 12_000)  # 64 KiB in 54 s
    assert client.statuses() == [200]


def test_a_body_has_its_time_from_when_the_request_before_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(at_once=False)
    client.send(GET + post(b"abc")[:-1])
    client.connection.sweep(last(client) + 100)
    client.answer(client.application.exchanges[0])
    client.connection.sweep(last(client) + 150)
    assert client.statuses() == [200]
    client.connection.sweep(last(client) + 161)
    assert client.statuses() == [200, 408]


def test_a_body_is_not_late_because_of_what_the_client_had_to_read_first(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect()
    client.send(post(b"abc")[:-1])
    client.connection.pause_writing()
    later = last(client) + 100
    monkeypatch.setattr("mms.http.patience.monotonic", lambda: later)
    client.connection.resume_writing()
    client.connection.sweep(last(client) + 59)
    assert client.statuses() == []


def test_a_connection_that_closes_is_cut_in_the_end_though_it_was_not_read_any_more() -> None:
    client = connect(at_once=False)
    client.send(GET * 20)
    assert not client.transport.reading
    client.connection.cut(client.application.exchanges[0])
    client.connection.sweep(last(client) + 136)
    assert client.transport.aborted


def test_a_head_that_drips_in_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect()
    now = last(client)
    for byte in GET[:-1]:
        now += 9
        monkeypatch.setattr("mms.http.connection.monotonic", lambda now=now: now)
        client.send(bytes([byte]))
        client.connection.sweep(now)
        if client.transport.sent:
            break
    assert client.statuses() == [408]


def test_an_idle_connection_is_closed_quietly() -> None:
    client = connect()
    client.send(GET)
    client.connection.sweep(last(client) + 74)
    assert not client.transport.closed
    client.connection.sweep(last(client) + 76)
    assert client.transport.closed and client.statuses() == [200]


def test_behind_the_edge_idle_connections_stay_open() -> None:
    client = connect(edge=True)
    client.connection.sweep(last(client) + 10_000)
    assert not client.transport.closed


def test_a_client_that_waits_for_its_answer_is_not_silent() -> None:
    client = connect(at_once=False)
    client.send(GET)
    client.connection.sweep(last(client) + 10_000)
    assert client.statuses() == [] and not client.transport.closed


def test_a_client_that_does_not_read_is_cut() -> None:
    client = connect(at_once=False)
    client.send(GET)
    client.connection.pause_writing()
    assert not client.transport.reading
    client.connection.sweep(last(client) + 61)
    assert client.transport.aborted


def test_a_client_may_take_its_time_to_read_what_took_long_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(at_once=False)
    client.send(GET)
    answered = last(client) + 100
    monkeypatch.setattr("mms.http.patience.monotonic", lambda: answered)
    client.connection.pause_writing()
    client.connection.sweep(answered + 59)
    assert not client.transport.aborted


@pytest.mark.parametrize("ends", [b"", b"Connection: close"], ids=["stays", "closes"])
@pytest.mark.parametrize(("step", "aborted"), [(LEAST_READ, False), (LEAST_READ // 70, True)], ids=["steady", "drips"])
def test_a_client_that_reads_steadily_is_not_cut_and_one_that_drips_is(ends: bytes, step: int, aborted: bool) -> None:
    client = connect()
    client.send(post(b"a", *([ends] if ends else [])))
    client.transport.unsent = 100 << 20
    client.connection.pause_writing()
    for second in range(1, 200):
        client.transport.unsent -= step
        client.connection.sweep(last(client) + second)
    assert client.transport.aborted is aborted


def test_the_rest_of_a_last_answer_may_be_read_for_longer_than_a_connection_lingers() -> None:
    client = connect()
    client.send(post(b"a", b"Connection: close"))
    client.transport.unsent = 1000
    client.connection.sweep(last(client) + 59)
    client.transport.unsent = 0
    client.connection.sweep(last(client) + 59.9)
    assert not client.transport.aborted
    client.connection.sweep(last(client) + 61)
    assert client.transport.aborted


def test_a_client_that_never_takes_the_rest_is_cut_after_its_connection_was_closed() -> None:
    client = connect()
    client.send(GET)
    client.transport.unsent = 1000
    client.connection.sweep(last(client) + 76)
    client.connection.sweep(last(client) + 134)
    assert client.transport.closed and not client.transport.aborted
    client.connection.sweep(last(client) + 136)
    assert client.transport.aborted


def test_a_client_that_reads_again_is_read_again() -> None:
    client = connect()
    client.connection.pause_writing()
    client.connection.resume_writing()
    assert client.transport.reading


def test_a_connection_that_lingers_is_cut_after_a_second() -> None:
    client = connect()
    client.send(b"garbage\r\n\r\n")
    client.connection.sweep(last(client) + 2)
    assert client.transport.aborted


def test_a_client_that_goes_on_sending_does_not_make_its_connection_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect()
    client.send(b"garbage\r\n\r\n")
    later = last(client) + 2
    monkeypatch.setattr("mms.http.connection.monotonic", lambda: later)
    client.send(b"x")
    client.connection.sweep(later)
    assert client.transport.aborted
