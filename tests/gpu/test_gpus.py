"""What only a GPU can show: which there are, streams, CUDA graphs, shared weights, and what goes wrong on one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mms.workers import gpus
from mms.workers.gpus import find_gpus
from tests.asking import Reply
from tests.conftest import MakeArchive
from tests.servers import Server, environment, server
from tests.waiting import eventually

pytestmark = [
    pytest.mark.skipif(not find_gpus(), reason="needs a GPU"),
    pytest.mark.timeout(180),  # a first `import torch`, and the driver's start
]

ROWS = [[float((place * row) % 5) for place in range(64)] for row in range(1, 9)]
WARMUP = [{"shape": [64], "dtype": "float32"}]


def ask(running: Server, model: str, order: Any) -> Any:
    reply = running.predict(model, json.dumps(order))
    assert reply.status == 200, reply.body
    return reply.json()


def ask_at_once(running: Server, model: str, orders: list[Any]) -> list[Reply]:
    with ThreadPoolExecutor(len(orders)) as clients:
        return list(clients.map(lambda order: running.predict(model, json.dumps(order)), orders))


def outputs(running: Server, model: str, rows: list[list[float]]) -> list[list[float]]:
    replies = ask_at_once(running, model, rows)
    assert {reply.status for reply in replies} == {200}
    return [reply.json()["output"] for reply in replies]


def same(ours: list[list[float]], theirs: list[list[float]]) -> bool:
    return all(a == pytest.approx(b, rel=1e-3, abs=1e-4) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def eager(make_archive: MakeArchive) -> Iterator[Server]:
    """A server with the network as its handler has it, and with the faults."""
    with server(
        make_archive("gpu_network", min_workers=-1, batch_size=8, max_batch_delay=50),
        make_archive("gpu_faults", batch_size=4, max_batch_delay=300, isolate_errors="true"),
    ) as running:
        yield running


def seen_by_torch(**variables: str) -> list[str]:
    """The UUIDs of the GPUs that a process of its own sees."""
    code = (
        "import torch\nfor index in range(torch.cuda.device_count()):\n"
        "    print('GPU-' + str(torch.cuda.get_device_properties(index).uuid))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment(**variables)
    )
    return done.stdout.split()


def test_nvml_nvidia_smi_and_the_kernel_name_the_gpus_that_torch_sees() -> None:
    nvml = gpus._nvml()
    assert nvml is not None
    named = [device.uuid for device in gpus._ask_nvml(nvml)]
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    assert [device.uuid for device in gpus.parse_listing(listing)] == named
    assert [device.uuid for device in gpus.read_proc(Path("/proc/driver/nvidia/gpus"))] in (named, [])  # a container
    assert [gpu.uuid for gpu in find_gpus()] == seen_by_torch(CUDA_DEVICE_ORDER="PCI_BUS_ID")


def test_a_gpus_environment_shows_a_process_that_gpu_alone() -> None:
    for gpu in find_gpus():
        assert seen_by_torch(**gpu.environment()) == [gpu.uuid]


def test_by_default_a_model_has_a_worker_per_gpu_and_its_description_says_where(eager: Server) -> None:
    workers = eager.describe("gpu_network")["workers"]
    assert [worker["gpuUuid"] for worker in workers] == [gpu.uuid for gpu in find_gpus()]
    assert [worker["gpuId"] for worker in workers] == [gpu.index for gpu in find_gpus()]
    answer = ask(eager, "gpu_network", ROWS[0])
    assert answer["visible"] in {gpu.uuid for gpu in find_gpus()}
    assert answer["device"] == answer["came_on"] == "cuda:0"  # collated on the CPU, moved before inference


def test_the_memory_of_workers_and_gpus_is_told(eager: Server) -> None:
    workers = eager.describe("gpu_network")["workers"]
    assert all(worker["gpuMemoryUsage"] > 100 << 20 for worker in workers), workers  # a CUDA context alone
    uuid = find_gpus()[0].uuid
    pids = eager.metric("mms_worker_gpu_memory_bytes", model="gpu_network", worker="0")
    assert pids > 100 << 20
    assert eager.metric("mms_gpu_memory_used_bytes", uuid=uuid) >= pids
    assert 0 <= eager.metric("mms_gpu_utilization_ratio", uuid=uuid) <= 1


def test_a_worker_on_the_cpu_sees_no_gpu(make_archive: MakeArchive) -> None:
    with server(make_archive("tells_its_place", device="cpu")) as running:
        described = running.describe("tells_its_place")["workers"]
        assert [worker["gpu"] for worker in described] == [False]
        assert running.predict("tells_its_place").body == b"cpu "  # and CUDA_VISIBLE_DEVICES is empty


def test_threads_compute_at_the_same_time_each_in_a_stream_of_its_own(make_archive: MakeArchive) -> None:
    with server(make_archive("gpu_faults", threads=4)) as running:
        for _ in range(2):  # the first round warms up
            begun = time.perf_counter()
            replies = ask_at_once(running, "gpu_faults", [{"sleep": 0.3}] * 4)
            took = time.perf_counter() - begun
        answers = [reply.json() for reply in replies]
        assert len({answer["stream"] for answer in answers}) == 4 and len({answer["pid"] for answer in answers}) == 1
        begun = time.perf_counter()
        ask(running, "gpu_faults", {"sleep": 0.3})
        assert took < 2 * (time.perf_counter() - begun)


@pytest.mark.parametrize("threads", [1, 2])
def test_cuda_graphs_answer_as_the_network_does(make_archive: MakeArchive, eager: Server, threads: int) -> None:
    how: dict[str, Any] = {
        "cuda_graphs": [1, 2, 4],
        "warmup": WARMUP,
        "batch_size": 8,
        "max_batch_delay": 50,
        "threads": threads,
    }
    with server(make_archive("gpu_network", model_name="graphs", **how)) as running:
        assert "cuda_graphs" not in running.output
        for _ in range(5):
            for count in 1, 2, 3, 4:
                assert same(outputs(running, "graphs", ROWS[:count]), outputs(eager, "gpu_network", ROWS[:count]))
        while running.metric("mms_batch_size_bucket", model="graphs", le="4.0") == running.metric(
            "mms_batch_size_count", model="graphs"
        ):
            assert same(outputs(running, "graphs", ROWS), outputs(eager, "gpu_network", ROWS))
        assert running.output.count("larger than the largest size, 4; such batches run without") == 1


def test_a_compiled_network_answers_as_the_network_does(make_archive: MakeArchive, eager: Server) -> None:
    how: dict[str, Any] = {"compile": True, "warmup": WARMUP, "startup_timeout": 120}
    archive = make_archive("gpu_network", model_name="compiled", **how)
    with server(archive) as running:
        assert "compile failed" not in running.output
        assert same(outputs(running, "compiled", ROWS[:2]), outputs(eager, "gpu_network", ROWS[:2]))


def test_share_weights_keeps_one_copy_per_gpu_and_outlives_the_owner(make_archive: MakeArchive, eager: Server) -> None:
    large = 1 << 30
    how: dict[str, Any] = {
        "share_weights": True,
        "large": large,
        "min_workers": -1,
        "instances": [{"kind": "gpu", "count": 3, "gpus": [0]}],
    }
    with server(make_archive("gpu_network", model_name="shared", **how)) as running:
        described = running.describe("shared")
        (owner,) = described["weightOwners"]
        assert owner["gpuId"] == 0 and owner["weights"] > large
        assert [worker["borrowedWeights"] for worker in described["workers"]] == [owner["weights"]] * 3
        assert all(worker["gpuMemoryUsage"] < large for worker in described["workers"]), described
        told = {ask(running, "shared", ROWS[0])["pid"] for _ in range(30)}
        assert told <= set(running.workers("shared"))
        for _ in range(10):
            assert same(outputs(running, "shared", ROWS), outputs(eager, "gpu_network", ROWS))

        os.kill(running.workers("shared")[0], signal.SIGKILL)
        eventually(lambda: len(running.workers("shared")) == 3, 60)
        assert same(outputs(running, "shared", ROWS), outputs(eager, "gpu_network", ROWS))

        old = set(running.workers("shared"))
        os.kill(owner["pid"], signal.SIGKILL)
        answers = []
        while old & set(running.workers("shared")):
            answers += outputs(running, "shared", ROWS[:4])
        assert all(same([answer], outputs(eager, "gpu_network", [ROWS[place % 4]]))
                   for place, answer in list(enumerate(answers))[:8])  # fmt: skip
        assert len(running.workers("shared")) == 3
        (owner,) = running.describe("shared")["weightOwners"]
        assert owner["weights"] > large
        assert same(outputs(running, "shared", ROWS), outputs(eager, "gpu_network", ROWS))


def test_f107_a_batch_that_is_too_large_for_the_gpu_runs_in_halves(eager: Server) -> None:
    ask(eager, "gpu_faults", {})
    (pid,) = eager.workers("gpu_faults")
    replies = ask_at_once(eager, "gpu_faults", [{"allocate": 0.3}] * 3 + [{"allocate": 1.5}])
    assert [reply.status for reply in replies] == [200, 200, 200, 507]
    assert replies[-1].message == "out of memory"
    assert eager.workers("gpu_faults") == [pid]


def test_f108_a_fault_in_a_kernel_costs_the_worker_and_no_other_request(make_archive: MakeArchive) -> None:
    with server(make_archive("gpu_faults")) as running:
        (pid,) = running.workers("gpu_faults")
        reply = running.predict("gpu_faults", json.dumps({"assert": True}))
        assert reply.status == 500
        assert ask(running, "gpu_faults", {})["pid"] != pid


def test_f109_the_replacement_of_a_killed_worker_gets_the_memory_that_it_had(make_archive: MakeArchive) -> None:
    with server(make_archive("gpu_faults", holds=0.6)) as running:
        for _ in range(3):
            (pid,) = running.workers("gpu_faults")
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: set(running.workers("gpu_faults")) - {pid}, 60)  # noqa: B023
            assert ask(running, "gpu_faults", {})["pid"] != pid


def test_workers_with_a_restricted_file_system_use_their_gpu(make_archive: MakeArchive, eager: Server) -> None:
    with server(make_archive("gpu_network", model_name="boxed", worker_fs="restricted")) as running:
        assert same(outputs(running, "boxed", ROWS[:1]), outputs(eager, "gpu_network", ROWS[:1]))


def test_neither_the_server_nor_its_fork_server_touches_a_gpu(eager: Server) -> None:
    (forkserver,) = eager.named("mms-forkserver")
    used = gpus.memory_by_process(find_gpus())
    assert set(eager.workers("gpu_network")) <= used.keys()
    assert not {eager.pid, forkserver.pid} & used.keys()
