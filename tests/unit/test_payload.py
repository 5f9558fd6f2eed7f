"""Bodies as values: JSON, text, forms, gzip, and every limit; nothing but refusals for hostile ones."""

from __future__ import annotations

import gzip
import time
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mms import payload
from mms.errors import BadRequestError, RequestTooLargeError
from mms.payload import FormPart, parse_form, parse_query, unpack

LIMIT = 8 << 20
FORM = "multipart/form-data; boundary=XX"


def multipart(*parts: tuple[str, bytes], end: bytes = b"--XX--\r\n") -> bytes:
    """A form whose parts are (header lines, data)."""
    return b"".join(b"--XX\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n" for head, data in parts) + end


def field(name: str, more: str = "") -> str:
    return f'Content-Disposition: form-data; name="{name}"{more}'


# bodies by content type


@pytest.mark.parametrize(
    ("body", "content_type", "value"),
    [
        (b'{"a": [1, null]}', "application/json", {"a": [1, None]}),
        (b"[1]", "application/json; charset=utf-8", [1]),
        (b"gr\xc3\xbc\xc3\x9fe", "text/plain", "grüße"),
        (b"a,b", "text/csv; header=present", "a,b"),
        (b"\xff\x00", "image/png", bytearray(b"\xff\x00")),
        (b"[1]", "application/vnd.api+json", bytearray(b"[1]")),
    ],
)
def test_a_body_becomes_what_its_content_type_says(body: bytes, content_type: str, value: Any) -> None:
    assert payload.decode_value(bytearray(body), content_type) == value


@pytest.mark.parametrize("body", [b"", b"{", b"{'a': 1}", b"NaN", b"[1],", b"\xff", b'"\xff"', b"[" * 100_000])
def test_what_is_not_json_is_the_clients_fault(body: bytes) -> None:
    with pytest.raises(BadRequestError, match="not valid JSON"):
        payload.decode_json(body)


def test_text_that_is_not_utf8_names_the_byte() -> None:
    with pytest.raises(BadRequestError, match="at byte 2"):
        payload.decode_text(b"ab\xff")


# gzip and deflate


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate"])
def test_bodies_are_unpacked(encoding: str) -> None:
    packed = zlib.compress(b"hello") if encoding == "deflate" else gzip.compress(b"hello")
    assert unpack(packed, encoding, LIMIT) == b"hello"


def test_an_empty_packed_body_is_empty() -> None:
    assert unpack(gzip.compress(b""), "gzip", LIMIT) == b""


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "identity, gzip", ""])
def test_other_encodings_are_refused(encoding: str) -> None:
    with pytest.raises(BadRequestError, match="not supported"):
        unpack(b"x", encoding, LIMIT)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"hello", "not valid gzip"),
        (b"", "ends early"),
        (gzip.compress(b"hello", mtime=0)[:-1], "ends early"),
        (gzip.compress(b"hello", mtime=0)[:5], "ends early"),
        (gzip.compress(b"hello", mtime=0) + b"x", "goes on"),
        (gzip.compress(b"hello", mtime=0)[:-8] + b"\0" * 8, "not valid gzip"),
    ],
)
def test_broken_gzip_is_refused(body: bytes, why: str) -> None:
    with pytest.raises(BadRequestError, match=why):
        unpack(body, "gzip", LIMIT)


def test_s9_a_body_may_unpack_to_the_limit_and_no_further() -> None:
    assert len(unpack(gzip.compress(b"x" * 1000), "gzip", 1000)) == 1000
    with pytest.raises(RequestTooLargeError, match="1000 bytes"):
        unpack(gzip.compress(b"x" * 1001), "gzip", 1000)


def test_s9_a_bomb_is_refused_by_its_ratio_beyond_the_first_mebibyte() -> None:
    assert len(unpack(gzip.compress(b"\0" * (1 << 20)), "gzip", LIMIT)) == 1 << 20
    with pytest.raises(RequestTooLargeError):
        unpack(gzip.compress(b"\0" * (4 << 20)), "gzip", LIMIT)


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate"]))
def test_garbage_for_gzip_is_only_refused(body: bytes, encoding: str) -> None:
    try:
        assert len(unpack(body, encoding, 1000)) <= 1000
    except (BadRequestError, RequestTooLargeError) as error:
        assert error.message


# urlencoded forms and queries


def test_an_urlencoded_form_has_one_part_per_field() -> None:
    parts = parse_form(b"a=1&b=x+y%21&c=&d&%C3%BC=%ff", "application/x-www-form-urlencoded")
    assert [(part.name, bytes(part.data)) for part in parts] == [
        ("a", b"1"), ("b", b"x y!"), ("c", b""), ("ü", b"\xff"),
    ]  # fmt: skip


def test_s9_the_fields_of_an_urlencoded_form_are_bounded() -> None:
    body = b"&".join(b"a=1" for _ in range(payload.MAX_PARTS))
    assert len(parse_form(body, "application/x-www-form-urlencoded")) == payload.MAX_PARTS
    with pytest.raises(BadRequestError, match="more than 1000 fields"):
        parse_form(body + b"&a=1", "application/x-www-form-urlencoded")


def test_of_a_repeated_query_parameter_the_last_wins() -> None:
    assert parse_query(b"a=1&b=&a=2&c=%20") == {"a": "2", "b": "", "c": " "}


def test_query_parameters_are_utf8() -> None:
    assert parse_query(b"q=%C3%BC") == {"q": "ü"}


def test_s9_the_parameters_of_a_query_are_bounded() -> None:
    with pytest.raises(BadRequestError, match="more than 1000"):
        parse_query(b"&".join(b"a=1" for _ in range(payload.MAX_PARTS + 1)))


# multipart forms


@pytest.mark.parametrize(
    ("content_type", "form"),
    [
        ("multipart/form-data; boundary=x", True),
        ("Multipart/Form-Data", True),
        ("application/x-www-form-urlencoded", True),
        ("multipart/mixed; boundary=x", False),
        ("application/json", False),
        ("", False),
    ],
)
def test_what_is_a_form(content_type: str, form: bool) -> None:
    assert payload.is_form(content_type) is form


def test_a_multipart_form_has_one_part_per_field() -> None:
    body = multipart(
        (field("text"), b"hello"),
        (field("data", '; filename="a;\\"b.png"') + "\r\nContent-Type: image/png", b"\x00\r\n--X\r\n"),
        (field("meta") + "\r\ncontent-type: application/json", b'{"k": 1}'),
        (field("file", "; filename=c.bin"), b""),
    )
    parts = parse_form(body, FORM)
    assert [(part.name, part.filename, part.content_type) for part in parts] == [
        ("text", "", ""),
        ("data", 'a;"b.png', "image/png"),
        ("meta", "", "application/json"),
        ("file", "c.bin", "application/octet-stream"),
    ]
    assert [part.value() for part in parts] == [bytearray(b"hello"), b"\x00\r\n--X\r\n", {"k": 1}, b""]


def test_a_quoted_boundary_and_a_preamble_are_understood() -> None:
    body = b"ignored\r\n" + multipart((field("a"), b"1")).replace(b"XX", b"a b")
    (part,) = parse_form(body, 'multipart/form-data; charset=utf-8; boundary="a b"')
    assert bytes(part.data) == b"1"


def test_a_form_without_parts_is_empty() -> None:
    assert parse_form(b"--XX--\r\n", FORM) == []


@pytest.mark.parametrize(
    ("body", "content_type", "why"),
    [
        (multipart((field("a"), b"1")), "multipart/form-data", "no boundary"),
        (multipart((field("a"), b"1")), "multipart/form-data; boundary=", "no boundary"),
        (multipart((field("a"), b"1")), f"multipart/form-data; boundary={'x' * 71}", "no boundary"),
        (b"", FORM, "broken after 0"),
        (multipart((field("a"), b"1"), end=b""), FORM, "broken after 0"),
        (multipart((field("a"), b"1"), (field("b"), b"2"), end=b"--XX"), FORM, "broken after 2"),
        (b"--XX\r\nno end of the headers\r\n--XX--", FORM, "broken after 0"),
        (b"--XXX\r\n" + field("a").encode() + b"\r\n\r\n1\r\n--XX--", FORM, "broken after 0"),
        (multipart(("Content-Type: text/plain", b"1")), FORM, "part 1 of the form has no name"),
        (multipart(("nonsense", b"1")), FORM, "part 1 of the form has no name"),
        (multipart(("X: " + "a" * payload.MAX_PART_HEAD, b"1")), FORM, "part 1 of the form has headers"),
    ],
)
def test_a_broken_form_is_refused_with_its_fault(body: bytes, content_type: str, why: str) -> None:
    with pytest.raises(BadRequestError, match=why):
        parse_form(body, content_type)


def test_s9_the_parts_of_a_form_are_bounded() -> None:
    parts = [(field("a"), b"")] * payload.MAX_PARTS
    assert len(parse_form(multipart(*parts), FORM)) == payload.MAX_PARTS
    with pytest.raises(BadRequestError, match="more than 1000 fields"):
        parse_form(multipart(*parts, (field("a"), b"")), FORM)


def test_a_part_with_many_parameters_costs_no_more_than_its_length() -> None:
    part = (field("a") + ";b=c" * 2000, b"1")
    started = time.process_time()
    for _ in range(5):
        parse_form(multipart(part), FORM + ";a=b" * 40_000)
    assert time.process_time() - started < 1  # 4 s where each parameter costs a copy of those behind it


def test_a_broken_json_part_is_the_clients_fault() -> None:
    part = FormPart("a", "", "application/json", bytearray(b"{"))
    with pytest.raises(BadRequestError):
        part.value()


@given(st.dictionaries(st.text("abcdefgh", min_size=1), st.binary(max_size=200), max_size=5))
def test_forms_survive_the_trip(fields: dict[str, bytes]) -> None:
    fields = {name: data for name, data in fields.items() if b"--XX" not in data}
    parts = parse_form(multipart(*((field(name), data) for name, data in fields.items())), FORM)
    assert {part.name: bytes(part.data) for part in parts} == fields


DISPOSITION = b"Content-Disposition: form-data; name="
PIECES = st.sampled_from(
    [b"--XX", b"--XX--", b"\r\n", b"\r\n\r\n", b"--", b"XX", b"\r", b"\n", b":", b";", b'"', b"\\", b"=", b"\0",
     b"\xff", DISPOSITION, DISPOSITION + b'"a"', b"content-type: text/plain", b"content-type: application/json"]
)  # fmt: skip


@settings(max_examples=400)
@given(st.lists(PIECES | st.binary(max_size=6), max_size=30))
def test_hostile_forms_are_only_refused(pieces: list[bytes]) -> None:
    try:
        for part in parse_form(b"".join(pieces), FORM):
            part.value()
    except (BadRequestError, RequestTooLargeError) as error:
        assert error.message


@given(st.text('multipar/fo-daubny;="\\ \x00ü', max_size=60))
def test_hostile_content_types_are_only_refused(text: str) -> None:
    try:
        parse_form(b"--x\r\n\r\n--x--", f"multipart/form-data;{text}")
    except BadRequestError as error:
        assert error.message
