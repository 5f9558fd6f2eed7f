"""The work of `work.py` behind LitServe: a FastAPI process, a worker behind a queue. It takes JSON objects only."""

import os

import litserve
import work
from fastapi import Response

BATCH = int(os.environ["PEER_BATCH"])


class Bench(litserve.LitAPI):
    def setup(self, device):
        self.work = work.from_environment()

    def decode_request(self, request):
        return self.work.parse(request["body"])

    def batch(self, inputs):
        return inputs

    def unbatch(self, output):
        return output

    def predict(self, x):
        return self.work.forward(x) if BATCH > 1 else self.work.forward([x])[0]

    def encode_response(self, output):
        return Response(self.work.answer(output), media_type=self.work.content_type)


if __name__ == "__main__":
    wait = int(os.environ["PEER_DELAY_MS"]) / 1000 if BATCH > 1 else 0
    api = Bench(max_batch_size=BATCH, batch_timeout=wait)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, timeout=120)
    port = int(os.environ["PEER_PORT"])
    server.run(host="127.0.0.1", port=port, generate_client_file=False, num_api_servers=1, log_level="warning")
