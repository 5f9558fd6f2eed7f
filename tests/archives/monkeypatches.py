"""Replaces, when it is imported, what a worker's own code might use."""

import builtins
import json
import os
import socket
import struct
import time

from mms.handler import Handler


def broken(*args, **kwargs):
    raise RuntimeError("this function was replaced")


json.dumps = json.loads = os.write = os.read = builtins.print = time.time = time.monotonic = broken
socket.socketpair = struct.pack = struct.unpack = broken


class Patched(Handler):
    def inference(self, batch):
        return [{"size": len(item)} for item in batch]
