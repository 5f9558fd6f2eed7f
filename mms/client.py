"""The command line's requests to a running server, over TCP or a Unix socket. stdlib only."""

from __future__ import annotations

import http.client
import json
import mimetypes
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mms.errors import MMSError

TIMEOUT = 300.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self._path)


def send(
    address: str,
    method: str,
    path: str,
    body: bytes = b"",
    content_type: str = "",
    *,
    token: bytes = b"",
    certificate: str = "",
    show: Callable[[bytes], object] | None = None,
) -> tuple[int, bytes]:
    """One request to host:port, https://host:port or unix:/path; status and body. Raises OSError.

    With https, the server must have that certificate: its file is here, so nobody else needs to vouch for it. With
    `show`, each piece of the body is handed to it as it comes, and none is returned.
    """
    if address.startswith("unix:"):
        connection: http.client.HTTPConnection = _UnixConnection(address.removeprefix("unix:"))
    elif address.startswith("https://"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(certificate)
        connection = http.client.HTTPSConnection(address.removeprefix("https://"), timeout=TIMEOUT, context=context)
    else:
        connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
    try:
        headers = {"Content-Type": content_type} if content_type else {}
        if token:
            headers["Authorization"] = f"Bearer {token.decode()}"
        connection.request(method, path, body or None, headers)
        response = connection.getresponse()
        if show is None:
            return response.status, response.read()
        while piece := response.read1():
            show(piece)
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return response.status, b""
    except http.client.IncompleteRead:
        raise OSError("the answer was cut off before its end") from None
    except http.client.HTTPException as error:
        raise OSError(f"not an HTTP answer: {error!r}") from None
    finally:
        connection.close()


def describe_models(address: str, *, token: bytes = b"", certificate: str = "") -> list[dict[str, Any]]:
    """The description of every version of every model; one that goes meanwhile is left out. Raises OSError."""
    described = []

    def get(path: str) -> dict[str, Any]:
        status, body = send(address, "GET", path, token=token, certificate=certificate)
        try:
            document = json.loads(body)
        except ValueError:
            document = None
        if not isinstance(document, dict) or status not in (200, 404):
            told = document.get("message") if isinstance(document, dict) else None
            raise OSError(told or f"status {status}, and not the JSON of a management API")
        return document if status == 200 else {}

    start = "0"
    while start:
        page = get(f"/models?next_page_token={start}")
        for entry in page.get("models", ()):
            name = quote(entry["modelName"], safe="")
            for version in get(f"/models/{name}").get("versions", ()):
                described.append(get(f"/models/{name}/{quote(version, safe='')}"))
        start = page.get("nextPageToken", "")
    return [description for description in described if description]


def read_request(path: Path) -> tuple[bytes, str]:
    """The file's content, and the content type that its name tells. Raises MMSError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MMSError(f"cannot read {path}: {error.strerror}") from None
    return content, mimetypes.guess_type(path.name)[0] or "application/octet-stream"
