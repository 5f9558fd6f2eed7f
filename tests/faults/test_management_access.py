"""S1, S11, S18, F106: who may use the two APIs, and where the management API may listen."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mms.errors import ConfigError
from mms.token import TokenFile, read_token
from tests.asking import Reply, fetch
from tests.conftest import MakeArchive
from tests.e2e.test_start_errors import refusal
from tests.servers import Server, free_ports, mms, scratch, server

TOKEN = "correct-horse-battery-staple"


def token_file(folder: Path, text: str = TOKEN, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.unlink(missing_ok=True)
    path.touch(mode)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture(scope="module")
def public(make_archive: MakeArchive) -> Iterator[tuple[Server, str]]:
    """A server whose management port is open to other machines, and that port's address."""
    with scratch() as folder:
        port = free_ports(1)[0]
        with server(
            make_archive("echo"),
            folder=folder,
            management_address=f"0.0.0.0:{port}",
            management_token_file=token_file(folder),
            management_hosts="models.example.com",
        ) as running:
            yield running, f"127.0.0.1:{port}"


def models(address: str, **headers: str) -> Reply:
    return fetch(address, "GET", "/models", headers=headers)


@pytest.mark.parametrize("address", ["0.0.0.0:{}", "[::]:{}", "*:{}", "192.0.2.1:{}", "models.example.com:{}"])
def test_s1_a_public_management_port_without_a_token_is_refused(address: str) -> None:
    with scratch() as folder:
        text = refusal(folder, management_address=address.format(free_ports(1)[0]))
    assert "set management_token_file, or keep it on 127.0.0.1 or a Unix socket" in text


def test_s1_a_unix_socket_needs_no_token() -> None:
    with scratch() as folder, server(folder=folder, management_address=f"unix:{folder}/management") as running:
        shown = mms("status", "--run-dir", str(running.run_dir))
    assert (shown.returncode, shown.stderr) == (0, "")


def test_s11_the_right_token_opens_the_management_api(public: tuple[Server, str]) -> None:
    assert models(public[1], Authorization=f"Bearer {TOKEN}").json()["models"][0]["modelName"] == "echo"


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="missing"),
        pytest.param({"Authorization": f"Basic {TOKEN}"}, id="scheme"),
        pytest.param({"Authorization": TOKEN}, id="bare"),
        pytest.param({"Authorization": f"Bearer {TOKEN[:-1]}"}, id="shorter"),
        pytest.param({"Authorization": f"Bearer {TOKEN}x"}, id="longer"),
        pytest.param({"Authorization": "Bearer t\xf6ken"}, id="latin-1"),
        pytest.param({"Authorization": "Bearer"}, id="empty"),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/models"), ("POST", "/models?url=echo-1.0.mar"), ("GET", "/x")])
def test_f106_without_the_token_nothing_is_answered(
    public: tuple[Server, str], headers: dict[str, str], method: str, path: str
) -> None:
    reply = fetch(public[1], method, path, headers=headers)
    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert reply.message == "the management API needs its token: Authorization: Bearer TOKEN"


def test_s11_a_token_of_a_megabyte_is_refused(public: tuple[Server, str]) -> None:
    with contextlib.suppress(ConnectionError):  # it may be closed before all of the token was sent
        assert models(public[1], Authorization=f"Bearer {'x' * (1 << 20)}").status == 400
    assert models(public[1], Authorization=f"Bearer {TOKEN}").status == 200


def test_s11_a_token_longer_than_a_header_may_be_is_named(public: tuple[Server, str]) -> None:
    assert models(public[1], Authorization=f"Bearer {'x' * (1 << 14)}").status == 400


def test_s11_mms_status_brings_the_token(public: tuple[Server, str]) -> None:
    shown = mms("status", "--json", "--run-dir", str(public[0].run_dir))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert '"modelName": "echo"' in shown.stdout


def test_s11_the_token_is_in_no_log_and_no_worker(public: tuple[Server, str]) -> None:
    running, address = public
    models(address, Authorization=f"Bearer {TOKEN}")
    pid = running.predict("echo", b"x").json()["pid"]
    assert TOKEN not in running.output
    assert TOKEN.encode() not in Path(f"/proc/{pid}/environ").read_bytes()


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        pytest.param(TOKEN, 0o644, "has mode 644: others may read it; chmod 600 it", id="world-readable"),
        pytest.param(TOKEN, 0o640, "has mode 640", id="group-readable"),
        pytest.param("", 0o600, "must hold one word of 22 to 512 characters", id="empty"),
        pytest.param("x" * 21, 0o600, "must hold one word", id="short"),
        pytest.param("two words of some length", 0o600, "must hold one word", id="words"),
        pytest.param("x" * (1 << 20), 0o600, "must hold one word", id="1MB"),
    ],
)
def test_f106_an_unsafe_token_file_is_refused(tmp_path: Path, text: str, mode: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_token(token_file(tmp_path, text, mode))


def test_f106_start_refuses_an_unsafe_token_file() -> None:
    with scratch() as folder:
        assert "others may read it" in refusal(folder, management_token_file=token_file(folder, mode=0o644))
        assert "cannot read the token file" in refusal(folder, management_token_file=folder / "none")


def test_f106_a_replaced_token_counts_at_once_and_an_unsafe_one_opens_nothing(tmp_path: Path) -> None:
    tokens = TokenFile(token_file(tmp_path))
    assert tokens.matches(TOKEN.encode())
    (tmp_path / "new").mkdir()
    os.rename(token_file(tmp_path / "new", "another-token-that-is-long"), tmp_path / "token")
    assert not tokens.matches(TOKEN.encode())
    assert tokens.matches(b"another-token-that-is-long")
    (tmp_path / "token").chmod(0o644)
    assert not tokens.matches(b"another-token-that-is-long")
    (tmp_path / "token").unlink()
    assert not tokens.matches(b"another-token-that-is-long")
    token_file(tmp_path)
    assert tokens.matches(TOKEN.encode())


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8081", "127.0.0.1.evil.example", "10.1.2.3", "", "a@127.0.0.1", "127.0.0.1/"]
)
def test_s18_a_foreign_host_is_refused(direct: Server, host: str) -> None:
    reply = models(direct.management, Host=host)
    assert reply.status in (400, 403)  # 400: not even a host
    assert host in ("", "a@127.0.0.1", "127.0.0.1/") or "add the name to management_hosts" in reply.message


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8081", "127.9.9.9"])
def test_s18_names_that_always_mean_this_machine_are_taken(either: Server, host: str) -> None:
    assert models(either.management, Host=host).status == 200


def test_s18_a_foreign_host_is_refused_behind_nginx(edged: Server) -> None:
    assert "'evil.example'" in models(edged.management, Host="evil.example").message


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000", "https://127.0.0.1", "::"])
def test_s18_a_page_of_another_site_is_refused(either: Server, origin: str) -> None:
    reply = fetch(either.management, "POST", "/models?url=echo-1.0.mar", headers={"Origin": origin})
    assert (reply.status, reply.json()["type"]) == (403, "ForbiddenException")


def test_s18_a_page_of_this_very_port_is_taken(either: Server) -> None:
    assert models(either.management, Origin=f"http://{either.management}").status == 200


def test_s18_a_named_host_is_taken_as_host_and_origin(public: tuple[Server, str]) -> None:
    headers = {"Host": "models.example.com", "Origin": "https://models.example.com"}
    assert models(public[1], Authorization=f"Bearer {TOKEN}", **headers).status == 200


def test_s18_no_answer_invites_other_sites(either: Server) -> None:
    reply = fetch(either.management, "OPTIONS", "/models", headers={"Origin": "http://evil.example"})
    assert reply.status == 403
    assert not [name for name in reply.headers if name.startswith("access-control-")]
