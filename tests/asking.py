"""One request to a server under test, and its answer."""

from __future__ import annotations

import hashlib
import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CLIENT_TIMEOUT = 20.0


@dataclass(frozen=True)
class Reply:
    """One HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """The text of an error, which must have the shape that MMS users know."""
        error = self.json()
        assert error["code"] == self.status
        assert error["type"].endswith("Exception")
        assert self.headers["content-type"] == "application/json"
        return str(error["message"])


def connect(address: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(address, timeout=CLIENT_TIMEOUT)


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    *,
    chunked: bool = False,
) -> Reply:
    """One request on a connection that may be used again."""
    connection.request(method, path, body, headers or {}, encode_chunked=chunked)
    response = connection.getresponse()
    content = response.read()
    return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, content)


def fetch(address: str, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
    """One request on a connection of its own."""
    connection = connect(address)
    try:
        return ask(connection, method, path, body, headers)
    finally:
        connection.close()


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
