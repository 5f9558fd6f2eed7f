"""A body is a path. Each stage notes `PATH.STAGE`, and goes on when there is no file `PATH.STAGE.held` (any more).

The answer is how many were in the batch. What stands behind an @ in the path is its bucket; `nan` is the number,
which is equal to none.
"""

import os
import threading

from mms.handler import Handler


class Held(Handler):
    def preprocess(self, request):
        path = bytes(request.data()).decode()
        passes(path, "preprocess")
        if path.endswith("bad"):
            raise ValueError(path)
        return path

    def bucket_by(self, item):
        bucket = item.partition("@")[2]
        return float("nan") if bucket == "nan" else bucket

    def inference(self, batch):
        for path in batch:
            passes(path, "inference")
        if any(path.endswith("guilty") for path in batch):
            raise ValueError(batch)
        return [(path, len(batch)) for path in batch]

    def postprocess(self, output):
        path, count = output
        passes(path, "postprocess")
        return str(count)


def passes(path, stage):
    with open(f"{path}.{stage}", "w"):
        pass
    while os.path.exists(f"{path}.{stage}.held"):
        threading.Event().wait(0.002)
