"""What a handler returned, as an answer that can be sent: status, header block, body. Runs in the worker process."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from mms.errors import HandlerError, MMSError
from mms.handler import PredictionError, Response
from mms.wire import Outcome

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_INSIDE = re.compile(r"0x[0-9A-Fa-f]{4,}|(?<![\w.])/[\w.-]+(?:/[\w.-]+)+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_FRAMING = frozenset(
    {b"content-length", b"transfer-encoding", b"connection", b"keep-alive", b"upgrade", b"trailer", b"te"}
)

PLAIN_BYTES = Outcome(200, b"content-type: application/octet-stream\r\n", "")
_TEXT = Outcome(200, b"content-type: text/plain; charset=utf-8\r\n", "")
_JSON = Outcome(200, b"content-type: application/json\r\n", "")
_ALWAYS_JSON = frozenset({dict, list})  # the usual ones: what else a result may be need not be asked for them

Body = bytes | bytearray | memoryview

# What became of one request, and its body; with an error the body is its message. A plain tuple, as there may be one
# per request, and with an Outcome that is shared wherever the handler has set nothing. In the place of the body may be
# a Stream, which then has the outcome; Stages.streams tells whether to look for one.
Answer = tuple[Outcome, Any]

Answers = tuple[list[Outcome], list[Any]]  # of a batch, in columns


class Streamed(Exception):
    """Raised for a result that is an iterator: an answer that is made of `chunks`, and what the handler set for it."""

    def __init__(self, chunks: Iterator[Any]) -> None:
        super().__init__()
        self.response = Response(chunks)


def is_error_status(status: Any) -> bool:
    return isinstance(status, int) and 400 <= status <= 599


def plain_bytes(results: list[Any], limit: int) -> Answers | None:
    """The answers to at least one request if all results are bytes that can be sent as they are.

    The list is copied: it is the handler's, which may keep it and change it.
    """
    first = results[0]
    if type(first) is not bytes or type(results) is not list:
        return None
    if len(results) == 1:
        return ([PLAIN_BYTES], [first]) if len(first) <= limit else None
    alike = len(set(map(type, results))) == 1 and max(map(len, results)) <= limit
    return ([PLAIN_BYTES] * len(results), results[:]) if alike else None


def columns(answers: Sequence[Answer]) -> Answers:
    """The same, outcomes and bodies apart; of at least one request."""
    outcomes, bodies = map(list, zip(*answers, strict=True))
    return outcomes, bodies


def failure(error: MMSError | PredictionError) -> Answer:
    """The answer for a request that failed."""
    kind = "PredictionException" if isinstance(error, PredictionError) else error.type
    status = error.status if is_error_status(error.status) else 500
    return Outcome(status, b"", kind), str(error.message).encode("utf-8", "replace")


def answer(value: Any, status: int, content_type: str, headers: Mapping[str, str], limit: int) -> Answer:
    """A handler's result, as bytes. Raises HandlerError when it cannot be sent as it is, Streamed for an iterator."""
    if isinstance(value, Response):
        if not isinstance(value.headers, Mapping):
            raise HandlerError(f"the handler set headers to {type(value.headers).__name__}; a dict is needed")
        status, content_type, headers = value.status, value.content_type or content_type, {**headers, **value.headers}
        value = value.body
    try:
        body, usual = body_of(value)
    except Streamed as streamed:
        streamed.response = Response(streamed.response.body, status, content_type, headers)
        raise
    if len(body) > limit:
        raise HandlerError(f"the handler's answer of {len(body)} bytes is over max_response_size ({limit} bytes)")
    if status == 200 and not content_type and not headers:
        return usual, body
    head = usual.head
    if status != 200:
        if not isinstance(status, int) or not 200 <= status <= 599:
            raise HandlerError(f"the handler set status {status!r}; it must be a number from 200 to 599")
        if status in (204, 304):
            body = b""
    if content_type:
        head = _header("content-type", content_type)
    extra = b""
    for name, text in headers.items():
        line = _header(name, text)
        if line.startswith(b"content-type:"):
            head = line
        else:
            extra += line
    return Outcome(status, head + extra, ""), body


def body_of(value: Any) -> tuple[Body, Outcome]:
    """The bytes of a result, and the outcome that it has unless the handler says more. Raises as `answer`."""
    if type(value) not in _ALWAYS_JSON:
        if isinstance(value, bytes | bytearray):
            return value, PLAIN_BYTES
        if isinstance(value, memoryview):
            return value.cast("B") if value.c_contiguous else value.tobytes(), PLAIN_BYTES
        if isinstance(value, str):
            try:
                return value.encode(), _TEXT
            except UnicodeEncodeError as error:
                raise HandlerError(f"the handler returned a str that is not valid Unicode: {error.reason}") from None
    try:
        return _encode_json(value), _JSON
    except Exception as error:  # encoding runs the tolist() of any library
        raise _no_json(value, error) from None


def json_of(value: Any) -> bytes:
    """The result as JSON, also if it is text. Raises as `answer`."""
    try:
        return _encode_json(value)
    except Exception as error:
        raise _no_json(value, error) from None


def _no_json(value: Any, error: Exception) -> HandlerError | Streamed:
    if hasattr(value, "__next__"):
        return Streamed(value)
    return HandlerError(
        f"the handler returned {type(value).__name__}, which cannot be sent ({_scrubbed(str(error))}); "
        "return bytes, str, or something JSON can hold"
    )


def _scrubbed(text: str) -> str:
    """Without memory addresses and absolute paths, which are no client's business."""
    return _INSIDE.sub("...", text)


def _plain(value: Any) -> Any:
    """Arrays and tensors of any library, and their scalars, as Python numbers and lists."""
    to_list = getattr(value, "tolist", None)
    if to_list is None:
        raise TypeError(f"{type(value).__name__} is not JSON")
    return to_list()


_encode_json: Callable[[Any], bytes] = msgspec.json.Encoder(enc_hook=_plain).encode


def _header(name: Any, value: Any) -> bytes:
    raw_name: bytes
    raw_value: bytes
    try:
        raw_name, raw_value = name.encode("ascii"), value.encode("latin-1")
    except (AttributeError, UnicodeEncodeError):
        fault = f"the handler set header {name!r} to {value!r}; both must be latin-1 text"
        raise HandlerError(_scrubbed(fault)) from None
    if not _TOKEN.fullmatch(raw_name) or not _VALUE.fullmatch(raw_value):
        raise HandlerError(f"the handler set header {name!r} to {value!r}, which is not a valid header")
    if raw_name.lower() in _FRAMING:
        raise HandlerError(f"the handler set header {name!r}; framing headers are the server's")
    return raw_name.lower() + b": " + raw_value + b"\r\n"
