"""Faults of nginx and between nginx and the front end: catalogue, section 2.4."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mms_nginx.find import find_nginx
from rich.console import Console

from tests.asking import CLIENT_TIMEOUT, Reply, ask, connect, fetch
from tests.chaos import lost
from tests.conftest import MakeArchive
from tests.faults.means import full, needs_mounts
from tests.servers import Server, free_ports, mms, needs_nginx, scratch, server
from tests.traffic import Answering
from tests.waiting import eventually

pytestmark = needs_nginx
BURST = 200


@pytest.mark.slow
def test_f60_a_burst_while_the_front_end_stands_still_waits_in_its_backlog(make_archive: MakeArchive) -> None:
    with server(make_archive("echo", queue_size=1000), edge="nginx") as running:
        answering = Answering()
        os.kill(running.pid, signal.SIGSTOP)
        try:
            for number in range(BURST):
                answering.send(running, "echo", b"%d" % number)
            port = int(running.url.rpartition(":")[2])
            eventually(lambda: accepted(running, port) >= BURST)
        finally:
            os.kill(running.pid, signal.SIGCONT)
        assert {reply.status for reply in answering.results()} == {200}


def accepted(running: Server, port: int) -> int:
    """The connections that nginx has taken from clients."""
    count = 0
    for process in running.named("nginx"):
        with contextlib.suppress(psutil.Error):
            count += sum(
                connection.laddr.port == port and connection.status == psutil.CONN_ESTABLISHED
                for connection in process.net_connections("tcp")
            )
    return count


LISTENERS = ("inference", "management", "metrics")


class UnixConnection(http.client.HTTPConnection):
    """A client of a socket file."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=CLIENT_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CLIENT_TIMEOUT)
        self.sock.connect(str(self._path))


def listening_below(folder: Path) -> int:
    """The Unix sockets bound there that take connections: unix(7), the flag of listen(2)."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return sum(int(row[3], 16) & 0x10000 > 0 for row in rows if row[-1].startswith(f"{folder}/"))


def at_once(running: Server, count: int = 4) -> list[Reply]:
    """Answers to more requests at the same time than nginx has connections open to the front end."""
    answering = Answering()
    for _ in range(count):
        answering.send(running, "echo", b"x")
    return answering.results()


def test_f61_a_deleted_socket_file_is_back_within_two_seconds(make_archive: MakeArchive) -> None:
    with server(make_archive("echo"), edge="nginx") as running:
        files = [running.run_dir / "sockets" / f"{name}.sock" for name in LISTENERS]
        opened = [UnixConnection(file) for file in files]
        paths = ("/ping", "/ping", "/metrics")
        assert [ask(client, "GET", path).status for client, path in zip(opened, paths, strict=True)] == [200, 404, 200]
        for file in files:
            file.unlink()
        deleted = time.monotonic()
        for reply in at_once(running):
            assert reply.status in (200, 502)
            assert reply.headers["content-type"] == "application/json"
        eventually(lambda: all(file.is_socket() for file in files))
        assert time.monotonic() - deleted < 2
        assert {reply.status for reply in at_once(running, 20)} == {200}
        assert running.describe("echo")["state"] == "READY"
        for client, path in zip(opened, paths, strict=True):  # those of the old sockets go on
            assert ask(client, "GET", path).status in (200, 404)
            client.close()
        eventually(lambda: listening_below(running.run_dir) == len(LISTENERS))  # the old sockets are closed
        for name in LISTENERS:
            assert running.output.count(f"the socket file of {name} was deleted; listening anew") == 1


def test_f61_a_deleted_public_socket_file_is_back_within_two_seconds(make_archive: MakeArchive) -> None:
    with scratch() as folder:
        file = folder / "public.sock"
        with server(make_archive("echo"), folder=folder, inference_address=f"unix:{file}") as running:
            file.unlink()
            eventually(file.is_socket, 2.0)
            client = UnixConnection(file)
            assert ask(client, "POST", "/predictions/echo", b"x").status == 200
            client.close()
        assert "the socket file of inference was deleted; listening anew" in running.output


class SlowNginx:
    """A program that is nginx, but comes up only while nobody holds it."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "slow-nginx"
        self._hold = folder / "hold"
        script = f"""case "$*" in *" -t") ;; *) while [ -e {self._hold} ]; do sleep 0.02; done ;; esac"""
        self.program.write_text(f'#!/bin/sh\n{script}\nexec {find_nginx("nginx")} "$@"\n')
        self.program.chmod(0o755)

    @contextlib.contextmanager
    def killed(self, running: Server) -> Iterator[None]:
        """The server is starting it again, and cannot before the end of the block."""
        self._hold.touch()
        before = running.output.count("starting it again")
        next(child for child in psutil.Process(running.pid).children() if child.name() == "nginx").kill()
        eventually(lambda: running.output.count("starting it again") > before)
        try:
            yield
        finally:
            self._hold.unlink()


@pytest.fixture(scope="module")
def behind_slow(make_archive: MakeArchive) -> Iterator[tuple[Server, SlowNginx]]:
    with scratch() as folder:
        slow, config = SlowNginx(folder), folder / "server.yaml"
        config.touch()
        with server(make_archive("echo"), folder=folder, edge="nginx", nginx=slow.program, config=config) as running:
            yield running, slow


def test_f58_the_front_end_and_a_reload_do_not_wait_for_a_slow_start_of_nginx(
    behind_slow: tuple[Server, SlowNginx],
) -> None:
    running, slow = behind_slow
    with slow.killed(running):
        client = UnixConnection(running.run_dir / "sockets" / "inference.sock")
        for _ in range(20):
            begun = time.monotonic()
            assert ask(client, "POST", "/predictions/echo", b"x").status == 200
            assert time.monotonic() - begun < 0.3
        client.close()
        (running.folder / "server.yaml").write_text("header_timeout: 3\n")
        running.signal(signal.SIGHUP)  # waits for nginx
    eventually(lambda: "reloaded; changed: header_timeout" in running.output)
    assert running.output.index("serves again") < running.output.index("reloaded; changed: header_timeout")
    assert "client_header_timeout 3" in (running.run_dir / "nginx" / "nginx.conf").read_text()
    assert running.predict("echo", b"x").status == 200


def test_f58_the_death_of_nginx_is_told(behind_slow: tuple[Server, SlowNginx]) -> None:
    running, slow = behind_slow
    deaths = running.metric("mms_nginx_restarts_total", reason="signal 9 (SIGKILL)")
    with slow.killed(running):
        for name in ("inference", "management"):
            client = UnixConnection(running.run_dir / "sockets" / f"{name}.sock")
            reply = ask(client, "GET", "/readyz")
            client.close()
            assert (reply.status, reply.json()["status"]) == (503, "unreachable")
            assert reply.message == "unreachable: nginx ended: signal 9 (SIGKILL)"
    eventually(lambda: fetch_quietly(running.management, "/readyz") == 200)
    (line,) = running.manage("GET", "/readyz").json()["restarts"]
    assert line == {
        "level": "nginx", "deaths": deaths + 1, "limit": 5, "window": 60.0, "lastCause": "signal 9 (SIGKILL)",
        "state": "running",
    }  # fmt: skip
    assert running.metric("mms_nginx_restarts_total", reason="signal 9 (SIGKILL)") == deaths + 1


def fetch_quietly(address: str, path: str) -> int:
    """The status; 0 while nobody answers."""
    try:
        return fetch(address, "GET", path).status
    except OSError:
        return 0


def test_f58_a_stop_does_not_wait_for_a_slow_start_of_nginx(make_archive: MakeArchive) -> None:
    with scratch() as folder:
        slow = SlowNginx(folder)
        with server(make_archive("echo"), folder=folder, edge="nginx", nginx=slow.program) as running:
            with slow.killed(running):
                assert running.stop(3) == 0
            assert "cannot be started again" not in running.output


@pytest.mark.parametrize(
    ("program", "words"),
    [("no-such-program", "is not found"), ("/bin/false", "/bin/false"), ("/etc/passwd", "/etc/passwd")],
)
def test_f62_a_program_that_is_no_nginx_is_one_line(program: str, words: str) -> None:
    inference, management, metrics = (f"127.0.0.1:{port}" for port in free_ports(3))
    arguments = ["--inference-address", inference, "--management-address", management, "--metrics-address", metrics]
    with scratch() as folder:
        folders = ["--run-dir", str(folder / "run"), "--cache-dir", str(folder / "cache")]
        ended = mms("start", "--edge", "nginx", "--nginx", program, *arguments, *folders, cwd=folder)
    assert ended.returncode == 1
    error = ended.stderr.strip().splitlines()[-1]
    assert words in error
    assert "Traceback" not in ended.stderr


@needs_mounts
def test_f63_a_full_disk_for_bodies_fails_the_large_request_only(make_archive: MakeArchive) -> None:
    with server(make_archive("echo"), edge="nginx", max_request_size="8MiB") as running:
        (spool,) = running.cache_dir.glob("servers/*/nginx/body")
        user = spool.stat().st_uid
        with full(spool, free=100_000, owner=user):
            reply = running.predict("echo", b"x" * 5_000_000)
            assert reply.status == 500
            assert reply.message
            assert running.predict("echo", b"x" * 1000).status == 200
        assert running.predict("echo", b"x" * 5_000_000).status == 200


@pytest.mark.slow
def test_f64_an_access_log_on_a_full_disk_stops_nobody(make_archive: MakeArchive) -> None:
    with server(make_archive("echo"), edge="nginx", access_log="/dev/full") as running:
        client = connect(running.url)
        assert {ask(client, "POST", "/predictions/echo", b"x").status for _ in range(300)} == {200}
        client.close()


@pytest.mark.slow
def test_f65_reloads_under_load_lose_no_request() -> None:
    with open(os.devnull, "w") as nothing:
        console = Console(record=True, quiet=False, file=nothing)
        assert lost.run("reloads", 2000, 1, console) == 0, console.export_text()
