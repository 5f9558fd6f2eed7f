"""S3, S10, S13, S14, S16: what the server reads, says and writes down."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mms.backend.answers import answer
from mms.errors import ConfigError, HandlerError, StartError
from mms.logs import _Formatter
from mms.rundir import RunDirectory
from mms.safe_yaml import MAX_FILE, parse_yaml
from tests.asking import fetch
from tests.conftest import MakeArchive
from tests.servers import Server, server
from tests.waiting import eventually

SECRET = "s3cr3t-of-a-client"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(b"a: " + b"[" * 33 + b"]" * 33, "more than 32 levels deep", id="depth"),
        pytest.param(b"a: " + b"{b: " * 100_000, "more than 32 levels deep", id="bottomless"),
        pytest.param(b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases are not allowed", id="bomb"),
        pytest.param(b"a: 1" + b":59" * 300_000, "a number has more than 100 digits", id="sexagesimal"),
        pytest.param(b"a: {%d: 1}" % (2**61 - 1), "a key is a number of more than 18 digits", id="colliding"),
        pytest.param(b"#" * (MAX_FILE + 1), "larger than 1048576 bytes", id="size"),
        pytest.param(b"a: 1\na: 2", "a stands twice", id="twice"),
        pytest.param(b"a: !!python/object/apply:os.system [id]", "could not determine a constructor", id="object"),
    ],
)
def test_s14_yaml_has_limits(data: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_yaml(data, "model-config.yaml")


def test_s14_thirty_levels_are_read() -> None:
    assert parse_yaml(b"a: " + b"[" * 30 + b"]" * 30, "x")


class Odd:
    """Its repr has an address, its conversion fails with a path."""

    def tolist(self) -> None:
        raise OSError(2, "No such file or directory", "/home/somebody/secret/weights.bin")


def test_s10_errors_have_no_addresses_and_no_paths() -> None:
    for value, headers in ((Odd(), {}), (b"", {"x-odd": Odd()})):
        with pytest.raises(HandlerError) as caught:
            answer(value, 200, "", headers, 1000)  # type: ignore[arg-type]  # what a handler could give
        assert "0x" not in caught.value.message and "somebody" not in caught.value.message


def test_s10_a_client_learns_the_class_of_an_exception_and_no_more(direct: Server) -> None:
    reply = direct.predict("raises", b"x")
    assert reply.status == 500
    assert "/" not in reply.message and "Traceback" not in reply.message


def test_s16_one_record_is_one_line() -> None:
    text = "hello\n2026-01-01 INFO forged\r\x1b[2J\u2028"
    record = logging.LogRecord("mms.test", logging.INFO, "", 1, "%s", (text,), None)
    assert _Formatter("%(name)s: %(message)s").format(record) == (
        r"mms.test: hello\x0a2026-01-01 INFO forged\x0d\x1b[2J\x2028"
    )


def test_s16_no_log_has_bodies_headers_or_queries(make_archive: MakeArchive, edged: Server) -> None:
    headers = {"Authorization": f"Bearer {SECRET}", "Cookie": SECRET, "X-Any": SECRET}
    for path in (f"/predictions/echo?key={SECRET}", f"/predictions/none?key={SECRET}", f"/{'x' * 9000}?{SECRET}"):
        fetch(edged.url, "POST", path, SECRET.encode(), headers)
    fetch(edged.management, "POST", f"/models?url={SECRET}.mar", headers=headers)
    log = edged.folder / "access.log"
    lines = eventually(lambda: [line for line in log.read_text().splitlines() if '"/predictions/none"' in line])
    assert json.loads(lines[0])["path"] == "/predictions/none"
    files = [path for path in edged.folder.rglob("*.log") if path.is_file()]
    assert all(SECRET not in text for text in (edged.output, *(path.read_text() for path in files)))


def test_s16_who_changes_what_is_served_is_logged(make_archive: MakeArchive) -> None:
    with server(spare=(make_archive("echo"),)) as running:
        running.manage("POST", "/models?url=echo-1.0.mar&initial_workers=0")
        running.manage("DELETE", "/models/echo")
        assert "mms.management: registered echo 1.0 from echo-1.0.mar" in running.output
        assert "mms.management: unregistered echo (all versions)" in running.output


def test_s13_a_run_directory_that_anybody_can_swap_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(StartError, match="has no sticky bit"):
        RunDirectory(tmp_path / "run").acquire(None)
    tmp_path.chmod(0o1777)
    directory = RunDirectory(tmp_path / "run")
    directory.acquire(None)
    directory.release()
