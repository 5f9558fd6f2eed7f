"""A whole server behind the real nginx: its own refusals, its separation of the ports, its death and return."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
from mms_nginx.find import find_nginx

from tests.asking import CLIENT_TIMEOUT, ask, connect, fetch
from tests.conftest import MakeArchive, MakeGate
from tests.servers import Server, needs_nginx, server
from tests.traffic import Answering, Traffic
from tests.waiting import eventually

pytestmark = needs_nginx


def master(running: Server) -> psutil.Process:
    return next(process for process in psutil.Process(running.pid).children() if process.name() == "nginx")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413_in_json(edged: Server, chunked: bool) -> None:
    body = b"x" * ((2 << 20) + 1)
    connection = connect(edged.url)
    try:
        if chunked:
            reply = ask(
                connection, "POST", "/predictions/echo", iter([body]), {"Transfer-Encoding": "chunked"}, chunked=True
            )
        else:
            reply = ask(connection, "POST", "/predictions/echo", body)
    finally:
        connection.close()
    assert (reply.status, reply.json()["type"]) == (413, "RequestEntityTooLargeException")
    assert reply.message
    assert edged.predict("echo", b"x").status == 200


@pytest.mark.parametrize("path", ["/models", "/models/echo", "/metrics", "/predictions/../models", "/%2e%2e/models"])
@pytest.mark.parametrize("host", ["management", "metrics", "localhost:8081"])
def test_management_is_not_reachable_through_the_inference_port(either: Server, path: str, host: str) -> None:
    reply = fetch(either.url, "GET", path, None, {"Host": host})
    assert reply.status in (400, 404)
    assert reply.message


def test_inference_is_not_served_on_the_other_ports(either: Server) -> None:
    assert either.manage("POST", "/predictions/echo").status == 404
    assert fetch(either.metrics, "GET", "/models").status == 404


def test_what_nginx_refuses_itself_is_json(edged: Server) -> None:
    connection = connect(edged.url)
    connection.putrequest("GET", "/ping", skip_host=True)
    connection.putheader("Host", "a b")
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 400
    assert json.loads(response.read())["code"] == 400
    connection.close()


def test_nothing_of_ours_listens_beside_nginx(edged: Server) -> None:
    """The server holds the sockets that nginx serves, for an upgrade, and no others."""
    listening = {
        "{}:{}".format(*c.laddr)
        for c in psutil.Process(edged.pid).net_connections("tcp")
        if c.status == psutil.CONN_LISTEN
    }
    assert listening == {edged.url, edged.management, edged.metrics}
    sockets = edged.run_dir / "sockets"
    assert {path.name for path in sockets.iterdir()} == {"inference.sock", "management.sock", "metrics.sock"}
    assert not any(path.stat().st_mode & 0o007 for path in (sockets, *sockets.iterdir()))


def test_the_access_log_names_requests_without_their_query(edged: Server) -> None:
    fetch(edged.url, "POST", "/predictions/echo?token=secret", b"x", {"X-Request-Id": "in-the-access-log"})
    log = edged.folder / "access.log"
    eventually(lambda: "in-the-access-log" in log.read_text())
    (line,) = (line for line in log.read_text().splitlines() if "in-the-access-log" in line)
    entry = json.loads(line)
    assert (entry["listener"], entry["path"], entry["status"]) == ("inference", "/predictions/echo", 200)
    assert "secret" not in log.read_text()


def test_a_client_that_leaves_is_noticed_behind_nginx(make_archive: MakeArchive, make_gate: MakeGate) -> None:
    busy, left, answering = make_gate(), make_gate(), Answering()
    with server(make_archive("gate"), edge="nginx") as running:
        answering.send(running, "gate", busy.body)
        eventually(busy.begun)
        connection = connect(running.url)
        connection.request("POST", "/predictions/gate", left.body)
        eventually(lambda: running.metric("mms_queue_depth", model="gate") == 1)
        connection.close()
        eventually(lambda: running.metric("mms_queue_depth", model="gate") == 0)
        busy.open()
        assert [reply.status for reply in answering.results()] == [200]
        assert left.begun() == []


def leave_a_body(running: Server) -> Path:
    """As a worker of nginx does that is killed between making the file and unlinking it, which is at once."""
    (folder,) = running.cache_dir.glob("servers/*/nginx/body")
    file = folder / "0000000001"
    file.touch()
    return file


def test_f57_a_killed_nginx_worker_is_replaced(make_archive: MakeArchive) -> None:
    with server(make_archive("echo"), edge="nginx") as running:
        workers, left = master(running).children(), leave_a_body(running)
        for worker in workers:
            worker.kill()
        eventually(lambda: len(set(master(running).children()) - set(workers)) == len(workers))
        assert running.predict("echo", b"x").status == 200
        eventually(lambda: not left.exists())


def test_f58_a_killed_nginx_is_back_within_two_seconds(make_archive: MakeArchive) -> None:
    with server(make_archive("echo"), edge="nginx") as running:
        before, left = running.workers("echo"), leave_a_body(running)
        first = master(running)
        first.kill()
        killed = time.monotonic()
        eventually(lambda: not first.is_running() and answers(running), timeout=2)
        assert time.monotonic() - killed < 2
        assert running.workers("echo") == before
        assert len([process for process in psutil.Process(running.pid).children() if process.name() == "nginx"]) == 1
        assert "nginx ended: signal 9 (SIGKILL); starting it again" in running.output
        assert not left.exists()


def test_nginx_that_cannot_be_kept_running_ends_the_server(make_archive: MakeArchive) -> None:
    with server(make_archive("echo"), edge="nginx") as running:
        running.expected_exit = 1
        for _ in range(6):
            process = eventually(lambda: running.process.poll() is not None or alive_master(running))
            if isinstance(process, psutil.Process):
                process.kill()
                process.wait(CLIENT_TIMEOUT)
        assert running.process.wait(10) == 1
        assert "nginx cannot be kept running; stopping" in running.output


def test_f59_posts_after_idle_gaps_never_meet_a_closed_connection(make_archive: MakeArchive) -> None:
    """The front end is never the side that closes an idle connection of nginx, however short its own limit."""
    with server(make_archive("echo"), edge="nginx", keepalive_timeout=0.2) as running:
        for gap in (0.0, 0.2, 1.3):
            threading.Event().wait(gap)  # the idle time is what is tested
            assert running.predict("echo", b"x").status == 200


def test_a_reload_of_nginx_under_load_loses_nothing(make_archive: MakeArchive) -> None:
    with server(make_archive("echo"), edge="nginx") as running, Traffic(running) as traffic:
        traffic.flows()
        os.kill(master(running).pid, signal.SIGUSR1)  # reopens its logs
        traffic.flows()
    assert traffic.failures == []


def test_without_nginx_the_server_says_so(make_archive: MakeArchive, tmp_path: Path) -> None:
    with server(make_archive("echo"), edge="auto", nginx=str(tmp_path / "nginx")) as running:
        assert "without nginx" in running.ready_line
        assert running.predict("echo", b"x").status == 200


def test_s20_the_ready_line_names_the_addresses_and_the_version_of_nginx(edged: Server) -> None:
    version = subprocess.run([find_nginx("nginx") or "", "-v"], capture_output=True, text=True, check=True).stderr
    number = version.split("/")[1].split()[0]
    assert f"2 models at http://{edged.url} behind nginx {number}, " in edged.ready_line
    assert f"management http://{edged.management}, metrics http://{edged.metrics}/metrics" in edged.ready_line
    assert "[notice]" not in edged.output


def answers(running: Server) -> bool:
    try:
        return fetch(running.url, "POST", "/predictions/echo", b"x").status == 200
    except OSError:
        return False


def alive_master(running: Server) -> psutil.Process | None:
    """The present master, once it serves."""
    try:
        found = master(running)
        return found if found.is_running() and found.children() and answers(running) else None
    except (StopIteration, psutil.Error):
        return None
