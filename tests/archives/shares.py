"""With share_weights: answers with who loaded it, who was forked, and what the workers do not share."""

import os
import random
import tempfile
import threading
import time
from pathlib import Path

from mms.handler import Handler


class Shares(Handler):
    def initialize(self, context):
        if context.config.get("raises"):
            raise ValueError("no weights here")
        if context.config.get("threads"):
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        print("loading the weights")
        context.metrics.add_counter("loaded", 1)
        self.loaded_by = os.getpid()
        self.forked = 0
        self.weights = os.urandom(16 << 20)
        self.file = open(__file__, "rb")  # noqa: SIM115  # stays open in the workers

    def after_fork(self, context):
        self.forked = os.getpid()

    def inference(self, batch):
        time.sleep(0.003)  # work that is not worth sharing would go to one worker
        name = Path(tempfile.mkstemp()[1])
        facts = {
            "loaded_by": self.loaded_by,
            "forked": self.forked,
            "pid": os.getpid(),
            "random": random.random(),
            "first": self.file.read(0) == b"",
            "temporary": str(name.parent),
            "home": os.environ["HOME"],
            "threads": os.environ["OMP_NUM_THREADS"],
        }
        return [facts] * len(batch)
