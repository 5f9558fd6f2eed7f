"""Streamed answers on a connection with a fake transport: framing, order, what waits for its turn, cuts. No sockets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mms.errors import WorkerDiedError
from mms.http.limits import LEAST_READ
from mms.http.listener import HttpServer
from mms.http.streaming import Streaming
from tests.unit.http_client import GET, LIMITS, Application, Client, connect

TEXT = b"content-type: text/plain\r\n"
EVENTS = b"content-type: text/event-stream\r\n"
DIED = WorkerDiedError("it died")


def begin(client: Client, number: int = 0, head: bytes = TEXT) -> Streaming:
    return client.application.exchanges[number].begin(200, head)


def end(stream: Streaming) -> None:
    stream.answer(200, b"", b"")


def asked(request: bytes = GET, *, count: int = 1, server: HttpServer | None = None) -> Client:
    client = connect(at_once=False, server=server)
    if server is not None:
        application = server._application
        assert isinstance(application, Application)
        client.application = application
    client.send(request * count)
    return client


def bodies(client: Client) -> list[bytes]:
    return [answer.partition(b"\r\n\r\n")[2] for answer in client.transport.sent.split(b"HTTP/1.1 ")[1:]]


def test_a_head_and_its_first_chunk_are_one_write() -> None:
    client = asked()
    begin(client).chunk(b"hello")
    assert client.transport.writes == 1
    (body,) = bodies(client)
    assert body == b"5\r\nhello\r\n"


def test_an_empty_chunk_sends_the_head_and_does_not_end_the_answer() -> None:
    client = asked()
    stream = begin(client)
    stream.chunk(b"")
    assert bodies(client) == [b""]
    stream.chunk(b"a")
    end(stream)
    assert bodies(client) == [b"1\r\na\r\n0\r\n\r\n"]


def test_a_handler_may_set_what_caches_are_told() -> None:
    client = asked()
    begin(client, head=TEXT + b"cache-control: no-store\r\n").chunk(b"a")
    assert client.transport.sent.count(b"cache-control:") == 1


def test_what_comes_before_its_turn_waits_and_a_running_stream_goes_on_in_its_turn() -> None:
    client = asked(count=3)
    first, second, third = (client.application.exchanges[number] for number in range(3))
    stream = second.begin(200, TEXT)
    stream.chunk(b"a")
    client.application.answer(third)
    assert not client.transport.sent and client.connection.unsent
    assert client.connection in client.connection.shedding.slow
    client.application.answer(first)
    assert bodies(client) == [b"GET /a ", b"1\r\na\r\n"]
    assert not client.connection.unsent and not client.connection.shedding.slow
    stream.chunk(b"b")
    end(stream)
    assert bodies(client) == [b"GET /a ", b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n", b"GET /a "]


def test_a_stream_that_ends_before_its_turn_is_sent_as_a_whole() -> None:
    client = asked(count=2)
    stream = begin(client, 1)
    stream.chunk(b"a")
    end(stream)
    client.application.answer(client.application.exchanges[0])
    assert bodies(client) == [b"GET /a ", b"1\r\na\r\n0\r\n\r\n"]
    assert not client.connection.unsent


def test_a_stream_that_fails_before_its_turn_is_a_plain_error() -> None:
    client = asked(count=2)
    stream = begin(client, 1)
    stream.chunk(b"a")
    stream.fail(DIED)
    client.application.answer(client.application.exchanges[0])
    assert client.statuses() == [200, 503]


def test_a_cut_stream_closes_its_connection_and_what_is_behind_it_is_cancelled() -> None:
    client = asked(count=2)
    stream = begin(client)
    stream.chunk(b"a")
    stream.fail(DIED)
    assert client.transport.closed and not client.transport.aborted
    assert bodies(client) == [b"1\r\na\r\n"]
    assert [work.cancelled for work in client.application.works] == [False, True]


def test_events_end_with_an_event_of_the_error() -> None:
    client = asked()
    stream = begin(client, head=EVENTS)
    stream.chunk(b"data: a\n\n")
    stream.fail(DIED)
    assert bodies(client)[0].endswith(b"\r\n0\r\n\r\n")
    told = b'event: error\ndata: {"code":503,"type":"WorkerDiedException","message":"it died"}\n\n'
    assert told in client.transport.sent
    client.send(GET)
    assert len(client.application.exchanges) == 2, "the connection is as good as before"


def test_to_a_client_of_http_1_0_the_end_of_the_connection_is_the_end() -> None:
    client = asked(b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    stream = begin(client)
    stream.chunk(b"a")
    stream.chunk(b"b")
    end(stream)
    assert bodies(client) == [b"ab"] and client.transport.ended
    assert b"transfer-encoding" not in client.transport.sent and b"connection: close" in client.transport.sent


def test_a_cut_is_a_reset_for_a_client_of_http_1_0() -> None:
    client = asked(b"GET /a HTTP/1.0\r\n\r\n")
    stream = begin(client)
    stream.chunk(b"a")
    stream.fail(DIED)
    assert client.transport.aborted


def test_a_head_request_gets_the_head_and_its_work_ends() -> None:
    client = asked(b"HEAD /a HTTP/1.1\r\nHost: x\r\n\r\n")
    stream = begin(client)
    stream.chunk(b"a")
    assert bodies(client) == [b""]
    assert [work.cancelled for work in client.application.works] == [True]
    client.send(GET)
    assert len(client.application.exchanges) == 2


def test_a_client_that_takes_nothing_is_cut_when_too_much_waits_for_it() -> None:
    client = asked(server=HttpServer(Application(at_once=False), replace(LIMITS, max_response_size=100), edge=False))
    stream = begin(client)
    client.transport.unsent = 100
    stream.chunk(b"a" * 100)
    assert not client.transport.aborted
    client.transport.unsent = 101
    stream.chunk(b"a")
    assert client.transport.aborted
    client.connection.connection_lost(None)
    assert [work.cancelled for work in client.application.works] == [True]
    stream.chunk(b"b")


def test_too_much_that_waits_for_its_turn_cuts_the_connection() -> None:
    server = HttpServer(Application(at_once=False), replace(LIMITS, max_response_size=100), edge=False)
    client = asked(count=2, server=server)
    stream = begin(client, 1)
    stream.chunk(b"a" * 100)
    assert not client.transport.aborted
    stream.chunk(b"a")
    assert client.transport.aborted
    client.connection.connection_lost(None)
    assert not client.connection.shedding.slow


def test_who_takes_a_stream_as_fast_as_it_comes_is_no_slow_client() -> None:
    client = asked()
    connection, transport = client.connection, client.transport
    stream = begin(client)
    transport.unsent = LEAST_READ
    connection.pause_writing()
    taken_at = connection._taken_at
    stream.chunk(b"a" * LEAST_READ)  # as much more as the client has taken meanwhile
    connection.sweep(taken_at + LIMITS.body_timeout - 1)
    connection.sweep(taken_at + LIMITS.body_timeout + 1)
    assert not transport.aborted
    connection.sweep(taken_at + 2 * LIMITS.body_timeout + 1)
    assert transport.aborted


def test_end_of_input_while_an_answer_streams_is_a_goodbye() -> None:
    client = asked(count=2)
    assert client.connection.eof_received() is True
    begin(client, 1)
    assert client.connection.eof_received() is False


@pytest.mark.parametrize("left", [True, False])
def test_nothing_is_said_to_a_client_that_has_gone(left: bool) -> None:
    client = asked(count=2)
    stream = begin(client, 0 if left else 1)
    stream.chunk(b"a")
    client.connection.connection_lost(None)
    sent = client.transport.sent
    stream.chunk(b"b")
    stream.fail(DIED)
    assert client.transport.sent == sent
    assert not client.connection.shedding.slow
