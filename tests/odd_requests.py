"""Requests that front ends are known to disagree about, with one verdict on each, and a strict reader of answers.

What the front end does with them: tests/e2e/test_bad_input.py; what nginx does: tests/faults/test_nginx_requests.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import h11

POST = b"POST /predictions/echo HTTP/1.1\r\n"
HOST = b"Host: a\r\n"
CHUNKED = POST + HOST + b"Transfer-Encoding: chunked\r\n"
AFTER = b"GET /ping HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def field(line: bytes, body: bytes = b"abc") -> bytes:
    """A request with one more header line; its length is given unless the line does."""
    return POST + HOST + line + b"\r\n\r\n" + body


def length(value: bytes, body: bytes = b"abc") -> bytes:
    return field(b"Content-Length:" + value, body)


def coding(value: bytes, body: bytes = b"3\r\nabc\r\n0\r\n\r\n") -> bytes:
    return field(b"Transfer-Encoding:" + value, body)


def chunks(body: bytes) -> bytes:
    return CHUNKED + b"\r\n" + body


def line(text: bytes) -> bytes:
    return text + b"\r\nHost: a\r\n\r\n"


END = b"0\r\n\r\n"

REFUSED: dict[str, tuple[bytes, set[int]]] = {
    "length-then-chunked": (field(b"Content-Length: 3\r\nTransfer-Encoding: chunked", b"3\r\nabc\r\n" + END), {400}),
    "chunked-then-length": (field(b"Transfer-Encoding: chunked\r\nContent-Length: 3", b"3\r\nabc\r\n" + END), {400}),
    "length-twice-same": (field(b"Content-Length: 3\r\nContent-Length: 3"), {400}),
    "length-twice-different": (field(b"Content-Length: 3\r\nContent-Length: 4"), {400}),
    "length-list": (length(b" 3, 3"), {400}),
    "length-plus": (length(b" +3"), {400}),
    "length-minus": (length(b" -1"), {400}),
    "length-hex": (length(b" 0x3"), {400}),
    "length-space-inside": (length(b" 3 3"), {400}),
    "length-empty": (length(b""), {400}),
    "length-blank": (length(b"  "), {400}),
    "length-underscore": (length(b" 1_0"), {400}),
    "length-2^64": (length(b" 18446744073709551616"), {400}),
    "length-2^64-1": (length(b" 18446744073709551615"), {413}),
    "length-over-limit": (length(b" 2097153"), {413}),
    "coding-xchunked": (coding(b" xchunked"), {400, 501}),
    "coding-identity": (coding(b" identity"), {400, 501}),
    "coding-chunked-identity": (coding(b" chunked, identity"), {400}),
    "coding-chunked-chunked": (coding(b" chunked, chunked"), {400}),
    "coding-twice": (field(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b"3\r\nabc\r\n" + END), {400}),
    "coding-parameter": (coding(b" chunked;q=1"), {400, 501}),
    "coding-vertical-tab": (coding(b" \x0bchunked"), {400}),
    "coding-space-before-colon": (field(b"Transfer-Encoding : chunked", b"3\r\nabc\r\n" + END), {400}),
    "coding-folded": (coding(b"\r\n chunked"), {400}),
    "coding-identity-chunked": (coding(b" identity, chunked"), {501}),
    "coding-gzip-chunked": (coding(b" gzip, chunked"), {501}),
    "coding-in-http-1.0": (CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r\n3\r\nabc\r\n" + END, {400}),
    "lf-after-request-line": (b"GET /ping HTTP/1.1\nHost: a\r\n\r\n", {400}),
    "lf-after-header": (b"GET /ping HTTP/1.1\r\nHost: a\n\r\n", {400}),
    "lf-everywhere": (b"GET /ping HTTP/1.1\nHost: a\n\n", {400}),
    "cr-after-request-line": (b"GET /ping HTTP/1.1\rHost: a\r\n\r\n", {400}),
    "cr-in-header": (b"GET /ping HTTP/1.1\r\nHost: a\rX: b\r\n\r\n", {400}),
    "cr-cr-lf": (b"GET /ping HTTP/1.1\r\r\nHost: a\r\n\r\n", {400}),
    "cr-cr-lf-after-header": (b"GET /ping HTTP/1.1\r\nHost: a\r\r\n\r\n", {400}),
    "folded-header": (b"GET /ping HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n", {400}),
    "space-before-first-header": (b"GET /ping HTTP/1.1\r\n Host: a\r\n\r\n", {400}),
    "chunk-lf-only": (chunks(b"3\nabc\r\n" + END), {400}),
    "chunk-trailing-space": (chunks(b"3 \r\nabc\r\n" + END), {400}),
    "chunk-0x": (chunks(b"0x3\r\nabc\r\n" + END), {400}),
    "chunk-plus": (chunks(b"+3\r\nabc\r\n" + END), {400}),
    "chunk-empty": (chunks(b"\r\nabc\r\n" + END), {400}),
    "chunk-overflow": (chunks(b"10000000000000003\r\nabc\r\n" + END), {400}),
    "chunk-over-limit": (chunks(b"200001\r\n" + b"x" * 0x200001), {413}),
    "chunk-no-crlf-after-data": (chunks(b"3\r\nabc" + END), {400}),
    "chunk-two-bytes-more": (chunks(b"3\r\nabcde\r\n" + END), {400}),
    "chunk-cr-in-extension": (chunks(b"3;a\rb\r\nabc\r\n" + END), {400}),
    "chunk-lf-in-extension": (chunks(b"3;a\nb\r\nabc\r\n" + END), {400}),
    "chunk-40-zeros": (chunks(b"0" * 40 + b"3\r\nabc\r\n" + END), {400}),
    "chunk-extensions-too-long": (chunks(b"3;" + b"a" * 100_000 + b"\r\nabc\r\n" + END), {400}),
    "chunk-many-extensions": (chunks((b"1;" + b"a" * 500 + b"\r\nx\r\n") * 200 + END), {400}),
    "trailers-too-long": (chunks(b"0\r\n" + b"X: y\r\n" * 20_000 + b"\r\n"), {400}),
    "trailer-length": (chunks(b"3\r\nabc\r\n0\r\nContent-Length: 3\r\n\r\n"), {400}),
    "trailer-coding": (chunks(b"3\r\nabc\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n"), {400}),
    "host-missing": (b"GET /ping HTTP/1.1\r\n\r\n", {400}),
    "host-twice": (b"GET /ping HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", {400}),
    "host-nonsense": (b"GET /ping HTTP/1.1\r\nHost: a b<>\r\n\r\n", {400}),
    "type-twice": (field(b"Content-Type: a/b\r\nContent-Type: c/d\r\nContent-Length: 3"), {400}),
    "nul-in-value": (field(b"X: a\0b", b""), {400}),
    "control-in-value": (field(b"X: a\x01b", b""), {400}),
    "del-in-value": (field(b"X: a\x7fb", b""), {400}),
    "high-byte-in-name": (field(b"X\xe4: a", b""), {400}),
    "nul-in-name": (field(b"X\0: a", b""), {400}),
    "empty-name": (field(b": a", b""), {400}),
    "space-in-name": (field(b"X Y: a", b""), {400}),
    "no-colon": (field(b"foo", b""), {400}),
    "no-version": (line(b"GET /ping"), {400}),
    "http-0.9": (line(b"GET /ping HTTP/0.9"), {400}),
    "http-2.0": (line(b"GET /ping HTTP/2.0"), {505}),
    "http-1.2": (line(b"GET /ping HTTP/1.2"), {400, 505}),
    "http-lower-case": (line(b"GET /ping http/1.1"), {400}),
    "ice": (line(b"SOURCE / ICE/1.0"), {400}),
    "rtsp": (line(b"OPTIONS * RTSP/1.0"), {400}),
    "http-2-preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 505}),
    "method-lower-case": (line(b"get /ping HTTP/1.1"), {400}),
    "method-unknown": (line(b"BREW /ping HTTP/1.1"), {400, 501}),
    "two-spaces-before-target": (line(b"GET  /ping HTTP/1.1"), {400}),
    "two-spaces-after-target": (line(b"GET /ping  HTTP/1.1"), {400}),
    "tab-in-request-line": (line(b"GET\t/ping HTTP/1.1"), {400}),
    "space-in-target": (line(b"GET /pi ng HTTP/1.1"), {400}),
    "control-in-target": (line(b"GET /pi\x01ng HTTP/1.1"), {400}),
    "high-byte-in-target": (line(b"GET /pi\xe4ng HTTP/1.1"), {400}),
    "fragment": (line(b"GET /ping#x HTTP/1.1"), {400}),
    "authority-form": (line(b"GET a:80 HTTP/1.1"), {400}),
    "star-with-get": (line(b"GET * HTTP/1.1"), {400}),
    "connect": (line(b"CONNECT a:80 HTTP/1.1"), {400, 405}),
    "three-leading-crlf": (b"\r\n\r\n\r\n" + line(b"GET /ping HTTP/1.1"), {400}),
    "leading-crlf-without-end": (b"\r\n" * 5000, {400}),
    "leading-lf": (b"\n" + line(b"GET /ping HTTP/1.1"), {400}),
    "expect-unknown": (field(b"Expect: 200-maybe\r\nContent-Length: 3"), {417}),
    "target-too-long": (line(b"GET /" + b"a" * 9000 + b" HTTP/1.1"), {414}),
    "request-line-without-end": (b"GET /" + b"a" * 20_000, {414}),
    "headers-too-long": (field(b"X: " + b"a" * 40_000, b""), {431}),
    "headers-too-many": (field(b"\r\n".join(b"X%d: a" % number for number in range(200)), b""), {431}),
    "length-minus-zero": (length(b" -0", b""), {400}),
    "length-two-lists": (field(b"Content-Length: 3\r\nContent-Length: 3, 3"), {400}),
    "coding-four-times": (
        field(b"\r\n".join([b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked"] * 2), b"3\r\nabc\r\n" + END),
        {400, 501},
    ),
    "coding-empty": (coding(b""), {400}),
    "chunk-space-before-size": (chunks(b"3\r\nabc\r\n 0\r\n\r\n"), {400}),
    "chunk-minus": (chunks(b"-3\r\nabc\r\n" + END), {400}),
    "chunk-underscore": (chunks(b"1_0\r\n0123456789abcdef\r\n" + END), {400}),
    "bell-in-value": (field(b"X: ding\x07", b""), {400}),
    "colon-alone": (field(b":", b""), {400}),
    "http-111": (line(b"GET /ping HTTP/111"), {400}),
    "http-1.1000": (line(b"GET /ping HTTP/1." + b"0" * 100 + b"1"), {400}),
    "http-1": (line(b"GET /ping HTTP/1"), {400}),
    "http-1.1-and-more": (line(b"GET /ping HTTP/1.1 HTTP/1.1"), {400}),
    "other-protocol": (line(b"GET /ping FTP/1.1"), {400}),
    "no-target": (line(b"GET HTTP/1.1"), {400}),
    "relative-target": (line(b"GET ping HTTP/1.1"), {400}),
    "lf-for-spaces": (line(b"GET\n/ping\nHTTP/1.1"), {400}),
    "method-with-colon": (line(b"GE:T /ping HTTP/1.1"), {400}),
    "method-with-nul": (line(b"GET\0 /ping HTTP/1.1"), {400}),
    "method-with-high-byte": (line(b"GET\xff /ping HTTP/1.1"), {400}),
    "method-in-quotes": (line(b'"GET" /ping HTTP/1.1'), {400}),
    "space-before-method": (line(b" GET /ping HTTP/1.1"), {400}),
    "proxy-protocol": (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n" + line(b"GET /ping HTTP/1.1"), {400}),
    "not-http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n", {400}),
}  # fmt: skip

# sha256 of the body that the handler must see
ACCEPTED: dict[str, tuple[bytes, bytes]] = {
    "length-leading-zeros": (length(b" 0003"), b"abc"),
    "length-trailing-space": (length(b" 3 "), b"abc"),
    "length-no-space": (length(b"3"), b"abc"),
    "coding-upper-case": (coding(b" CHUNKED"), b"abc"),
    "underscore-coding": (field(b"Transfer_Encoding: chunked\r\nContent-Length: 3"), b"abc"),
    "chunk-extension": (chunks(b"3;name=value\r\nabc\r\n" + END), b"abc"),
    "chunk-quoted-extension": (chunks(b'3;name="a b"\r\nabc\r\n' + END), b"abc"),
    "chunk-16-digits": (chunks(b"0000000000000003\r\nabc\r\n" + END), b"abc"),
    "chunk-upper-hex": (chunks(b"A\r\n0123456789\r\n" + END), b"0123456789"),
    "chunk-lower-hex": (chunks(b"a\r\n0123456789\r\n" + END), b"0123456789"),
    "chunks-of-one-byte": (chunks(b"1\r\nx\r\n" * 300 + END), b"x" * 300),
    "trailers": (chunks(b"3\r\nabc\r\n0\r\nX-Sum: 1\r\n\r\n"), b"abc"),
    "high-bytes-in-value": (field(b"X: \xe4\xff\r\nContent-Length: 3"), b"abc"),
    "empty-value": (field(b"X:\r\nContent-Length: 3"), b"abc"),
    "absolute-form": (length(b" 3").replace(b"/pre", b"http://else.where/pre"), b"abc"),
    "one-leading-crlf": (b"\r\n" + length(b" 3"), b"abc"),
    "two-leading-crlf": (b"\r\n\r\n" + length(b" 3"), b"abc"),
    "get-with-body": (length(b" 3").replace(b"POST", b"GET", 1), b"abc"),
    "host-with-port": (length(b" 3").replace(b"Host: a", b"Host: a.b-c:80"), b"abc"),
    "host-ipv6": (length(b" 3").replace(b"Host: a", b"Host: [::1]:80"), b"abc"),
    "host-empty": (length(b" 3").replace(b"Host: a", b"Host:"), b"abc"),
    "chunk-trailer-host": (chunks(b"3\r\nabc\r\n0\r\nHost: else.where\r\n\r\n"), b"abc"),
    "tabs-around-value": (field(b"X:\t a \t\r\nContent-Length:\t3\t"), b"abc"),
    "absolute-form-ipv6": (length(b" 3").replace(b"/pre", b"http://[::1]:80/pre"), b"abc"),
    "query": (length(b" 3").replace(b"/echo", b"/echo?a=b?c&d=/e"), b"abc"),
    "header-of-8000": (field(b"X: " + b"a" * 8000 + b"\r\nContent-Length: 3"), b"abc"),
}  # fmt: skip


def answers(data: bytes, *, methods: tuple[bytes, ...] = ()) -> list[Answer]:
    """The answers in `data`, read by a strict parser; fails when there is anything else in it."""
    found: list[Answer] = []
    while data:
        method = methods[len(found)] if len(found) < len(methods) else b"GET"
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        body, head = b"", None
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            assert event is not h11.NEED_DATA, f"cut: {data!r}"
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
        assert head is not None
        headers = {bytes(name).decode(): bytes(value).decode() for name, value in head.headers}
        found.append(Answer(head.status_code, headers, body))
        data = client.trailing_data[0]
    return found
