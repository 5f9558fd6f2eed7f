"""The model alone in a loop: the handler of an extracted archive and nothing else. Prints requests per second."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mms import wire
from mms.backend.__main__ import load_of
from mms.backend.loader import load_handler
from mms.backend.stages import RequestStages
from mms.handler import Request


def main() -> None:
    """FOLDER BODY BATCH SECONDS: waits for a line on standard input when it is warm, then counts."""
    folder, body, batch, seconds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    load = load_of(folder)
    load.cpu_threads = 1
    stages = load_handler(load)
    assert isinstance(stages, RequestStages)
    handler = stages.handler
    data = body.read_bytes()
    facts = wire.RequestFactsView("application/octet-stream", "", b"", False, wire.EMPTY_HEADERS)

    def once() -> None:
        requests = [Request(facts, b"bare", bytearray(data), load.max_request_size) for _ in range(batch)]
        outputs = handler.inference(handler.collate([handler.preprocess(request) for request in requests]))
        for output in outputs:
            handler.postprocess(output)

    for _ in range(3):
        once()
    print("warm", flush=True)
    sys.stdin.readline()
    begun, count = time.monotonic(), 0
    while time.monotonic() - begun < seconds:
        once()
        count += batch
    print(count / (time.monotonic() - begun), flush=True)


if __name__ == "__main__":
    main()
