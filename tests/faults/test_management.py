"""Archives, settings and races of the management API: catalogue, section 2.7."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from mms.config import load_config
from mms.errors import ConfigError
from tests.asking import CLIENT_TIMEOUT, fetch
from tests.chaos.rig import Rig
from tests.conftest import MakeArchive
from tests.servers import Server, processes_in, server
from tests.traffic import Traffic
from tests.unit import hostile
from tests.waiting import eventually

LIMIT = 16 << 20
STORM = {"quick": (1.0, 8), "long": (60.0, 50)}
SOME_CYCLES = 20


@pytest.fixture(scope="module")
def running(make_archive: MakeArchive) -> Iterator[Server]:
    broken = make_archive("crashes_on_load", model_name="echo", version="3.0")
    spare = make_archive("echo", version="2.0"), make_archive("account"), make_archive("loads_slowly"), broken
    with server(make_archive("echo"), spare=spare) as started:
        yield started


def hostile_archives() -> Iterator[tuple[str, bytes]]:
    for name, _ in hostile.BAD_NAMES:
        yield f"zip with {name[:20]!r}", hostile.zip_bytes(hostile.entry(name))
    for names, _ in hostile.COLLISIONS:
        yield f"zip with {names}", hostile.zip_bytes(*map(hostile.entry, names))
    for kind, (bad, _) in hostile.BAD_ENTRIES.items():
        yield kind, hostile.zip_bytes(bad)
    yield "no archive", b"#!/bin/sh\n"
    yield "empty", b""
    yield "two joined", hostile.HONEST * 2
    yield "behind junk", b"junk" + hostile.HONEST
    yield "cut", hostile.HONEST[:-30]
    yield "cut tar", hostile.HONEST_TGZ[:-30]


def test_f99_hostile_archives_are_refused_with_a_reason_and_leave_nothing(running: Server) -> None:
    main = psutil.Process(running.pid)
    before, used = running.extracted, main.cpu_times().user
    memory = main.memory_info().rss
    path = running.folder / "store" / "hostile.mar"
    count = 0
    for kind, data in hostile_archives():
        path.write_bytes(data)
        reply = running.manage("POST", "/models?url=hostile.mar&model_name=hostile")
        assert (reply.status, reply.json()["type"]) == (400, "InvalidModelException"), kind
        assert reply.message.startswith("hostile.mar"), kind
        count += 1
    path.unlink()
    assert count > 60
    assert running.extracted == before
    assert not (running.folder / "evil").exists()
    assert main.cpu_times().user - used < 2
    assert main.memory_info().rss - memory < 64 << 20
    assert running.manage("GET", "/models/hostile").status == 404


def test_a_text_of_a_registration_is_bounded(running: Server) -> None:
    """Python's urlsplit brings a name's combining marks into order one by one: 1 MiB of them took minutes."""
    body = b'{"url": "http://a%b"}' % ("\u0316\u0301" * 100_000).encode()
    reply = fetch(running.management, "POST", "/models", body, {"content-type": "application/json"})
    assert (reply.status, "longer than 8192 characters" in reply.message) == (400, True)


def test_f100_an_archive_may_be_replaced_or_deleted_while_it_is_served(make_archive: MakeArchive) -> None:
    with server(make_archive("echo")) as serving:
        path = serving.folder / "store" / "echo-1.0.mar"
        path.unlink()
        shutil.copy(make_archive("echo", version="2.0"), path)
        (pid,) = serving.workers("echo")
        os.kill(pid, signal.SIGKILL)
        assert serving.predict("echo", b"x").status == 200
        path.unlink()
        reply = serving.manage("POST", "/models?url=echo-1.0.mar&model_name=again")
        assert reply.status == 404
        assert "echo-1.0.mar" in reply.message


SETTINGS = {
    "unknown key": (b"modle_store: /x\n", "model_store"),
    "wrong type": (b"workers: [1, 2]\n", "workers"),
    "negative": (b"max_connections: -1\n", "max_connections"),
    "not finite": (b"drain_timeout: .inf\n", "drain_timeout"),
    "bomb": (b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (c, c, c - 1, c - 1) for c in b"bcdefgh"), "alias"),
    "tabs": (b"workers:\t\n\t- 1\n", "line"),
    "twice": (b"workers: 1\nworkers: 2\n", "workers"),
    "deep": (b"[" * 100_000, "32 levels deep"),
    "binary": (bytes(range(256)), "settings.yaml"),
    "too large": (b"#" * (2 << 20), "larger than"),
    "no mapping": (b"- 1\n", "key: value"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_f101_a_settings_file_that_is_none_is_refused_in_one_line_and_little_memory(tmp_path: Path, name: str) -> None:
    text, words = SETTINGS[name]
    file = tmp_path / "settings.yaml"
    file.write_bytes(text)
    tracemalloc.start()
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(tracemalloc.stop)
        with pytest.raises(ConfigError) as refused:
            load_config(file=file, environ={})
        assert tracemalloc.get_traced_memory()[1] < LIMIT
    assert words in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_f101_a_settings_file_with_a_byte_order_mark_is_read(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes("workers: 3\n".encode(encoding))
    assert load_config(file=file, environ={})[0].workers == 3


@pytest.mark.parametrize("length", ["quick", pytest.param("long", marks=[pytest.mark.slow, pytest.mark.timeout(180)])])
def test_f102_a_storm_of_changes_leaves_a_sound_server_and_loses_no_prediction(
    make_archive: MakeArchive, length: str
) -> None:
    """Every call has one of its own outcomes, and the end is what some order of them gives."""
    seconds, threads = STORM[length]
    versions = make_archive("account"), make_archive("account", version="2.0")
    with server(make_archive("echo"), spare=versions, workers=1) as stormy:
        outcomes: Counter[str] = Counter()
        over = threading.Event()

        def storm(number: int) -> None:
            dice = random.Random(number)
            while not over.is_set():
                version = dice.choice("12")
                method, path, wanted = dice.choice(
                    (
                        ("POST", f"/models?url=account-{version}.0.mar&synchronous={dice.choice(('true', 'false'))}",
                         {200, 202, 409, 500, 503}),
                        ("DELETE", f"/models/account/{version}.0", {200, 404}),
                        ("DELETE", "/models/account", {200, 404}),
                        ("PUT", f"/models/account?min_worker={dice.randrange(4)}", {200, 202, 404, 409}),
                        ("PUT", f"/models/account/{version}.0/set-default", {200, 404, 409}),
                        ("GET", "/models/account", {200, 404}),
                        ("GET", "/models", {200}),
                    )
                )  # fmt: skip
                reply = stormy.manage(method, path)
                outcomes[
                    f"{method} {reply.status}" if reply.status in wanted else f"WRONG {method} {path} {reply}"
                ] += 1

        workers = [threading.Thread(target=storm, args=(number,)) for number in range(threads)]
        with Traffic(stormy, clients=2) as traffic:
            for worker in workers:
                worker.start()
            over.wait(seconds)
            eventually(lambda: outcomes["POST 200"] and outcomes["DELETE 200"], CLIENT_TIMEOUT)
            over.set()
            for worker in workers:
                worker.join(CLIENT_TIMEOUT)
        assert traffic.failures == []
        assert [outcome for outcome in outcomes if outcome.startswith("WRONG")] == []
        stormy.manage("DELETE", "/models/account")
        assert stormy.manage("GET", "/models/account").status == 404
        assert stormy.manage("POST", "/models?url=account-1.0.mar").status == 200
        assert stormy.predict("account", b"x").status == 200
        assert stormy.manage("DELETE", "/models/account").status == 200
        eventually(lambda: len(stormy.extracted) == 1)
        eventually(lambda: [process.name() for process in processes_in(stormy.folder)].count("mms-account") == 0)


def test_f103_a_registration_whose_client_leaves_is_completed(make_archive: MakeArchive, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    archive = make_archive("loads_slowly", gate=str(gate))
    with server(spare=(archive,)) as registering:
        host, _, port = registering.management.rpartition(":")
        with socket.create_connection((host, int(port)), CLIENT_TIMEOUT) as sock:
            sock.sendall(
                f"POST /models?url={archive.name} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode()
            )
            eventually(lambda: registering.manage("GET", "/models/loads_slowly").status == 200)
        gate.touch()
        eventually(lambda: registering.workers("loads_slowly"))
        assert registering.predict("loads_slowly", b"x").body == b"x"
        assert registering.manage("DELETE", "/models/loads_slowly").status == 200
        eventually(lambda: not registering.extracted)


def test_f102_what_is_unregistered_while_it_loads_is_no_success(make_archive: MakeArchive, tmp_path: Path) -> None:
    archive = make_archive("loads_slowly", gate=str(tmp_path / "never"))
    with server(spare=(archive,)) as registering, ThreadPoolExecutor() as calls:
        call = calls.submit(registering.manage, "POST", f"/models?url={archive.name}")
        eventually(lambda: registering.describe("loads_slowly").get("workers"))
        assert registering.manage("DELETE", "/models/loads_slowly").status == 200
        reply = call.result(CLIENT_TIMEOUT)
    assert (reply.status, reply.json()["type"]) == (409, "ConflictStatusException")
    assert reply.message == "model loads_slowly 1.0 was unregistered before it had its workers"


def test_f104_a_version_that_does_not_load_takes_nothing_from_the_old_one(running: Server) -> None:
    with Traffic(running, clients=2) as traffic:
        traffic.flows()
        assert running.manage("POST", "/models?url=echo-3.0.mar").status == 500
        assert running.manage("PUT", "/models/echo/3.0/set-default").status == 409
        traffic.flows()
        assert running.manage("DELETE", "/models/echo/3.0").status == 200
    assert traffic.failures == []


def test_f105_registering_again_and_again_leaves_nothing(running: Server) -> None:
    """2,000 times by `make soak`."""
    under = Rig(running, "none", random.Random(1))

    def cycle() -> None:
        assert running.manage("POST", "/models?url=account-1.0.mar&initial_workers=1").status == 200
        assert running.predict("account", b"x").status == 200
        assert running.manage("DELETE", "/models/account").status == 200

    cycle()
    before = under.state()
    for _ in range(SOME_CYCLES):
        cycle()
    under.compare(before)
    assert under.problems == []
