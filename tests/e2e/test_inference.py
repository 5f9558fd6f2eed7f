"""Predictions over HTTP: `mms start` as a child process, real sockets, without and with nginx."""

from __future__ import annotations

import gzip
import json
import os
import re
import threading
from urllib.parse import urlencode

import pytest

from tests.asking import Reply, ask, connect, digest, fetch
from tests.servers import Server
from tests.traffic import Answering

PART = b"--b\r\nContent-Disposition: form-data; name=a\r\n\r\n"


@pytest.mark.parametrize("method", ["POST", "PUT", "GET"])
@pytest.mark.parametrize(
    "path", ["/predictions/echo", "/predictions/echo/1.0", "/predictions/echo/", "/predictions/%65cho"]
)
def test_a_body_reaches_the_handler_whole(either: Server, method: str, path: str) -> None:
    body = os.urandom(5000)
    reply = fetch(either.url, method, path, body)
    assert reply.status == 200
    assert reply.json()["sha256"] == digest(body)
    assert reply.headers["content-type"] == "application/json"


@pytest.mark.parametrize("size", [0, 1, 100_000, 2 << 20])
def test_bodies_of_many_sizes(either: Server, size: int) -> None:
    body = os.urandom(size)
    reply = either.predict("echo", body)
    assert (reply.json()["size"], reply.json()["sha256"]) == (size, digest(body))


def test_large_bodies_of_several_clients_on_kept_connections_at_a_time(either: Server) -> None:
    def client() -> None:
        connection = connect(either.url)
        for size in (70_000, 100_000, 300_000, 10, 100_000, 100_000, 1 << 20):
            body = os.urandom(size)
            replies.append(ask(connection, "POST", "/predictions/echo", body).json()["sha256"] == digest(body))
        connection.close()

    replies: list[bool] = []
    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert replies == [True] * 42


@pytest.mark.parametrize("size", [0, 1, 70_000, 1 << 20])
def test_answers_of_many_sizes(either: Server, size: int) -> None:
    reply = either.predict("big", str(size))
    assert reply.body == b"x" * size
    assert reply.headers["content-type"] == "application/octet-stream"


def test_a_chunked_body_is_one_body(either: Server) -> None:
    pieces = [os.urandom(size) for size in (1, 1000, 1, 70_000)]
    connection = connect(either.url)
    reply = ask(connection, "POST", "/predictions/echo", iter(pieces), {"Transfer-Encoding": "chunked"}, chunked=True)
    assert reply.json()["sha256"] == digest(b"".join(pieces))
    connection.close()


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
def test_a_packed_body_is_unpacked(either: Server, encoding: str) -> None:
    body = b"the same words again " * 1000
    reply = either.predict("echo", gzip.compress(body), Content_Encoding=encoding)
    assert reply.json()["sha256"] == digest(body)


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [
        (b"not packed at all", "gzip", 400),
        (gzip.compress(b"x" * 1000, mtime=0)[:-9], "gzip", 400),
        (gzip.compress(b"x", mtime=0) + b"more", "gzip", 400),
        (b"x", "br", 400),
        (gzip.compress(gzip.compress(b"x", mtime=0), mtime=0), "gzip, gzip", 400),
        (gzip.compress(b"\0" * (4 << 20), mtime=0), "gzip", 413),
    ],
    ids=["no-gzip", "cut", "trailing-bytes", "brotli", "twice", "bomb"],
)
def test_f94_a_badly_packed_body_is_refused(direct: Server, body: bytes, encoding: str, status: int) -> None:
    reply = direct.predict("echo", body, Content_Encoding=encoding)
    assert reply.status == status
    assert reply.message
    assert direct.predict("echo", b"x").status == 200


@pytest.mark.parametrize(
    ("content_type", "body", "row"),
    [
        ("application/json", b'{"a": [1, 2.5]}', {"body": {"a": [1, 2.5]}}),
        ("application/json; charset=utf-8", b'"x"', {"body": "x"}),
        ("text/plain", "grüße".encode(), {"body": "grüße"}),
        ("application/octet-stream", b"\x00\xff", {"body": bytearray(b"\x00\xff")}),
        (
            "application/x-www-form-urlencoded",
            b"a=1&b=%C3%BC+x",
            {"a": bytearray(b"1"), "b": bytearray("ü x".encode())},
        ),
    ],
)
def test_a_row_is_what_mms_handlers_expect(direct: Server, content_type: str, body: bytes, row: object) -> None:
    assert direct.predict("rows", body, Content_Type=content_type).body.decode() == repr(row)


def test_a_body_without_content_type_stays_bytes(direct: Server) -> None:
    connection = connect(direct.url)
    connection.putrequest("POST", "/predictions/rows")
    connection.putheader("Content-Length", "2")
    connection.endheaders(b"{}")
    assert connection.getresponse().read().decode() == repr({"body": bytearray(b"{}")})
    connection.close()


def test_a_multipart_form_has_a_value_per_field(direct: Server) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name=data; filename="a.png"\r\n\r\n\x89PNG\r\n\x1a\r\n'
        b'--b\r\nContent-Disposition: form-data; name="n"\r\nContent-Type: application/json\r\n\r\n[1]\r\n'
        b'--b\r\nContent-Disposition: form-data; name="t"\r\nContent-Type: text/plain\r\n\r\nhi\r\n--b--\r\n'
    )
    reply = direct.predict("rows", body, Content_Type="multipart/form-data; boundary=b")
    assert reply.body.decode() == repr({"data": bytearray(b"\x89PNG\r\n\x1a"), "n": [1], "t": "hi"})


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b'{"a": '),
        ("application/json", b""),
        ("application/json", b"\xff"),
        ("application/json", b"[" * 100_000),
        ("text/plain", b"\xff\xfe"),
        ("multipart/form-data", b"--b\r\n"),
        ("multipart/form-data; boundary=b", PART + b"no end"),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\nno name\r\n--b--\r\n"),
        (
            "multipart/form-data; boundary=b",
            (PART + b"1\r\n") * 1001 + b"--b--\r\n",
        ),
        ("application/x-www-form-urlencoded", b"a=1&" * 1001),
    ],
    ids=[
        "json-cut",
        "json-empty",
        "json-bytes",
        "json-deep",
        "text",
        "no-boundary",
        "no-end",
        "no-name",
        "parts",
        "fields",
    ],
)
def test_f95_a_body_that_is_not_what_it_says_is_refused(direct: Server, content_type: str, body: bytes) -> None:
    reply = direct.predict("rows", body, Content_Type=content_type)
    assert reply.status == 400
    assert reply.message
    assert direct.predict("rows", b"x", Content_Type="text/plain").status == 200


def test_invocations_name_their_model_and_take_the_query_as_input(direct: Server) -> None:
    reply = fetch(direct.url, "POST", "/invocations?model_name=rows&a=1", b"x", {"Content-Type": "text/plain"})
    assert reply.body.decode() == repr({"a": "1", "body": "x", "model_name": "rows"})
    missing = fetch(direct.url, "POST", "/invocations", b"x")
    assert (missing.status, missing.message) == (400, "Parameter model_name is required.")


def test_the_query_is_no_input_of_predictions(direct: Server) -> None:
    reply = fetch(direct.url, "POST", "/predictions/rows?a=1", b"x", {"Content-Type": "text/plain"})
    assert reply.body.decode() == repr({"body": "x"})
    assert fetch(direct.url, "POST", "/predictions/echo?a=1&b=%20", b"x").json()["query"] == {"a": "1", "b": " "}


@pytest.mark.parametrize(
    ("method", "path", "status", "kind", "words"),
    [
        ("POST", "/predictions/dog", 404, "ModelNotFoundException", "dog"),
        ("POST", "/predictions/echo/9", 404, "ModelVersionNotFoundException", "9"),
        ("POST", "/invocations?model_name=dog", 404, "ModelNotFoundException", "dog"),
        ("GET", "/", 404, "ResourceNotFoundException", "not found"),
        ("GET", "/nowhere", 404, "ResourceNotFoundException", "not found"),
        ("POST", "/predictions", 404, "ResourceNotFoundException", "not found"),
        ("POST", "/predictions/echo/1.0/x", 404, "ModelVersionNotFoundException", "1.0/x"),
        ("DELETE", "/predictions/echo", 405, "MethodNotAllowedException", "not allowed"),
        ("PATCH", "/predictions/echo", 405, "MethodNotAllowedException", "not allowed"),
    ],
)
def test_what_is_not_served_is_said_in_json(
    either: Server, method: str, path: str, status: int, kind: str, words: str
) -> None:
    reply = fetch(either.url, method, path, b"x" if method == "POST" else None)
    assert (reply.status, reply.json()["type"]) == (status, kind)
    assert words in reply.message


def test_ping_is_healthy(either: Server) -> None:
    reply = fetch(either.url, "GET", "/ping")
    assert (reply.status, reply.json()) == (200, {"status": "Healthy"})


def test_status_type_and_headers_are_the_handlers(direct: Server) -> None:
    reply = direct.predict("status_and_headers", b"x", X_Asked="this", X_Request_Id="my-own.id_1")
    assert (reply.status, reply.body) == (201, b"hello")
    assert reply.headers["content-type"] == "text/x-greeting"
    assert reply.headers["x-seen"] == "this"
    assert reply.headers["x-request"] == reply.headers["x-request-id"] == "my-own.id_1"


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, "<script>"])
def test_s23_a_bad_request_id_is_replaced(direct: Server, sent: str) -> None:
    seen = {direct.predict("echo", b"", X_Request_Id=sent).headers["x-request-id"] for _ in range(3)}
    assert len(seen) == 3
    assert all(re.fullmatch(r"[\w.-]{1,128}", name) for name in seen)


def test_a_bad_request_fails_alone_in_request_style(direct: Server) -> None:
    answering = Answering()
    bodies = [b"one", b"preprocess", b"two", b"inference", b"postprocess", b"three"]
    for body in bodies:
        answering.send(direct, "request_style", body)
    replies = dict(zip(bodies, answering.results(), strict=True))
    for body in (b"one", b"two", b"three"):
        assert (replies[body].status, replies[body].body) == (203, body.upper())
        assert replies[body].headers["content-type"] == "text/x-loud"
        assert replies[body].headers["x-length"] == str(len(body))
    assert (replies[b"preprocess"].status, replies[b"preprocess"].message) == (422, "preprocess does not like this")
    assert (replies[b"postprocess"].status, replies[b"postprocess"].message) == (400, "postprocess does not like this")
    assert replies[b"inference"].status == 500
    assert "ValueError" in replies[b"inference"].message
    assert "secret" not in replies[b"inference"].message


def test_a_bad_request_fails_alone_in_an_isolated_batch(direct: Server) -> None:
    answering = Answering()
    bodies = [b"one", b"bad", b"two", b"unlucky", b"three"]
    for body in bodies:
        answering.send(direct, "fails_one", body)
    assert [reply.status for reply in answering.results()] == [200, 500, 200, 418, 200]


@pytest.mark.parametrize(
    ("model", "body", "words"),
    [
        ("wrong_count", b"x", "handle returned 2 results for 1 requests"),
        ("not_a_list", b"x", "handle returned str; a list"),
        ("crashes_on_predict", b"x", "the handler raised ValueError"),
        ("unencodable", b"object", "returned object, which cannot be sent"),
        ("unencodable", b"nested", "returned dict, which cannot be sent"),
        ("unencodable", b"surrogate", "not valid Unicode"),
        ("unencodable", b"header", "not a valid header"),
        ("unencodable", b"framing", "framing headers are the server's"),
        ("unencodable", b"status", "the handler set status 99"),
        ("unencodable", b"large", "over max_response_size"),
    ],
)
def test_f29_a_wrong_answer_is_a_clear_500(direct: Server, model: str, body: bytes, words: str) -> None:
    before = direct.workers(model)
    reply = direct.predict(model, body)
    assert reply.status == 500
    assert words in reply.message
    assert "secret" not in reply.message
    assert direct.workers(model) == before


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "CancelledError", "MemoryError"])
def test_f24_an_exception_that_ends_processes_is_this_requests_error(direct: Server, name: str) -> None:
    before = direct.workers("raises")
    reply = direct.predict("raises", name)
    assert reply.status == (507 if name == "MemoryError" else 500)
    assert reply.message
    assert direct.predict("raises", b"").status == 200
    assert direct.workers("raises") == before


def test_a_failure_is_in_the_models_log_with_its_traceback(direct: Server) -> None:
    direct.predict("crashes_on_predict", b"x", X_Request_Id="look-for-this")
    log = (direct.run_dir / "logs" / "crashes_on_predict.log").read_text()
    assert "requests look-for-this: the handler failed" in log
    assert "ValueError: a secret of the handler" in log


def test_answers_do_not_get_mixed_up(either: Server) -> None:
    wrong: list[Reply] = []

    def client(number: int) -> None:
        connection = connect(either.url)
        for index in range(50):
            body = b"%d/%d" % (number, index)
            name = f"{number}-{index}"
            reply = ask(connection, "POST", "/predictions/echo", body, {"X-Request-Id": name})
            if (
                reply.json()["sha256"] != digest(body)
                or reply.json()["id"] != name
                or reply.headers["x-request-id"] != name
            ):
                wrong.append(reply)
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_form_reaches_the_handler_through_nginx_unchanged(edged: Server) -> None:
    body = urlencode({"a": "1"}).encode()
    reply = edged.predict("echo", body, Content_Type="application/x-www-form-urlencoded")
    assert reply.json()["sha256"] == digest(body)
    assert reply.json()["headers"]["content-type"] == "application/x-www-form-urlencoded"
    assert json.dumps(reply.json()["headers"]["x-forwarded-for"]) == '"127.0.0.1"'
