"""benchmarks/gpu.py runs on a CPU, with tiny networks: each row of its table is there."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from benchmarks.gpu import Child
from tests.servers import environment

pytestmark = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")


def test_the_table_has_a_row_per_batch_size_and_number_of_threads() -> None:
    words = ["--device", "cpu", "--quick", "--networks", "mlp,resnet50,encoder", "--threads", "1,2", "--batches", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    row = r"\| (\w+) \| eager \| 1 \| (\d) \| 2 \| [\d,]+ \| [\d.]+ \| [\d.]+ \| [\d,-]+ \| (\d+%)? \|"
    found = [match.groups() for match in map(re.compile(row).fullmatch, done.stdout.splitlines()) if match]
    assert [(name, threads) for name, threads, _ in found] == [
        (name, threads) for name in ("mlp", "resnet50", "encoder") for threads in ("1", "2")
    ]
    assert [bool(share) for _, _, share in found] == [True, False] * 3


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False)))
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        Child().machine(device="cuda")
