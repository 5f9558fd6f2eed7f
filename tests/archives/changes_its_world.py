"""Changes what its process stands on: working directory, environment, umask, clock functions, json."""

import json
import os
import time

from mms.handler import Handler


class Changes(Handler):
    def inference(self, batch):
        os.chdir("/")
        os.umask(0)
        os.environ.clear()
        time.monotonic = time.time = time.perf_counter = lambda: -1.0
        json.dumps = json.loads = None
        return batch
