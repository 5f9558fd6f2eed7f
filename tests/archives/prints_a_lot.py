"""Prints BODY megabytes in lines, then one line that is no line: without end, binary, with terminal codes."""

import sys

from mms.handler import Handler


class Prints(Handler):
    def inference(self, batch):
        for item in batch:
            for _ in range(int(item)):
                print("x" * 1_000_000)
            sys.stdout.flush()
            sys.stdout.buffer.write(b"\xff\x00\x1b[31m\nlast line\n")
            sys.stdout.buffer.flush()
        return [b"printed"] * len(batch)
