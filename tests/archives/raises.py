"""Raises the exception that the body names, even those that are meant to end a process."""

import asyncio
import builtins

from mms.handler import Handler


class Raises(Handler):
    def inference(self, batch):
        for item in batch:
            name = item.decode()
            if name == "CancelledError":
                raise asyncio.CancelledError
            if name:
                raise getattr(builtins, name)("on purpose")
        return batch
