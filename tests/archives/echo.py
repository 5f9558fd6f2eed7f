"""Answers with what it was sent: hash and size of the body, request id, headers, query; and with who answered."""

import hashlib
import os

from mms.handler import Handler


class Echo(Handler):
    def preprocess(self, request):
        return {
            "sha256": hashlib.sha256(request.body).hexdigest(),
            "size": len(request.body),
            "id": request.id,
            "headers": dict(request.headers),
            "query": request.query,
        }

    def inference(self, batch):
        return [{**item, "pid": os.getpid(), "batch": len(batch)} for item in batch]
