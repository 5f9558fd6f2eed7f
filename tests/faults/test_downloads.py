"""S2: archives from other machines, from a server that does its worst."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mms.config import load_config
from mms.errors import ArchiveError, BadRequestError, ConfigError, ConflictError, DownloadError
from mms.models.download import Downloads, _is_public
from mms.models.store import ModelStore
from tests.asking import fetch
from tests.conftest import MakeArchive
from tests.e2e.test_start_errors import refusal
from tests.servers import free_ports, scratch, server


@dataclass
class Origin:
    """An HTTP server: path -> what it does with the request. `asked` are the paths it was asked for."""

    answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def serves(self, path: str, body: bytes, status: int = 200, **headers: str) -> str:
        def answer(request: BaseHTTPRequestHandler) -> None:
            request.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                request.send_header(name.replace("_", "-"), value)
            request.end_headers()
            request.wfile.write(body)

        self.answers[path] = answer
        return self.url + path


@pytest.fixture
def origin() -> Iterator[Origin]:
    here = Origin()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            here.asked.append(self.path)
            here.answers[self.path](self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        here.url = f"http://127.0.0.1:{running.server_address[1]}"
        yield here
        running.shutdown()
        thread.join()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


def get(store: Path, url: str, sha256: str = "", **settings: Any) -> str:
    """One download; whatever comes of it, nothing half-written is left."""

    async def run() -> str:
        config, _ = load_config(environ={}, command_line={"model_store": str(store), **settings})
        return await Downloads(config, ModelStore(store)).fetch(url, sha256)

    before = set(os.listdir(store))
    try:
        name = asyncio.run(run())
    except BaseException:
        assert set(os.listdir(store)) == before
        raise
    assert set(os.listdir(store)) == before | {name}
    return name


def local(origin: Origin, **more: Any) -> dict[str, Any]:
    """Settings that allow this origin."""
    return {"allowed_urls": [origin.url], "allowed_networks": ["127.0.0.0/8"], **more}


def test_s2_an_allowed_archive_comes_into_the_store(origin: Origin, store: Path, make_archive: MakeArchive) -> None:
    data = make_archive("echo").read_bytes()
    url = origin.serves("/models/echo-1.0.mar?signature=1", data)
    assert get(store, url, hashlib.sha256(data).hexdigest(), **local(origin)) == "echo-1.0.mar"
    assert (store / "echo-1.0.mar").read_bytes() == data


def test_s2_downloads_are_off(origin: Origin, store: Path) -> None:
    with pytest.raises(BadRequestError, match="allowed_urls lists the places"):
        get(store, origin.url + "/a.mar")
    assert not origin.asked


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.2:{port}/a.mar",
        "http://127.0.0.1:1/a.mar",
        "http://127.0.0.1/a.mar",
        "https://127.0.0.1:{port}/a.mar",
        "http://evil.example#@127.0.0.1:{port}/a.mar",
        "http://evil.example\\@127.0.0.1:{port}/a.mar",
        "http://127.0.0.1:{port}.evil.example/a.mar",
        "http://127.0.0.1:{port} /a.mar",
        "http:///a.mar",
        "http://[::1/a.mar",
        "http://2130706433:{port}/a.mar",
        "http://127.1:{port}/a.mar",
        "http://017700000001:{port}/a.mar",
    ],
)
def test_s2_any_other_scheme_host_or_port_is_refused(origin: Origin, store: Path, url: str) -> None:
    with pytest.raises(BadRequestError, match="allowed_urls"):
        get(store, url.format(port=origin.url.rpartition(":")[2]), **local(origin))
    assert not origin.asked


@pytest.mark.parametrize(
    "path",
    ["/", "/a", "/a.mar/", "/a.zip", "/..%2fa.mar", "/.a.mar", "/%2e%2e/..mar", "/a%00.mar", "/a%0a.mar", "/é.mar",
     "/" + "a" * 200 + ".mar", "/-rf.mar", "/a%5cb.mar"],
)  # fmt: skip
def test_s2_the_file_name_must_be_plain(origin: Origin, store: Path, path: str) -> None:
    with pytest.raises(BadRequestError, match="plain file name"):
        get(store, origin.url + path, **local(origin))
    assert not origin.asked


def test_s2_a_private_address_is_refused_at_the_connection(origin: Origin, store: Path) -> None:
    with pytest.raises(BadRequestError, match=r"refused to connect to 127\.0\.0\.1, which is no public address"):
        get(store, origin.url + "/a.mar", allowed_urls=[origin.url])
    name = origin.url.replace("127.0.0.1", "localhost")
    with pytest.raises((BadRequestError, DownloadError), match="no public address"):
        get(store, name + "/a.mar", allowed_urls=[name])
    assert not origin.asked


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::",
     "ff02::1"],
)  # fmt: skip
def test_s2_what_is_no_public_address(address: str) -> None:
    assert not _is_public(ipaddress.ip_address(address))
    assert _is_public(ipaddress.ip_address("93.184.215.14"))
    assert _is_public(ipaddress.ip_address("2606:2800:21f:cb07:6820:80da:af6b:8b2c"))


@pytest.mark.parametrize("target", ["http://127.0.0.1:1/a.mar", "file:///etc/passwd", "https://evil.example/", "//[x"])
def test_s2_a_redirect_elsewhere_is_refused(origin: Origin, store: Path, target: str) -> None:
    url = origin.serves("/a.mar", b"", 302, Location=target)
    with pytest.raises((BadRequestError, DownloadError), match=r"allowed_urls|no address"):
        get(store, url, **local(origin))
    assert origin.asked == ["/a.mar"]


def test_s2_redirects_are_followed_three_times(origin: Origin, store: Path, make_archive: MakeArchive) -> None:
    for number in range(4):
        origin.serves(f"/{number}.mar", b"", 307, Location=f"/{number + 1}.mar")
    origin.serves("/4.mar", make_archive("echo").read_bytes())
    assert get(store, origin.url + "/1.mar", **local(origin)) == "1.mar"
    with pytest.raises(DownloadError, match="redirected more than 3 times"):
        get(store, origin.url + "/0.mar", **local(origin))


@pytest.mark.parametrize("declared", [True, False])
def test_s2_the_size_is_limited(origin: Origin, store: Path, declared: bool) -> None:
    url = origin.serves("/a.mar", b"x" * 100_000)
    if not declared:

        def endless(request: BaseHTTPRequestHandler) -> None:
            request.send_response(200)
            request.end_headers()
            while True:
                try:
                    request.wfile.write(b"x" * 65536)
                except OSError:
                    return

        origin.answers["/a.mar"] = endless
    with pytest.raises(DownloadError, match="larger than max_download_size"):
        get(store, url, **local(origin, max_download_size=90_000))


def test_s2_the_time_is_limited(origin: Origin, store: Path) -> None:
    done = threading.Event()

    def stalls(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        request.wfile.write(b"PK")
        done.wait(5)

    origin.answers["/a.mar"] = stalls
    with pytest.raises(DownloadError, match=r"took longer than 0\.1 s"):
        get(store, origin.url + "/a.mar", **local(origin, download_timeout=0.1))
    done.set()


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (404, {}, "the answer was 404"),
        (302, {}, "the answer was 302"),
        (200, {"Content_Encoding": "gzip"}, "has a Content-Encoding"),
        (200, {"Content_Length": "100"}, "cannot be downloaded"),
    ],
)
def test_s2_a_bad_answer_leaves_nothing(
    origin: Origin, store: Path, status: int, headers: dict[str, str], words: str
) -> None:
    with pytest.raises(DownloadError, match=words):
        get(store, origin.serves("/a.mar", b"PK", status, **headers), **local(origin))


def test_s10_no_error_of_a_download_has_the_query(origin: Origin, store: Path) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"HTTP/1.1 abc\r\n\r\n")

    def redirect(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"HTTP/1.1 302 x\r\nLocation: http://SECRET@[::1:x/?SECRET\r\n\r\n")

    for it in (answer, redirect):
        origin.answers["/a.mar?token=SECRET"] = it
        with pytest.raises(DownloadError) as caught:
            get(store, origin.url + "/a.mar?token=SECRET", **local(origin))
        assert "SECRET" not in caught.value.message


def test_s10_a_download_that_cannot_connect_says_why(store: Path) -> None:
    (port,) = free_ports(1)
    with pytest.raises(DownloadError, match=r"Connection refused|Connect call failed") as caught:
        get(store, f"http://127.0.0.1:{port}/a.mar?SECRET", **local(Origin(url=f"http://127.0.0.1:{port}")))
    assert "SECRET" not in caught.value.message


@pytest.mark.parametrize("user", ["user@", "user:pass@", ":pass@"])
def test_s2_credentials_in_an_address_are_refused_as_such(origin: Origin, store: Path, user: str) -> None:
    with pytest.raises(BadRequestError, match="credentials in addresses") as caught:
        get(store, f"{origin.url.replace('//', f'//{user}')}/a.mar", **local(origin))
    assert "user:pass@127" not in caught.value.message
    assert not origin.asked


def test_s2_a_wrong_hash_and_a_broken_archive_leave_nothing(
    origin: Origin, store: Path, make_archive: MakeArchive
) -> None:
    data = bytearray(make_archive("echo").read_bytes())
    with pytest.raises(DownloadError, match="not the one that was asked for"):
        get(store, origin.serves("/a.mar", bytes(data)), "0" * 64, **local(origin))
    data[60] ^= 0xFF
    with pytest.raises(ArchiveError, match=r"^a\.mar: "):
        get(store, origin.serves("/a.mar", bytes(data)), **local(origin))


def test_s2_another_file_of_that_name_is_never_replaced(origin: Origin, store: Path, make_archive: MakeArchive) -> None:
    (store / "a.mar").write_bytes(b"mine")
    url = origin.serves("/a.mar", make_archive("echo").read_bytes())
    with pytest.raises(ConflictError, match=r"holds another a\.mar already"):
        get(store, url, **local(origin))
    assert (store / "a.mar").read_bytes() == b"mine"


def test_s2_the_same_file_is_used_again(origin: Origin, store: Path, make_archive: MakeArchive) -> None:
    data = make_archive("echo").read_bytes()
    url = origin.serves("/a.mar", data)
    assert get(store, url, **local(origin)) == get(store, url, **local(origin)) == "a.mar"
    assert len(origin.asked) == 2
    get(store, url, hashlib.sha256(data).hexdigest(), **local(origin))
    assert len(origin.asked) == 2  # a known hash needs no download


def test_s2_what_a_killed_server_left_is_removed(origin: Origin, store: Path, make_archive: MakeArchive) -> None:
    (store / ".download-left").write_bytes(b"half")
    url = origin.serves("/a.mar", make_archive("echo").read_bytes())

    async def run() -> None:
        config, _ = load_config(environ={}, command_line={"model_store": str(store), **local(origin)})
        await Downloads(config, ModelStore(store)).fetch(url)

    asyncio.run(run())
    assert os.listdir(store) == ["a.mar"]


@pytest.mark.parametrize(
    "value",
    ["models.example.com", "ftp://x", "https://x/path", "https://u@x", "https://x:port", "https://x?y", "s3://x"],
)
def test_s2_an_allowed_place_is_scheme_host_and_port(value: str) -> None:
    with pytest.raises(ConfigError, match="allowed_urls"):
        load_config(environ={}, command_line={"allowed_urls": [value]})


def test_s2_the_whole_way_over_the_management_api_and_at_start(origin: Origin, make_archive: MakeArchive) -> None:
    data = make_archive("echo").read_bytes()
    url = origin.serves("/echo.mar", data)
    pinned = f"{url}#sha256={hashlib.sha256(data).hexdigest()}"
    settings: dict[str, Any] = {name: ",".join(value) for name, value in local(origin).items()}
    with scratch() as folder, server(folder=folder, models=f"first={pinned}", **settings) as running:
        assert running.predict("first", b"x").status == 200
        other = origin.serves("/other.mar", data)
        wrong = fetch(running.management, "POST", f"/models?url={other}&model_name=b&sha256={'0' * 64}")
        assert (wrong.status, wrong.json()["type"]) == (400, "DownloadArchiveException")
        known = fetch(running.management, "POST", f"/models?url={url}&model_name=b&sha256={'0' * 64}")
        assert known.status == 400
        assert f"echo.mar: its SHA-256 is {hashlib.sha256(data).hexdigest()}, and another " in known.message
        body = b'{"url": "%s", "model_name": "second", "initial_workers": 1}' % url.encode()
        reply = fetch(running.management, "POST", "/models", body, {"Content-Type": "application/json"})
        assert reply.status == 200, reply
        assert running.describe("second")["modelUrl"] == "echo.mar"
        assert fetch(running.management, "POST", "/models?url=file:///etc/passwd").status == 400
        assert fetch(running.management, "POST", f"/models?url=echo.mar&model_name=c&sha256={'0' * 64}").status == 400
        assert fetch(running.management, "POST", "/models?url=echo.mar&sha256=12").status == 400
        assert os.listdir(folder / "store") == ["echo.mar"]


def test_s2_start_refuses_a_place_that_is_not_allowed() -> None:
    with scratch() as folder:
        text = refusal(folder, models=("a=https://evil.example/a.mar",), allowed_urls="https://models.example.com")
    assert "https://evil.example:443 is none of allowed_urls (https://models.example.com:443)" in text
