"""The life of the real nginx: how it starts, what it refuses, reloads, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from mms_nginx import Listener, Nginx, find_nginx

from mms.errors import StartError
from tests.processes.nginx.edges import (
    PROGRAM,
    Edge,
    Upstream,
    can_bind,
    configuration,
)
from tests.servers import free_ports, needs_nginx
from tests.waiting import eventually

pytestmark = [needs_nginx, pytest.mark.timeout(30)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_port_in_use_is_named_in_one_line(directory: Path, upstream: Upstream) -> None:
    edge = Edge(directory)
    with socket.create_server(("127.0.0.1", edge.port)), pytest.raises(StartError) as caught:
        edge.nginx.start()
    assert f"127.0.0.1:{edge.port}" in caught.value.message and "\n" not in caught.value.message
    assert edge.nginx.pid == 0


def test_unix_address_in_use(directory: Path, upstream: Upstream) -> None:
    public = Listener("inference", f"unix:{upstream.path}", (upstream.path,))
    with pytest.raises(StartError, match=r"\(pid \d+\) listens there; stop it, or choose"):
        Nginx(PROGRAM, directory / "nginx", configuration(directory, public)).start()
    eventually(lambda: upstream.connections)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("events {} nonsense on;", 'unknown directive "nonsense"'),
        ("events {} http { server { listen 127.0.0.1:1; ", "unexpected end of file"),
    ],
)
def test_check_gives_the_reason_in_one_line(directory: Path, text: str, reason: str) -> None:
    with pytest.raises(StartError) as caught:
        Nginx(PROGRAM, directory / "nginx", text).check()
    assert reason in caught.value.message and "\n" not in caught.value.message


def test_one_address_for_two_listeners_is_refused(directory: Path) -> None:
    edge = Edge(directory)
    twin = Listener("management", edge.inference.address, edge.inference.upstream)
    with pytest.raises(StartError, match="duplicate"):
        Nginx(PROGRAM, directory / "nginx", configuration(directory, edge.inference, twin)).check()


def test_missing_program(directory: Path) -> None:
    assert find_nginx("no-such-nginx") is None
    with pytest.raises(StartError, match="No such file"):
        Nginx("/no-such-nginx", directory / "nginx", "").check()


def test_workers_do_not_run_as_root(edge: Edge) -> None:
    def owners() -> set[int]:
        return {Path(f"/proc/{pid}").stat().st_uid for pid in workers(edge.nginx.pid)}

    eventually(lambda: owners() and 0 not in owners())


def test_refused_reload_keeps_the_old_configuration(edge: Edge) -> None:
    before = workers(edge.nginx.pid)
    with pytest.raises(StartError, match="unknown directive"):
        edge.nginx.reload(edge.text + "nonsense on;")
    assert workers(edge.nginx.pid) == before
    assert (edge.directory / "nginx/nginx.conf").read_text() == edge.text
    assert edge.request("GET", "/")[0] == 200


def test_reload_to_a_port_in_use_is_refused(edge: Edge, upstream: Upstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        text = configuration(edge.directory, edge.inference, Listener("metrics", address, (upstream.path,)))
        with pytest.raises(StartError, match=address):
            edge.nginx.reload(text)
    assert (edge.directory / "nginx/nginx.conf").read_text() == edge.text
    assert edge.request("GET", "/")[0] == 200


def test_reload_takes_effect(edge: Edge, upstream: Upstream) -> None:
    port = free_ports(1)[0]
    metrics = Listener("metrics", f"127.0.0.1:{port}", (upstream.path,))
    edge.nginx.reload(configuration(edge.directory, edge.inference, metrics))
    with socket.create_connection(("127.0.0.1", port), 5) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_reloads_under_load_lose_nothing(edge: Edge) -> None:
    statuses: list[int] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            statuses.append(edge.request("POST", "/", b"x")[0])

    def reached(number: int) -> bool:
        return len(statuses) >= number

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        enough = len(statuses) + 50
        edge.nginx.reload(edge.text)
        eventually(partial(reached, enough))
    over.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200} and len(statuses) >= 250


def test_a_request_in_hand_is_answered_before_the_stop(edge: Edge, upstream: Upstream) -> None:
    connection = edge.connect()
    with contextlib.closing(connection):
        connection.request("POST", "/stream", b"")
        answer = connection.getresponse()
        assert answer.read1() == b"first"
        stopping = threading.Thread(target=edge.nginx.stop, args=(10.0,))
        stopping.start()
        eventually(lambda: can_bind(edge.port))
        upstream.let_stream_go_on()
        assert answer.read() == b"second"
        stopping.join()
    assert edge.nginx.exit_code() == 0


def test_stop_does_not_wait_for_ever(edge: Edge, upstream: Upstream) -> None:
    connection = edge.connect()
    with contextlib.closing(connection):
        connection.request("POST", "/stream", b"")
        assert connection.getresponse().read1() == b"first"
        began = time.monotonic()
        edge.nginx.stop(0.2)
    assert 0.2 <= time.monotonic() - began < 3


def test_stop_leaves_nothing(directory: Path, upstream: Upstream) -> None:
    with Edge(directory) as edge:
        pids = [edge.nginx.pid, *workers(edge.nginx.pid)]
        descriptor = edge.nginx.pidfd
        assert len(pids) > 1 and edge.nginx.exit_code() is None
    assert not any(map(alive, pids))
    assert edge.nginx.exit_code() == 0
    assert not Path(f"/proc/self/fd/{descriptor}").exists() and edge.nginx.pidfd == -1
    assert not (directory / "nginx/nginx.pid").exists()


def test_a_killed_master_is_noticed_and_its_workers_end(directory: Path, upstream: Upstream) -> None:
    with Edge(directory) as edge:
        pids = workers(edge.nginx.pid)
        os.kill(edge.nginx.pid, signal.SIGKILL)
        assert eventually(edge.nginx.exit_code) == -signal.SIGKILL
        assert not any(map(alive, pids))
        edge.nginx.stop(1.0)
        edge.nginx.start()
        assert edge.request("GET", "/")[0] == 200


CHILD = """
import sys
from pathlib import Path
from mms_nginx import Nginx

directory = Path(sys.argv[2])
nginx = Nginx(sys.argv[1], directory, (directory / "text").read_text())
nginx.start()
print(nginx.pid, flush=True)
sys.stdin.read()
"""


def test_ends_with_its_parent(directory: Path, upstream: Upstream) -> None:
    edge = Edge(directory)
    (directory / "nginx").mkdir()
    (directory / "nginx/text").write_text(edge.text)
    command = [sys.executable, "-c", CHILD, PROGRAM, str(directory / "nginx")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        master = int(parent.stdout.readline())
        pids = [master, *workers(master)]
        assert edge.request("GET", "/")[0] == 200
        parent.kill()
    eventually(lambda: not any(map(alive, pids)))
    assert can_bind(edge.port)
