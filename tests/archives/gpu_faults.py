"""Request style: does to its worker's GPU what the body says."""

import os

import torch

from mms.handler import Handler


class Faults(Handler):
    def initialize(self, context):
        self.device = context.device
        self.held = self.allocate(context.config.get("holds", 0.0))

    def allocate(self, share):
        """That share of the GPU's memory."""
        total = torch.cuda.get_device_properties(0).total_memory
        return torch.empty(int(share * total), dtype=torch.uint8, device=self.device)

    def preprocess(self, request):
        return request.json()

    def inference(self, batch):
        space = self.allocate(sum(order.get("allocate", 0.0) for order in batch))
        for order in batch:
            if "sleep" in order:  # seconds; a kernel, which other streams do not wait for
                torch.cuda._sleep(int(order["sleep"] * torch.cuda.clock_rate() * 1e6))
                torch.cuda.current_stream().synchronize()
            if "assert" in order:
                torch.zeros(1, device=self.device)[torch.tensor([9], device=self.device)].cpu()
        del space
        stream = torch.cuda.current_stream().stream_id
        return [{"pid": os.getpid(), "batch": len(batch), "stream": stream}] * len(batch)
