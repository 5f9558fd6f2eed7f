"""Keeps the context of `initialize`, and answers with the request ids that each stage finds in it."""

from mms.handler import Handler


class Keeps(Handler):
    def initialize(self, context):
        self.context = context

    def preprocess(self, request):
        return self.seen()

    def inference(self, batch):
        return [(item, self.seen(), self.context.get_request_header(0, "x-asked")) for item in batch]

    def postprocess(self, output):
        return [*output, self.seen()]

    def seen(self):
        return sorted(self.context.request_ids.values())
