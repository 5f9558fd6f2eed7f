"""The work of `work.py` as a handler of ours."""

import work

from mms.handler import Handler


class Bench(Handler):
    def initialize(self, context):
        self.work = work.make(**context.config["peers"])

    def preprocess(self, request):
        return self.work.parse(request.body)

    def inference(self, batch):
        return self.work.forward(batch)

    def postprocess(self, output):
        return self.work.answer(output)


class JsonBench(Bench):
    """JSON by our own means."""

    def preprocess(self, request):
        return request.json()

    def postprocess(self, output):
        return output
