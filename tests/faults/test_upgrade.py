"""`mms upgrade`: another process takes over the sockets, no request is lost; what cannot take over changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from mms.errors import StartError
from mms.state import State
from mms.upgrade import Handover, Successor
from tests.asking import ask, connect
from tests.conftest import MakeArchive, MakeGate
from tests.faults.test_management_access import TOKEN
from tests.faults.test_service_manager import activated
from tests.faults.test_tls import certify, secure_get, trusting
from tests.servers import Server, environment, mms, needs_nginx, processes_in, scratch, server, start_arguments
from tests.traffic import Answering, Traffic
from tests.waiting import eventually

UNCHANGED = "mms: error: not upgraded, everything stays as it was: "
BEING_UPGRADED = "the server is being upgraded; try again when that is done"


@pytest.fixture(scope="module")
def running(make_archive: MakeArchive) -> Iterator[Server]:
    """A server that has a service manager, settings in a file, and a folder for code that goes before all other."""
    with scratch() as folder, contextlib.ExitStack() as stack:
        for path in (folder / "server.yaml", folder / "gate"):
            path.touch()
        (folder / "code").mkdir()
        archives = make_archive("echo"), make_archive("gate"), make_archive("loads_slowly", gate=str(folder / "gate"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NOTIFY_SOCKET", str(folder / "notify"))
            patch.setenv("PYTHONPATH", str(folder / "code"), prepend=os.pathsep)
            started = stack.enter_context(server(*archives, folder=folder, config=folder / "server.yaml"))
        yield started


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


class Command(subprocess.Popen[str]):
    """`mms upgrade`, while it runs."""

    stdout: IO[str]
    stderr: IO[str]
    said = ""  # at its end

    def __init__(self, running: Server) -> None:
        words = [sys.executable, "-P", "-m", "mms.cli", "upgrade", "--run-dir", str(running.run_dir)]
        super().__init__(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def upgrading(running: Server) -> Iterator[Command]:
    """Inside of the block the successor cannot load its models; behind it, the command has ended."""
    gate = running.folder / "gate"
    gate.unlink()
    with Command(running) as command:
        try:
            eventually(lambda: running.manage("DELETE", "/models/none").status == 503)
            yield command
        finally:
            gate.touch()
            command.said = command.stdout.read() or command.stderr.read()


@contextlib.contextmanager
def knocking(connect: Callable[[], socket.socket]) -> Iterator[list[bytes]]:
    """One new connection after another, each with a request; the bad answers."""
    bad: list[bytes] = []
    enough = threading.Event()

    def knock() -> None:
        while not enough.wait(0.01):
            with connect() as sock:
                sock.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                answer = b"".join(iter(lambda: sock.recv(4096), b""))
            if not answer.startswith(b"HTTP/1.1 200 "):
                bad.append(answer)

    thread = threading.Thread(target=knock)
    thread.start()
    try:
        yield bad
    finally:
        enough.set()
        thread.join()


def test_f54_an_upgrade_under_load_loses_nothing(running: Server) -> None:
    with Traffic(running, clients=2) as traffic:
        traffic.flows(50)
        succeed(running)
        traffic.flows(50)
    assert traffic.failures == []
    assert mms("status", "--run-dir", str(running.run_dir), "--quiet").returncode == 0
    left = {path.name for path in running.run_dir.iterdir()}
    assert {name.rstrip("-0123456789") for name in left} == {"lock", "logs", "mms.json", "sockets", "upgrade.json"}
    assert len(list((running.cache_dir / "servers").iterdir())) == 1


@pytest.mark.slow
def test_f54_requests_in_hand_and_on_their_way_are_answered(running: Server, make_gate: MakeGate) -> None:
    slow, idle, answering = make_gate(), connect(running.url), Answering()
    answering.send(running, "gate", slow.body)
    eventually(slow.begun)
    assert "connection" not in ask(idle, "POST", "/predictions/echo", b"x").headers
    code, text = upgrade(running)
    assert code == 0, text
    assert ask(idle, "POST", "/predictions/echo", b"y").headers["connection"] == "close"  # by the old server
    assert "connection" not in ask(idle, "POST", "/predictions/echo", b"z").headers  # by the new one
    slow.open()
    assert [reply.status for reply in answering.results()] == [200]
    idle.close()
    running.succeed(int(text.split()[2]))


def test_f55_what_does_not_start_changes_nothing(running: Server) -> None:
    """New settings that are refused, and new code that is broken."""

    def refused() -> str:
        code, text = upgrade(running)
        assert (code, text[: len(UNCHANGED)]) == (1, UNCHANGED)
        assert running.predict("echo", b"x").status == 200
        return text.removeprefix(UNCHANGED)

    (running.folder / "server.yaml").write_text("batch_sise: 3\n")
    assert "unknown setting batch_sise" in refused()
    (running.folder / "server.yaml").write_text("")
    (running.folder / "code" / "uvloop.py").write_text("1 / 0")
    assert refused() == "the new server ended before it was ready; its own words are in the log"
    (running.folder / "code" / "uvloop.py").unlink()
    assert running.manage("PUT", "/models/echo?max_worker=1&min_worker=1").status in (200, 202)


def test_f55_what_the_new_server_must_not_say_thaws_the_old_one(running: Server) -> None:
    module = running.folder / "code" / "sitecustomize.py"
    module.write_text(
        "import json, os\n"
        "if number := os.environ.get('_MMS_HANDOVER'):\n"
        "    os.write(json.loads(os.pread(int(number), 1 << 20, 0))['channel'], b'\\xff\\n')\n"
    )
    running.signal(signal.SIGUSR2)
    eventually(lambda: "not upgraded, everything stays as it was: UnicodeDecodeError: " in running.output)
    module.unlink()
    assert running.manage("PUT", "/models/echo?max_worker=1&min_worker=1").status in (200, 202)


@pytest.mark.slow
def test_f54_what_there_is_work_for_has_as_many_workers_afterwards(running: Server) -> None:
    """Also what was asleep when it was registered; a model that sleeps now is not woken."""
    for name in ("awake", "sleeper"):
        query = f"url=echo-1.0.mar&model_name={name}&initial_workers=0&load_on_request=true"
        assert running.manage("POST", f"/models?{query}").status == 200
    assert running.predict("awake", b"x").status == 200
    for query in ("min_worker=3", "min_worker=1&max_worker=3"):
        assert running.manage("PUT", f"/models/echo?{query}&synchronous=true").status == 200
    succeed(running)
    assert [len(running.workers(name)) for name in ("echo", "awake", "sleeper")] == [3, 1, 0]
    assert (running.describe("echo")["minWorkers"], running.describe("sleeper")["asleep"]) == (1, True)
    for name in ("awake", "sleeper"):
        running.manage("DELETE", f"/models/{name}")
    running.manage("PUT", "/models/echo?min_worker=1&max_worker=1")


@pytest.mark.slow
def test_f55_a_model_that_is_served_and_cannot_be_loaded_ends_the_upgrade(
    running: Server, make_archive: MakeArchive
) -> None:
    stored = running.folder / "store" / "sleeps.mar"
    shutil.copy(make_archive("sleeps"), stored)
    assert running.manage("POST", "/models?url=sleeps.mar&initial_workers=1&synchronous=true").status == 200
    stored.rename(running.folder / "away")
    code, text = upgrade(running)
    assert code == 1
    assert text.startswith(f"{UNCHANGED}not all that is served now could be loaded: sleeps 1.0 is not restored: ")
    (running.folder / "away").rename(stored)
    succeed(running)
    assert len(running.workers("sleeps")) == 1


@pytest.mark.slow
def test_f55_a_new_server_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, one that stops in its imports."""
    (tmp_path / "uvloop.py").write_text("import threading\nthreading.Event().wait()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", ["mms", *start_arguments(tmp_path, ["127.0.0.1:1"] * 3)[4:]])
    monkeypatch.setattr("mms.upgrade.SILENCE", 0.5)

    async def upgraded(lock: int) -> None:
        successor = Successor()
        successor.start(
            lambda channel: Handover(
                generation=2, daemon=True, edge=False, addresses={}, activated=[], sockets={}, lock=lock,
                channel=channel, state=State(), loaded=[],
            )
        )  # fmt: skip
        pid = successor.pid
        with pytest.raises(StartError, match=r"^the new server said nothing for 0\.5 s and was ended$"):
            await successor.serves(print)
        await successor.end()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    with (tmp_path / "lock").open("w") as lock:
        asyncio.run(upgraded(lock.fileno()))


@pytest.mark.slow
def test_f54_until_it_is_done_nothing_changes_and_a_second_upgrade_is_the_same_one(running: Server) -> None:
    with upgrading(running) as command:
        reply = running.manage("POST", "/models?url=echo-1.0.mar&model_name=other")
        assert (reply.status, reply.message, reply.headers["retry-after"]) == (503, BEING_UPGRADED, "5")
        assert reply.json()["type"] == "UpgradingException"
        for method, path in (("PUT", "/models/echo?min_worker=2"), ("DELETE", "/models/echo"),
                             ("PUT", "/models/echo/1.0/set-default")):  # fmt: skip
            assert running.manage(method, path).message == BEING_UPGRADED
        assert running.predict("echo", b"x").status == 200
        done = mms("reload", "--run-dir", str(running.run_dir))
        assert done.stderr == f"mms: error: not reloaded, everything stays as it was: {BEING_UPGRADED}\n"
        second = Command(running)
        assert second.stderr.readline()  # it shows how far the first one is
    with second:
        text = second.stdout.read()
    assert (command.returncode, second.returncode, command.said) == (0, 0, text)
    running.succeed(int(text.split()[2]))
    assert running.manage("POST", "/models?url=echo-1.0.mar&model_name=other").status in (200, 202)
    assert running.manage("DELETE", "/models/other").status == 200


@pytest.mark.slow
def test_f54_a_stop_during_an_upgrade_stops_both(
    make_archive: MakeArchive, manager: socket.socket, folder: Path
) -> None:
    (folder / "gate").touch()
    with server(make_archive("loads_slowly", gate=str(folder / "gate")), folder=folder) as running:
        with upgrading(running) as command:
            assert running.stop() == 0
            eventually(lambda: not processes_in(folder))
        assert command.returncode == 1
        assert "has ended before it was upgraded" in command.said


@pytest.mark.slow
@needs_nginx
def test_f54_behind_nginx_nothing_is_lost(make_archive: MakeArchive, manager: socket.socket, folder: Path) -> None:
    """nginx closes idle connections, and a client meets that now and then."""
    with server(make_archive("echo"), folder=folder, edge="nginx") as running:
        with Traffic(running, clients=2, reconnects=1) as traffic:
            traffic.flows(50)
            succeed(running)
            traffic.flows(50)
        assert traffic.failures == []
        left = {path.name for path in running.run_dir.iterdir()}
        assert left - {"nginx-2"} == {"lock", "logs", "mms.json", "sockets-2", "upgrade.json"}


@pytest.mark.slow
@needs_nginx
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_f54_with_tls(make_archive: MakeArchive, manager: socket.socket, folder: Path) -> None:
    cert, key = certify(folder)
    with server(make_archive("echo"), folder=folder, edge="nginx", tls_cert=cert, tls_key=key) as running:
        context = trusting(cert)
        host, _, port = running.url.rpartition(":")

        def shaken() -> socket.socket:
            return context.wrap_socket(socket.create_connection((host, int(port)), 10), server_hostname="localhost")

        with knocking(shaken) as bad:
            succeed(running)
            assert secure_get(running.url, "/readyz", context)[0] == 200
        assert bad == []


@pytest.mark.slow
@pytest.mark.parametrize("edge", ["none", pytest.param("nginx", marks=needs_nginx)])
def test_f54_at_a_unix_socket(make_archive: MakeArchive, manager: socket.socket, folder: Path, edge: str) -> None:
    """It stays the same file, and is gone at the end if nginx made it."""
    public = folder / "public"

    def dial() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(public))
        return sock

    with server(make_archive("echo"), folder=folder, edge=edge, inference_address=f"unix:{public}") as running:
        before = public.stat().st_ino
        with knocking(dial) as bad:
            succeed(running)
            if edge == "nginx":
                os.kill(running.named("nginx")[0].pid, signal.SIGHUP)
            succeed(running)
        assert bad == []
        assert public.stat().st_ino == before
    assert public.exists() == (edge == "none")


@pytest.mark.slow
def test_f54_with_sockets_of_the_service_manager(
    make_archive: MakeArchive, manager: socket.socket, folder: Path
) -> None:
    """It is told which process is the server from then on."""
    echo = make_archive("echo")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        addresses = ["{}:{}".format(*sock.getsockname()) for sock in sockets]
        words = [*start_arguments(folder, addresses, echo), "--models", echo.name]
        command = activated(sockets, "inference:management:metrics", words)
        running = Server(folder, command, addresses, descriptors=tuple(sock.fileno() for sock in sockets))
        stack.callback(running.close)
        for sock in sockets:
            stack.callback(sock.close)
        running.wait_until_ready()
        host, _, port = running.url.rpartition(":")
        with knocking(lambda: socket.create_connection((host, int(port)), 10)) as bad:
            first, pid = running.pid, succeed(running)
            second, last = pid, succeed(running)
        assert bad == []
        running.stop()
        manager.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            told = []
            while True:
                told.append(manager.recv(4096).decode().split("\n")[0])
        assert [text for text in told if not text.startswith(("EXTEND", "WATCHDOG"))] == [
            "READY=1", "READY=1", f"MAINPID={second}", "READY=1", f"MAINPID={last}", "STOPPING=1",
        ]  # fmt: skip
        assert first != second


@pytest.mark.slow
def test_f54_a_token_of_the_environment_still_counts(
    make_archive: MakeArchive, manager: socket.socket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old server has taken it out of its environment."""
    monkeypatch.setattr("tests.servers.environment", lambda: {**os.environ, "MMS_INFERENCE_TOKEN": TOKEN})
    with server(make_archive("echo"), folder=folder) as running:
        monkeypatch.undo()
        for _ in range(2):
            assert running.predict("echo", b"x").status == 401
            assert running.predict("echo", b"x", Authorization=f"Bearer {TOKEN}").status == 200
            succeed(running)


def test_a_server_in_the_foreground_is_not_upgraded(direct: Server) -> None:
    code, text = upgrade(direct)
    assert code == 1
    assert text.startswith(f"{UNCHANGED}the server runs in the foreground")
    assert direct.predict("echo", b"x").status == 200
