"""Starts a process that would outlive its worker and keep its channel open; answers with both pids."""

import os
import signal

from mms.handler import Handler


class Forks(Handler):
    def inference(self, batch):
        helper = os.fork()
        if helper == 0:
            signal.pause()
            os._exit(0)
        return [{"pid": os.getpid(), "helper": helper}] * len(batch)
