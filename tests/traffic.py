"""Clients of a server under test: many that send as fast as they are answered, or some whose answers come later."""

from __future__ import annotations

import http.client
import threading
import time

from tests.asking import CLIENT_TIMEOUT, Reply, ask, connect, digest
from tests.servers import Server
from tests.waiting import eventually


class Traffic:
    """Clients that send requests as fast as they are answered, each with a body of its own, until the end of the block.

    `failures` holds every answer that was not the right one. With `until_refused`, a client ends without complaint when
    the server takes no more connections or closes one before the request was begun; with `reconnects`, it sends the
    request again on a new connection then, at most so many times in a row.
    """

    def __init__(
        self,
        running: Server,
        *,
        model: str = "echo",
        clients: int = 8,
        until_refused: bool = False,
        reconnects: int = 0,
    ) -> None:
        self.count = 0
        self.failures: list[str] = []
        self.slowest = 0.0
        self._server = running
        self._path = f"/predictions/{model}"
        self._until_refused = until_refused
        self._reconnects = reconnects
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.join()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(CLIENT_TIMEOUT)
            assert not thread.is_alive()

    def flows(self, more: int = 200, timeout: float = 15.0) -> None:
        """Wait until that many more requests are answered."""
        wanted = self.count + more
        eventually(lambda: self.count >= wanted or self.failures, timeout)

    def _client(self, number: int) -> None:
        connection = connect(self._server.url)
        sent, tries = 0, self._reconnects
        try:
            while not self._stop.is_set() and not self.failures:
                sent += 1
                body = b"%d of %d" % (sent, number)
                begun = time.monotonic()
                try:
                    reply = ask(connection, "POST", self._path, body)
                except (OSError, http.client.HTTPException) as error:
                    if self._until_refused and isinstance(error, ConnectionError):
                        return
                    if tries and isinstance(error, ConnectionError):
                        connection.close()
                        tries -= 1
                        continue
                    self.failures.append(f"{body!r}: {error!r}")
                    return
                tries = self._reconnects
                self.slowest = max(self.slowest, time.monotonic() - begun)
                if reply.status != 200 or reply.json()["sha256"] != digest(body):
                    self.failures.append(f"{body!r}: {reply}")
                self.count += 1
        finally:
            connection.close()


class Answering:
    """Requests sent from threads of their own, whose answers are looked at later."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self.replies: dict[int, Reply | OSError | http.client.HTTPException] = {}

    def send(self, running: Server, model: str, body: bytes, **headers: str) -> None:
        number = len(self._threads)

        def run() -> None:
            try:
                self.replies[number] = running.predict(model, body, **headers)
            except (OSError, http.client.HTTPException) as error:
                self.replies[number] = error

        thread = threading.Thread(target=run)
        self._threads.append(thread)
        thread.start()

    def results(self, timeout: float = CLIENT_TIMEOUT) -> list[Reply]:
        """The answers in the order of the requests; fails when one has none."""
        for thread in self._threads:
            thread.join(timeout)
        missing = [number for number in range(len(self._threads)) if not isinstance(self.replies.get(number), Reply)]
        assert not missing, [self.replies.get(number) for number in missing]
        return [reply for number in range(len(self._threads)) if isinstance(reply := self.replies[number], Reply)]
