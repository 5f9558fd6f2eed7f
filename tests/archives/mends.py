"""Does not load until the file that its model-config.yaml names exists."""

import os

from mms.handler import Handler


class Mends(Handler):
    def initialize(self, context):
        if not os.path.exists(context.config["mended"]):
            raise RuntimeError("not mended yet")

    def inference(self, batch):
        return batch
