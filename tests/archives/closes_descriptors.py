"""A body `close` closes every descriptor and lives on; `garbage` writes into every socket; others are answered."""

import os
import threading

from mms.handler import Handler


class Closes(Handler):
    def inference(self, batch):
        if b"close" in batch:
            os.closerange(3, 4096)
            threading.Event().wait()
        if b"garbage" in batch:
            for fd in range(3, 64):
                try:
                    if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                        os.write(fd, b"this is no frame" * 4)
                except OSError:
                    continue
            threading.Event().wait()
        return batch
