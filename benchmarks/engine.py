"""`make bench-engine`: what the execution engine gets out of the hardware, as ratios within one run; needs wrk."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil

from benchmarks import queueing
from benchmarks.figures import Bench, Figure, background
from benchmarks.models import Model, change, spec, workers
from benchmarks.servers import Server, ServerError, running, server_environment
from benchmarks.suite import Scenario, main
from mms.archive import ModelArchive
from mms.workers.environment import thread_counts

PACKAGE = Path(__file__).parents[1] / "examples" / "image_classification" / "package.py"
LAST_DEATH_FORGOTTEN = 11.0  # seconds: a death so soon after another one is followed by a pause
REPLACED_WITHIN = 30.0
BESIDE = 1.5  # times as long as alone
NETWORK_SECONDS = 20.0  # at least: a batch of 8 takes half a second, and what is not ended at the end does not count
CORES = len(os.sched_getaffinity(0))


def overlap(bench: Bench) -> Iterator[Figure]:
    """preprocess costs as much as inference on the device."""
    times = {"preprocess": 5, "item": 5}
    serial = Model("device", config={"batch_size": 8, "device_model": times, "preprocess_threads": 0})
    overlapped = Model("device", config={"batch_size": 8, "device_model": times, "preprocess_threads": 1})
    with running(spec("serial", [serial], workers=1)) as one, running(spec("overlap", [overlapped], workers=1)) as two:
        rate, base, ratio = bench.rates(two, one, 32)
    yield Figure("overlap of preprocess and inference", f"{rate:.0f}/s, serial {base:.0f}/s", ratio, 1.8)


def threads(bench: Bench) -> Iterator[Figure]:
    """Four batches at a time on the device, with one copy of the weights."""
    config = {"device_model": {"inference": 20, "megabytes": 200}, "preprocess_threads": 0}
    with (
        running(spec("1 thread", [Model("device", config={**config, "threads": 1})], workers=1)) as one,
        running(spec("4 threads", [Model("device", config={**config, "threads": 4})], workers=1)) as four,
    ):
        rate, base, ratio = bench.rates(four, one, 16)
        memory = worker_memory(four) / worker_memory(one)
    yield Figure("threads: 4 against one", f"{rate:.0f}/s, one thread {base:.0f}/s", ratio, 3.8)
    yield Figure("memory of threads: 4 against one", "resident, a model of 200 MiB", memory, 1.1, least=False)


def neighbours(bench: Bench) -> Iterator[Figure]:
    """A slow model beside a fast one, in turns of a second, so that what else the machine does meets both alike."""
    fast = Model("fast", config={"device_model": {"inference": 2}})
    slow = Model("slow", config={"device_model": {"inference": 200}})
    with running(spec("two models", [fast, slow], workers=1)) as server:
        bench.load(server, 1, model="fast")
        slow_one = partial(background, server, bench, "slow")
        yield bench.beside("a model of 2 ms beside one of 200 ms", server, slow_one, BESIDE, model="fast")


def network(bench: Bench) -> Iterator[Figure]:
    """EfficientNet-Lite0: JPEG in, top 5 out, beside the same work in a bare loop on as many cores."""
    archive, photo = efficientnet(bench.folder), jpeg(bench.folder)
    folder = bench.folder / "extracted"
    seconds = max(bench.seconds, NETWORK_SECONDS)
    ModelArchive.open(archive).extract(folder)
    for batch in (1, 8):
        with running(spec(f"batch {batch}", [], archives=[archive], body=photo.read_bytes(), workers=CORES)) as server:
            change(server, archive.stem, batch_size=batch)
            ratios = []
            for _ in range(bench.repeat):
                base = bare(folder, photo, batch, seconds)
                load = bench.load(server, 2 * CORES * batch, body=photo, seconds=seconds)
                rate = load.requests / load.seconds
                ratios.append(rate / base)
        detail = f"{rate:.0f}/s, bare loop {base:.0f}/s on {CORES} cores"
        yield Figure(f"EfficientNet-Lite0, batch {batch}", detail, statistics.median(ratios), 0.95)


def replacement(bench: Bench) -> Iterator[Figure]:
    """A torch worker is killed: seconds until its replacement is ready, the model loading for 0.2 s."""
    model = Model("torch_model", "torch_model.py:TorchModel", {"preload": ["torch"]})
    seconds = []
    with running(spec("torch", [model], workers=1)) as server:
        for _ in range(bench.repeat):
            seconds.append(replaced_after(server))
            time.sleep(LAST_DEATH_FORGOTTEN)
    figure = statistics.median(seconds)
    yield Figure("a killed torch worker is replaced", f"after {figure:.2f} s, in seconds", figure, 0.5, least=False)


SCENARIOS: dict[str, Scenario] = {
    "overlap": overlap,
    "threads": threads,
    "neighbours": neighbours,
    "network": network,
    "replacement": replacement,
    "objective": queueing.objective,
    "priority": queueing.priority,
    "cache": queueing.cache,
}


def worker_memory(server: Server) -> int:
    return psutil.Process(workers(server)[0]["pid"]).memory_info().rss


def replaced_after(server: Server) -> float:
    """Seconds from the death of the only worker until another one is ready."""
    (worker,) = workers(server)
    os.kill(worker["pid"], signal.SIGKILL)
    begun = time.monotonic()
    while time.monotonic() - begun < REPLACED_WITHIN:
        if [other for other in workers(server) if other["pid"] != worker["pid"]]:
            return time.monotonic() - begun
        time.sleep(0.005)
    raise ServerError(f"no new worker within {REPLACED_WITHIN:g} s")


def efficientnet(folder: Path) -> Path:
    """The archive of the image classification example. Raises ServerError."""
    command = [sys.executable, str(PACKAGE), "--export-path", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=server_environment())
    if done.returncode != 0:
        raise ServerError(f"the network cannot be packaged: {done.stderr.strip()}")
    return next(folder.glob("*.mar"))


def jpeg(folder: Path) -> Path:
    """A photo, as clients send them."""
    import skimage
    from PIL import Image

    path = folder / "photo.jpg"
    Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png").convert("RGB").save(path, quality=90)
    return path


def bare(folder: Path, photo: Path, batch: int, seconds: float) -> float:
    """Requests per second of bare loops, one per core, that begin together."""
    command = [sys.executable, "-m", "benchmarks.bare", str(folder), str(photo), str(batch), str(seconds)]
    loops = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=server_environment() | thread_counts(1),
        )
        for _ in range(CORES)
    ]
    try:
        for loop in loops:
            assert loop.stdout is not None
            if loop.stdout.readline() != "warm\n":
                raise ServerError("the bare loop does not run")
        for loop in loops:
            assert loop.stdin is not None
            loop.stdin.write("go\n")
            loop.stdin.flush()
        return sum(float(loop.communicate()[0]) for loop in loops)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


if __name__ == "__main__":
    sys.exit(main("engine", "The execution engine", __doc__, SCENARIOS))
