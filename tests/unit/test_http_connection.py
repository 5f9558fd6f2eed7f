"""A connection with a fake transport and a tiny application: answers, order, refusals, endings. No sockets."""

from __future__ import annotations

import json
import sys

import pytest

from mms.errors import BadRequestError, MMSError
from mms.http.exchange import Exchange
from mms.http.limits import LINGER_BODY_BYTES, LINGER_BYTES, MAX_PIPELINED
from mms.http.listener import HttpServer
from mms.http.response import error_response
from mms.wire import RequestFacts
from mms.workers.job import Job
from tests.unit.http_client import GET, LIMITS, Application, chunked, connect, head_of, post, turn

# answers


def test_an_answer_has_length_date_and_id() -> None:
    client = connect()
    client.send(GET)
    (answer,) = client.answers()
    assert set(answer.headers) == {"date", "content-type", "x-request-id", "content-length"}
    assert answer.headers["content-length"] == "7"


@pytest.mark.parametrize(
    ("sent", "kept"), [(b"a.B_c-1", True), (b"x" * 128, True), (b"x" * 129, False), (b"a b", False), (b"\xe4", False)]
)
def test_a_valid_request_id_is_kept(sent: bytes, kept: bool) -> None:
    client = connect()
    client.send(b"GET /a HTTP/1.1\r\nHost: x\r\nX-Request-Id: " + sent + b"\r\n\r\n")
    shown = client.answers()[0].headers["x-request-id"]
    assert (shown == sent.decode("latin-1").lower()) is kept and shown


def test_made_up_ids_differ() -> None:
    client = connect()
    client.send(GET * 3)
    assert len({answer.headers["x-request-id"] for answer in client.answers()}) == 3


def test_the_applications_refusal_leaves_the_connection_open() -> None:
    client = connect()
    client.send(b"GET /missing HTTP/1.1\r\nHost: x\r\n\r\n" + GET)
    assert client.statuses() == [404, 200] and not client.transport.ended


def test_head_is_answered_without_its_body() -> None:
    client = connect()
    client.send(b"HEAD /a HTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.transport.sent.endswith(b"content-length: 8\r\n\r\n")


def test_204_has_neither_length_nor_body() -> None:
    client = connect(at_once=False)
    client.send(GET)
    client.application.exchanges[0].answer(204, b"", b"")
    assert b"content-length" not in client.transport.sent and client.transport.sent.endswith(b"\r\n\r\n")
    client.send(GET)
    client.answer(client.application.exchanges[1])
    assert client.statuses() == [204, 200]


def test_a_large_answer_is_whole() -> None:
    client = connect(at_once=False)
    client.send(GET)
    client.application.exchanges[0].answer(200, b"", b"x" * 300_000)
    assert client.answers()[0].body == b"x" * 300_000


def test_a_request_knows_its_headers_but_those_with_underscores() -> None:
    client = connect(at_once=False)
    client.send(b"GET /a HTTP/1.1\r\nHost: x\r\nTransfer_Encoding: chunked\r\nX-A: 1\r\n\r\n")
    assert client.application.exchanges[0].head.headers == [b"Host", b"x", b"X-A", b"1"]


def test_trailers_are_not_headers() -> None:
    client = connect(at_once=False)
    client.send(chunked(b"0\r\nX-T: 1\r\n\r\n"))
    assert b"X-T" not in client.application.exchanges[0].head.headers


# order


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
def test_answers_leave_in_the_order_of_the_requests(order: tuple[int, ...]) -> None:
    client = connect(at_once=False)
    client.send(b"".join(GET.replace(b"/a", b"/%d" % number) for number in range(3)))
    for number in order:
        client.answer(client.application.exchanges[number])
    assert [answer.body for answer in client.answers()] == [b"GET /0 ", b"GET /1 ", b"GET /2 "]


def test_a_connection_has_a_bounded_number_of_requests_in_hand() -> None:
    client = connect(at_once=False)
    client.send(GET * (MAX_PIPELINED + 2))
    assert len(client.application.exchanges) == MAX_PIPELINED and not client.transport.reading
    client.answer(client.application.exchanges[0])
    assert len(client.application.exchanges) == MAX_PIPELINED + 1
    client.answer(client.application.exchanges[1])
    assert client.transport.reading


@pytest.mark.parametrize("path", [b"/a", b"/missing"])
def test_a_thousand_pipelined_requests_are_answered(path: bytes) -> None:
    client = connect()
    client.send(GET.replace(b"/a", path) * 1000)
    assert len(client.answers()) == 1000


def test_too_many_pipelined_requests_are_refused() -> None:
    client = connect(at_once=False)
    client.send(GET * 5000)
    assert len(client.application.exchanges) == MAX_PIPELINED
    assert [error.status for error in client.application.refusals] == [400]


# keep-alive


@pytest.mark.parametrize(
    ("version", "connection", "open_after"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"keep-alive", True),
        (b"1.1", b"close", False),
        (b"1.1", b"Close", False),
        (b"1.0", b"", False),
        (b"1.0", b"keep-alive", True),
        (b"1.0", b"close", False),
    ],
)
@pytest.mark.parametrize("body", [b"", b"abc"])
def test_the_connection_stays_open_where_the_client_says_so(
    version: bytes, connection: bytes, open_after: bool, body: bytes
) -> None:
    client = connect()
    client.send(post(body, *([b"Connection: " + connection] if connection else ()), version=version))
    (answer,) = client.answers()
    assert client.transport.ended is not open_after
    assert (answer.headers.get("connection") == "close") is not open_after
    if open_after:
        client.send(GET)
        assert client.statuses() == [200, 200]


def test_what_follows_a_request_that_closes_is_not_served() -> None:
    client = connect()
    client.send(post(b"a", b"Connection: close") + GET)
    assert client.statuses() == [200] and client.transport.ended


def test_without_half_close_the_connection_is_closed() -> None:
    client = connect(half_close=False)
    client.send(post(b"a", b"Connection: close"))
    assert client.transport.closed and not client.transport.aborted


def test_after_its_last_answer_a_connection_reads_a_little_then_ends() -> None:
    client = connect()
    client.send(b"garbage\r\n\r\n")
    client.send(b"x" * LINGER_BYTES)
    assert not client.transport.closed
    client.send(b"x")
    assert client.transport.aborted and client.statuses() == [400]


def test_of_a_refused_body_more_is_read_before_the_connection_ends() -> None:
    client = connect()
    client.send(head_of(b"/a", b"Content-Length: 100000000"))
    client.send(b"x" * LINGER_BODY_BYTES)
    assert not client.transport.closed and client.statuses() == [413]
    client.send(b"x")
    assert client.transport.aborted


# Expect


def test_a_client_that_asks_is_told_to_continue_once() -> None:
    client = connect()
    request = post(b"abc", b"Expect: 100-continue")
    client.send(request[:-3])
    assert client.transport.sent == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.transport.sent = b""
    client.send(b"abc")
    assert client.statuses() == [200]


def test_a_client_that_asks_with_a_body_over_the_limit_is_refused() -> None:
    client = connect()
    client.send(b"POST /p HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 100001\r\n\r\n")
    assert client.statuses() == [413]


def test_nobody_is_told_to_continue_before_earlier_answers() -> None:
    client = connect(at_once=False)
    client.send(GET + post(b"abc", b"Expect: 100-continue"))
    for exchange in list(client.application.exchanges):
        client.answer(exchange)
    assert client.statuses() == [200, 200]


# refusals before the body


@pytest.mark.parametrize(
    "lines",
    [
        (b"Content-Length: 90000",),
        (b"Transfer-Encoding: chunked",),
        (b"Content-Length: 3", b"Expect: 100-continue"),
    ],
    ids=["long", "chunked", "asks"],
)
@pytest.mark.parametrize("step", [0, 1])
def test_a_body_that_is_not_wanted_is_refused_before_it_arrives(lines: tuple[bytes, ...], step: int) -> None:
    client = connect()
    client.send(head_of(b"/full", *lines), step=step)
    (answer,) = client.answers()
    assert (answer.status, answer.headers["retry-after"], answer.headers["connection"]) == (429, "3", "close")
    assert client.transport.ended and not client.application.exchanges and not client.application.refusals
    client.send(b"x" * 1000)
    assert client.statuses() == [429]


def test_a_body_of_which_little_is_missing_is_read_and_the_connection_kept() -> None:
    client = connect()
    client.send(head_of(b"/full", b"Content-Length: 60000") + b"x" * 10)
    assert client.statuses() == [] and not client.application.asked
    client.send(b"x" * 59_990 + GET)
    assert client.statuses() == [200, 200]


def test_a_body_that_is_there_already_is_not_asked_about() -> None:
    client = connect()
    client.send(head_of(b"/full", b"Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\n\r\n")
    assert client.statuses() == [200] and not client.application.asked


def test_a_request_is_asked_about_once_behind_those_before_it() -> None:
    client = connect(at_once=False)
    client.send(GET + head_of(b"/full", b"Content-Length: 90000") + b"x")
    assert client.statuses() == [] and client.application.asked == [(b"/full", 90_000)]
    client.answer(client.application.exchanges[0])
    assert client.statuses() == [200, 429] and client.transport.ended


# endings


def test_requests_that_arrive_in_one_turn_go_to_the_application_together() -> None:
    application = Application()
    server = HttpServer(application, LIMITS, edge=False)
    clients = [connect(server=server) for _ in range(3)]
    for client in clients:
        client.connection.data_received(GET)
    assert not application.exchanges
    turn(clients[0].connection)
    assert [exchange.connection for exchange in application.exchanges] == [client.connection for client in clients]
    assert [client.statuses() for client in clients] == [[200]] * 3


def test_a_client_that_leaves_within_the_turn_is_not_worked_for() -> None:
    application = Application()
    server = HttpServer(application, LIMITS, edge=False)
    one, other = connect(server=server), connect(server=server)
    for client in (one, other):
        client.connection.data_received(GET)
    one.connection.connection_lost(None)
    turn(other.connection)
    assert [exchange.connection for exchange in application.exchanges] == [other.connection]


def test_a_fault_of_the_application_leaves_nobody_waiting() -> None:
    class Faulty(Application):
        def handle(self, exchanges: list[Exchange]) -> None:
            super().handle(exchanges[:1])
            raise RuntimeError("of ours")

    server = HttpServer(Faulty(), LIMITS, edge=False)
    one, other = connect(server=server), connect(server=server)
    for client in (one, other):
        client.connection.data_received(GET)
    turn(one.connection)
    assert one.statuses() == [200] and not one.transport.closed
    assert other.transport.aborted


def test_when_the_client_leaves_its_work_is_cancelled() -> None:
    client = connect(at_once=False)
    client.send(GET * 2)
    client.answer(client.application.exchanges[1])
    client.connection.connection_lost(None)
    assert client.application.works[0].cancelled and not client.application.works[1].cancelled
    client.answer(client.application.exchanges[0])
    assert client.transport.sent == b""


def test_a_client_that_closes_its_half_still_gets_its_answers() -> None:
    client = connect(at_once=False)
    client.send(GET * 2)
    assert client.connection.eof_received()
    for exchange in list(client.application.exchanges):
        client.answer(exchange)
    assert client.statuses() == [200, 200] and client.transport.ended


@pytest.mark.parametrize(("data", "edge"), [(b"", False), (b"GET /a", False), (GET, True)])
def test_the_end_of_the_stream_is_goodbye_when_nothing_is_owed_or_nginx_says_it(data: bytes, edge: bool) -> None:
    client = connect(at_once=False, edge=edge)
    if data:
        client.send(data)
    assert not client.connection.eof_received()


def test_draining_closes_an_idle_connection_at_once() -> None:
    client = connect()
    client.send(GET)
    client.connection.drain()
    assert client.transport.closed


def test_draining_waits_for_the_requests_in_hand_and_says_close() -> None:
    client = connect(at_once=False)
    client.send(GET * 2)
    drained = client.connection.drain()
    assert not client.transport.closed
    for exchange in list(client.application.exchanges):
        client.answer(exchange)
    first, second = client.answers()
    assert "connection" not in first.headers and second.headers["connection"] == "close"
    assert client.transport.closed and not drained.done(), "the answers may still be on their way"
    client.connection.connection_lost(None)
    assert drained.done()


def test_draining_waits_for_a_request_that_is_arriving() -> None:
    client = connect()
    client.send(GET[:-2])
    client.connection.drain()
    assert not client.transport.closed
    client.send(GET[-2:])
    assert client.answers()[0].headers["connection"] == "close" and client.transport.closed


def test_draining_twice_changes_nothing() -> None:
    client = connect(at_once=False)
    client.send(GET)
    client.connection.drain()
    client.connection.drain()
    client.answer(client.application.exchanges[0])
    assert client.statuses() == [200]


def test_an_error_that_names_a_file_that_is_not_utf8_is_told() -> None:
    _, _, body = error_response(BadRequestError("cannot load \udcff"))
    assert body == b'{"code":400,"type":"BadRequestException","message":"cannot load ?"}\n'


def test_an_error_of_the_application_is_told_as_json() -> None:
    client = connect(at_once=False)
    client.send(GET)
    client.application.exchanges[0].fail(MMSError("it broke", status=507))
    (answer,) = client.answers()
    assert answer.status == 507
    assert json.loads(answer.body) == {"code": 507, "type": "InternalServerException", "message": "it broke"}


def test_the_parser_of_a_connection_that_has_ended_is_freed_without_the_collector() -> None:
    client = connect()
    client.send(GET)
    parser = client.connection._reader._parser
    client.connection.connection_lost(None)
    assert sys.getrefcount(parser) == 2  # this function's and its own argument


@pytest.mark.parametrize("streams", [False, True])
def test_a_request_whose_client_has_left_is_freed_without_the_collector(streams: bool) -> None:
    client = connect(at_once=False)
    client.send(GET)
    exchange = client.application.exchanges.pop()
    facts = RequestFacts("", "", b"", False, [])
    exchange.work = job = Job(1, facts, b"", exchange.parts, 0, exchange, 0.0)
    if streams:
        job.caller = exchange.begin(200, b"content-type: text/plain\r\n")
        job.caller.chunk(b"a")
    client.connection.connection_lost(None)
    assert job.settled and exchange.stream is None
    assert sys.getrefcount(job) == 2
