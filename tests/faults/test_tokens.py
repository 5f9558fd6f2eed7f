"""S11: tokens from the environment, and a token for predictions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mms.errors import ConfigError
from mms.token import find_token, take_token
from tests.asking import ask, connect, digest, fetch
from tests.conftest import MakeArchive
from tests.faults.test_management_access import TOKEN, token_file
from tests.servers import Server, mms, needs_nginx, scratch, server
from tests.waiting import eventually

OTHER = "another-token-that-is-long"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module", params=["none", pytest.param("nginx", marks=needs_nginx)])
def guarded(request: pytest.FixtureRequest, make_archive: MakeArchive) -> Iterator[Server]:
    """A server whose predictions need a token from a file, and whose management API one from the environment."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch())
        settings = {"edge": request.param, "inference_token_file": token_file(folder)}
        archives = make_archive("echo"), make_archive("request_style")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.servers.environment", lambda: {**os.environ, "MMS_MANAGEMENT_TOKEN": OTHER})
            running = stack.enter_context(server(*archives, folder=folder, **settings))
        yield running


@pytest.mark.parametrize(
    ("path", "body"),
    [("/predictions/echo", b"x"), ("/predictions/none", b""), ("/invocations", b""), ("/nowhere", b""),
     ("/predictions/echo", b"x" * 300_000)],
)  # fmt: skip
@pytest.mark.parametrize("given", ["", f"Bearer {OTHER}", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer t\xf6ken"])
def test_s11_models_are_for_those_who_bring_the_token(guarded: Server, path: str, body: bytes, given: str) -> None:
    reply = fetch(guarded.url, "POST", path, body, {"Authorization": given} if given else {})
    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert reply.message == "the inference API needs its token: Authorization: Bearer TOKEN"


def test_s11_the_token_opens_models_and_is_not_shown_to_handlers(guarded: Server) -> None:
    connection = connect(guarded.url)
    try:
        for _ in range(3):  # the same head again and again
            assert ask(connection, "POST", "/predictions/echo", b"x", BEARER).json()["sha256"] == digest(b"x")
        reply = ask(connection, "POST", "/predictions/echo", b"x", {**BEARER, "X-Request-Id": "one"})
        assert reply.status == 200 and "authorization" not in map(str.lower, reply.json()["headers"])
        assert ask(connection, "POST", "/predictions/echo", b"x").status == 401
    finally:
        connection.close()


@pytest.mark.parametrize("path", ["/ping", "/livez", "/readyz", "/openapi.json"])
def test_s11_probes_need_no_token(guarded: Server, path: str) -> None:
    assert fetch(guarded.url, "GET", path).status == 200


def test_s11_a_token_of_one_api_does_not_open_the_other(guarded: Server) -> None:
    assert fetch(guarded.management, "GET", "/models", headers=BEARER).status == 401
    assert fetch(guarded.management, "GET", "/models", headers={"Authorization": f"Bearer {OTHER}"}).status == 200


def test_s11_the_command_line_finds_both_tokens(guarded: Server, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"x")
    where = ("--run-dir", str(guarded.run_dir))
    assert digest(b"x") in mms("predict", "echo", str(tmp_path / "x.txt"), *where).stdout
    assert "needs its token" in mms("status", *where).stderr
    assert mms("status", *where, MMS_MANAGEMENT_TOKEN=OTHER).returncode == 0


def test_s11_what_the_server_starts_does_not_have_the_token_of_its_environment(guarded: Server) -> None:
    workers = [guarded.predict("echo", **BEARER).json()["pid"], *(process.pid for process in guarded.named("nginx"))]
    for pid in workers:
        assert OTHER.encode() not in Path(f"/proc/{pid}/environ").read_bytes()


def test_s11_a_replaced_token_closes_a_connection_that_was_open_to_the_old_one(make_archive: MakeArchive) -> None:
    with scratch() as folder, server(
        make_archive("echo"), folder=folder, inference_token_file=token_file(folder)
    ) as running:  # fmt: skip
        connection = connect(running.url)
        try:
            assert ask(connection, "POST", "/predictions/echo", b"x", BEARER).status == 200
            (folder / "new").mkdir()
            os.rename(token_file(folder / "new", OTHER), folder / "token")
            eventually(lambda: ask(connection, "POST", "/predictions/echo", b"x", BEARER).status == 401)
            new = {"Authorization": f"Bearer {OTHER}"}
            assert ask(connection, "POST", "/predictions/echo", b"x", new).status == 200
        finally:
            connection.close()


def test_s11_a_token_of_the_environment_is_taken_out_of_it() -> None:
    environ = {"MMS_INFERENCE_TOKEN": TOKEN}
    token = take_token("inference", None, environ)
    assert token is not None and token.matches(TOKEN.encode()) and not environ


@pytest.mark.parametrize(("text", "words"), [("short", "must hold one word"), (TOKEN, "inference_token_file as well")])
def test_s11_a_token_that_is_weak_or_there_twice_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = token_file(tmp_path) if text == TOKEN else None
    with pytest.raises(ConfigError, match=f"environment: MMS_INFERENCE_TOKEN .*{words}"):
        take_token("inference", file, {"MMS_INFERENCE_TOKEN": text})
    if file is None:
        with pytest.raises(ConfigError, match=words):
            find_token("inference", "", {"MMS_INFERENCE_TOKEN": text})
