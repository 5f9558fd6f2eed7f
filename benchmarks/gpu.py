"""`python -m benchmarks.gpu`: three networks of random weights on one device, bare and through a worker's stages.

Each row is one network, way of launching (eager, compile, graphs), number of processes and of threads with a stream of
their own, and batch size: requests per second, latency of a batch, memory that the last of the processes has added,
and what goes through the stages of a worker (with one process and one thread, in turns) as a share of the bare loop.
torch only, nothing is downloaded. `--device cpu --quick` shows in seconds that it runs. `--shared` measures the memory
of 1 and 4 processes instead, with a copy of the weights each, and with those of one process more (share_weights).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from benchmarks.openloop import percentile

NETWORKS = ("mlp", "resnet50", "encoder")
VARIANTS = ("eager", "compile", "graphs")
BUDGET = 540.0  # seconds; what is left out then is said
WARM = 3  # batches before each measurement
TURNS = 5  # of ours and the bare loop

Command = dict[str, Any]


# the children: one process of the table each, which does what it reads on standard input


def child() -> None:
    """Runs in a process of its own: a line of JSON in, a line of JSON out."""
    state = Child()
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        command: Command = json.loads(line)
        answer = getattr(state, command.pop("do"))(**command)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # as owners and workers do: torch would miss the files that `lend` has taken out of /dev/shm


class Child:
    """One loaded network."""

    def load(
        self, *, network: str, variant: str, device: str, quick: bool, batches: list[int], weights: Any = None
    ) -> Any:
        """Load it as a worker would, warm, or use `weights` that another has lent; the bytes that this has added."""
        import benchmarks.gpu_networks  # noqa: F401  # torch itself is no network's memory
        from mms import wire
        from mms.backend.loader import load_handler
        from mms.backend.prepare import prepare
        from mms.backend.weights import Borrowed
        from mms.samples import WarmupSample

        self.stages: Any = None
        before = self._memory(device)
        load = wire.Load(
            model_name=network, version="1", directory=tempfile.gettempdir(), handler="benchmarks.gpu_networks:Network",
            manifest={}, model_config={"network": network, "quick": quick}, batch_size=max(batches),
            isolate_errors="false", gpu=0 if device == "cuda" else None, cpu_threads=1, max_request_size=1 << 20,
            max_response_size=1 << 20,
            preparation=wire.Preparation(
                warmup=(WarmupSample(file="/dev/null", count=WARM),),
                batch_sizes=tuple(batches),
                compile=variant == "compile",
                cuda_graphs=tuple(batches) if variant == "graphs" else (),
            ),
            weights=None if weights is None else msgspec.convert(weights, wire.Weights),
        )  # fmt: skip
        self.limit = load.max_request_size
        borrowed = Borrowed(load.weights)
        self.stages = load_handler(load, borrowed.are_lent)
        borrowed.put(self.stages.handler)
        if borrowed.fault:
            raise SystemExit(f"gpu: {borrowed.fault}")
        prepare(self.stages, load)
        return self._memory(device) - before

    def machine(self, *, device: str) -> str:
        """What is measured."""
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("gpu: torch sees no GPU; --device cpu --quick shows that this script runs")
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU of {platform.machine()}"
        return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"

    def lend(self) -> Any:
        """The weights, for `load` in another process."""
        from mms.backend.weights import offer

        return msgspec.to_builtins(offer(self.stages.handler))

    def bare(self, *, threads: int, batch: int, seconds: float) -> Any:
        """A loop of nothing but the network, in each of `threads`."""
        handler = self.stages.handler
        inputs = handler.inputs(batch)
        return self._measure(threads, seconds, lambda: handler.inference(inputs))

    def ours(self, *, batch: int, seconds: float) -> Any:
        """The same through the stages of a worker: requests in, answers out."""
        from mms import wire
        from mms.handler import Request

        facts = wire.RequestFactsView("", "", b"", False, wire.EMPTY_HEADERS)

        def run() -> None:
            self.stages.run([Request(facts, b"id", bytearray(), self.limit) for _ in range(batch)])

        return self._measure(1, seconds, run)

    def _measure(self, threads: int, seconds: float, run: Any) -> Any:
        """Batches per second, and the seconds that each took."""
        stream = self.stages.handler.stream
        times: list[float] = []
        rates: list[float] = []
        together = threading.Barrier(threads)

        def work() -> None:
            with stream():
                for _ in range(WARM):
                    run()
                together.wait()
                first = now = time.perf_counter()
                own = []
                while now - first < seconds:
                    begun = now
                    run()
                    now = time.perf_counter()
                    own.append(now - begun)
                times.extend(own)
                rates.append(len(own) / (now - first))

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return {"rate": sum(rates), "times": times}

    @staticmethod
    def _memory(device: str) -> int:
        """Bytes in use: of the whole GPU, or of this process alone. Children load one after the other."""
        if device == "cuda":
            import torch

            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            return int(total - free)
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


# the parent: asks the children, prints the table


class Process:
    """One child."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", "--child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in: IO[bytes] = self._process.stdin
        self._out: IO[bytes] = self._process.stdout

    def ask(self, do: str, **command: Any) -> None:
        self._in.write(json.dumps({"do": do, **command}).encode() + b"\n")
        self._in.flush()

    def answer(self) -> Any:
        line = self._out.readline()
        if not line:
            raise SystemExit(f"gpu: a process ended with status {self._process.wait()}; see above")
        return json.loads(line)

    def close(self) -> None:
        self._in.close()
        self._out.close()
        self._process.wait()


@dataclass(frozen=True)
class Row:
    """One line of the table; `share` only where it is measured."""

    network: str
    variant: str
    processes: int
    threads: int
    batch: int
    rate: float
    p50: float
    p99: float
    memory: int
    share: float | None

    def markdown(self) -> str:
        share = "" if self.share is None else f"{self.share:.0%}"
        return (
            f"| {self.network} | {self.variant} | {self.processes} | {self.threads} | {self.batch} | {self.rate:,.0f} "
            f"| {self.p50 * 1000:.2f} | {self.p99 * 1000:.2f} | {self.memory / (1 << 20):,.0f} | {share} |"
        )


HEAD = """| Network | Launch | Processes | Threads | Batch | Requests/s | p50 ms | p99 ms | MiB added | Ours / bare |
|---|---|---|---|---|---|---|---|---|---|"""


def rows(options: argparse.Namespace, count: int, variant: str) -> Iterator[Row]:
    """All rows of `count` processes that launch like that."""
    processes = [Process() for _ in range(count)]
    try:
        for network in options.networks:
            memory = 0
            for process in processes:
                process.ask(
                    "load", network=network, variant=variant, device=options.device, quick=options.quick,
                    batches=options.batches,
                )  # fmt: skip
                memory = process.answer()
            for threads in options.threads:
                for batch in options.batches:
                    yield row(options, processes, network, variant, threads, batch, memory)
    finally:
        for process in processes:
            process.close()


def row(
    options: argparse.Namespace,
    processes: list[Process],
    network: str,
    variant: str,
    threads: int,
    batch: int,
    memory: int,
) -> Row:
    for process in processes:
        process.ask("bare", threads=threads, batch=batch, seconds=options.seconds)
    answers = [process.answer() for process in processes]
    times = sorted(seconds for answer in answers for seconds in answer["times"])
    rate = sum(answer["rate"] for answer in answers)
    share = share_of(options, processes[0], batch) if len(processes) == threads == 1 else None
    return Row(network, variant, len(processes), threads, batch, rate * batch, percentile(times, 0.5),
               percentile(times, 0.99), memory, share)  # fmt: skip


def share_of(options: argparse.Namespace, process: Process, batch: int) -> float:
    """Ours by the bare loop, in turns: a launch costs CPU time, and the CPU has better and worse moments."""
    shares: list[float] = []
    for _ in range(TURNS):
        rates = []
        for do in ({"do": "ours"}, {"do": "bare", "threads": 1}):
            process.ask(**do, batch=batch, seconds=options.seconds / 2)
            rates.append(process.answer()["rate"])
        shares.append(rates[0] / rates[1])
    return statistics.median(shares)


SHARED_HEAD = """| Network | share_weights | MiB with 1 process | MiB with 4 | MiB that the last has added |
|---|---|---|---|---|"""


def shared_row(options: argparse.Namespace, network: str, *, shares: bool) -> str:
    """What 1 and 4 processes hold, with the owner of their weights if they share them; without CUDA's contexts."""
    processes = [Process() for _ in range(4 + shares)]
    how = {"network": network, "variant": "eager", "device": options.device, "quick": options.quick, "batches": [1]}
    try:
        held, weights = [], None
        for number, process in enumerate(processes):
            process.ask("load", **how, weights=weights)
            held.append(process.answer() / (1 << 20))
            if shares and not number:
                process.ask("lend")
                weights = process.answer()
    finally:
        for process in reversed(processes):  # the owner is the last
            process.close()
    sums = f"{sum(held[: 1 + shares]):,.0f} | {sum(held):,.0f} | {held[-1]:,.0f}"
    return f"| {network} | {str(shares).lower()} | {sums} |"


def words(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks, eager, one process")
    parser.add_argument("--shared", action="store_true", help="memory with and without share_weights")
    parser.add_argument("--networks", type=words, default=list(NETWORKS))
    parser.add_argument("--variants", type=words, help="of eager, compile, graphs")
    parser.add_argument("--processes", type=numbers)
    parser.add_argument("--threads", type=numbers, default=[1, 2, 4])
    parser.add_argument("--batches", type=numbers)
    parser.add_argument("--seconds", type=float, help="per row")
    options = parser.parse_args()
    if options.child:
        child()
        return
    quick = options.quick
    options.variants = options.variants or (["eager"] if quick else [*VARIANTS[: 3 if options.device == "cuda" else 2]])
    options.processes = options.processes or ([1] if quick else [1, 2, 4])
    options.batches = options.batches or ([1, 2] if quick else [1, 8, 32])
    options.seconds = options.seconds or (0.02 if quick else 0.5)
    first = Process()
    first.ask("machine", device=options.device)
    print(f"{first.answer()}\n")
    first.close()
    until = time.monotonic() + BUDGET
    if options.shared:
        print(SHARED_HEAD)
        for network in options.networks:
            for shares in (False, True):
                print(shared_row(options, network, shares=shares), flush=True)
        return
    print(HEAD)
    for count in options.processes:
        for variant in options.variants:
            for found in rows(options, count, variant):
                print(found.markdown(), flush=True)
                if time.monotonic() > until:
                    sys.exit(f"gpu: {BUDGET:g} s are over at {count} processes, {variant}; name fewer rows")


if __name__ == "__main__":
    main()
