"""The work of `work.py` behind TorchServe: a Java front end, a Python worker behind a Unix socket."""

import json

from peer_java import BATCH, DELAY_MS, HANDLERS, MORE_PORTS, PORT, launch

if __name__ == "__main__":
    files = ",".join(str(HANDLERS / name) for name in ("work.py", "work_mlp.py"))
    archiver = ["torch-model-archiver", "--version", "1.0", "--handler", HANDLERS / "peer_mar.py"]
    model = {
        "defaultVersion": True,
        "marName": "bench.mar",
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": BATCH,
        "maxBatchDelay": DELAY_MS,
        "responseTimeout": 120,
    }
    settings = {
        "inference_address": f"http://127.0.0.1:{PORT}",
        "management_address": f"http://127.0.0.1:{MORE_PORTS[0]}",
        "metrics_address": f"http://127.0.0.1:{MORE_PORTS[1]}",
        "grpc_inference_port": MORE_PORTS[2],
        "grpc_management_port": MORE_PORTS[3],
        "load_models": "bench.mar",
        "disable_token_authorization": "true",
        "disable_system_metrics": "true",
        "models": json.dumps({"bench": {"1.0": model}}),
    }
    server = ["torchserve", "--ncs", "--disable-token-auth", "--ts-config"]
    launch([*archiver, "--extra-files", files], server, settings)
