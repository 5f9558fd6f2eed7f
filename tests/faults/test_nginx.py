"""Faults of nginx and between nginx and the front end: catalogue, section 2.4."""

from __future__ import annotations

import contextlib
import os
import signal

import psutil
import pytest
from rich.console import Console

from tests.chaos import lost
from tests.conftest import MakeArchive, Server, ask, connect, eventually, free_ports, mms, needs_nginx, scratch, server
from tests.faults.means import full, needs_mounts
from tests.traffic import Answering

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


def test_f61_without_its_socket_file_nginx_answers_in_json_and_open_connections_serve(
    make_archive: MakeArchive,
) -> None:
    with server(make_archive("echo"), edge="nginx") as running:
        assert running.predict("echo", b"x").status == 200
        path = running.run_dir / "sockets" / "inference.sock"
        path.unlink()
        clients = [connect(running.url) for _ in range(4)]
        for client in clients:  # more at once than nginx keeps connections for
            client.request("POST", "/predictions/echo", b"x")
        for client in clients:
            response = client.getresponse()
            body = response.read()
            client.close()
            assert response.status in (200, 502)
            assert response.getheader("content-type") == "application/json", body


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
    console = Console(record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    with contextlib.closing(console.file):
        assert lost.run("reloads", 2000, 1, console) == 0, console.export_text()
