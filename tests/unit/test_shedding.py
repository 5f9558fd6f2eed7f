"""The steps in which the front end does less: by bytes and by descriptors, up at once and down with some distance."""

from __future__ import annotations

import errno
import logging
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from mms.http.listener import HttpServer
from mms.http.shedding import Shedding
from tests.unit.http_client import GET, LIMITS, Application, connect, head_of, last


@dataclass(frozen=True)
class Slow:
    unsent: int


def make(*, held: Callable[[], int] = lambda: 0, max_bytes: int = 1000, max_connections: int = 50) -> Shedding:
    return Shedding(max_bytes=max_bytes, max_connections=max_connections, held=held)


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """So many are open, so many may be."""

    def pretend(used: int, limit: int) -> None:
        monkeypatch.setattr(os, "listdir", lambda _: ["0"] * (used + 1))
        monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))

    return pretend


@pytest.mark.parametrize(
    ("held", "step"), [(0, 0), (799, 0), (800, 1), (899, 1), (900, 2), (949, 2), (950, 3), (5000, 3)]
)
def test_the_step_follows_the_bytes(held: int, step: int) -> None:
    account = make(held=lambda: held)
    assert account.tick(0) is (step > 0)
    assert account.step == step and account.bytes == held


def test_a_step_is_taken_back_at_some_distance_only() -> None:
    held = (950, 910, 899, 851, 849, 760, 749)
    account = make(held=iter(held).__next__)
    steps = []
    for _ in held:
        account.tick(0)
        steps.append(account.step)
    assert steps == [3, 3, 2, 2, 1, 1, 0]


def test_each_change_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    held = (0, 910, 920, 0, 0)
    account = make(held=iter(held).__next__)
    with caplog.at_level(logging.INFO):
        for _ in held:
            account.tick(0)
    first, last = (record.getMessage() for record in caplog.records)
    assert first == "step 2 of 3: 91 % of max_bytes_in_flight are used; the front end refuses requests with 429"
    assert last.endswith("the front end serves as usual again")


def test_unsent_answers_count() -> None:
    account = make()
    account.slow |= {Slow(300), Slow(550)}
    account.tick(0)
    assert account.bytes == 850 and account.step == 1


def test_the_step_follows_the_descriptors(descriptors: Callable[[int, int], None]) -> None:
    account = make()
    for used, step in ((70, 0), (82, 1), (91, 2), (96, 3), (10, 0)):
        descriptors(used, 100)
        account.tick(min(used, 50))
        assert account.step == step


def test_to_have_no_descriptor_left_to_count_with_is_the_last_step(
    descriptors: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> list[str]:
        raise OSError(errno.EMFILE, "Too many open files")

    account = make()
    descriptors(10, 100)
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", fail)
        assert account.tick(5)
    assert (account.step, account.room) == (3, 0)
    assert account.tick(5)
    assert (account.step, account.room) == (0, 50)


def test_connections_leave_room_for_what_else_needs_descriptors(descriptors: Callable[[int, int], None]) -> None:
    account = make()
    descriptors(40, 64)
    account.tick(10)  # 30 are something else
    assert account.room == 30
    assert "no file descriptors" in account.full().message
    descriptors(40, 10_000)
    account.tick(10)
    assert account.room == 50 and account.full().message == "more than 50 connections"


def test_a_body_may_be_read_alone_whatever_its_size() -> None:
    account = make()
    assert account.read(3000, before=0, to_come=2000) is None
    assert account.read(2000, before=3000, to_come=0) is None
    assert account.read(1, before=0, to_come=0) is not None
    account.drop(5000)
    assert account.read(600, before=0, to_come=0) is None and account.bytes == 600


def test_what_is_promised_counts_only_against_who_promises_it() -> None:
    account = make()
    assert account.read(10, before=0, to_come=880) is None
    assert account.read(10, before=0, to_come=880) is None
    assert account.read(10, before=0, to_come=881) is not None
    assert account.bytes == 20


# what connections do


def test_one_connection_too_many_is_told_so() -> None:
    application = Application()
    server = HttpServer(application, LIMITS, edge=False)
    clients = [connect(server=server) for _ in range(LIMITS.max_connections + 1)]
    assert [client.statuses() for client in clients] == [[], [], [], [503]]
    clients[0].connection.connection_lost(None)
    assert connect(server=server).statuses() == [503], "the refused one still counts until it has gone"
    clients[3].connection.connection_lost(None)


def shedding_server(application: Application, *, max_bytes: int) -> HttpServer:
    return HttpServer(application, replace(LIMITS, max_bytes_in_flight=max_bytes), edge=False)


def tick(server: HttpServer) -> None:
    if server.shedding.tick(len(server.connections)):
        server._step_changed()


def test_a_body_for_which_there_is_no_room_beside_others_is_refused() -> None:
    application = Application()
    server = shedding_server(application, max_bytes=100_000)
    first, second = connect(server=server), connect(server=server)
    first.send(head_of(b"/a", b"Content-Length: 61000") + b"x" * 60_000)
    second.send(head_of(b"/a", b"Content-Length: 40000") + b"x")
    assert (first.statuses(), second.statuses()) == ([], [429]) and second.transport.ended
    assert server.shedding.bytes == 60_000
    first.send(b"x" * 1000)
    assert first.statuses() == [200]
    tick(server)
    assert server.shedding.bytes == 0


def test_a_chunked_body_counts_as_it_comes() -> None:
    application = Application()
    server = shedding_server(application, max_bytes=100_000)
    first, second = connect(server=server), connect(server=server)
    first.send(head_of(b"/a", b"Content-Length: 61000") + b"x" * 60_000)
    second.send(head_of(b"/a", b"Transfer-Encoding: chunked") + b"8000\r\n" + b"x" * 20_000)
    assert second.statuses() == [] and server.shedding.bytes == 80_000
    second.send(b"x" * 12_000)
    assert second.statuses() == [429] and server.shedding.bytes == 60_000


@pytest.mark.parametrize("ends", ["lost", "refused"])
def test_a_body_that_never_comes_no_longer_counts(ends: str) -> None:
    application = Application()
    server = shedding_server(application, max_bytes=100_000)
    client = connect(server=server)
    client.send(head_of(b"/a", b"Content-Length: 60000") + b"x" * 100)
    assert server.shedding.bytes == 100
    if ends == "lost":
        client.connection.connection_lost(None)
    else:
        client.connection.sweep(last(client) + 61)
        assert client.statuses() == [408]
    assert server.shedding.bytes == 0


def test_at_the_first_step_answers_close_their_connections_and_later_no_more() -> None:
    application = Application()
    server = shedding_server(application, max_bytes=100_000)
    tick(server)
    one, two = connect(server=server), connect(server=server)
    for client in (one, one, two):
        client.send(GET)
    application.bytes = 85_000
    tick(server)
    for client in (one, two):
        client.send(GET)
        assert client.answers()[-1].headers["connection"] == "close" and client.transport.ended
        client.connection.connection_lost(None)
    application.bytes = 0
    tick(server)
    client = connect(server=server)
    client.send(GET)
    client.send(GET)
    assert client.statuses() == [200, 200] and not client.transport.ended


def test_while_something_is_shed_idle_connections_are_closed_soon() -> None:
    application = Application()
    server = shedding_server(application, max_bytes=100_000)
    client = connect(server=server)
    application.bytes = 85_000
    tick(server)
    client.connection.sweep(last(client) + 2)
    assert client.transport.closed


def test_at_the_last_step_connections_are_refused() -> None:
    application = Application()
    server = shedding_server(application, max_bytes=100_000)
    application.bytes = 96_000
    tick(server)
    client = connect(server=server)
    assert [answer.message for answer in client.answers()] == [
        "the server has no file descriptors or memory left for more connections"
    ]
