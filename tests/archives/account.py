"""Answers with the digest of the body and the request's id; `delay` in model-config.yaml is what a batch takes."""

import hashlib
import threading

from mms.handler import Handler


class Account(Handler):
    def initialize(self, context):
        self.delay = context.config.get("delay", 0.0)

    def preprocess(self, request):
        if request.content_type == "application/json":
            request.json()
        return {"sha256": hashlib.sha256(request.body).hexdigest(), "id": request.id}

    def inference(self, batch):
        if self.delay:
            threading.Event().wait(self.delay)
        return batch
