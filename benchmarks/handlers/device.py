"""A model on a stand-in device: its stages take as long as model-config.yaml says; only `preprocess` takes CPU time.

Times in milliseconds: `preprocess` per request, `inference` per batch, `item` more for each request of the batch.
`megabytes` is the size of the model's weights.
"""

import time
import zlib

from mms.handler import Handler


class Device(Handler):
    def initialize(self, context):
        times = context.config.get("device_model", {})
        self.preprocess_seconds = times.get("preprocess", 0) / 1000
        self.inference_seconds = times.get("inference", 0) / 1000
        self.item_seconds = times.get("item", 0) / 1000
        self.weights = bytearray(times.get("megabytes", 0) << 20)
        self.weights[::4096] = b"w" * len(self.weights[::4096])
        self.picture = bytes(range(256)) * 64

    def preprocess(self, request):
        until = time.thread_time() + self.preprocess_seconds
        while time.thread_time() < until:
            zlib.compress(self.picture)  # as decoding a picture does, it lets go of Python's lock
        return request.data()

    def inference(self, batch):
        time.sleep(self.inference_seconds + self.item_seconds * len(batch))
        return [b"ok"] * len(batch)
