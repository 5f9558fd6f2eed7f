"""Cannot be asked to leave: SIGTERM is ignored and a thread never ends."""

import signal
import threading

from mms.handler import Handler


class Stays(Handler):
    def initialize(self, context):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=threading.Event().wait).start()

    def inference(self, batch):
        return batch
