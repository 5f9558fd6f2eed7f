"""The command line's requests to a running server, over TCP or a Unix socket. stdlib only."""

from __future__ import annotations

import http.client
import json
import mimetypes
import socket
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import quote

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
) -> tuple[int, bytes]:
    """One request to host:port, https://host:port or unix:/path; status and body. Raises OSError.

    With https, the server must have that certificate: its file is here, so nobody else needs to vouch for it.
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
        return response.status, response.read()
    except http.client.HTTPException as error:
        raise OSError(f"not an HTTP answer: {error!r}") from None
    finally:
        connection.close()


def describe_models(address: str, *, token: bytes = b"", certificate: str = "") -> list[dict[str, Any]]:
    """The description of every version of every model. Raises OSError."""
    described = []

    def get(path: str) -> tuple[int, bytes]:
        return send(address, "GET", path, token=token, certificate=certificate)

    start = "0"
    while start:
        status, body = get(f"/models?next_page_token={start}")
        page = json.loads(body)
        if status != 200:
            raise OSError(page.get("message", body.decode()))
        for entry in page["models"]:
            name = quote(entry["modelName"], safe="")
            default = json.loads(get(f"/models/{name}")[1])
            for version in default.get("versions", ()):
                described.append(json.loads(get(f"/models/{name}/{quote(version, safe='')}")[1]))
        start = page.get("nextPageToken", "")
    return described


def guess_type(path: Path) -> str:
    return mimetypes.guess_type(path.name)[0] or "application/octet-stream"
