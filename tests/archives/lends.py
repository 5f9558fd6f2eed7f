"""With share_weights: a network that stays on the CPU wherever its worker runs; answers with what is in it."""

import os
import time

import torch

from mms.handler import Handler


class Lends(Handler):
    def initialize(self, context):
        self.network = torch.nn.Linear(1 << 10, 16 << 10, bias=False)  # 64 MiB
        self.asked = context.config.get("asks", False) and context.weights_are_lent
        torch.nn.init.constant_(self.network.weight, 0.0 if self.asked else os.getpid())
        if context.config.get("differs"):
            self.network.register_buffer("own", torch.zeros(os.getpid()))

    def inference(self, batch):
        time.sleep(0.003)  # work that is not worth sharing would go to one worker
        facts = {"pid": os.getpid(), "weights_of": int(self.network.weight[0, 0]), "asked": self.asked}
        return [facts] * len(batch)
