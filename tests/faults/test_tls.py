"""S19: TLS through nginx, with a certificate of our own making."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.asking import fetch
from tests.conftest import MakeArchive
from tests.e2e.test_start_errors import refusal
from tests.faults.test_management_access import TOKEN, token_file
from tests.servers import Server, free_ports, mms, needs_nginx, scratch, server
from tests.waiting import eventually

pytestmark = [needs_nginx, pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")]


def certify(folder: Path, name: str = "tls") -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    more = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", str(cert), "-keyout", str(key)]
    subprocess.run([*words.split(), *more], check=True, capture_output=True)
    key.chmod(0o600)
    return cert, key


@pytest.fixture(scope="module")
def secure(make_archive: MakeArchive) -> Iterator[tuple[Server, str, Path]]:
    """A server with TLS and a public management port; that port's address; the certificate."""
    with scratch() as folder:
        cert, key = certify(folder)
        address = f"0.0.0.0:{free_ports(1)[0]}"
        with server(
            make_archive("echo"),
            folder=folder,
            edge="nginx",
            tls_cert=cert,
            tls_key=key,
            management_address=address,
            management_token_file=token_file(folder),
        ) as running:
            yield running, address.replace("0.0.0.0", "127.0.0.1"), cert


def trusting(cert: Path, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(cert))
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


def secure_get(address: str, path: str, context: ssl.SSLContext, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPSConnection(address, timeout=10, context=context)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_s19_clients_speak_tls_1_2_and_1_3(secure: tuple[Server, str, Path], version: ssl.TLSVersion) -> None:
    running, _, cert = secure
    assert secure_get(running.url, "/predictions/echo", trusting(cert, version))[0] == 200
    assert f"https://{running.url}" in running.ready_line


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_s19_older_versions_are_refused(secure: tuple[Server, str, Path]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.load_verify_locations(secure[2])
    with pytest.raises((ssl.SSLError, ConnectionError)):
        secure_get(secure[0].url, "/ping", context)


def test_s19_a_public_management_port_speaks_tls_and_wants_its_token(secure: tuple[Server, str, Path]) -> None:
    _, address, cert = secure
    assert secure_get(address, "/models", trusting(cert))[0] == 401
    assert secure_get(address, "/models", trusting(cert), Authorization=f"Bearer {TOKEN}")[0] == 200


def test_s19_plain_http_on_a_port_with_tls_is_told_so(secure: tuple[Server, str, Path]) -> None:
    reply = fetch(secure[0].url, "GET", "/ping")
    assert reply.json() == {"code": 421, "type": "BadRequestException", "message": "this port speaks TLS: use https"}


def test_s19_a_session_of_one_port_is_not_resumed_at_the_other(secure: tuple[Server, str, Path]) -> None:
    running, management, cert = secure
    context = trusting(cert, ssl.TLSVersion.TLSv1_2)

    def connect(address: str, session: ssl.SSLSession | None) -> ssl.SSLSession | bool:
        host, _, port = address.partition(":")
        with (
            socket.create_connection((host, int(port)), 10) as plain,
            context.wrap_socket(plain, server_hostname="localhost", session=session) as sock,
        ):
            return sock.session_reused or False if session else sock.session or False

    session = connect(running.url, None)
    assert isinstance(session, ssl.SSLSession)
    assert connect(management, session) is False


def test_s19_the_command_line_speaks_tls(secure: tuple[Server, str, Path]) -> None:
    running, _, cert = secure
    where = ("--run-dir", str(running.run_dir))
    shown = mms("status", "--json", *where)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert json.loads(shown.stdout)["ready"] is True
    assert mms("predict", "echo", str(cert), *where).returncode == 0


def test_s19_a_new_certificate_is_taken_without_a_restart(secure: tuple[Server, str, Path]) -> None:
    running, _, cert = secure
    new = certify(running.folder, "new")
    before = running.named("nginx")
    old = ssl.create_default_context(cafile=str(cert))
    for path, target in zip(new, (cert, cert.with_suffix(".key")), strict=True):
        os.replace(path, target)

    def served(context: ssl.SSLContext) -> bool:
        try:
            return secure_get(running.url, "/ping", context)[0] == 200
        except ssl.SSLError:
            return False

    eventually(lambda: served(trusting(cert)), 10)
    # Any of nginx's workers of before takes connections until it has read its signal: only the master outlives this.
    eventually(lambda: sum(process.is_running() for process in before) == 1, 10)
    assert served(trusting(cert))
    assert not served(old)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"edge": "none"}, "TLS needs nginx in front"),
        ({"tls_key": ""}, "tls_cert and tls_key go together"),
        ({"tls_cert": "/nowhere.crt"}, "cannot read the certificate /nowhere.crt"),
        ({"tls_key": "/nowhere.key"}, "cannot read the key /nowhere.key"),
    ],
)
def test_s19_what_cannot_work_is_refused(settings: dict[str, str], words: str) -> None:
    with scratch() as folder:
        cert, key = certify(folder)
        given: dict[str, Any] = {"edge": "nginx", "tls_cert": cert, "tls_key": key, **settings}
        assert words in refusal(folder, **given)


def test_s19_a_key_that_others_may_read_is_refused() -> None:
    with scratch() as folder:
        cert, key = certify(folder)
        key.chmod(0o644)
        assert "others may read it; chmod 600 it" in refusal(folder, edge="nginx", tls_cert=cert, tls_key=key)


def test_s19_a_key_of_another_certificate_is_refused() -> None:
    with scratch() as folder:
        cert, _ = certify(folder)
        _, key = certify(folder, "other")
        text = refusal(folder, edge="nginx", tls_cert=cert, tls_key=key)
    assert "nginx refused its configuration" in text and "key values mismatch" in text
