"""A torch model that takes 0.2 s to load."""

import time

import torch

from mms.handler import Handler


class TorchModel(Handler):
    def initialize(self, context):
        time.sleep(0.2)
        self.layer = torch.nn.Linear(16, 4).eval()

    def inference(self, batch):
        with torch.inference_mode():
            return self.layer(torch.zeros(len(batch), 16))
