"""Notes each execution in the file BODY.begun and answers once the file BODY exists: as slow as a test wants."""

import os
import threading

from mms.handler import Handler


class Gate(Handler):
    def inference(self, batch):
        for item in batch:
            path = item.decode()
            with open(f"{path}.begun", "a") as file:
                file.write(f"{os.getpid()} {len(batch)}\n")
        while not all(os.path.exists(item.decode()) for item in batch):
            threading.Event().wait(0.002)
        return [str(os.getpid())] * len(batch)
