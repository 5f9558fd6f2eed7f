"""Descriptors, memory, disks, clocks and surroundings that fail the server: catalogue, section 2.5."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.asking import Reply, fetch
from tests.conftest import MakeArchive, MakeGate
from tests.faults.means import fill, full, needs_mounts, needs_pid_namespaces, small_disk
from tests.servers import environment, free_ports, needs_nginx, scratch, server, start_arguments
from tests.traffic import Answering, Traffic
from tests.waiting import eventually

CONNECTIONS = 150
DAY = 86_400


def test_f66_without_descriptors_requests_are_refused_in_words_and_all_is_well_afterwards(
    make_archive: MakeArchive,
) -> None:
    """What is done by the clock goes on, too: steps are taken back, and a head that does not arrive is refused."""
    with server(make_archive("echo"), header_timeout=0.2) as running:
        main = psutil.Process(running.pid)
        before = main.num_fds()
        hard = main.rlimit(psutil.RLIMIT_NOFILE)[1]
        host, _, port = running.url.rpartition(":")
        with contextlib.ExitStack() as stack:
            predicts, probes = (stack.enter_context(socket.create_connection((host, int(port)), 5)) for _ in range(2))
            main.rlimit(psutil.RLIMIT_NOFILE, (before + 20, hard))
            for _ in range(CONNECTIONS):  # the kernel takes them, the server cannot
                stack.enter_context(socket.create_connection((host, int(port)), 5))
            eventually(lambda: "step 3 of 3" in running.output)
            predicts.sendall(b"POST /predictions/echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx")
            assert predicts.recv(65536).startswith(b"HTTP/1.1 429")
            probes.sendall(b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = probes.recv(65536)
            assert answer.startswith(b"HTTP/1.1 503") and b"the front end refuses connections" in answer
            main.rlimit(psutil.RLIMIT_NOFILE, (hard, hard))
        eventually(lambda: running.metric("mms_shedding_step") == 0)
        assert running.predict("echo", b"x").status == 200
        assert fetch(running.url, "GET", "/readyz").status == 200
        with socket.create_connection((host, int(port)), 5) as sock:
            sock.sendall(b"GET /")
            assert sock.recv(65536).startswith(b"HTTP/1.1 408")
        eventually(lambda: main.num_fds() <= before)
        (pid,) = running.workers("echo")
        os.kill(pid, signal.SIGKILL)
        assert running.predict("echo", b"x").status == 200


@pytest.mark.slow
def test_f68_without_memory_for_bodies_small_requests_are_served(make_archive: MakeArchive) -> None:
    """Bodies that do not fit fail alone, with an answer or their connection; the server may not die of them."""
    with server(make_archive("echo")) as running:
        assert running.predict("echo", b"x").status == 200
        main = psutil.Process(running.pid)
        limit = main.memory_info().vms + (64 << 20)
        before = main.rlimit(psutil.RLIMIT_AS)
        main.rlimit(psutil.RLIMIT_AS, (limit, before[1]))
        answering = Answering()
        for _ in range(4):
            answering.send(running, "echo", b"x" * (48 << 20))
        with contextlib.suppress(AssertionError):  # a connection may end
            answering.results()
        statuses = {reply.status for reply in answering.replies.values() if isinstance(reply, Reply)}
        assert statuses <= {200, 413, 429, 500, 503}
        assert running.process.poll() is None, running.output
        assert running.predict("echo", b"x").status == 200
        main.rlimit(psutil.RLIMIT_AS, before)
        assert running.predict("echo", b"x" * (48 << 20)).status == 200
        assert running.workers("echo")


@needs_mounts
@pytest.mark.parametrize("edge", ["none", pytest.param("nginx", marks=needs_nginx)])
def test_f72_a_full_disk_under_the_run_directory_stops_no_request(make_archive: MakeArchive, edge: str) -> None:
    """Logs are lost; workers and nginx are still replaced, and models registered."""
    with scratch() as folder:
        user = 0o711
        with small_disk(folder / "run", 2 << 20, mode=user):
            archives = make_archive("echo"), make_archive("raises")
            with server(*archives, spare=(make_archive("big"),), folder=folder, edge=edge) as running:
                filler = fill(folder / "run")
                for _ in range(20):  # each puts a traceback into the model's log
                    assert running.predict("raises", b"x").status == 500
                (pid,) = running.workers("echo")
                os.kill(pid, signal.SIGKILL)
                assert running.predict("echo", b"x").status == 200
                assert running.manage("POST", "/models?url=big-1.0.mar").status == 200
                assert running.predict("big", b"10").status == 200
                filler.unlink()
                assert running.predict("echo", b"x").status == 200


@needs_mounts
def test_f73_a_full_disk_for_extracted_archives_fails_the_registration_only(make_archive: MakeArchive) -> None:
    with server(make_archive("echo"), spare=(make_archive("big"),)) as running:
        (models,) = running.cache_dir.glob("servers/*/models")
        kept = {path.name for path in models.iterdir()}
        with full(models, free=0):
            reply = running.manage("POST", "/models?url=big-1.0.mar")
            assert reply.status == 500
            assert "No space left" in reply.message
            assert [path.name for path in models.iterdir()] == ["fills-the-disk"]
            assert running.predict("echo", b"x").status == 200
        assert {path.name for path in models.iterdir()} == kept
        assert running.manage("POST", "/models?url=big-1.0.mar").status == 200


@needs_mounts
def test_f74_a_read_only_model_store_serves(make_archive: MakeArchive) -> None:
    with scratch() as folder, small_disk(folder / "disk", 2 << 20) as disk:
        for name in ("echo", "big"):
            shutil.copy(make_archive(name), disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with server(folder=folder, model_store=disk, models="echo-1.0.mar") as running:
            assert running.predict("echo", b"x").status == 200
            assert running.manage("POST", "/models?url=big-1.0.mar").status == 200
            assert running.predict("big", b"10").status == 200


def test_f75_weights_that_cannot_be_read_are_named_with_the_fault(make_archive: MakeArchive) -> None:
    """Reading the start of /proc/self/mem is an input/output error, as from a broken disk."""
    with server(spare=(make_archive("reads_weights", weights="/proc/self/mem"),)) as running:
        reply = running.manage("POST", "/models?url=reads_weights-1.0.mar")
        assert reply.status == 500
        described = running.describe("reads_weights")
        assert described["state"] == "FAILED"
        assert "Input/output error" in json.dumps(described["failure"])


@pytest.mark.parametrize("edge", ["none", pytest.param("nginx", marks=needs_nginx)])
def test_f79_a_run_directory_that_is_deleted_stops_no_request_and_no_stop(make_archive: MakeArchive, edge: str) -> None:
    with server(make_archive("echo"), edge=edge) as running, Traffic(running, clients=1) as traffic:
        traffic.flows()
        shutil.rmtree(running.run_dir)
        if edge == "none":  # nginx keeps what it has connected, and cannot connect anew (F61)
            traffic.flows()
            (pid,) = running.workers("echo")
            os.kill(pid, signal.SIGKILL)
            traffic.flows()
    if edge == "none":
        assert traffic.failures == []


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_f80_jumps_of_the_wall_clock_end_nothing(
    make_archive: MakeArchive, make_gate: MakeGate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, shift = tmp_path / "clock.so", tmp_path / "shift"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    shift.write_text("0")
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("CLOCK_SHIFT", str(shift))
    with server(make_archive("gate"), make_archive("echo"), response_timeout=30, queue_timeout=30) as running:
        monkeypatch.delenv("LD_PRELOAD")
        gate, answering = make_gate(), Answering()
        answering.send(running, "gate", gate.body)
        eventually(gate.begun)
        before = running.workers("gate"), running.workers("echo")
        loaded = running.describe("echo")["loadedAt"]
        for jump in (DAY, -DAY, 12 * 365 * DAY + 2**31 - int(time.time())):
            shift.write_text(str(jump))
            assert running.predict("echo", b"x").status == 200
        running.manage("POST", "/models?url=echo-1.0.mar&model_name=later")
        assert running.describe("later")["loadedAt"] > loaded[:3] + "8"  # the jumps were seen: it is 2050
        assert running.metric("mms_request_duration_seconds_sum") >= 0
        gate.open()
        assert [reply.status for reply in answering.results()] == [200]
        assert (running.workers("gate"), running.workers("echo")) == before


def await_ping(address: str, process: subprocess.Popen[bytes]) -> None:
    def answers() -> bool:
        assert process.poll() is None, "it has ended"
        try:
            return fetch(address, "GET", "/ping").status == 200
        except OSError:
            return False

    eventually(answers, timeout=20)


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"], ids=["stdin", "all"])
def test_f82_without_environment_terminal_and_home_it_serves(make_archive: MakeArchive, closed: str) -> None:
    with scratch() as folder:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
        words = start_arguments(folder, addresses, make_archive("echo"), models="echo-1.0.mar", workers=1)
        python_path = environment().get("PYTHONPATH", "")
        script = f'exec "$@" {closed}'
        process = subprocess.Popen(
            ["/bin/sh", "-c", script, "sh", *words],
            cwd=folder,
            env={"PYTHONPATH": python_path, "LANG": "C", "TZ": "No/Where"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            await_ping(addresses[0], process)
            eventually(lambda: fetch(addresses[0], "POST", "/predictions/echo", b"x").status == 200)
        finally:
            process.terminate()
            assert process.wait(20) == 0


def zombies(parent: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in parent.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # reaped while we look
            if child.status() == psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


@needs_mounts
def test_f71_a_full_dev_shm_does_not_matter_to_large_bodies(make_archive: MakeArchive) -> None:
    full_first = "mount -t tmpfs -o size=4k none /dev/shm && head -c 4096 /dev/zero > /dev/shm/full && exec "
    with scratch() as folder:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
        archive = make_archive("large")
        words = start_arguments(folder, addresses, archive, models=archive.name, workers=1)
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", full_first + shlex.join(words)],
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            await_ping(addresses[0], process)
            eventually(lambda: fetch(addresses[0], "POST", "/predictions/large", b"\n").status == 200)
            body = os.urandom(1 << 20)
            assert fetch(addresses[0], "POST", "/predictions/large", b"\n" + body).body == body
        finally:
            process.terminate()
            assert process.wait(20) == 0


@needs_pid_namespaces
def test_f83_as_the_first_process_it_reaps_strangers_and_ends_well(make_archive: MakeArchive) -> None:
    with scratch() as folder:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
        archive = make_archive("forks_a_helper")
        words = start_arguments(folder, addresses, archive, models=archive.name, workers=1)
        process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *words],
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            await_ping(addresses[0], process)
            (first,) = psutil.Process(process.pid).children()
            eventually(lambda: fetch(addresses[0], "POST", "/predictions/forks_a_helper", b"x").status == 200)
            for worker in [each for each in first.children(recursive=True) if each.name() == "mms-forks_a_hel"]:
                worker.kill()  # workers and their helpers: orphans that the first process inherits
            eventually(lambda: not zombies(first))
            eventually(lambda: fetch(addresses[0], "POST", "/predictions/forks_a_helper", b"x").status == 200)
        finally:
            for child in psutil.Process(process.pid).children():
                child.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
