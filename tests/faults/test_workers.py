"""Faults of workers (rows F7 to F34), in a pool alone and in a whole server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import uvloop

from mms import wire
from mms.errors import MMSError as Error
from mms.workers.process import reap_orphans
from tests.conftest import MakeArchive
from tests.faults.misbehaving import dies, serves, tell
from tests.processes.pools import Serve, serve, subreaper, until
from tests.servers import Server, server
from tests.waiting import eventually

__all__ = ["serve", "subreaper"]


def test_f7_fifty_poisons_in_a_row_cost_two_workers_and_no_other_request(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("poison", workers=2) as served:
            served.queue.timeout = 60.0
            answered, over = 0, asyncio.Event()

            async def good(name: bytes) -> None:
                nonlocal answered
                while not over.is_set():
                    assert await served.submit(name) == name
                    answered += 1

            clients = [asyncio.ensure_future(good(b"good %d" % number)) for number in range(4)]
            for _ in range(50):
                error = None
                try:
                    await asyncio.wait_for(served.submit(b"abort"), 10)
                except Error as caught:
                    error = caught
                assert error is not None
                assert (error.status, error.type) == (500, "WorkerDiedException")
            over.set()
            await asyncio.gather(*clients)
            assert dict(served.metrics.restarts) == {"signal 6 (SIGABRT)": 2}
            assert served.pool.failure is None
            assert answered > 4

    uvloop.run(scenario())


def test_f11_killed_for_lack_of_memory_is_said_only_when_it_is_proved(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "memory.events"
    counter.write_text("oom 0\noom_kill 3\n")
    monkeypatch.setattr("mms.workers.oom._find", lambda root: counter)

    async def scenario() -> None:
        async with serve("misbehaves") as served:
            for kills, cause in ((4, "killed (out of memory)"), (4, "signal 9 (SIGKILL)")):
                (pid,) = served.pids
                counter.write_text(f"oom {kills}\noom_kill {kills}\n")
                os.kill(pid, signal.SIGKILL)
                await until(lambda pid=pid: served.pids not in ([], [pid]))  # type: ignore[misc]  # mypy cannot infer it
                assert served.pool.losses.back_off.last_failure is not None
                assert served.pool.losses.back_off.last_failure.cause == cause
            assert dict(served.metrics.restarts) == {"killed (out of memory)": 1, "signal 9 (SIGKILL)": 1}

    uvloop.run(scenario())


def test_a_death_is_one_line_with_the_last_words(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serve("misbehaves", retry=0) as served:
            await dies(served, "say_and_die I was here")
            await until(lambda: served.pids)
            failure = served.pool.losses.back_off.last_failure
            assert failure is not None
            assert (failure.cause, failure.output[-1]) == ("signal 9 (SIGKILL)", "I was here")
            assert abs(failure.at - time.time()) < 10
            assert (served.pool.losses.back_off.deaths, served.pool.next_start) == (1, None)

    with caplog.at_level(logging.INFO, "mms.pool"):
        uvloop.run(scenario())
    (line,) = [record.message for record in caplog.records if "died" in record.message]
    assert line.endswith("died: signal 9 (SIGKILL); replacing it; it last printed: I was here")


def test_f13_a_worker_stuck_in_c_is_504_and_killed(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves", response_timeout=0.2) as served:
            (pid,) = served.pids
            assert (await dies(served, "hold_gil")).status == 504
            assert await serves(served)
            assert not psutil.pid_exists(pid)

    uvloop.run(scenario())


def test_f15_a_worker_that_leaks_memory_is_replaced_without_a_failure(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves", max_rss=200 << 20) as served:
            (first,) = served.pids
            pids = []
            for _ in range(20):
                pids.append((await tell(served, f"leak_memory {10 << 20}"))["pid"])

            async def traffic() -> None:
                while first in served.pids or not served.pids:
                    pids.append((await tell(served, "echo x"))["pid"])

            await asyncio.wait_for(traffic(), 10)
            await until(lambda: len(served.pool.workers) == 1)
            assert dict(served.metrics.restarts) == {"max_rss": 1}
            assert (served.pool.losses.back_off.deaths, served.pool.losses.back_off.last_failure) == (0, None), (
                "this is no crash"
            )
            assert set(pids) <= {first, *served.pids}

    uvloop.run(scenario())


def test_a_worker_is_replaced_after_max_requests_and_the_new_one_is_ready_first(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves", workers=2, max_requests=5) as served:
            first = set(served.pids)
            fewest = 2
            until_then = time.monotonic() + 10
            while set(served.pids) & first:
                assert time.monotonic() < until_then
                await tell(served, "echo x")
                fewest = min(fewest, served.pool.ready)
            assert fewest == 2
            assert served.metrics.restarts["max_requests"] >= 2
            assert set(served.metrics.restarts) == {"max_requests"}
            await served.scale(1)
            assert len(served.pids) == 1

    uvloop.run(scenario())


def test_a_max_rss_that_no_worker_can_keep_is_said_and_not_a_loop(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serve("misbehaves", max_rss=1 << 20) as served:
            (pid,) = served.pids
            await until(lambda: "before its first request" in caplog.text)
            assert served.pids == [pid]

    with caplog.at_level(logging.WARNING, "mms.pool"):
        uvloop.run(scenario())


def test_f16_descriptors_that_leak_are_that_workers_trouble(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves") as served:
            assert (await tell(served, "leak_files 5000"))["error"] == "Too many open files"
            assert await serves(served), "the worker has what it needs already"
            os.close(os.open("/dev/null", os.O_RDONLY))

    uvloop.run(scenario())


def test_f17_threads_that_never_end_do_not_hold_up_an_exit(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves") as served:
            for _ in range(20):
                await tell(served, "leak_thread")
            begun = time.monotonic()
            await served.scale(0)
            assert time.monotonic() - begun < 0.4, "before stop_grace"
            assert dict(served.metrics.restarts) == {}

    uvloop.run(scenario())


def test_f19_a_worker_that_daemonises_itself_is_dead_and_its_stray_is_killed(serve: Serve, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serve("misbehaves", retry=0) as served:
            (pid,) = served.pids
            error = await dies(served, f"daemonise {tmp_path / 'stray'}")
            assert "exit code 0" in error.message
            stray = int(await until(lambda: (tmp_path / "stray").exists() and (tmp_path / "stray").read_text()))
            await until(lambda: served.pids not in ([], [pid]))
            known = {os.getpid(), *served.pids, *served.forkservers.pids()}
            others = {child.pid for child in psutil.Process().children()} - {stray}
            assert await until(lambda: reap_orphans(known | others)) == [stray]
            await until(lambda: reap_orphans(known | others) or not psutil.pid_exists(stray))
            assert await serves(served)

    uvloop.run(scenario())


def test_f21_f108_a_worker_that_has_lost_its_channel_or_its_gpu_is_replaced(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves", retry=0) as served:
            for what in "replace_descriptors", "break_device":
                (pid,) = served.pids
                error = await dies(served, what)
                assert error.type == "WorkerDiedException"
                assert await serves(served)
                assert not psutil.pid_exists(pid)

    uvloop.run(scenario())


def test_f25_leaving_a_thread_is_nothing_and_leaving_the_process_a_crash(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves") as served:
            (pid,) = served.pids
            assert (await tell(served, "exit_in_thread"))["pid"] == pid
            error = await dies(served, "exit 0")
            assert (error.status, "exit code 0" in error.message) == (500, True)
            assert dict(served.metrics.restarts) == {"exit code 0": 2}

    uvloop.run(scenario())


def test_f26_blocked_signals_do_not_hold_up_an_end_and_an_alarm_is_a_death(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves", response_timeout=0.3) as served:
            await tell(served, "block_signals")
            (pid,) = served.pids
            assert (await dies(served, "sleep 60")).status == 504
            assert await serves(served)
            assert not psutil.pid_exists(pid)
            assert "signal 14 (SIGALRM)" in (await dies(served, "alarm")).message
            assert await serves(served)

    uvloop.run(scenario())


def test_f27_functions_that_a_handler_replaces_are_not_ours(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("monkeypatches") as served:
            for size in (0, 10, 300_000):
                answer = await asyncio.wait_for(served.submit(b"x" * size), 10)
                assert json.loads(answer) == {"size": size}
            assert dict(served.metrics.restarts) == {}

    uvloop.run(scenario())


def test_f28_a_segmentation_fault_kills_two_workers_and_is_named(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves") as served:
            error = await dies(served, "segfault")
            assert (error.status, "signal 11 (SIGSEGV)" in error.message) == (500, True)
            assert await serves(served)

    uvloop.run(scenario())


def test_f31_a_handler_may_run_an_event_loop(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves") as served:
            assert (await tell(served, "event_loop"))["result"] == 2

    uvloop.run(scenario())


def test_f32_a_late_answer_reaches_nobody(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves", response_timeout=0.2) as served:
            late = asyncio.ensure_future(dies(served, "sleep 0.45"))
            assert (await late).status == 504
            answers = [await tell(served, f"echo {number}") for number in range(50)]
            assert [answer["result"] for answer in answers] == [str(number) for number in range(50)]

    uvloop.run(scenario())


def test_f34_workers_that_take_every_cpu_do_not_stop_the_server(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves", sandbox=wire.Sandbox(nice=19)) as served:
            worker = await tell(served, f"spin {2 * (os.cpu_count() or 1)}")
            spinning = psutil.Process(worker["pid"]).children()
            late = []
            for _ in range(100):
                begun = time.monotonic()
                await asyncio.sleep(0.001)
                late.append(time.monotonic() - begun)
            assert sorted(late)[90] < 0.05
        # killed with their worker, but they hardly get the time to end
        await until(lambda: all(process.status() == psutil.STATUS_ZOMBIE for process in spinning))

    uvloop.run(scenario())


# a whole server


@pytest.fixture(scope="module")
def bare(make_archive: MakeArchive) -> Iterator[Server]:
    """A server whose workers have no network; tests restart its workers, but leave its settings."""
    with server(make_archive("misbehaves"), worker_network="none") as running:
        yield running


def test_s12_the_description_says_what_is_in_force_and_a_model_can_only_be_stricter(bare: Server) -> None:
    assert bare.describe("misbehaves")["sandbox"] == {"network": "none"}
    assert json.loads(bare.predict("misbehaves", b"connect AF_INET").body)["error"] == "Permission denied"
    reply = bare.manage("POST", "/models?url=misbehaves-1.0.mar&model_name=other&worker_network=open")
    assert (reply.status, reply.message) == (
        400, "request: worker_network = open: this server demands none; a model can only be stricter"
    )  # fmt: skip
    words = "url=misbehaves-1.0.mar&model_name=other&worker_memory=4GiB&max_requests=7&retry=0"
    reply = bare.manage("POST", f"/models?{words}")
    assert reply.status == 200, reply
    described = bare.describe("other")
    assert (described["sandbox"], described["maxRequests"]) == ({"network": "none", "memory": 4 << 30}, 7)
    assert (described["retry"], "retry" in bare.describe("misbehaves")) == (0, False)
    assert bare.manage("DELETE", "/models/other").status == 200


def test_recycling_is_counted_and_is_no_failure(bare: Server) -> None:
    added = bare.manage("POST", "/models?url=misbehaves-1.0.mar&model_name=short&max_requests=1")
    assert added.status == 200, added
    (pid,) = bare.workers("short")
    assert bare.predict("short", b"echo x").status == 200
    eventually(lambda: bare.workers("short") not in ([], [pid]))
    eventually(lambda: bare.metric("mms_worker_restarts_total", model="short", reason="max_requests") == 1)
    assert "lastFailure" not in bare.describe("short")
    assert bare.manage("DELETE", "/models/short").status == 200


def test_f19_the_server_kills_what_has_left_its_worker(bare: Server, tmp_path: Path) -> None:
    """And the description tells of the death."""
    reply = bare.predict("misbehaves", b"daemonise %s" % str(tmp_path / "stray").encode())
    assert (reply.status, "exit code 0" in reply.message) == (500, True)
    eventually(lambda: " had left its session; killed" in bare.output)
    stray = int((tmp_path / "stray").read_text())
    eventually(lambda: not psutil.pid_exists(stray))
    described = bare.describe("misbehaves")
    assert described["lastFailure"]["cause"] == "exit code 0"
    assert described["deathsInWindow"] >= 1
    eventually(lambda: bare.workers("misbehaves"))


def _memory_group() -> Path | None:
    """A control group of our own with a memory limit, where we may make one."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("memory", ""):
            folder = Path("/sys/fs/cgroup", controllers, path.lstrip("/"), f"mms-test-{os.getpid()}")
            limit = folder / ("memory.limit_in_bytes" if controllers else "memory.max")
            try:
                folder.mkdir()
            except OSError:
                continue
            try:
                limit.write_text(str(400 << 20))
            except OSError:
                folder.rmdir()
                continue
            return folder
    return None


def test_f11_the_kernels_kill_for_lack_of_memory_is_named_and_the_server_lives(make_archive: MakeArchive) -> None:
    group = _memory_group()
    if group is None:
        pytest.skip("no control group with a memory limit can be made here")
    own = Path("/sys/fs/cgroup", *group.relative_to("/sys/fs/cgroup").parts[:-1], "cgroup.procs")
    try:
        (group / "cgroup.procs").write_text(str(os.getpid()))  # the server is started from in here
        try:
            context = server(make_archive("misbehaves", retry=0))
            running = context.__enter__()
        finally:
            own.write_text(str(os.getpid()))
        with contextlib.ExitStack() as stack:
            stack.push(context.__exit__)
            reply = running.predict("misbehaves", b"leak_memory %d" % (1 << 30))
            assert (reply.status, "killed (out of memory)" in reply.message) == (503, True)
            assert eventually(lambda: running.workers("misbehaves"))
            assert running.describe("misbehaves")["lastFailure"]["cause"] == "killed (out of memory)"
    finally:
        eventually(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()
