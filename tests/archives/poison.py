"""A body `abort` or `exit` ends the worker's process; `freeze` stops it; any other is answered with itself."""

import os
import signal

from mms.handler import Handler


class Poison(Handler):
    def inference(self, batch):
        for item in batch:
            if item == b"abort":
                os.abort()
            if item == b"exit":
                os._exit(0)
            if item == b"freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
        return batch
