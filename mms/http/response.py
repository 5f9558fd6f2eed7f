"""Responses as bytes."""

from __future__ import annotations

import json
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any

import msgspec

from mms.errors import MethodNotAllowedError, MMSError, SubstituteError, UnauthorizedError

JSON = b"content-type: application/json\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
JOIN_BELOW = 64 << 10  # a larger body goes to the transport as it is, not joined to its head

_REASONS = {status.value: status.phrase for status in HTTPStatus}


class ResponseHeads(dict[int, bytes]):
    """Status line and Date header by status, made once per status and second."""

    def __init__(self) -> None:
        super().__init__()
        self._date = b""
        self.tick()

    def tick(self) -> None:
        """Called once a second: the Date header is new."""
        self._date = f"date: {formatdate(usegmt=True)}\r\n".encode()
        self.clear()

    def __missing__(self, status: int) -> bytes:
        begin = f"HTTP/1.1 {status} {_REASONS.get(status, '')}\r\n".encode() + self._date
        self[status] = begin
        return begin


@lru_cache(maxsize=4096)
def length_lines(size: int) -> bytes:
    """The end of a head: of the line before, the one with the length, and of the head."""
    return b"\r\ncontent-length: %d\r\n\r\n" % size


def json_body(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value) + b"\n"
    except UnicodeEncodeError:  # a file name that is not UTF-8, in the message of an error
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n"


def error_response(error: MMSError) -> tuple[int, bytes, bytes]:
    """Status, header block and JSON body of an error, in the native form."""
    if isinstance(error, SubstituteError):
        return error.status, error.head, error.body
    body = json_body({"code": error.status, "type": error.type, "message": error.message})
    head = JSON
    if error.retry_after:
        head += b"retry-after: %d\r\n" % error.retry_after
    elif isinstance(error, MethodNotAllowedError) and error.allow:
        head += b"allow: %s\r\n" % error.allow.encode()
    elif isinstance(error, UnauthorizedError):
        head += b"www-authenticate: Bearer\r\n"
    return error.status, head, body
