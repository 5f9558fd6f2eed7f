"""Five seconds of `make chaos`, and that its judge sees what it must see."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from rich.console import Console

from tests.asking import digest
from tests.chaos import chaos
from tests.chaos.clients import Clients, Outcome, Port, Timeline
from tests.chaos.rig import explain
from tests.servers import needs_nginx
from tests.waiting import eventually


@needs_nginx
def test_five_seconds_of_chaos_lose_nothing_and_leave_nothing() -> None:
    findings = chaos.run(5, 20, ("nginx",))
    assert [problem for finding in findings for problem in finding.problems] == []
    assert sum(sum(finding.faults.values()) for finding in findings) > 5
    assert chaos.show(findings, Console(quiet=True)) == 0


class Liar:
    """A server that answers each request with `answer`, in which `%b` stands for the right digest."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                while data := sock.recv(65536):
                    head, _, body = data.partition(b"\r\n\r\n")
                    name = head.lower().partition(b"x-request-id: ")[2].partition(b"\r\n")[0]
                    text = b'{"sha256": "%b", "id": "%b"}' % (digest(body).encode(), name)
                    answer = self._answer.replace(b"RIGHT", text)
                    if not answer:
                        break
                    sock.sendall(answer.replace(b"LENGTH", b"%d" % len(text)))


RIGHT = b"HTTP/1.1 200 OK\r\ncontent-length: LENGTH\r\n\r\nRIGHT"
OTHER = b'HTTP/1.1 200 OK\r\ncontent-length: 30\r\n\r\n{"sha256": "0000", "id": "r1"}'


@pytest.fixture
def liar(request: pytest.FixtureRequest) -> Iterator[Liar]:
    made = Liar(request.param)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("liar", "words"),
    [
        (b"", "status=0"),
        (OTHER, "the answer to another body"),
        (RIGHT + RIGHT, "answered twice"),
        (b"HTTP/1.1 500 No\r\ncontent-length: 13\r\n\r\n{\"type\": \"x\"}", "status=500"),
        (b"hello\r\n\r\n", "not an answer"),
    ],
    indirect=["liar"],
    ids=["none", "another's", "two", "an error", "no HTTP"],
)  # fmt: skip
def test_the_judge_sees_what_is_wrong(liar: Liar, words: str) -> None:
    clients = Clients([Port("direct", liar.address)], ["m"], Timeline({}), lambda *_: False, clients=1)
    with clients:
        eventually(lambda: clients.account.violations)
    assert words in clients.account.violations[0]


@pytest.mark.parametrize("liar", [RIGHT], indirect=True, ids=["right"])
def test_the_judge_counts_what_is_right(liar: Liar) -> None:
    clients = Clients([Port("direct", liar.address)], ["m"], Timeline({}), lambda *_: False, clients=1)
    with clients:
        eventually(lambda: clients.account.right > 10)
    account = clients.account
    assert (account.violations, account.lost, account.right) == ([], 0, account.sent)


def test_a_fault_explains_only_what_it_may_cause() -> None:
    broken = Outcome("nginx", "steady", 0, "closed", reused=True)
    assert explain(broken, Counter({"nginx worker killed": 1}))
    assert not explain(broken, Counter({"worker killed": 9}))
    assert not explain(Outcome("direct", "steady", 0, "closed", reused=True), Counter({"nginx worker killed": 1}))
    twice = Outcome("direct", "steady", 500, "WorkerDiedException", reused=True)
    assert [explain(twice, Counter({"worker killed": count})) for count in (1, 2)] == [False, True]
