"""`mms upgrade`: another process takes over the sockets, no request is lost; what cannot take over changes nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import (
    Answering,
    MakeArchive,
    MakeGate,
    Server,
    Traffic,
    ask,
    connect,
    eventually,
    mms,
    needs_nginx,
    scratch,
    server,
)

EDGES = ["none", pytest.param("nginx", marks=needs_nginx)]


@pytest.fixture
def folder() -> Iterator[Path]:
    with scratch() as made:
        yield made


@pytest.fixture(autouse=True)
def manager(folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    """The service manager's end of NOTIFY_SOCKET, of servers that are started here."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(folder / "notify"))
        sock.settimeout(10)
        if "direct" not in request.fixturenames:
            monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "notify"))
        yield sock


def upgrade(running: Server) -> tuple[int, str]:
    """Exit code and last words of `mms upgrade`."""
    done = mms("upgrade", "--run-dir", str(running.run_dir))
    return done.returncode, (done.stderr if done.returncode else done.stdout).splitlines()[-1]


def succeed(running: Server) -> int:
    """Upgrade it; the pid of the new server, which is the only one left."""
    old = running.pid
    code, text = upgrade(running)
    assert code == 0, text + running.output
    pid = int(text.split()[2])
    assert text == f"upgraded: pid {pid} serves; pid {old} answers what it has in hand and ends"
    assert pid != old
    running.succeed(pid)
    return pid


@pytest.mark.parametrize("edge", EDGES)
def test_f54_an_upgrade_under_load_loses_nothing(make_archive: MakeArchive, folder: Path, edge: str) -> None:
    """nginx closes idle connections, and a client meets that now and then; without it, not even that."""
    with server(make_archive("echo"), folder=folder, edge=edge) as running:
        with Traffic(running, clients=2, reconnects=edge == "nginx") as traffic:
            traffic.flows(50)
            succeed(running)
            traffic.flows(50)
        assert traffic.failures == []
        assert mms("status", "--run-dir", str(running.run_dir), "--quiet").returncode == 0
        left = {path.name for path in running.run_dir.iterdir()}
        assert left - {"nginx-2"} == {"lock", "logs", "mms.json", "sockets-2", "upgrade.json"}
        assert len(list((running.cache_dir / "servers").iterdir())) == 1


def test_an_upgrade_answers_what_is_in_hand_and_what_is_on_its_way(
    make_archive: MakeArchive, make_gate: MakeGate, folder: Path, manager: socket.socket
) -> None:
    """And the service manager is told whom to watch from then on."""
    with server(make_archive("gate"), make_archive("echo"), folder=folder) as running:
        slow, idle, answering = make_gate(), connect(running.url), Answering()
        answering.send(running, "gate", slow.body)
        eventually(slow.begun)
        assert "connection" not in ask(idle, "POST", "/predictions/echo", b"x").headers
        code, text = upgrade(running)
        assert code == 0, text
        pid = text.split()[2]
        assert f"MAINPID={pid}" in iter(lambda: manager.recv(4096).decode().split("\n")[0], "")
        assert ask(idle, "POST", "/predictions/echo", b"y").headers["connection"] == "close"  # by the old server
        assert "connection" not in ask(idle, "POST", "/predictions/echo", b"z").headers  # by the new one
        slow.open()
        assert [reply.status for reply in answering.results()] == [200]
        idle.close()
        running.succeed(int(pid))


def test_f55_what_does_not_start_changes_nothing(
    make_archive: MakeArchive, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New settings that are refused, new code that is broken, and an archive that is gone; then nothing of it is."""
    settings, code_folder = folder / "server.yaml", folder / "code"
    settings.touch()
    code_folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(code_folder), prepend=os.pathsep)
    echo, spare = make_archive("echo"), make_archive("sleeps")
    with server(echo, spare=(spare,), folder=folder, config=settings) as running:
        assert running.manage("POST", f"/models?url={spare.name}&initial_workers=1&synchronous=true").status == 200

        def refused() -> str:
            code, text = upgrade(running)
            start = "mms: error: not upgraded, everything stays as it was: "
            assert (code, text[: len(start)]) == (1, start)
            assert running.predict("echo", b"x").status == 200
            return text.removeprefix(start)

        settings.write_text("batch_sise: 3\n")
        assert "unknown setting batch_sise" in refused()
        settings.write_text("")
        (code_folder / "uvloop.py").write_text("1 / 0")
        assert refused() == "the new server ended before it was ready; its own words are in the log"
        (code_folder / "uvloop.py").unlink()
        stored = folder / "store" / spare.name
        stored.rename(folder / "away")
        assert refused().startswith("not all that is served now could be loaded: sleeps 1.0 is not restored: ")
        (folder / "away").rename(stored)
        assert running.manage("PUT", "/models/echo?max_worker=2&min_worker=1").status in (200, 202)
        succeed(running)
        assert len(running.workers("sleeps")) == 1


def test_a_server_in_the_foreground_is_not_upgraded(direct: Server) -> None:
    code, text = upgrade(direct)
    assert code == 1
    assert text.startswith("mms: error: not upgraded, everything stays as it was: the server runs in the foreground")
    assert direct.predict("echo", b"x").status == 200
