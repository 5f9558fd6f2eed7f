"""The command line's requests: what is made of answers that are not those of a management API in good health."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from mms.client import describe_models


@contextmanager
def answering(answer: Callable[[str], tuple[int, bytes]]) -> Iterator[str]:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *words: Any) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, b"<html>", "status 200, and not the JSON of a management API"),
        (502, b"<html>", "status 502, and not"),
        (200, b"[]", "status 200, and not"),
        (401, b'{"code": 401, "message": "the token is needed"}', "the token is needed"),
    ],
)
def test_an_answer_that_is_no_list_of_models_is_told(status: int, body: bytes, told: str) -> None:
    with answering(lambda path: (status, body)) as address, pytest.raises(OSError, match=told):
        describe_models(address)


def test_a_version_that_goes_meanwhile_is_left_out() -> None:
    def answer(path: str) -> tuple[int, bytes]:
        known: dict[str, Any] = {
            "/models?next_page_token=0": {"models": [{"modelName": "gone"}, {"modelName": "here"}]},
            "/models/here": {"versions": ["1.0", "2.0"]},
            "/models/here/2.0": {"modelName": "here", "modelVersion": "2.0"},
        }
        return (200, json.dumps(known[path]).encode()) if path in known else (404, b'{"message": "Model not found"}')

    with answering(answer) as address:
        assert describe_models(address) == [{"modelName": "here", "modelVersion": "2.0"}]
