"""Its initialize raises."""

from mms.handler import Handler


class Broken(Handler):
    def initialize(self, context):
        raise RuntimeError("the weights are missing")

    def inference(self, batch):
        return batch
