"""The work of `work.py` behind mosec: a Rust front end, a Python worker behind a Unix socket."""

import os

import work
from mosec import Server, Worker

BATCH = int(os.environ["PEER_BATCH"])


class Bench(Worker):
    def __init__(self):
        self.work = work.from_environment()
        self.resp_mime_type = self.work.content_type

    def deserialize(self, data):
        return self.work.parse(data)

    def forward(self, data):
        return self.work.forward(data) if BATCH > 1 else self.work.forward([data])[0]

    def serialize(self, data):
        return self.work.answer(data)


class JsonBench(Bench):
    """JSON by its own means."""

    deserialize, serialize = Worker.deserialize, Worker.serialize


if __name__ == "__main__":
    server = Server()
    wait = int(os.environ["PEER_DELAY_MS"]) if BATCH > 1 else 0
    worker = JsonBench if os.environ["PEER_WORK"] == "mlp-json" else Bench
    server.append_worker(worker, num=1, max_batch_size=BATCH, max_wait_time=wait)
    server.run()
