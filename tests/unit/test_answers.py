"""A handler's result as an answer: body, content type, status, headers, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from mms.backend.answers import Answer, answer, failure
from mms.errors import BadRequestError, HandlerError
from mms.handler import PredictionError, Response

JSON = b"content-type: application/json\r\n"
TEXT = b"content-type: text/plain; charset=utf-8\r\n"
BYTES = b"content-type: application/octet-stream\r\n"


Reply = tuple[int, bytes, bytes, str]  # status, header block, body, error


def reply(made: Answer) -> Reply:
    outcome, body = made
    return outcome.status, outcome.head, bytes(body), outcome.error


def make(value: Any, *, status: int = 200, content_type: str = "", limit: int = 1000, **headers: str) -> Reply:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return reply(answer(value, status, content_type, named, limit))


class Tensor:
    """Anything with tolist is shown as lists and numbers."""

    def tolist(self) -> list[float]:
        return [1.5, 2.5]


@pytest.mark.parametrize(
    ("value", "head", "body"),
    [
        (b"\xff", BYTES, b"\xff"),
        (bytearray(b"ab"), BYTES, b"ab"),
        (memoryview(b"abcd")[1:3], BYTES, b"bc"),
        ("grüße", TEXT, "grüße".encode()),
        ("", TEXT, b""),
        ({"a": [1, None, True]}, JSON, b'{"a":[1,null,true]}'),
        (None, JSON, b"null"),
        (3, JSON, b"3"),
        ({1: 2}, JSON, b'{"1":2}'),
        (Tensor(), JSON, b"[1.5,2.5]"),
        ([{"scores": Tensor()}], JSON, b'[{"scores":[1.5,2.5]}]'),
        (math.nan, JSON, b"null"),
        ([math.inf], JSON, b"[null]"),
    ],
)
def test_a_result_becomes_bytes_of_its_own_type(value: Any, head: bytes, body: bytes) -> None:
    status, made, content, error = make(value)
    assert (status, made, bytes(content), error) == (200, head, body, "")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (object(), "returned object"),
        ([1, {2, 3}, object()], "returned list"),
        ({("a", 1): object()}, "returned dict"),
        ("\ud800", "not valid Unicode"),
        (["\ud800"], "returned list"),
    ],
)
def test_what_cannot_be_sent_is_the_handlers_fault(value: Any, why: str) -> None:
    with pytest.raises(HandlerError, match=why):
        make(value)


class Broken:
    def tolist(self) -> list[float]:
        raise RuntimeError("the device is gone")


@pytest.mark.parametrize("value", [Broken(), [Broken()], memoryview(b"abcd")[::2]])
def test_a_result_that_cannot_be_read_is_the_handlers_fault(value: Any) -> None:
    try:
        assert bytes(make(value)[2]) == b"ac"
    except HandlerError as error:
        assert "the device is gone" in error.message


@pytest.mark.parametrize("headers", [None, 5, ["x"]])
def test_headers_that_are_no_mapping_are_the_handlers_fault(headers: Any) -> None:
    with pytest.raises(HandlerError, match="headers"):
        make(Response("x", headers=headers))


def test_a_result_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(HandlerError):
        make(value)


def test_an_answer_over_the_limit_is_refused() -> None:
    assert len(make(b"x" * 10, limit=10)[2]) == 10
    with pytest.raises(HandlerError, match=r"11 bytes is over max_response_size \(10 bytes\)"):
        make(b"x" * 11, limit=10)


def test_a_response_brings_its_own_status_type_and_headers() -> None:
    made = make(Response({"a": 1}, status=202, content_type="application/x", headers={"X-A": "1"}), x_b="2")
    assert made == (202, b"content-type: application/x\r\nx-b: 2\r\nx-a: 1\r\n", b'{"a":1}', "")


def test_a_content_type_among_the_headers_counts() -> None:
    assert make("x", content_type="a/b")[1] == b"content-type: a/b\r\n"
    assert make("x", content_type="a/b", Content_Type="c/d")[1] == b"content-type: c/d\r\n"


@pytest.mark.parametrize("status", [204, 304])
def test_answers_without_a_body_have_none(status: int) -> None:
    assert make({"a": 1}, status=status)[2] == b""


@pytest.mark.parametrize("status", [0, 100, 199, 600, "200", None, 200.5])
def test_a_status_that_is_none_is_refused(status: Any) -> None:
    assert make("x", status=599)[0] == 599
    with pytest.raises(HandlerError, match="status"):
        make("x", status=status)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x a", "1"),
        ("", "1"),
        ("x:", "1"),
        ("ü", "1"),
        ("x", "a\r\nset-cookie: b"),
        ("x", "a\0"),
        ("x", "\u20ac"),
        ("x", 1),
        (5, "x"),
        ("Content-Length", "0"),
        ("transfer-encoding", "chunked"),
        ("Connection", "close"),
        ("upgrade", "h2c"),
    ],
)
def test_s22_headers_that_would_break_the_answer_are_refused(name: str, value: Any) -> None:
    with pytest.raises(HandlerError, match="header"):
        answer("x", 200, "", {name: value}, 1000)


def test_s22_a_content_type_with_a_line_break_is_refused() -> None:
    with pytest.raises(HandlerError):
        make("x", content_type="a/b\r\nx: y")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BadRequestError("no"), (400, b"", b"no", "BadRequestException")),
        (HandlerError("no", status=507), (507, b"", b"no", "HandlerException")),
        (PredictionError("no cat", 422), (422, b"", b"no cat", "PredictionException")),
        (PredictionError("fine?", 200), (500, b"", b"fine?", "PredictionException")),
        (PredictionError("\ud800", 400), (400, b"", b"?", "PredictionException")),
    ],
)
def test_a_failure_has_a_status_of_its_own(error: Any, expected: Reply) -> None:
    assert reply(failure(error)) == expected


def test_a_prediction_error_of_somebodys_own_making_has_a_status() -> None:
    class Unusual(PredictionError):
        def __init__(self) -> None:
            pass

    assert reply(failure(Unusual())) == (400, b"", b"", "PredictionException")


def test_a_message_that_is_no_text_is_shown_all_the_same() -> None:
    error: Any = SimpleNamespace(status="x", type="T", message=5)
    assert reply(failure(error)) == (500, b"", b"5", "T")
