"""The servers that we are compared with: how each is installed into an environment of its own, and started."""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.hotpath import BODY_SIZE
from benchmarks.models import HANDLERS, Model, spec
from benchmarks.servers import Command, Spec, free_port

DELAY_MS = 2  # for which peers wait for a full batch: what they need for their best throughput
JAVA = "Java 17 (Debian: apt-get install openjdk-17-jre-headless)"
OURS = "mms"
BORROWED = "torch.pth"  # where else an environment looks; written last, so where it is the installation is complete
NUMBERS = json.dumps([number / 64 for number in range(64)]).encode()
BODIES = {"noop": os.urandom(BODY_SIZE), "mlp": NUMBERS, "mlp-json": NUMBERS}


@dataclass(frozen=True)
class Peer:
    """A server that pip installs: `arguments` for a folder and a port follow its file of benchmarks/handlers."""

    packages: tuple[str, ...]
    path: str
    arguments: Callable[[Path, int], list[str]] = lambda folder, port: []
    body: Callable[[str], bytes] = BODIES.__getitem__
    java: bool = False
    python: bool = True  # a server for Python code alone, so that its memory is comparable
    own_json: bool = False  # is compared where it reads and writes JSON itself, too

    def missing(self) -> str:
        """What it needs besides its packages, and is not there."""
        return JAVA if self.java and shutil.which("java") is None else ""


def wrapped(work: str) -> bytes:
    """As the member `body` of a JSON object."""
    value = _text() if work == "noop" else json.loads(BODIES[work])
    return json.dumps({"body": value}).encode()


def tensor(work: str) -> bytes:
    """In the Open Inference Protocol."""
    kind, data = ("BYTES", [_text()]) if work == "noop" else ("FP32", json.loads(BODIES[work]))
    values = {"name": "x", "datatype": kind, "shape": [1, len(data)], "data": data}
    return json.dumps({"inputs": [values]}).encode()


def _text() -> str:
    return base64.b64encode(BODIES["noop"]).decode()[:BODY_SIZE]


PEERS = {
    "mosec": Peer(
        ("mosec==0.9.8",),
        "/inference",
        lambda folder, port: ["--address", "127.0.0.1", "--port", str(port), "--path", f"{folder}/ipc",
                              "--timeout", "120000", "--capacity", "2048"],
        own_json=True,
    ),
    "triton": Peer(("nvidia-pytriton==0.7.0",), "/v2/models/bench/infer", body=tensor, python=False, own_json=True),
    "multi-model-server": Peer(("multi-model-server==1.1.11", "model-archiver==1.0.3"), "/predictions/bench",
                               java=True, python=False),
    "torchserve": Peer(("torchserve==0.12.0", "torch-model-archiver==0.12.0"), "/predictions/bench",
                       java=True, python=False),
    "litserve": Peer(("litserve==0.2.19",), "/predict", body=wrapped),
}  # fmt: skip


def python_of(folder: Path, name: str) -> Path:
    """Where a peer's interpreter is, if it is installed."""
    return folder.absolute() / name / "bin" / "python"


def absence(folder: Path, name: str) -> str:
    """Why a peer cannot be measured, and what to do; nothing if it can."""
    if not any(folder.glob(f"{name}/lib/python*/site-packages/{BORROWED}")):
        return f"{name} is not installed in {folder}: make peers (PEERS= names another folder)"
    missing = PEERS[name].missing()
    return f"{name} needs {missing}" if missing else ""


def install(folder: Path) -> int:
    """All of them. Exit status: 1 if one could not be installed; pip has said why."""
    failed = [name for name in PEERS if not _install(folder, name)]
    return 1 if failed else 0


def _install(folder: Path, name: str) -> bool:
    peer, python = PEERS[name], python_of(folder, name)
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *peer.packages], check=True)
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip()
    except subprocess.CalledProcessError as error:
        print(f"{name} is not installed: {error}", file=sys.stderr, flush=True)
        return False
    # behind the peer's own: it takes from here what it has not, which is torch
    (Path(packages) / BORROWED).write_text(sysconfig.get_path("purelib") + "\n")
    missing = peer.missing()
    print(
        f"{peer.packages[0]} is installed in {folder / name}" + (f"; it needs {missing}" if missing else ""), flush=True
    )
    return True


def peer_spec(folder: Path, name: str, work: str, batch: int, counts: Path) -> Spec:
    peer = PEERS[name]

    def commands(scratch: Path, port: int) -> list[Command]:
        settings: dict[str, object] = {
            "WORK": work,
            "BATCH": batch,
            "DELAY_MS": DELAY_MS,
            "PORT": port,
            "COUNTS": counts,
        }
        settings["MORE_PORTS"] = ",".join(str(free_port()) for _ in range(4))
        environ = [f"TMPDIR={scratch}", *(f"PEER_{key}={value}" for key, value in settings.items())]
        script = str(HANDLERS / f"peer_{name.replace('-', '_')}.py")
        words = [str(python_of(folder, name)), script, *peer.arguments(scratch, port)]
        return [["env", "--unset=PYTHONPATH", f"--chdir={scratch}", *environ, *words]]

    return Spec(name, commands, peer.path, ping="", body=peer.body(work))


def our_spec(work: str, batch: int, counts: Path) -> Spec:
    files = ("work.py",) if work == "noop" else ("work.py", "work_mlp.py")
    handler = "JsonBench" if work == "mlp-json" else "Bench"
    config = {"batch_size": batch, "peers": {"name": work, "counts": str(counts)}}
    return spec(OURS, [Model("bench", f"peer_mms.py:{handler}", config, files=files)], body=BODIES[work], workers=1)


class Counts:
    """The file in which the work of one server counts its batches (benchmarks/handlers/work.py)."""

    _pair = struct.Struct("QQ")

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(self._pair.size))

    def read(self) -> tuple[int, int]:
        """Batches, and requests in them, so far."""
        batches, requests = self._pair.unpack(self.path.read_bytes())
        return batches, requests
