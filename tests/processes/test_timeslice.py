"""Who loads a model has long time slices on the CPU and pauses, and who serves has usual ones."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import uvloop

from mms import arena
from mms.backend import loop, timeslice
from mms.backend.forking import fork_worker
from tests.processes.pools import Serve, serve, subreaper, until

__all__ = ["serve", "subreaper"]

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}.get(platform.machine())
SCHED_ATTR = struct.Struct("=IIQiIQQQ")  # sched_setattr(2)
KERNEL = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])

slices = pytest.mark.skipif(
    KERNEL < (6, 12) or SCHED_GETATTR is None, reason="Linux has slices of one's own since 6.12"
)


def attributes(thread: int) -> tuple[int, int, int]:
    """Policy, niceness, and the slice in ns."""
    buffer = ctypes.create_string_buffer(SCHED_ATTR.size)
    assert ctypes.CDLL(None).syscall(SCHED_GETATTR, thread, buffer, SCHED_ATTR.size, 0) == 0
    _, policy, _, nice, _, slice_ns, _, _ = SCHED_ATTR.unpack(buffer.raw)
    return policy, nice, slice_ns


@slices
@pytest.mark.parametrize("interpreter", [None, sys.executable], ids=["forked", "fresh"])
def test_a_worker_has_long_slices_until_it_is_ready(serve: Serve, tmp_path: Path, interpreter: str | None) -> None:
    gate = tmp_path / "gate"

    async def scenario() -> None:
        usual = attributes(0)
        how = {"workers": 0, "model_config": {"gate": str(gate)}, "interpreter": interpreter}
        async with serve("loads_slowly", **how) as served:
            served.pool.set_target(1)
            pid = await until(lambda: next((worker.pid for worker in served.pool.workers if worker.pid), 0))
            await until(lambda: attributes(pid)[2] == timeslice.LONG)
            assert {attributes(other)[2] for other in served.forkservers.pids()} <= {timeslice.LONG}
            gate.touch()
            await served.pool.settled()
            assert served.pids == [pid]
            assert os.sched_getaffinity(pid) == os.sched_getaffinity(0), "and all cores"
            assert {attributes(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")} == {usual}

    uvloop.run(scenario())


@slices
def test_all_threads_of_a_process_get_them_and_give_them_back() -> None:
    usual, ended = attributes(0), threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    assert other.native_id is not None
    try:
        timeslice.take(timeslice.LONG)
        assert attributes(0) == attributes(other.native_id) == (*usual[:2], timeslice.LONG)
        timeslice.take(timeslice.USUAL)
        assert attributes(0) == attributes(other.native_id) == usual
    finally:
        ended.set()
        other.join()


@slices
def test_a_worker_ends_with_long_slices() -> None:
    """In this process: the loop of a worker whose server has gone leaves at once."""
    ours, theirs = socket.socketpair()
    theirs.close()
    usual, last = attributes(0), []
    try:
        loop.main(ours, arena.create(mmap.PAGESIZE), lambda code: last.append((code, attributes(0)[2])))
    finally:
        timeslice.take(timeslice.USUAL)
        ours.close()
    assert last == [(0, timeslice.LONG)]
    assert attributes(0) == usual


def test_who_forks_and_who_is_forked_pauses(subreaper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who pauses writes down its pid: who forks, the process between, and the worker."""
    read_end, write_end = os.pipe()
    monkeypatch.setattr(timeslice, "pause", lambda: os.write(write_end, b"%d " % os.getpid()))
    fork_worker(lambda reply, descriptors: None, [], lambda: os._exit(0))
    os.close(write_end)
    with open(read_end) as pids:
        maker, between, worker = pids.read().split()
    assert os.waitpid(int(worker), 0)[1] == 0
    assert int(maker) == os.getpid()
    assert len({maker, between, worker}) == 3


@slices
def test_a_template_keeps_long_slices_and_its_workers_have_usual_ones(serve: Serve) -> None:
    async def scenario() -> None:
        usual = attributes(0)
        async with serve("shares", workers=1, share_weights=True) as served:
            template = served.pool.starter.template
            assert template is not None and template.pid is not None
            assert attributes(template.pid)[2] == timeslice.LONG
            for pid in served.pids:
                assert {attributes(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")} == {usual}

    uvloop.run(scenario())


def test_the_core_of_another_process_is_left_out_and_taken_back() -> None:
    cores = os.sched_getaffinity(0)
    core = min(cores)
    other = subprocess.Popen(["taskset", "-c", str(core), "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdin is not None and other.stdout is not None
        other.stdin.write(b"x\n")
        other.stdin.flush()
        assert other.stdout.readline() == b"x\n"
        allowed = timeslice.keep_off(other.pid)
        assert os.sched_getaffinity(0) == (cores - {core} or cores)
        timeslice.spread(allowed)
        assert os.sched_getaffinity(0) == cores
    finally:
        os.sched_setaffinity(0, cores)
        other.communicate()


def test_where_the_core_is_not_known_all_are_kept() -> None:
    cores = os.sched_getaffinity(0)
    timeslice.spread(timeslice.keep_off(2**22 + 1))  # no process has so high a number
    assert os.sched_getaffinity(0) == cores
