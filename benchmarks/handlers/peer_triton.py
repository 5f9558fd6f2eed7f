"""The work of `work.py` behind Triton: the tritonserver in pytriton's wheel, with its Python backend.

It reads and writes JSON itself: the network's numbers arrive as a tensor.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

BATCH, DELAY_MS, PORT = (int(os.environ[f"PEER_{name}"]) for name in ("BATCH", "DELAY_MS", "PORT"))
NETWORK = ("TYPE_FP32", 64, 10)
SHAPES = {"noop": ("TYPE_STRING", 1, 1), "mlp": NETWORK, "mlp-json": NETWORK}


def configuration():
    kind, wide, narrow = SHAPES[os.environ["PEER_WORK"]]
    lines = [
        f'name: "bench" backend: "python" max_batch_size: {BATCH}',
        f'input [ {{ name: "x" data_type: {kind} dims: [ {wide} ] }} ]',
        f'output [ {{ name: "y" data_type: {kind} dims: [ {narrow} ] }} ]',
        "instance_group [ { kind: KIND_CPU count: 1 } ]",
    ]
    if BATCH > 1:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {DELAY_MS * 1000} }}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (place,) = importlib.util.find_spec("pytriton").submodule_search_locations
    triton = Path(place) / "tritonserver"
    model = Path("repository/bench/1")
    model.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("peer_triton_model.py"), model / "model.py")
    (model.parent / "config.pbtxt").write_text(configuration())
    # the wheel keeps a stub per version of Python apart from the backend
    shutil.copytree(triton / "backends", "backends")
    version = "{}.{}".format(*sys.version_info)
    shutil.copy(triton / "python_backend_stubs" / version / "triton_python_backend_stub", "backends/python")
    libraries = triton.parent.parent / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")
    environ = {
        **os.environ,
        "PEER_PATH": os.pathsep.join(filter(None, sys.path)),  # the stub knows of no environment and no .pth file
        "PYTHONHOME": sys.base_prefix,
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
    }
    program = str(triton / "bin" / "tritonserver")
    words = ["--model-repository=repository", f"--backend-directory={Path.cwd() / 'backends'}"]
    words += ["--http-address=127.0.0.1", f"--http-port={PORT}", "--allow-grpc=false", "--allow-metrics=false"]
    words += ["--allow-gpu-metrics=false", "--disable-auto-complete-config", "--log-info=false"]
    os.execve(program, [program, *words], environ)
