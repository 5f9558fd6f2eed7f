"""The work of `work.py` behind Multi Model Server: a Java front end, a Python worker behind a Unix socket."""

import http.client
import os
import shutil
import time
from pathlib import Path

from peer_java import BATCH, DELAY_MS, HANDLERS, MORE_PORTS, PORT, launch


def register(port):
    """Only the management API can ask for batches. Waits for it, and for the worker."""
    query = f"url=bench.mar&model_name=bench&batch_size={BATCH}&max_batch_delay={DELAY_MS}"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            client.request("POST", f"/models?{query}&initial_workers=1&synchronous=true&response_timeout=120")
            client.getresponse().read()
            return
        except OSError:
            time.sleep(0.1)


if __name__ == "__main__":
    management = int(MORE_PORTS[0])
    Path("source").mkdir()
    for name in ("work.py", "work_mlp.py", "peer_mar.py"):
        shutil.copy(HANDLERS / name, "source")
    if not os.fork():
        register(management)
        os._exit(0)
    archiver = ["model-archiver", "--model-path", "source", "--handler", "peer_mar:handle", "--runtime", "python3"]
    addresses = {"inference_address": PORT, "management_address": management}
    settings = {name: f"http://127.0.0.1:{port}" for name, port in addresses.items()}
    launch(archiver, ["multi-model-server", "--mms-config"], settings)
