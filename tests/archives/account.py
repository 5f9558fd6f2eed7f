"""Answers with the digest of the body and the request's id; `delay` in model-config.yaml is what a batch takes.

A request whose query has `times` gets its digest so many times more, for a large answer.
"""

import hashlib
import threading

from mms.handler import Handler


class Account(Handler):
    def initialize(self, context):
        self.delay = context.config.get("delay", 0.0)

    def preprocess(self, request):
        if request.content_type == "application/json":
            request.json()
        digest = hashlib.sha256(request.body).hexdigest()
        return {"sha256": digest, "id": request.id, "more": digest * int(request.query.get("times", 0))}

    def inference(self, batch):
        if self.delay:
            threading.Event().wait(self.delay)
        return batch
