"""Verdicts on a request's head, where the parser is more tolerant than a server may be (RFC 9110, RFC 9112)."""

from __future__ import annotations

from typing import Any

from mms.errors import BadRequestError, MethodNotAllowedError, MMSError, RequestTooLargeError
from mms.http.limits import LARGE_BODY, MAX_FIELDS, MAX_HEAD, MAX_LINE

MAX_KNOWN = 1024
MAX_KNOWN_SIZE = 2 << 10

_VERSIONS = (b" HTTP/1.1", b" HTTP/1.0")
_HOST_BYTES = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_:[]%~!$&'()*+,;=")
_ID_BYTES = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def judge_line(line: bytes) -> MMSError | None:
    """The request line, without its CRLF."""
    if line[-9:] in _VERSIONS and line.count(b" ") == 2 and b"#" not in line:
        return None
    if len(line) > MAX_LINE:
        return too_long()
    if line[:4] != b"PRI " and (line[-9:-1] == b" HTTP/2." or line[-7:] == b" HTTP/2"):
        return BadRequestError("HTTP/2 is not spoken here; use HTTP/1.1", status=505)
    return BadRequestError("the request line is not 'METHOD target HTTP/1.1'")


def judge_head(head: Head) -> MMSError | None:
    """The head as a whole, once the parser has seen it all."""
    target = head.target
    if len(target) > MAX_LINE:
        return too_long()
    if head.size > MAX_HEAD or len(head.headers) > 2 * MAX_FIELDS:
        return too_large()
    if head.hosts != 1 and (head.hosts or head.version != "1.0"):
        return BadRequestError(f"the request has {head.hosts} Host headers; exactly one is needed")
    if head.fault:
        return BadRequestError(head.fault)
    if head.method == b"CONNECT" or head.upgrade:
        return MethodNotAllowedError("this server is no proxy and does not change protocols", status=400)
    if target[:1] != b"/" and target[:7].lower() != b"http://" and not (target == b"*" and head.method == b"OPTIONS"):
        return BadRequestError("the request target must begin with /")
    if head.transfer_encoding:
        if head.version == "1.0":
            return BadRequestError("Transfer-Encoding does not exist in HTTP/1.0")
        codings = [coding.strip() for coding in head.transfer_encoding.split(b",")]
        if codings != [b"chunked"]:
            known = codings[-1] == b"chunked" and codings.count(b"chunked") == 1
            return BadRequestError("of Transfer-Encodings only chunked is supported", status=501 if known else 400)
    if head.expect and head.expect != b"100-continue":
        return BadRequestError("of Expect only 100-continue is supported", status=417)
    return None


def too_long() -> MMSError:
    return RequestTooLargeError(f"the request line is longer than {MAX_LINE} bytes", status=414)


def too_large() -> MMSError:
    return RequestTooLargeError(f"the headers are more than {MAX_FIELDS} or longer than {MAX_HEAD} bytes", status=431)


def valid_id(value: bytes) -> bool:
    """Whether a client's x-request-id is taken over: 1 to 128 letters, digits, dots, underscores, dashes."""
    return 0 < len(value) <= 128 and _ID_BYTES.issuperset(value)


class Head:
    """What the parser has told of the request so far. Complete heads may be shared: they are not changed any more."""

    __slots__ = (
        "content_type",
        "encoding",
        "expect",
        "fault",
        "headers",
        "hosts",
        "keep_alive",
        "length",
        "meaning",
        "method",
        "plain",
        "priority",
        "request_id",
        "size",
        "target",
        "timeout",
        "transfer_encoding",
        "upgrade",
        "version",
    )

    def __init__(self) -> None:
        self.target = b""
        self.headers: list[bytes] = []
        self.size = 0
        self.hosts = 0
        self.fault = ""  # of one header or of two that contradict each other
        self.content_type = ""
        self.encoding = ""
        self.expect = b""
        self.length = 0
        self.transfer_encoding = b""
        self.request_id = b""
        self.timeout = b""  # how long the client waits for the answer, as it says so
        self.priority = b""
        self.method = b""
        self.version = ""
        self.keep_alive = True
        self.upgrade = False
        self.meaning: Any = None  # what the application makes of it: its own note
        self.plain = False  # answered in the usual way: HTTP/1.1, with a body

    def add(self, name: bytes, value: bytes) -> None:
        """One header field. Names with an underscore are dropped, as nginx does: CGI cannot tell them from dashes."""
        self.size += len(name) + len(value) + 4
        key = name.lower()
        note = _NOTES.get(key)
        if note is not None:
            note(self, value)
        elif b"_" in key:
            return
        self.headers += (name, value)

    def note_host(self, value: bytes) -> None:
        self.hosts += 1
        if not _HOST_BYTES.issuperset(value):
            self.fault = "the Host header is not a host name"

    def note_type(self, value: bytes) -> None:
        if self.content_type:
            self.fault = "the request has more than one Content-Type"
        self.content_type = value.decode("latin-1")

    def note_encoding(self, value: bytes) -> None:
        encoding = value.decode("latin-1").lower()
        self.encoding = "" if encoding == "identity" else encoding

    def note_expect(self, value: bytes) -> None:
        self.expect = value.lower()

    def note_length(self, value: bytes) -> None:
        try:
            self.length = int(value) if value.strip().isdigit() else 0  # the parser refuses anything but digits
        except ValueError:  # Python refuses thousands of them, the parser takes any number of zeros
            self.fault = "the Content-Length has too many digits"

    def note_transfer_encoding(self, value: bytes) -> None:
        self.transfer_encoding = (self.transfer_encoding + b"," + value if self.transfer_encoding else value).lower()

    def note_request_id(self, value: bytes) -> None:
        self.request_id = value if valid_id(value) else b""

    def note_timeout(self, value: bytes) -> None:
        self.timeout = value

    def note_priority(self, value: bytes) -> None:
        self.priority = value


_NOTES = {
    b"host": Head.note_host,
    b"content-type": Head.note_type,
    b"content-encoding": Head.note_encoding,
    b"expect": Head.note_expect,
    b"content-length": Head.note_length,
    b"transfer-encoding": Head.note_transfer_encoding,
    b"x-request-id": Head.note_request_id,
    b"x-request-timeout-ms": Head.note_timeout,
    b"x-request-priority": Head.note_priority,
}


class KnownHeads(dict[bytes, Head]):
    """Heads seen before, by their bytes: a client that keeps its connection sends the same head again and again.

    The same bytes between two requests always mean the same, so they are parsed once, provided that they are plain: no
    transfer coding, nothing to negotiate, no id that only occurs once.
    """

    shut = False  # none is kept: every request is looked at
    max_body = LARGE_BODY  # bytes; one over the limit of new connections is not kept, though an older one may send it

    def may_come_again(self, raw: bytes, head: Head) -> bool:
        """Whether a head that was judged fit to serve is plain."""
        return not (
            self.shut
            or head.transfer_encoding
            or head.expect
            or head.request_id
            or not head.keep_alive
            or len(raw) > MAX_KNOWN_SIZE
        )

    def remember(self, raw: bytes, head: Head) -> None:
        """Keep a plain head; that of a large body is each connection's own matter."""
        if head.length >= LARGE_BODY or head.length > self.max_body or not self.may_come_again(raw, head):
            return
        if len(self) >= MAX_KNOWN:
            self.clear()
        self[raw] = head
