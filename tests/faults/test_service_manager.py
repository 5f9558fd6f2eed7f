"""What systemd is told, and the sockets it may hand over; the manager here is a real socket that we read."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from mms.errors import StartError
from mms.systemd import Notifier, passed_sockets
from tests.asking import fetch
from tests.conftest import MakeArchive
from tests.servers import Server, environment, free_ports, needs_nginx, server, start_arguments
from tests.waiting import eventually


def told(manager: socket.socket, word: str) -> str:
    """The next message that begins so."""
    while not (text := manager.recv(4096).decode()).startswith(word):
        pass
    return text


def test_the_manager_is_told_of_each_step(
    make_archive: MakeArchive, folder: Path, manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    with server(make_archive("echo"), folder=folder) as running:
        assert told(manager, "READY=1") == f"READY=1\nSTATUS={running.ready_line}"
        assert [told(manager, "WATCHDOG=1") for _ in range(3)] == ["WATCHDOG=1"] * 3
        running.signal(signal.SIGHUP)
        assert "MONOTONIC_USEC=" in told(manager, "RELOADING=1")
        assert told(manager, "READY=1") == "READY=1\nSTATUS=reloaded"
        running.signal(signal.SIGTERM)
        assert told(manager, "STOPPING=1") == "STOPPING=1"


def test_a_change_is_told_to_a_manager_that_is_behind(folder: Path, manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(folder / "notify")})
    for _ in range(1000):
        notifier.alive()
    reader = threading.Thread(target=told, args=(manager, "READY=1"))
    reader.start()
    notifier.ready("ready")
    reader.join(5)
    assert not reader.is_alive()


def test_a_manager_that_has_gone_does_no_harm(make_archive: MakeArchive, folder: Path, manager: socket.socket) -> None:
    manager.close()
    with server(make_archive("echo"), folder=folder) as running:
        assert running.predict("echo", b"x").status == 200


def activated(sockets: list[socket.socket], names: str, command: list[str]) -> list[str]:
    """The command as systemd runs it: with these sockets as descriptors 3 and up."""
    passed = " ".join(f"{3 + number}<&{sock.fileno()}" for number, sock in enumerate(sockets))
    script = f'export LISTEN_PID=$$ LISTEN_FDS={len(sockets)} LISTEN_FDNAMES={names}; exec "$@" {passed}'
    return ["bash", "-c", script, "bash", *command]


def test_sockets_of_the_manager_are_served_and_outlive_the_server(
    make_archive: MakeArchive, folder: Path, tmp_path: Path
) -> None:
    """A client that connects while there is no server waits until the next one has its models, at any front end."""
    gate = tmp_path / "gate"
    gate.touch()
    model = make_archive("loads_slowly", gate=str(gate))
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        addresses = ["{}:{}".format(*sock.getsockname()) for sock in sockets]
        words = [*start_arguments(folder, addresses, model, edge="auto"), "--models", model.name]
        unused = [f"--{name}-address=127.0.0.1:{port}" for name, port in zip(
            ("inference", "management", "metrics"), free_ports(3), strict=True)]  # fmt: skip
        order = [sockets[1], sockets[0], sockets[2]]
        command = activated(order, "management:inference:metrics", [*words, *unused])
        descriptors = tuple(sock.fileno() for sock in sockets)
        first = Server(folder, command, addresses, descriptors=descriptors)
        stack.callback(first.process.kill)
        first.wait_until_ready()
        assert f"at http://{addresses[0]} without nginx, management http://{addresses[1]}" in first.ready_line
        assert first.predict("loads_slowly", b"x").status == 200
        assert first.stop() == 0
        gate.unlink()
        host, _, port = addresses[0].rpartition(":")
        early = stack.enter_context(socket.create_connection((host, int(port)), 20))
        early.sendall(b"POST /predictions/loads_slowly HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
        several = [*command, "--front-ends=2"]
        second = Server(folder, several, addresses, descriptors=descriptors)
        stack.callback(second.close)
        for sock in sockets:
            stack.callback(sock.close)
        assert fetch(addresses[2], "GET", "/metrics").status == 200  # all front ends there are were asked for it
        gate.touch()
        assert early.recv(4096).startswith(b"HTTP/1.1 200 ")
        second.wait_until_ready()
        assert fetch(addresses[1], "GET", "/readyz").status == 200


@pytest.mark.parametrize(
    ("names", "edge", "message"),
    [
        ("web", "none", "the inference socket from the service manager does not listen for streams"),
        ("inference:other", "none", "socket 2 of 2 from the service manager has the name 'other'; set "),
        ("inference", "nginx", "nginx cannot take over the sockets of the service manager; start with --edge none"),
    ],
)
def test_sockets_that_do_not_fit_are_refused(folder: Path, names: str, edge: str, message: str) -> None:
    words = start_arguments(folder, [f"127.0.0.1:{port}" for port in free_ports(3)], edge=edge)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names.split(":")]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
            if "listen" not in message:
                sock.listen()
        done = subprocess.run(
            activated(sockets, names, words), capture_output=True, text=True, env=environment(), timeout=20,
            pass_fds=[sock.fileno() for sock in sockets],
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"mms: error: {message}")


@pytest.mark.parametrize("text", ["x", "-1", "1e3", "9" * 5000])
def test_numbers_of_the_manager_that_are_none_are_refused(text: str) -> None:
    message = f" = {text[:40]}, from the service manager: a whole number is needed"
    with pytest.raises(StartError, match=f"^LISTEN_FDS{re.escape(message)}$"):
        passed_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": text}, ["inference"])
    with pytest.raises(StartError, match=f"^WATCHDOG_USEC{re.escape(message)}$"):
        Notifier({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": text})


@needs_nginx
def test_a_reload_that_is_asked_for_during_a_reload_follows_it(
    make_archive: MakeArchive, folder: Path, manager: socket.socket
) -> None:
    file = folder / "server.yaml"
    file.touch()
    with server(make_archive("echo"), folder=folder, config=file, edge="nginx") as running:
        told(manager, "READY=1")
        file.write_text("header_timeout: 7")
        running.signal(signal.SIGHUP)
        told(manager, "RELOADING=1")
        other = folder / "other.yaml"
        other.write_text("header_timeout: 8")
        other.replace(file)
        running.signal(signal.SIGHUP)
        for word in ("READY=1", "RELOADING=1", "READY=1"):
            told(manager, word)
        assert "client_header_timeout 8000ms;" in (running.run_dir / "nginx" / "nginx.conf").read_text()


@needs_nginx
def test_a_reload_ends_whatever_cannot_be_written(
    make_archive: MakeArchive, folder: Path, manager: socket.socket
) -> None:
    file = folder / "server.yaml"
    file.touch()
    with server(make_archive("echo"), folder=folder, config=file, edge="nginx") as running:
        told(manager, "READY=1")

        candidate = running.run_dir / "nginx" / "nginx.conf.new"
        candidate.unlink(missing_ok=True)
        candidate.mkdir()
        (running.run_dir / "reload.json").mkdir()
        file.write_text("header_timeout: 7")
        running.signal(signal.SIGHUP)
        assert "Is a directory" in told(manager, "READY=1")
        candidate.rmdir()
        running.signal(signal.SIGHUP)
        assert told(manager, "READY=1") == "READY=1\nSTATUS=reloaded"
        eventually(lambda: "cannot write into the run directory: Is a directory" in running.output)
        (running.run_dir / "reload.json").rmdir()
