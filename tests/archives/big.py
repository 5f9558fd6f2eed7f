"""Answers with as many bytes as the body says."""

from mms.handler import Handler


class Big(Handler):
    def inference(self, batch):
        return [b"x" * int(item) for item in batch]
