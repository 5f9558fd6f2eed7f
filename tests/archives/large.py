"""Bodies of any size, whose first line is a path or empty. It spoils its copy, notes that in PATH.begun, waits for PATH
and answers with what came behind the first line.
"""

import os
import threading

from mms.handler import Handler


class Large(Handler):
    def inference(self, batch):
        return [answer(body) for body in batch]


def answer(body):
    path, _, rest = bytes(body).partition(b"\n")
    body[:] = bytes(len(body))
    if path:
        path = path.decode()
        with open(f"{path}.begun", "a") as file:
            file.write(f"{os.getpid()} 1\n")
        while not os.path.exists(path):
            threading.Event().wait(0.002)
    return rest
