"""What is read as a request and what is refused, cut anywhere: framing and limits. No sockets."""

from __future__ import annotations

import json

import pytest

from mms.http.limits import MAX_FIELDS, MAX_HEAD, MAX_LINE, MAX_PIPELINED
from tests.unit.http_client import GET, chunked, connect, post

# what is accepted


ACCEPTED = {
    "get": (GET, b"GET /a "),
    "body": (post(b"hello"), b"POST /p hello"),
    "empty body": (post(b""), b"POST /p "),
    "get with body": (b"GET /a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi", b"GET /a hi"),
    "length with zeros": (b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 0003\r\n\r\nabc", b"POST /p abc"),
    "length with space": (b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 3 \r\n\r\nabc", b"POST /p abc"),
    "chunked": (chunked(b"3\r\nabc\r\n", b"2\r\nde\r\n", b"0\r\n\r\n"), b"POST /c abcde"),
    "chunk extension": (chunked(b'3;a=b;c="d"\r\nabc\r\n', b"0\r\n\r\n"), b"POST /c abc"),
    "trailer": (chunked(b"3\r\nabc\r\n", b"0\r\nX-T: 1\r\n\r\n"), b"POST /c abc"),
    "absolute form": (b"GET http://y/a?b HTTP/1.1\r\nHost: x\r\n\r\n", b"GET http://y/a?b "),
    "options of all": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", b"OPTIONS * "),
    "empty lines before": (b"\r\n\r\n" + GET, b"GET /a "),
    "high bytes in a value": (b"GET /a HTTP/1.1\r\nHost: x\r\nX: \xe4\xff\r\n\r\n", b"GET /a "),
    "1.0 without host": (b"GET /a HTTP/1.0\r\n\r\n", b"GET /a "),
    "query": (b"GET /a?b=c&d HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /a?b=c&d "),
}


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_the_line_of_the_next_request_is_judged_wherever_the_head_before_it_was_cut(cut: int) -> None:
    """Found by `make fuzz`: the rest of the empty line, the body and a request without a version came in one piece."""
    first, client = post(b"abc"), connect()
    at = first.index(b"\r\n\r\n") + cut
    client.send(first[:at])
    client.send(first[at:] + b"POST /pHTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.statuses() == [200, 400]


@pytest.mark.parametrize("step", [0, 1, 7], ids=["whole", "bytes", "sevens"])
@pytest.mark.parametrize("name", ACCEPTED)
def test_good_requests_are_served(name: str, step: int) -> None:
    request, echo = ACCEPTED[name]
    client = connect()
    client.send(request, step=step)
    (answer,) = client.answers()
    assert (answer.status, answer.body) == (200, echo)


@pytest.mark.parametrize("name", ACCEPTED)
def test_good_requests_are_served_again_on_the_same_connection(name: str) -> None:
    request, echo = ACCEPTED[name]
    if b"HTTP/1.0" in request:
        request = request.replace(b"\r\n\r\n", b"\r\nConnection: keep-alive\r\n\r\n")
    client = connect()
    for _ in range(3):
        client.send(request)
    client.send(GET)
    assert [answer.body for answer in client.answers()] == [echo] * 3 + [b"GET /a "]


# what is refused (reliability.md, appendix A)


@pytest.mark.parametrize("before", [b"\n", b"\r\r\n", b"\r\n" * 20], ids=repr)
def test_what_may_stand_before_a_request_line_is_said(before: bytes) -> None:
    client = connect()
    client.send(before + GET)
    (answer,) = client.answers()
    assert answer.status == 400 and b'"only empty lines (CR LF) may stand before the request line"' in answer.body


LENGTH = b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: "
CODING = b"POST /p HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: "
REFUSED = {
    "length then coding": (LENGTH + b"3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "coding then length": (CODING + b"chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400),
    "two lengths": (LENGTH + b"3\r\nContent-Length: 4\r\n\r\nabcd", 400),
    "the same length twice": (LENGTH + b"3\r\nContent-Length: 3\r\n\r\nabc", 400),
    "length list": (LENGTH + b"3, 3\r\n\r\nabc", 400),
    "length with plus": (LENGTH + b"+3\r\n\r\nabc", 400),
    "negative length": (LENGTH + b"-1\r\n\r\n", 400),
    "hexadecimal length": (LENGTH + b"0x3\r\n\r\nabc", 400),
    "length in two": (LENGTH + b"3 3\r\n\r\nabc", 400),
    "no length": (LENGTH + b"\r\n\r\n", 400),
    "length with underscore": (LENGTH + b"1_0\r\n\r\n", 400),
    "length 2^64": (LENGTH + b"18446744073709551616\r\n\r\n", 400),
    "length 2^64-1": (LENGTH + b"18446744073709551615\r\n\r\n", 413),
    "xchunked": (CODING + b"xchunked\r\n\r\n0\r\n\r\n", 400),
    "identity": (CODING + b"identity\r\n\r\n", 400),
    "chunked, identity": (CODING + b"chunked, identity\r\n\r\n0\r\n\r\n", 400),
    "chunked, chunked": (CODING + b"chunked, chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked twice": (CODING + b"chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked;q=1": (CODING + b"chunked;q=1\r\n\r\n0\r\n\r\n", 400),
    "vertical tab before chunked": (CODING + b"\x0bchunked\r\n\r\n0\r\n\r\n", 400),
    "space before colon": (CODING.replace(b"ng: ", b"ng : ") + b"chunked\r\n\r\n0\r\n\r\n", 400),
    "folded coding": (CODING + b"\r\n chunked\r\n\r\n0\r\n\r\n", 400),
    "identity, chunked": (CODING + b"identity, chunked\r\n\r\n0\r\n\r\n", 501),
    "gzip, chunked": (CODING + b"gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "coding in 1.0": (CODING.replace(b"1.1", b"1.0") + b"chunked\r\n\r\n0\r\n\r\n", 400),
    "bare LF after the line": (b"GET /a HTTP/1.1\nHost: x\r\n\r\n", 400),
    "bare LF after a header": (b"GET /a HTTP/1.1\r\nHost: x\n\r\n", 400),
    "bare CR": (b"GET /a HTTP/1.1\r\nHost: x\rX: y\r\n\r\n", 400),
    "CR CR LF": (b"GET /a HTTP/1.1\r\r\nHost: x\r\n\r\n", 400),
    "folded header": (b"GET /a HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n", 400),
    "leading space": (b"GET /a HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    "chunk line with LF": (chunked(b"3\nabc\r\n0\r\n\r\n"), 400),
    "chunk size and space": (chunked(b"3 \r\nabc\r\n0\r\n\r\n"), 400),
    "chunk 0x3": (chunked(b"0x3\r\nabc\r\n0\r\n\r\n"), 400),
    "chunk +3": (chunked(b"+3\r\nabc\r\n0\r\n\r\n"), 400),
    "empty chunk size": (chunked(b"\r\nabc\r\n0\r\n\r\n"), 400),
    "17 digits of chunk size": (chunked(b"00000000000000003\r\nabc\r\n0\r\n\r\n"), 400),
    "17 digits of a later chunk's size": (chunked(b"3;a\r\nabc\r\n" + b"0" * 16 + b"1;b\r\na\r\n0\r\n\r\n"), 400),
    "40 digits of last chunk": (chunked(b"3\r\nabc\r\n" + b"0" * 40 + b"\r\n\r\n"), 400),
    "chunk overflow": (chunked(b"fffffffffffffffff\r\nabc"), 400),
    "huge chunk": (chunked(b"ffffffff\r\n" + b"x" * 100_001), 413),
    "chunk without end": (chunked(b"3\r\nabcX0\r\n\r\n"), 400),
    "chunk spill": (chunked(b"3\r\nabcde\r\n0\r\n\r\n"), 400),
    "CR in extension": (chunked(b"3;a\rb\r\nabc\r\n0\r\n\r\n"), 400),
    "LF in extension": (chunked(b"3;a\nb\r\nabc\r\n0\r\n\r\n"), 400),
    "trailer Content-Length": (chunked(b"0\r\nContent-Length: 3\r\n\r\n"), 400),
    "trailer Transfer-Encoding": (chunked(b"0\r\nTransfer-Encoding: chunked\r\n\r\n"), 400),
    "no host": (b"GET /a HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /a HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
    "two hosts in 1.0": (b"GET /a HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    "no host name": (b"GET /a HTTP/1.1\r\nHost: a b<>\r\n\r\n", 400),
    "NUL in value": (b"GET /a HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n", 400),
    "control in value": (b"GET /a HTTP/1.1\r\nHost: x\r\nX: a\x01b\r\n\r\n", 400),
    "DEL in value": (b"GET /a HTTP/1.1\r\nHost: x\r\nX: a\x7fb\r\n\r\n", 400),
    "high byte in name": (b"GET /a HTTP/1.1\r\nHost: x\r\nX\xe4: a\r\n\r\n", 400),
    "NUL in name": (b"GET /a HTTP/1.1\r\nHost: x\r\nX\0: a\r\n\r\n", 400),
    "empty name": (b"GET /a HTTP/1.1\r\nHost: x\r\n: a\r\n\r\n", 400),
    "space in name": (b"GET /a HTTP/1.1\r\nHost: x\r\nX Y: a\r\n\r\n", 400),
    "no colon": (b"GET /a HTTP/1.1\r\nHost: x\r\nfoo\r\n\r\n", 400),
    "no version": (b"GET /a\r\nHost: x\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /a HTTP/0.9\r\nHost: x\r\n\r\n", 400),
    "HTTP/2.0": (b"GET /a HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    "HTTP/1.2": (b"GET /a HTTP/1.2\r\nHost: x\r\n\r\n", 400),
    "http/1.1": (b"GET /a http/1.1\r\nHost: x\r\n\r\n", 400),
    "ICE": (b"SOURCE /a ICE/1.0\r\nHost: x\r\n\r\n", 400),
    "RTSP": (b"OPTIONS * RTSP/1.0\r\nHost: x\r\n\r\n", 400),
    "lower-case method": (b"get /a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "unknown method": (b"FETCH /a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "two spaces": (b"GET  /a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "tab in target": (b"GET /a\tb HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "space in target": (b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "control in target": (b"GET /a\x01 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "high byte in target": (b"GET /\xe4 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "fragment": (b"GET /a#b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "authority form": (b"GET y:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "GET *": (b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "CONNECT": (b"CONNECT y:80 HTTP/1.1\r\nHost: x\r\n\r\nraw", 400),
    "upgrade to h2c": (post(b"abc", b"Connection: Upgrade", b"Upgrade: h2c"), 400),
    "upgrade to websocket": (post(b"abc", b"Connection: Upgrade", b"Upgrade: websocket"), 400),
    "leading CRLFs": (b"\r\n" * 40 + GET, 400),
    "leading LF": (b"\n" + GET, 400),
    "unknown expectation": (post(b"abc", b"Expect: a-miracle"), 417),
    "garbage": (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
}


@pytest.mark.parametrize("step", [0, 1], ids=["whole", "bytes"])
@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_refused_and_the_connection_ends(name: str, step: int) -> None:
    request, status = REFUSED[name]
    client = connect()
    client.send(request, step=step)
    assert client.statuses() == [status]
    (answer,) = client.answers()
    assert answer.headers["connection"] == "close"
    assert json.loads(answer.body)["code"] == status and answer.message
    assert client.transport.ended
    assert not client.application.exchanges, "refused, and handed to the application all the same"


ENDLESS = {
    "zeros before chunk size": (chunked(b"0" * 60_000 + b"3\r\nabc\r\n0\r\n\r\n"), 400),
    "endless chunk extension": (chunked(b"3;" + b"a" * 60_000 + b"\r\nabc\r\n0\r\n\r\n"), 400),
    "endless trailers": (chunked(b"0\r\n", b"X: y\r\n" * 15_000, b"\r\n"), 400),
}
# Between two requests of one read, the parser hides what a request line looked like; nobody else reads the stream.
HIDDEN = {"leading CRLFs", "leading LF", "two spaces", "RTSP", "ICE"}


@pytest.mark.parametrize("step", [1, 1 << 10, 1 << 14])
@pytest.mark.parametrize("name", ENDLESS)
def test_what_a_chunked_body_may_hold_beside_its_data_is_bounded(name: str, step: int) -> None:
    request, status = ENDLESS[name]
    client = connect()
    client.send(request, step=step)
    assert client.statuses() == [status] and client.transport.ended


@pytest.mark.parametrize("step", [0, 1], ids=["whole", "bytes"])
def test_the_preface_of_http2_is_refused(step: int) -> None:
    client = connect()
    client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", step=step)
    assert client.statuses() in ([400], [505]) and client.transport.ended


@pytest.mark.parametrize("step", [0, 1], ids=["whole", "bytes"])
@pytest.mark.parametrize("name", [name for name in REFUSED if name not in HIDDEN])
def test_a_good_request_before_a_bad_one_is_answered_first(name: str, step: int) -> None:
    request, status = REFUSED[name]
    client = connect(at_once=False)
    client.send(GET + request, step=step)
    assert client.statuses() == []
    (exchange,) = client.application.exchanges
    client.answer(exchange)
    assert client.statuses() == [200, status]
    assert client.transport.ended


@pytest.mark.parametrize("count", [1, MAX_PIPELINED, MAX_PIPELINED + 4])
def test_all_good_requests_before_a_bad_one_are_answered(count: int) -> None:
    client = connect(at_once=False)
    client.send(GET * count + b"garbage\r\n\r\n")
    while any(exchange.response is None for exchange in client.application.exchanges):
        todo = [exchange for exchange in client.application.exchanges if exchange.response is None]
        answered = len(client.answers())
        client.answer(todo[answered] if answered < len(todo) else todo[-1])
        if len(client.answers()) == answered:
            break
    assert client.statuses() == [200] * count + [400]


# limits


def test_a_body_over_the_limit_is_refused_before_it_arrives() -> None:
    client = connect()
    client.send(b"POST /p HTTP/1.1\r\nHost: x\r\nContent-Length: 100001\r\n\r\n")
    assert client.statuses() == [413]
    assert "100000 bytes" in client.answers()[0].message


def test_a_body_of_the_limit_is_served() -> None:
    client = connect()
    client.send(post(b"x" * 100_000), step=1 << 16)
    assert client.statuses() == [200]


def test_a_chunked_body_over_the_limit_is_refused_where_it_passes_it() -> None:
    client = connect()
    client.send(chunked(b"186a0\r\n", b"x" * 100_000, b"\r\n"))
    assert client.statuses() == []
    client.send(b"1\r\nx")
    assert client.statuses() == [413]


def test_a_large_chunked_body_of_small_chunks_is_served() -> None:
    client = connect()
    client.send(chunked(b"1\r\nx\r\n" * 20_000, b"0\r\n\r\n"), step=1 << 16)
    assert client.statuses() == [200]


@pytest.mark.parametrize("step", [0, 1 << 10])
def test_a_request_line_over_the_limit_is_414(step: int) -> None:
    client = connect()
    client.send(b"GET /" + b"a" * MAX_LINE + b" HTTP/1.1\r\nHost: x\r\n\r\n", step=step)
    assert client.statuses() == [414]


@pytest.mark.parametrize("step", [0, 1 << 10])
@pytest.mark.parametrize(
    "lines",
    [b"X: " + b"a" * MAX_HEAD + b"\r\n", b"X: y\r\n" * (MAX_FIELDS + 1), b"X-Long: abcdefghij\r\n" * 2000],
    ids=["long", "many", "both"],
)
def test_headers_over_the_limit_are_431(lines: bytes, step: int) -> None:
    client = connect()
    client.send(b"GET /a HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n", step=step)
    assert client.statuses() == [431]


def test_headers_at_the_limit_are_served() -> None:
    client = connect()
    client.send(b"GET /a HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * (MAX_FIELDS - 1) + b"\r\n")
    assert client.statuses() == [200]


def test_a_long_body_does_not_count_against_the_head_of_the_next_request() -> None:
    client = connect()
    client.send(post(b"x" * (MAX_HEAD + 100)) + b"GET /a HTTP/1.1\r\nHo")
    client.send(b"st: x\r\n\r\n")
    assert client.statuses() == [200, 200]


def test_a_long_body_does_not_count_against_the_chunks_of_the_next_request() -> None:
    client = connect()
    second = chunked(b"3\r\nabc\r\n", b"0\r\n\r\n")
    client.send(post(b"x" * 90_000) + second[:-3])
    client.send(second[-3:])
    assert client.statuses() == [200, 200]
