"""S12: what every worker lacks, and what a sandbox takes from it, seen from inside."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import uvloop

from mms import arena, wire
from mms.backend import sandbox
from tests.faults.misbehaving import MODULES, NOBODY, as_root, make_folder_public, restricted, serves, tell
from tests.processes.pools import Serve, serve, subreaper, until
from tests.servers import free_ports, mms, scratch, start_arguments

__all__ = ["make_folder_public", "serve", "subreaper"]


@pytest.mark.parametrize("start", ["forked", "spawned"])
def test_s12_workers_have_limits_and_no_privileges_to_gain(serve: Serve, start: str) -> None:
    own = int(Path("/proc/self/oom_score_adj").read_text())

    async def scenario() -> None:
        async with serve("misbehaves", interpreter=sys.executable if start == "spawned" else None) as served:
            facts = (await tell(served, "facts"))["result"]
            assert facts["session"] == facts["pid"]
            assert facts["no_new_privs"] == "1"
            assert facts["umask"] == "0077"
            assert facts["core"] == [0, 0]
            most = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
            assert facts["nofile"] == [most, most]
            assert facts["oom_score"] == min(1000, own + 500)
            assert facts["nice"] == os.nice(0)

    uvloop.run(scenario())


def test_s12_a_worker_sees_no_variable_that_is_not_allowed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a secret of the server")

    async def scenario() -> None:
        async with serve("misbehaves") as served:
            seen = (await tell(served, "env"))["result"]
            assert "secret" not in json.dumps(seen)
            assert seen["own"]["PYTHONUNBUFFERED"] == "1"

    uvloop.run(scenario())


def test_s12_each_worker_has_a_scratch_folder_that_goes_with_it(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves", workers=2) as served:
            files = {Path((await tell(served, "scratch"))["result"]) for _ in range(6)}
            for file in files:
                assert file.parent.stat().st_mode & 0o777 == 0o700
            (root,) = {file.parent.parent for file in files}
            assert len(list(root.iterdir())) == 2
            folders = {file.parent for file in files}
            for pid in served.pids:
                os.kill(pid, signal.SIGKILL)
            await until(lambda: not any(folder.exists() for folder in folders))
            assert await serves(served)

    uvloop.run(scenario())


@restricted
def test_s12_a_restricted_worker_reads_its_archive_and_writes_its_scratch_folder_only(
    serve: Serve, tmp_path: Path
) -> None:
    secret, allowed = tmp_path / "secret", tmp_path / "allowed"
    secret.write_text("x")
    allowed.write_text("x")

    async def scenario() -> None:
        async with serve("misbehaves", sandbox=wire.Sandbox(files=True, read=(str(allowed),))) as served:
            facts = (await tell(served, "facts"))["result"]
            archive = facts["cwd"]
            for what in (f"read {secret}", f"write {secret}", f"truncate {secret}", f"write {allowed}",
                         f"write {tmp_path}/new", f"write {archive}/new", "write /tmp/mms-test-new",
                         f"read /proc/{os.getpid()}/environ"):  # fmt: skip
                assert (await tell(served, what)).get("error") == "Permission denied", what
            for what in (f"read {allowed}", f"read {archive}/misbehaves.py", "read /etc/passwd", "read /proc/self/stat",
                         "read /dev/urandom", "write /dev/null"):  # fmt: skip
                assert "error" not in await tell(served, what), what
            assert (await tell(served, "scratch"))["result"].startswith(facts["scratch"])
            assert facts["home"] == facts["scratch"]
            assert (await tell(served, f"run cat {secret} || id -u"))["result"] == f"{os.getuid()}\n", "children, too"

    uvloop.run(scenario())


@restricted
@pytest.mark.skipif(sandbox.landlock_abi() < 6, reason="signals are scoped from Landlock 6 on")
def test_s12_a_restricted_worker_cannot_signal_the_server(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves", sandbox=wire.Sandbox(files=True)) as served:
            assert (await tell(served, f"run kill -0 {os.getpid()} || echo refused"))["result"] == "refused\n"
            (pid,) = served.pids
            os.kill(pid, signal.SIGKILL)
            await until(lambda: served.pids not in ([], [pid]))

    uvloop.run(scenario())


def test_s12_a_worker_without_network_has_unix_sockets_only(serve: Serve) -> None:
    async def scenario() -> None:
        async with serve("misbehaves", sandbox=wire.Sandbox(network=False)) as served:
            for family in ("AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET"):
                assert (await tell(served, f"connect {family}"))["error"] == "Permission denied"
            assert "error" not in await tell(served, "connect AF_UNIX")
            assert "error" not in await tell(served, "pair")
            python = "/usr/bin/env python3 -c 'import socket; socket.socket()' 2>&1 | tail -1"
            assert "Permission denied" in (await tell(served, f"run {python}"))["result"], "children, too"

    uvloop.run(scenario())


@as_root
def test_s12_workers_of_another_user_have_none_of_roots_powers(serve: Serve, make_folder_public: None) -> None:
    async def scenario() -> None:
        box = wire.Sandbox(uid=NOBODY, gid=NOBODY, groups=(NOBODY,))
        async with serve("misbehaves", sandbox=box, preload=MODULES) as served:
            facts = (await tell(served, "facts"))["result"]
            assert (facts["uids"], facts["groups"]) == ([NOBODY] * 3, [NOBODY])
            assert int(facts["capabilities"], 16) == 0
            assert facts["no_new_privs"] == "1"
            assert (await tell(served, "read /etc/shadow"))["error"] == "Permission denied"
            file = (await tell(served, "scratch"))["result"]
            assert (os.stat(file).st_uid, facts["home"]) == (NOBODY, facts["scratch"])

    uvloop.run(scenario())


@as_root
def test_s12_a_worker_of_another_user_ends_with_the_server(serve: Serve, make_folder_public: None) -> None:
    """A change of user clears the signal at the parent's death; it must be asked for again."""

    async def scenario() -> None:
        box = wire.Sandbox(uid=NOBODY, gid=NOBODY, groups=())
        async with serve("misbehaves", sandbox=box, preload=MODULES) as served:
            assert (await tell(served, "parent_death_signal"))["result"] == signal.SIGKILL

    uvloop.run(scenario())


def test_s12_address_space_is_bounded_on_request(serve: Serve) -> None:
    async def scenario() -> None:
        limit = 2 << 30
        async with serve("misbehaves", sandbox=wire.Sandbox(memory=limit, nice=3)) as served:
            facts = (await tell(served, "facts"))["result"]
            assert (facts["memory"], facts["nice"]) == ([limit + arena.SIZE] * 2, os.nice(0) + 3)
            assert (await tell(served, f"allocate {limit}"))["error"] == "MemoryError"
            assert await serves(served)

    uvloop.run(scenario())


def test_all_of_it_at_once(serve: Serve, make_folder_public: None) -> None:
    async def scenario() -> None:
        root = os.geteuid() == 0
        box = wire.Sandbox(
            uid=NOBODY if root else -1, gid=NOBODY if root else -1, files=sandbox.landlock_abi() >= 3, network=False,
            memory=4 << 30,
        )  # fmt: skip
        async with serve("misbehaves", workers=2, sandbox=box, preload=MODULES) as served:
            assert await serves(served)
            assert (await tell(served, "connect AF_INET"))["error"] == "Permission denied"

    uvloop.run(scenario())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("--worker-user", "no-such-user"), "worker_user = no-such-user: there is no such user"),
        (("--worker-user", "root"), "worker_user = root: that is root, whom workers should not run as"),
        (("--worker-network", "off"), "one of open, none is needed"),
    ],
)
@as_root
def test_s12_a_sandbox_that_cannot_be_had_is_refused_at_start(settings: tuple[str, str], words: str) -> None:
    with scratch() as folder:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
        command = start_arguments(folder, addresses)
        done = mms(*command[command.index("start") :], *settings)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
