"""A model's workers in a real server: loads that fail, signals, an archive's requirements, sleep until a request."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.asking import fetch
from tests.conftest import MakeArchive
from tests.servers import Server, server
from tests.waiting import eventually


@pytest.fixture(scope="module")
def empty(make_archive: MakeArchive) -> Iterator[Server]:
    """A server that serves nothing yet; each test unregisters what it has registered."""
    names = ("echo", "crashes_on_load", "dies_on_load", "ignores_sigterm", "changes_its_world")
    with server(spare=tuple(make_archive(name) for name in names), stop_grace=0.5) as running:
        yield running


@pytest.fixture
def bare(empty: Server) -> Iterator[Server]:
    yield empty
    empty.unregister_all()


def test_f9_s17_a_handler_that_does_not_load_is_failed_with_its_traceback(bare: Server) -> None:
    reply = bare.manage("POST", "/models?url=crashes_on_load-1.0.mar")
    assert reply.status == 500
    assert reply.json()["type"] == "ModelLoadException"
    assert "failed to load: RuntimeError: the weights are missing" in reply.message
    assert "in initialize" in reply.json()["traceback"]
    described = bare.describe("crashes_on_load")
    assert described["state"] == "FAILED"
    assert "RuntimeError: the weights are missing" in described["failure"]["traceback"]
    assert bare.output.count("crashes_on_load 1.0: FAILED after 3 tries") == 1
    assert bare.metric("mms_workers", model="crashes_on_load", state="FAILED") == 1
    refused = bare.predict("crashes_on_load")
    assert refused.status == 503
    assert "failed to load" in refused.message and b"in initialize" not in refused.body
    assert bare.manage("POST", "/models?url=crashes_on_load-1.0.mar").status == 500, "a FAILED version gives way"


def test_f9_a_worker_that_dies_before_it_is_ready_leaves_its_last_words(bare: Server) -> None:
    reply = bare.manage("POST", "/models?url=dies_on_load-1.0.mar")
    assert reply.status == 500
    assert "exit code 3" in reply.message
    assert "these are my last words" in bare.describe("dies_on_load")["failure"]["traceback"]


def test_f14_a_worker_that_ignores_sigterm_is_gone_after_its_grace(bare: Server) -> None:
    bare.manage("POST", "/models?url=ignores_sigterm-1.0.mar")
    (pid,) = bare.workers("ignores_sigterm")
    bare.manage("PUT", "/models/ignores_sigterm?min_worker=0")
    eventually(lambda: not psutil.pid_exists(pid), timeout=1.5)


def test_f30_what_a_handler_changes_stays_in_its_worker(bare: Server) -> None:
    bare.manage("POST", "/models?url=changes_its_world-1.0.mar")
    for body in (b"one", b"two", b"three"):
        assert bare.predict("changes_its_world", body).body == body
    os.kill(bare.workers("changes_its_world")[0], 9)
    assert bare.predict("changes_its_world", b"four").body == b"four"


def test_an_archive_brings_its_requirements(make_archive: MakeArchive, tmp_path: Path) -> None:
    """Installed in an environment of their own while the server runs; what cannot be is the version's failure."""
    wheel = tmp_path / "colours-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("colours.py", "NAMES = ['red', 'blue']")
        file.writestr("colours-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: colours\nVersion: 1.0\n")
        file.writestr("colours-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("colours-1.0.dist-info/RECORD", "")
    good = make_archive("needs_colours", requirements=f"--no-index\n{wheel}\n")
    bad = make_archive("needs_colours", model_name="bad", requirements="--no-index\nno-such-package==9\n")
    with server(good, spare=(bad,), install_requirements="true") as running:
        assert running.predict("needs_colours").body == b"red blue"
        assert "[needs_colours 1.0 install] Successfully installed colours-1.0" in running.output
        assert running.manage("POST", "/models?url=needs_colours-1.0.mar&model_name=same").status == 200
        assert running.output.count("Successfully installed") == 1, "the second model finds it there"
        reply = running.manage("POST", "/models?url=bad-1.0.mar")
        assert (reply.status, reply.json()["type"]) == (500, "ModelLoadException")
        assert reply.message == (
            "the requirements of bad 1.0 cannot be installed: No matching distribution found for no-such-package==9"
        )
        described = running.describe("bad")
        assert (described["state"], described["failure"]["message"]) == ("FAILED", reply.message)
        assert "ERROR: Could not find a version" in described["failure"]["traceback"]
        assert running.predict("bad").status == 503


def test_a_model_sleeps_until_its_first_request(bare: Server) -> None:
    reply = bare.manage("POST", "/models", url="echo-1.0.mar", min_workers=0, load_on_request=True)
    assert reply.json()["status"].endswith("registered with 0 initial workers. The first request loads it.")
    for wakes in (1, 2):
        described = bare.describe("echo")
        assert (described["state"], described["asleep"], described["targetWorkers"]) == ("READY", True, 0)
        assert (described["minWorkers"], described["maxWorkers"], described["workers"]) == (0, 1, [])
        assert bare.manage("GET", "/models/echo/ready").status == 200
        assert fetch(bare.url, "GET", "/readyz").status == 200
        assert fetch(bare.url, "GET", "/ping").json() == {"status": "Healthy"}
        assert bare.predict("echo", b"x").status == 200
        described = bare.describe("echo")
        assert (described["asleep"], described["targetWorkers"], len(described["workers"])) == (False, 1, 1)
        assert bare.metric("mms_scalings_total", model="echo", direction="up") == wakes
        assert bare.metric("mms_workers_wanted", model="echo") == 1
        assert bare.manage("PUT", "/models/echo?min_worker=0&synchronous=true").status == 200


def test_f9_a_model_that_cannot_be_loaded_when_a_request_comes_says_when_it_is_tried_again(bare: Server) -> None:
    bare.manage("POST", "/models", url="crashes_on_load-1.0.mar", min_workers=0, load_on_request=True)
    for _ in range(2):  # who has waited for it, and who comes later
        refused = bare.predict("crashes_on_load", b"x")
        assert (refused.status, refused.json()["type"]) == (503, "ServiceUnavailableException")
        assert "crashes_on_load 1.0 failed to load; its description" in refused.message
        assert 1 <= int(refused.headers["retry-after"]) <= 5
    assert bare.describe("crashes_on_load")["state"] == "FAILED"
