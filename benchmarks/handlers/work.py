"""The work of the comparison with peers, the same for every server: parse and answer per request, forward per batch.

Of `mlp-json` only forward: JSON is read and written by each server's own means.
"""

import mmap
import os
import struct

COUNTS = struct.Struct("QQ")  # batches, requests


class Noop:
    content_type = "text/plain"

    def parse(self, body):
        return body

    def forward(self, items):
        return ["ok"] * len(items)

    def answer(self, result):
        return b"ok"


def make(name, counts):
    """The work of that name, which keeps in the file `counts` how many batches there were, and of how many requests."""
    if name in ("mlp", "mlp-json"):
        from work_mlp import Mlp as Work
    else:
        Work = Noop
    work = Work()
    work.forward = counted(work.forward, counts)
    return work


def counted(forward, counts):
    with open(counts, "r+b") as file:
        page = mmap.mmap(file.fileno(), COUNTS.size)
    batches = requests = 0

    def run(items):
        nonlocal batches, requests
        batches += 1
        requests += len(items)
        COUNTS.pack_into(page, 0, batches, requests)
        return forward(items)

    return run


def from_environment():
    return make(os.environ["PEER_WORK"], os.environ["PEER_COUNTS"])
