"""What a handler's author sees: Request, Context as MMS handlers know it, the defaults of Handler."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mms import wire
from mms.errors import BadRequestError, RequestTooLargeError
from mms.handler import Context, Handler, Headers, PredictionError, Request, Requests

FORM = b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'


def make_request(
    body: bytes = b"",
    content_type: str = "",
    *,
    query: bytes = b"",
    query_is_input: bool = False,
    headers: tuple[bytes, ...] = (),
    encoding: str = "",
    limit: int = 1000,
) -> Request:
    raw = msgspec.Raw(wire.encode(list(headers)))
    facts = wire.RequestFactsView(content_type, encoding, query, query_is_input, raw)
    return Request(facts, b"id-1", bytearray(body), limit)


def make_context(directory: str = "/model", **changes: Any) -> Context:
    manifest = {"modelServerVersion": "1.0", "model": {"handler": "h:H"}}
    load = wire.Load("cat", "2.0", directory, "h:H", manifest, {"topk": 3}, 4, "auto", None, 1, 10, 10)
    for name, value in changes.items():
        setattr(load, name, value)
    return Context(load, "cpu")


# Request


def test_a_request_shows_what_was_sent() -> None:
    request = make_request(b'{"a": 1}', "application/json", query=b"k=v", headers=(b"Host", b"x", b"X-Tag", b"\xe4"))
    assert request.id == "id-1" and request.content_type == "application/json"
    assert request.body == b'{"a": 1}' and request.json() == {"a": 1} and request.text() == '{"a": 1}'
    assert request.query == {"k": "v"} and make_request().query == {}
    assert request.headers["HOST"] == "x" and request.headers["x-tag"] == "ä"
    assert request.headers.get("missing") is None


def make_requests(*content_types: str, alike: bool) -> Requests:
    facts = [wire.RequestFactsView(kind, "", b"", False, wire.EMPTY_HEADERS) for kind in content_types]
    numbers = range(len(facts))
    ids, bodies = [b"%d" % number for number in numbers], [bytearray(b"%d" % number) for number in numbers]
    return Requests(facts[:1] if alike else facts, ids, bodies, 1000)


@pytest.mark.parametrize(
    ("content_type", "bodies"),
    [("application/json", [0, 1]), ("text/plain", ["0", "1"]), ("", [bytearray(b"0"), bytearray(b"1")])],
)
def test_requests_that_say_the_same_are_decoded_alike(content_type: str, bodies: list[Any]) -> None:
    assert make_requests(content_type, content_type, alike=True).rows() == [{"body": body} for body in bodies]


def test_requests_of_one_batch_may_have_different_content_types() -> None:
    assert make_requests("application/json", "text/plain", alike=False).rows() == [{"body": 0}, {"body": "1"}]


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("looked_at", [True, False])
def test_a_part_of_a_batch_has_its_own_requests(alike: bool, looked_at: bool) -> None:
    requests = make_requests(*["text/plain"] * 4, alike=alike)
    before = requests.all() if looked_at else []
    part = requests[1:3]
    assert (len(part), [one.id for one in part], part[-1].text()) == (2, ["1", "2"], "2")
    assert part.rows() == [{"body": "1"}, {"body": "2"}]
    assert not before or part[0] is before[1]


def test_a_request_is_the_same_whenever_it_is_looked_at() -> None:
    requests = make_requests("text/plain", "text/plain", alike=True)
    assert requests[0] is requests[0] and list(requests) == requests.all()


def test_of_a_repeated_header_the_last_wins() -> None:
    headers = Headers([b"A", b"1", b"B", b"2", b"a", b"3"])
    assert dict(headers) == {"a": "3", "b": "2"} and len(headers) == 2


def test_a_packed_body_is_unpacked_within_the_limit() -> None:
    packed = gzip.compress(b"x" * 100)
    assert make_request(packed, encoding="gzip").body == b"x" * 100
    with pytest.raises(RequestTooLargeError):
        _ = make_request(packed, encoding="gzip", limit=99).body


@pytest.mark.parametrize(
    ("body", "content_type", "row"),
    [
        (b"\xff\xd8", "image/jpeg", {"body": bytearray(b"\xff\xd8")}),
        (b"[1]", "application/json", {"body": [1]}),
        (b"hi", "text/plain", {"body": "hi"}),
        (b"raw", "", {"body": bytearray(b"raw")}),
        (b"a=1&b=2", "application/x-www-form-urlencoded", {"a": bytearray(b"1"), "b": bytearray(b"2")}),
        (FORM % (b"data", b"z") + b"--x--", "multipart/form-data; boundary=x", {"data": bytearray(b"z")}),
    ],
)
def test_the_row_is_what_mms_handlers_get(body: bytes, content_type: str, row: dict[str, Any]) -> None:
    assert make_request(body, content_type).row() == row


def test_query_parameters_are_inputs_only_where_mms_has_them_so() -> None:
    assert make_request(b"x", query=b"k=v").row() == {"body": b"x"}
    assert make_request(b"x", query=b"k=v&body=q", query_is_input=True).row() == {"k": "v", "body": b"x"}


def test_the_row_of_a_broken_body_is_a_bad_request() -> None:
    with pytest.raises(BadRequestError):
        make_request(b"{", "application/json").row()


@pytest.mark.parametrize(
    ("names", "data"),
    [(("x", "file", "body"), b"body"), (("body", "data"), b"data"), (("y", "x"), b"y"), (("data", "data"), b"data")],
)
def test_the_upload_is_found_in_a_form(names: tuple[str, ...], data: bytes) -> None:
    body = b"".join(FORM % (name.encode(), name.encode()) for name in names) + b"--x--"
    assert make_request(body, "multipart/form-data; boundary=x").data() == data


def test_without_a_form_the_body_is_the_upload() -> None:
    assert make_request(b"raw", "image/png").data() == b"raw"
    assert make_request(b"a=b", "text/plain").form == []


# Context


def test_the_context_holds_the_workers_facts() -> None:
    context = make_context()
    assert (context.model_name, context.model_version, context.device) == ("cat", "2.0", "cpu")
    assert context.manifest["model"] == {"handler": "h:H"}
    assert context.config == context.model_yaml_config == {"topk": 3}
    properties = context.system_properties
    assert properties["model_dir"] == "/model" and properties["gpu_id"] is None and properties["batch_size"] == 4
    assert properties["server_name"] == "MMS" and properties["server_version"] == "1.0"


def test_a_file_of_the_archive_or_the_list_of_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    (tmp_path / "labels.json").touch()
    context = make_context(str(tmp_path))
    assert context.path("model.pt") == tmp_path / "model.pt"
    with pytest.raises(FileNotFoundError, match=r"model\.pt2 is not in the archive of cat; .*labels\.json, model\.pt"):
        context.path("model.pt2")


def test_the_context_knows_the_requests_of_the_batch() -> None:
    context = make_context()
    context.begin_batch([make_request(headers=(b"X-A", b"1")), make_request(headers=(b"X-A", b"2"))])
    assert context.request_ids == {0: "id-1", 1: "id-1"} and context.get_request_id(1) == "id-1"
    assert context.get_request_header(1, "x-a") == "2" and context.get_request_header(0, "nope") is None
    assert context.get_all_request_header(0) == {"x-a": "1"}


def test_what_a_handler_sets_for_an_answer_lasts_for_that_batch() -> None:
    context = make_context()
    context.begin_batch([make_request(), make_request()])
    context.set_response_content_type(0, "image/png")
    context.set_response_header(0, "x-a", "1")
    context.set_response_status(code=418, phrase="I'm a teapot", idx=1)
    first, second = context.responses.get(0), context.responses.get(1)
    assert first is not None and (first.status, first.content_type, first.headers) == (200, "image/png", {"x-a": "1"})
    assert second is not None and second.status == 418
    assert context.get_response_content_type(0) == "image/png"
    assert context.get_response_headers(0) == {"x-a": "1"}
    assert context.get_response_status(1) == 418
    context.begin_batch([make_request()])
    assert not context.responses


def test_one_status_for_the_whole_batch() -> None:
    context = make_context()
    context.begin_batch([make_request(), make_request()])
    context.set_all_response_status(503, "busy")
    assert [context.get_response_status(index) for index in range(2)] == [503, 503]


# Handler


def test_a_handlers_defaults_pass_the_upload_on_and_name_what_is_missing() -> None:
    class Nothing(Handler):
        pass

    handler = Nothing()
    handler.initialize(make_context())
    assert handler.preprocess(make_request(b"x")) == b"x"
    assert handler.collate([b"x", "y"]) == [b"x", "y"]
    assert handler.postprocess(5) == 5
    with pytest.raises(TypeError, match=r"Nothing must define inference"):
        handler.inference([1])


def test_arrays_are_stacked() -> None:
    import numpy

    batch = Handler().collate([numpy.zeros(3), numpy.ones(3)])
    assert batch.shape == (2, 3)


def test_a_prediction_error_carries_its_status() -> None:
    error = PredictionError("no cat in sight", 422)
    assert (str(error), error.message, error.status) == ("no cat in sight", "no cat in sight", 422)
    assert PredictionError("bad").status == 400
