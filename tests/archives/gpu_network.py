"""Request style: a network of fixed random weights on its worker's GPU; says what it computed, and on what."""

import os

import torch

from mms.handler import Handler


class Network(Handler):
    def initialize(self, context):
        torch.manual_seed(7)
        self.device = context.device
        self.lent = context.weights_are_lent
        self.network = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8)).eval()
        self.network.register_buffer("large", torch.zeros(context.config.get("large", 0), dtype=torch.uint8))
        if not self.lent:
            self.network.to(self.device)

    def preprocess(self, request):
        return torch.tensor(request.json(), dtype=torch.float32)

    def inference(self, batch):
        with torch.inference_mode():
            outputs = self.network(batch).cpu().tolist()
        facts = {
            "pid": os.getpid(),
            "batch": len(outputs),
            "came_on": str(batch.device),
            "device": self.device,
            "lent": self.lent,
            "stream": torch.cuda.current_stream().stream_id,
            "visible": os.environ["CUDA_VISIBLE_DEVICES"],
        }
        return [{"output": output, **facts} for output in outputs]
