"""Clients that keep an account of every request: what was sent, what came back, and whether a fault explains it.

Each request has a body of its own, and the archive `account` answers with its digest and with the request's id: an
answer to another request, a second answer, or none are seen by the client itself. An answer that is not the right one
is a violation unless a fault that was under way meanwhile may cause just that.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import random
import re
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.asking import digest

ANSWER_TIMEOUT = 30.0
RECONNECT = 0.005
MAX_VIOLATIONS = 20

_SIZES = (0, 10, 100, 1000, 1000, 1000, 20_000, 65_500, 70_000, 200_000, 200_000, 300_000)
CUT = "closed after an answer"  # to what was sent before: this was not read

_RETURNS = b"HTTP/1.1 "
# what a server that loses its place in the bytes of a client takes for a request
_BODY = (b"\r\n\r\n0\r\n\r\nPOST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n" * 5000)[:300_000]


@dataclass
class Fault:
    """Something that was done to the server; `end` is when it can no longer be noticed."""

    kind: str
    begun: float
    end: float


class Timeline:
    """The faults so far. `effects` says how long, in seconds, each kind may be noticed after its moment."""

    def __init__(self, effects: dict[str, float]) -> None:
        self.count: Counter[str] = Counter()
        self._effects = effects
        self._faults: list[Fault] = []

    def add(self, kind: str) -> None:
        now = time.monotonic()
        self.count[kind] += 1
        self._faults.append(Fault(kind, now, now + self._effects.get(kind, 0.0)))

    @contextlib.contextmanager
    def lasting(self, kind: str) -> Iterator[None]:
        """A state that may be noticed until the end of the block, and for its usual time thereafter; not counted."""
        fault = Fault(kind, time.monotonic(), math.inf)
        self._faults.append(fault)
        try:
            yield
        finally:
            fault.end = time.monotonic() + self._effects[kind]

    def during(self, begun: float, end: float) -> Counter[str]:
        """How often each kind was under way in that time."""
        return Counter(fault.kind for fault in self._faults if fault.begun <= end and fault.end >= begun)


Explain = Callable[["Outcome", Counter[str]], bool]


@dataclass(frozen=True)
class Outcome:
    """How a request ended: with an answer, or (status 0) with its connection."""

    port: str
    target: str
    status: int
    type: str
    reused: bool  # the connection had carried an answer before


@dataclass
class Account:
    """What became of all requests, by the clients' own history. `sent` is the sum of the other counts."""

    sent: int = 0
    right: int = 0
    abandoned: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # bad requests that were refused as they must be
    explained: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    slowest: float = 0.0

    @property
    def lost(self) -> int:
        return self.sent - self.right - self.abandoned - self.refused.total() - self.explained.total()


class Broken(Exception):
    """The connection ended before the answer had come."""


class Connection:
    """One keep-alive connection; reads exactly the answers that it waits for and notices any byte beyond.

    A `slow` one takes its time for large answers.
    """

    def __init__(self, address: str, *, slow: bool = False) -> None:
        host, _, port = address.rpartition(":")
        try:
            self.sock = socket.create_connection((host, int(port)), ANSWER_TIMEOUT)
        except OSError as error:
            raise Broken(f"cannot connect: {error}") from None
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if slow:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        self._slow = slow
        self.reused = False
        self.open = True
        self._buffer = b""

    def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # the answer may have come before the end of the request
            self.sock.sendall(data)

    def send_in_pieces(self, data: bytes, dice: random.Random) -> None:
        """Cut somewhere, or within a byte or two of where a head ends, and with time between the pieces."""
        ends = [found.end() + dice.randrange(-2, 3) for found in re.finditer(rb"\r\n\r\n", data[:2000])]
        cuts = sorted(dice.sample(ends, min(2, len(ends))) + dice.choices(range(len(data)), k=3))
        for begin, end in itertools.pairwise([0, *cuts, len(data)]):
            self.send(data[begin:end])
            threading.Event().wait(dice.choice((0, 0.0005, 0.002)))

    def answer(self) -> tuple[int, bytes]:
        """Status and body of the next answer."""
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            self._more()
        head = self._buffer[:end].lower()
        if not self._buffer.startswith(_RETURNS):
            raise AssertionError(f"not an answer: {self._buffer[:100]!r}")
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(self._buffer) < end + 4 + length:
            self._more()
        body = self._buffer[end + 4 : end + 4 + length]
        self._buffer = self._buffer[end + 4 + length :]
        self.reused = True
        self.open = b"connection: close" not in head
        return int(head[9:12]), body

    def surplus(self) -> bytes:
        """What has come although nothing was asked."""
        if self.sock.fileno() < 0:
            return b""
        if not self._buffer and select.select([self.sock], [], [], 0)[0]:
            with contextlib.suppress(OSError):
                self._buffer = self.sock.recv(1000)
            self.open = self.open and bool(self._buffer)
        return self._buffer

    def close(self) -> None:
        self.open = False
        self.sock.close()

    def _more(self) -> None:
        try:
            if self._slow and self._buffer:
                threading.Event().wait(0.001)
            data = self.sock.recv(16384 if self._slow else 65536)
        except TimeoutError:
            raise AssertionError(f"no answer within {ANSWER_TIMEOUT:g} s") from None
        except OSError as error:
            raise Broken(str(error)) from None
        if not data:
            raise Broken("closed")
        self._buffer += data


@dataclass(frozen=True)
class Port:
    """Where requests are sent to, under the name that explanations know it by."""

    name: str
    address: str


class Clients:
    """Threads that send requests, one after another each, until the end of the block.

    `targets` are models, or models with a version. With `naughty`, some requests are bad and must be refused in their
    own way, some are abandoned. `pause` is the mean time between two requests of a client.
    """

    def __init__(
        self,
        ports: Sequence[Port],
        targets: Sequence[str],
        timeline: Timeline,
        explain: Explain,
        *,
        clients: int = 8,
        naughty: bool = False,
        pause: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.account = Account()
        self._ports = ports
        self._targets = targets
        self._timeline = timeline
        self._explain = explain
        self._naughty = naughty
        self._pause = pause
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._numbers = itertools.count(1)
        self._threads = [
            threading.Thread(target=self._run, args=(number, random.Random(seed * 1000 + number)), daemon=True)
            for number in range(clients)
        ]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2 * ANSWER_TIMEOUT)
            assert not thread.is_alive(), "a client waits for ever"

    def _run(self, number: int, dice: random.Random) -> None:
        port = self._ports[number % len(self._ports)]
        connection: Connection | None = None
        while not self._over.is_set() and len(self.account.violations) < MAX_VIOLATIONS:
            if self._pause:
                self._over.wait(dice.expovariate(1 / self._pause))
            if connection is None or not connection.open or dice.random() < 0.01:
                if connection is not None:
                    connection.close()
                connection = self._connect(port, slow=self._naughty and dice.random() < 0.2)
                if connection is None:
                    continue
            try:
                self._one(port, connection, dice)
            except Exception as error:  # an answer that is none, too
                self._note(violation=f"{port.name}: {error!r}")
                connection.close()
            else:
                if surplus := connection.surplus():
                    self._note(violation=f"{port.name}: answered twice, the second time {surplus[:100]!r}", sent=0)
                    connection.close()
        if connection is not None:
            connection.close()

    def _connect(self, port: Port, *, slow: bool) -> Connection | None:
        """None (and no request is begun) when nobody listens, which a fault must explain."""
        begun = time.monotonic()
        try:
            return Connection(port.address, slow=slow)
        except Broken as error:
            outcome = Outcome(port.name, "", 0, "cannot connect", reused=False)
            if not self._explain(outcome, self._timeline.during(begun, time.monotonic())):
                self._note(violation=f"{port.name}: {error}", sent=0)
            self._over.wait(RECONNECT)
            return None

    def _one(self, port: Port, connection: Connection, dice: random.Random) -> None:
        chance = dice.random() if self._naughty else 1.0
        if chance < 0.05:
            self._abandon(connection, dice)
        elif chance < 0.12:
            self._bad(port, connection, dice)
        elif chance < 0.20:
            self._good(port, connection, dice, count=dice.randrange(2, 5))
        else:
            self._good(port, connection, dice, count=1)

    def _request(self, dice: random.Random, *, large_answer: bool = False) -> tuple[str, str, bytes, bytes]:
        """Target, id (or none), body and bytes of a right request."""
        target = dice.choice(self._targets)
        name = f"r{next(self._numbers)}"
        size = dice.choice(_SIZES) if self._naughty else 100
        body = name.encode() + _BODY[:size]
        times = f"?times={dice.choice((100, 2000, 10_000))}" if large_answer else ""
        head = f"POST /predictions/{target}{times} HTTP/1.1\r\nHost: a\r\n"
        if self._naughty and dice.random() < 0.4:
            name = ""  # the server gives it one, and may know its head
        else:
            head += f"X-Request-Id: {name}\r\n"
        if self._naughty and dice.random() < 0.2:
            framed = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            return target, name, body, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + framed
        return target, name, body, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def _good(self, port: Port, connection: Connection, dice: random.Random, *, count: int) -> None:
        """So many requests at once; their answers must come in their order."""
        begun = time.monotonic()
        requests = [self._request(dice) for _ in range(count - 1)]
        # only the last one: answers that nobody reads yet would keep the server from reading
        requests.append(self._request(dice, large_answer=self._naughty and dice.random() < 0.1))
        data = b"".join([data for _, _, _, data in requests])
        if self._naughty and dice.random() < 0.2:
            connection.send_in_pieces(data, dice)
        else:
            connection.send(data)
        for index, (target, name, body, _) in enumerate(requests):
            reused = connection.reused
            try:
                status, answer = connection.answer()
            except Broken as error:
                connection.close()
                self._judge(Outcome(port.name, target, 0, str(error), reused), begun, sent=count - index)
                return
            if status == 200:
                found = json.loads(answer)
                assert found["sha256"] == digest(body), (
                    f"{port.name}: {name} got the answer to another body: {answer!r}"
                )
                assert found["id"] == name or not name, f"{port.name}: {name} got the answer to {found['id']}"
                more = found.get("more", "")
                assert more == found["sha256"] * (len(more) // 64), f"{port.name}: {name} got another's bytes"
                self._note(right=1, seconds=time.monotonic() - begun)
            else:
                self._judge(
                    Outcome(port.name, target, status, json.loads(answer)["type"], reused), begun, answer=answer
                )
            if not connection.open and index + 1 < count:
                outcome = Outcome(port.name, target, 0, CUT, True)
                self._judge(outcome, begun, sent=count - index - 1)
                return

    def _bad(self, port: Port, connection: Connection, dice: random.Random) -> None:
        begun = time.monotonic()
        kind, status, data = dice.choice(_BAD)
        connection.send(data)
        try:
            found, answer = connection.answer()
        except Broken as error:
            connection.close()
            self._judge(Outcome(port.name, kind, 0, str(error), connection.reused), begun)
            return
        if found == status:
            self._note(refused=kind)
        else:
            self._judge(
                Outcome(port.name, kind, found, json.loads(answer).get("type", "?"), connection.reused),
                begun,
                answer=answer,
            )
        if status in (400, 413) and kind != "not JSON":
            connection.close()

    def _abandon(self, connection: Connection, dice: random.Random) -> None:
        """A request, or a part of one, whose client leaves without a word."""
        _, _, _, data = self._request(dice)
        connection.send(data[: dice.choice((len(data), len(data), len(data) // 2))])
        self._over.wait(dice.random() * 0.02)
        connection.close()
        self._note(abandoned=1)

    def _judge(self, outcome: Outcome, begun: float, *, sent: int = 1, answer: bytes = b"") -> None:
        faults = self._timeline.during(begun, time.monotonic())
        if self._explain(outcome, faults):
            self._note(
                explained=f"{outcome.status or 'connection ended'} {outcome.type if outcome.status else ''}", sent=sent
            )
        else:
            self._note(violation=f"{outcome} during {dict(faults)}: {answer[:200]!r}", sent=sent)

    def _note(
        self,
        *,
        sent: int = 1,
        right: int = 0,
        abandoned: int = 0,
        refused: str = "",
        explained: str = "",
        violation: str = "",
        seconds: float = 0.0,
    ) -> None:
        account = self.account
        with self._lock:
            account.sent += sent
            account.right += right
            account.abandoned += abandoned
            account.slowest = max(account.slowest, seconds)
            if refused:
                account.refused[refused] += 1
            if explained:
                account.explained[explained.strip()] += sent
            if violation:
                account.violations.append(violation)


def _post(target: str, body: bytes, *lines: str) -> bytes:
    more = "".join(f"{line}\r\n" for line in lines)
    head = f"POST /predictions/{target} HTTP/1.1\r\nHost: a\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


_BAD = (
    ("no such model", 404, _post("nobody", b"x")),
    ("no such path", 404, b"GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("not HTTP", 400, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"),
    (
        "two lengths",
        400,
        b"POST /predictions/steady HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    ),
    ("too large", 413, b"POST /predictions/steady HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999\r\n\r\n"),
    ("not JSON", 400, _post("steady", b"{", "Content-Type: application/json")),
    ("not gzip", 400, _post("steady", b"hello", "Content-Encoding: gzip")),
)
