"""`mms reload` and SIGHUP: what changes at once, what does not, what is refused, and that no request is lost."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeArchive
from tests.servers import Server, mms, needs_nginx, scratch, server
from tests.traffic import Traffic
from tests.waiting import eventually


class Configured:
    """A server with a settings file that can be changed."""

    def __init__(self, running: Server, file: Path) -> None:
        self.running = running
        self._file = file

    def reload(self, text: str) -> tuple[int, str, str]:
        self._file.write_text(text)
        done = mms("reload", "--run-dir", str(self.running.run_dir))
        return done.returncode, done.stdout, done.stderr

    def reload_quietly(self, text: str) -> None:
        """By the signal alone; returns when the server has logged it."""
        before = self.running.output.count("reloaded; changed: header_timeout")
        self._file.write_text(text)
        self.running.signal(signal.SIGHUP)
        eventually(lambda: self.running.output.count("reloaded; changed: header_timeout") > before)


@contextlib.contextmanager
def configured(archive: Path, edge: str) -> Iterator[Configured]:
    with scratch() as folder:
        file = folder / "server.yaml"
        file.touch()
        with server(archive, folder=folder, config=file, edge=edge) as running:
            yield Configured(running, file)


@pytest.fixture(scope="module")
def plain(make_archive: MakeArchive) -> Iterator[Configured]:
    with configured(make_archive("echo"), "none") as it:
        yield it


@pytest.fixture(scope="module")
def behind(make_archive: MakeArchive) -> Iterator[Configured]:
    with configured(make_archive("echo"), "nginx") as it:
        yield it


def queue_of_a_new_model(running: Server) -> Any:
    """The size of its queue, by the settings of now."""
    assert running.manage("POST", "/models?url=echo-1.0.mar&model_name=new&initial_workers=0").status == 200
    size = running.describe("new")["queueSize"]
    assert running.manage("DELETE", "/models/new").status == 200
    return size


def test_settings_change_at_once_or_are_named(plain: Configured) -> None:
    code, out, _ = plain.reload("log_level: warning\nqueue_size: 7\nparallel_loads: 2\n")
    assert (code, out) == (
        0, "reloaded; changed: log_level, queue_size\nchanged by a restart only: parallel_loads\n",
    )  # fmt: skip
    assert plain.running.describe("echo")["queueSize"] == 100
    assert queue_of_a_new_model(plain.running) == 7
    assert plain.reload("")[:2] == (0, "reloaded; changed: log_level, queue_size\n")


def test_f56_a_bad_file_changes_nothing(plain: Configured) -> None:
    code, _, err = plain.reload("queue_size: 7\nbatch_sise: 3\n")
    assert code == 1
    assert err.startswith("mms: error: not reloaded, everything stays as it was: ")
    assert "unknown setting batch_sise; did you mean batch_size?" in err
    code, _, err = plain.reload("queue_size: 7\naccess_log: log\n")
    assert (code, "access_log is written by nginx" in err) == (1, True)
    assert queue_of_a_new_model(plain.running) == 100


@pytest.mark.parametrize("which", ["plain", pytest.param("behind", marks=needs_nginx)])
def test_f65_reloads_under_load_lose_nothing(request: pytest.FixtureRequest, which: str) -> None:
    """nginx closes idle connections, and a client meets that now and then; no request is run twice for it."""
    it: Configured = request.getfixturevalue(which)
    before = it.running.metric("mms_requests_total", model="echo", code="200")
    with Traffic(it.running, clients=4, reconnects=1) as traffic:
        for number in range(1, 6):
            it.reload_quietly(f"header_timeout: {number}\n")
            traffic.flows(50)
    assert traffic.failures == []
    assert it.running.metric("mms_requests_total", model="echo", code="200") == before + traffic.count


def test_a_reload_without_a_server() -> None:
    with scratch() as folder:
        done = mms("reload", "--run-dir", str(folder / "run"))
    assert (done.returncode, done.stderr) == (3, f"mms: error: no server is running in {folder}/run\n")
