"""How the bytes of a request become values, by content type: JSON, text, forms, gzip. Runs in the worker process.

The rules are those of MMS: exactly `application/json` is parsed, `text/*` is a str, anything else stays bytes; a form
becomes one value per field. Every limit here bounds what a hostile body can cost.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec

from mms.errors import BadRequestError, RequestTooLargeError

MAX_PARTS = 1000
MAX_PART_HEAD = 8 << 10
MAX_RATIO = 1000  # of unpacked to packed bytes, beyond the first MiB: DEFLATE cannot exceed 1032 (RFC 1951)

_decode_json = msgspec.json.decode


@dataclass(frozen=True, slots=True)
class FormPart:
    """One field of a form; `filename` and `content_type` are empty for a plain field."""

    name: str
    filename: str
    content_type: str
    data: bytearray

    def value(self) -> Any:
        """The part as MMS hands it to handlers: parsed JSON, str, or bytearray."""
        return decode_value(self.data, self.content_type)


@lru_cache(maxsize=1024)
def media_type(content_type: str) -> str:
    """The content type without its parameters."""
    return content_type.partition(";")[0].strip()


def decode_json(data: bytes | bytearray | memoryview) -> Any:
    """Raises BadRequestError when the bytes are not JSON."""
    try:
        return _decode_json(data)
    except msgspec.DecodeError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}") from None
    except UnicodeDecodeError:
        raise BadRequestError("the body is not valid JSON: it is not UTF-8") from None
    except RecursionError:
        raise BadRequestError("the body is not valid JSON: nested too deeply") from None


def decode_text(data: bytes | bytearray | memoryview) -> str:
    """Raises BadRequestError when the bytes are not UTF-8."""
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise BadRequestError(f"the body is not UTF-8 text: {error.reason} at byte {error.start}") from None


def decode_value(data: bytearray, content_type: str) -> Any:
    """A body or part as MMS decodes it. Raises BadRequestError."""
    return decoder(content_type)(data)


@lru_cache(maxsize=1024)
def decoder(content_type: str) -> Callable[[bytearray], Any]:
    """What decodes bodies and parts of that type, as MMS does; it raises BadRequestError."""
    kind = media_type(content_type)
    if kind == "application/json":
        return decode_json
    return decode_text if kind.startswith("text") else as_it_is


def as_it_is(data: bytearray) -> bytearray:
    """Of content types that mean nothing to MMS."""
    return data


def unpack(data: bytes | bytearray | memoryview, encoding: str, limit: int) -> bytearray:
    """The body without its Content-Encoding (gzip or deflate), at most `limit` bytes.

    Raises BadRequestError for other or broken encodings, RequestTooLargeError beyond the limits.
    """
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise BadRequestError(f"Content-Encoding {encoding!r} is not supported; send gzip, deflate or nothing")
    inflate = zlib.decompressobj(wbits=47 if encoding != "deflate" else 15)  # 47: gzip or zlib header, 32 KiB window
    allowed = min(limit, max(1 << 20, len(data) * MAX_RATIO))
    try:
        result = bytearray(inflate.decompress(data, allowed + 1))
    except zlib.error as error:
        raise BadRequestError(f"the body is not valid {encoding}: {error}") from None
    if len(result) > allowed:
        raise RequestTooLargeError(f"the unpacked body is larger than {allowed} bytes")
    if not inflate.eof or inflate.unused_data:
        raise BadRequestError(
            f"the body is not valid {encoding}: it {'ends early' if not inflate.eof else 'goes on after its end'}"
        )
    return result


@lru_cache(maxsize=1024)
def is_form(content_type: str) -> bool:
    kind = media_type(content_type).lower()
    return kind in ("multipart/form-data", "application/x-www-form-urlencoded")


def parse_form(data: bytes | bytearray | memoryview, content_type: str) -> list[FormPart]:
    """The fields of a multipart or urlencoded form. Raises BadRequestError."""
    if media_type(content_type).lower() == "multipart/form-data":
        return _parse_multipart(bytes(data), content_type)
    text = bytes(data)
    if text.count(b"&") >= MAX_PARTS:
        raise BadRequestError(f"the form has more than {MAX_PARTS} fields")
    parts = []
    for pair in text.split(b"&"):
        name, equals, value = pair.partition(b"=")
        if equals:
            name_text = unquote_to_bytes(name.replace(b"+", b" ")).decode("utf-8", "replace")
            parts.append(FormPart(name_text, "", "", bytearray(unquote_to_bytes(value.replace(b"+", b" ")))))
    return parts


def parse_query(query: bytes) -> dict[str, str]:
    """Query parameters; of a repeated name the last wins. Raises BadRequestError."""
    try:
        return dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=MAX_PARTS))
    except ValueError:
        raise BadRequestError(f"the query has more than {MAX_PARTS} parameters") from None


def _parse_multipart(data: bytes, content_type: str) -> list[FormPart]:
    """RFC 7578, in which a part is `--boundary CRLF headers CRLF CRLF data CRLF`."""
    boundary = _parameters(content_type).get("boundary", "").encode("latin-1", "replace")
    if not boundary or len(boundary) > 70:  # RFC 2046, 5.1.1
        raise BadRequestError("the multipart form names no boundary of 1 to 70 characters in its Content-Type")
    mark = b"\r\n--" + boundary
    data = b"\r\n" + data
    at = data.find(mark)
    parts: list[FormPart] = []
    while at >= 0:
        at += len(mark)
        if data.startswith(b"--", at):
            return parts
        line = data.find(b"\r\n", at)
        head_end = data.find(b"\r\n\r\n", line) if line >= 0 else -1
        end = data.find(mark, line) if line >= 0 else -1
        if head_end < 0 or end < 0 or head_end > end or data[at:line].strip(b" \t"):
            break
        if len(parts) == MAX_PARTS:
            raise BadRequestError(f"the form has more than {MAX_PARTS} fields")
        if head_end - line > MAX_PART_HEAD:
            raise BadRequestError(f"part {len(parts) + 1} of the form has headers of more than {MAX_PART_HEAD} bytes")
        parts.append(_form_part(data[line + 2 : head_end], bytearray(data[head_end + 4 : end]), len(parts) + 1))
        at = end
    raise BadRequestError(f"the multipart form is broken after {len(parts)} complete parts")


def _form_part(head: bytes, data: bytearray, number: int) -> FormPart:
    headers = {}
    for line in head.decode("utf-8", "replace").split("\r\n"):
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    disposition = _parameters(headers.get("content-disposition", ""))
    if "name" not in disposition:
        raise BadRequestError(f"part {number} of the form has no name in its Content-Disposition")
    content_type = headers.get("content-type", "")
    if "filename" in disposition and not content_type:
        content_type = "application/octet-stream"
    return FormPart(disposition["name"], disposition.get("filename", ""), content_type, data)


def _parameters(value: str) -> dict[str, str]:
    """The `; name=value` parameters of a header value; a quoted value may hold `;` and backslash escapes."""
    found: dict[str, str] = {}
    at, end = value.find(";"), len(value)
    while at >= 0:
        equals = value.find("=", at)
        if equals < 0:
            break
        name, at = value[at + 1 : equals].strip().lower(), equals + 1
        if value.startswith('"', at):
            text = []
            at += 1
            while at < end and value[at] != '"':
                at += value[at] == "\\" and at + 1 < end
                text.append(value[at])
                at += 1
            found[name] = "".join(text)
            at = value.find(";", at + 1)
        else:
            begin, at = at, value.find(";", at)
            found[name] = value[begin : at if at >= 0 else end].strip()
    return found
