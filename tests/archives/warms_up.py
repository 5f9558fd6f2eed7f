"""Answers with what it has seen: the sizes of its batches since `initialize`, and which of them held zeros."""

from mms.handler import Handler, PredictionError


class Counts(Handler):
    def initialize(self, context):
        self.seen = []

    def preprocess(self, request):
        text = request.text()
        if text.startswith("bad"):
            raise PredictionError(f"does not like {request.content_type}")
        return text

    def inference(self, batch):
        kind = "text" if isinstance(batch, list) else f"{batch.dtype}{list(batch.shape[1:])}"
        if kind.startswith("int8"):
            raise ValueError("no bytes, please")
        self.seen.append([kind, len(batch)])
        return [self.seen] * len(batch)
