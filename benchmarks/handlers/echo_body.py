"""Answers with the body that it was sent."""

from mms.handler import Handler


class EchoBody(Handler):
    def preprocess(self, request):
        return request.body

    def inference(self, batch):
        return batch
