"""A body `close` closes every descriptor and lives on; `garbage` and `empty` write into every socket; else an echo.

`garbage` is no frame, `empty` is one with the results of no job.
"""

import os
import threading

from mms import wire
from mms.handler import Handler

JUNK = {b"garbage": b"this is no frame" * 4, b"empty": wire.pack(wire.RESULT, wire.Result([], [], [], [], []))}


class Closes(Handler):
    def inference(self, batch):
        if b"close" in batch:
            os.closerange(3, 4096)
            threading.Event().wait()
        junk = JUNK.get(bytes(batch[0]))
        if junk is not None:
            for fd in range(3, 64):
                try:
                    if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                        os.write(fd, junk)
                except OSError:
                    continue
            threading.Event().wait()
        return batch
