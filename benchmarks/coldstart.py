"""`make bench-cold`: how long a start takes until the first right answer, and what a live load costs."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from mms_nginx import find_nginx

from benchmarks.engine import efficientnet, jpeg
from benchmarks.figures import Bench, Figure
from benchmarks.models import Model, management, package, spec
from benchmarks.servers import Server, Spec, running, server_environment
from benchmarks.suite import Scenario, main

POLL = 0.005  # seconds; a client that asks more often takes a good part of a core from the server that starts
LOADS = 0.2  # seconds that benchmarks/handlers/torch_model.py takes
PLAIN_BAR = 0.6
DEMO_BAR = 1.0
SECOND_BAR = 0.5
BESIDE_BAR = 1.5
FAST = Model("fast", config={"device_model": {"inference": 2}})  # ms


def plain(bench: Bench) -> Iterator[Figure]:
    """From the start of the process to the first right answer, a model without torch."""
    for edge in ("none", "nginx"):
        what = f"a model without torch, {'behind nginx' if edge == 'nginx' else 'without nginx'}"
        if edge == "nginx" and find_nginx("nginx") is None:
            print(f"  not measured: {what}: nginx is not installed", file=sys.stderr)
            continue
        server = spec("plain", [Model("plain")], edge=edge, workers=1)
        first_answer(server)  # compiles its modules, which users have compiled
        figure, detail = middle([first_answer(server) for _ in range(bench.repeat)])
        yield Figure(what, detail, figure, PLAIN_BAR, least=False)


def demo(bench: Bench) -> Iterator[Figure]:
    """The same for the image classification example, beside the imports that it needs in a bare interpreter."""
    missing = [name for name in ("torch", "torchvision") if importlib.util.find_spec(name) is None]
    if "torch" in missing:
        print("  not measured: torch is not installed", file=sys.stderr)
        return
    modules = "torch" if missing else "torch, torchvision"
    if missing:
        server = spec("torch", [Model("torch", "torch_model.py:TorchModel", {"preload": ["torch"]})], workers=1)
    else:
        archive, photo = efficientnet(bench.folder), jpeg(bench.folder)
        server = spec("demo", [], archives=[archive], body=photo.read_bytes(), workers=1)
    first_answer(server)
    beyond, details = [], []
    for _ in range(bench.repeat):
        bare = import_time(modules)
        took = first_answer(server)
        beyond.append(took - bare)
        details.append(f"{took:.2f} s, import {modules} {bare:.2f} s")
    what = "a torch model (no torchvision here)" if missing else "the image classification example"
    figure = statistics.median(beyond)
    yield Figure(f"{what}, beyond the imports", details[beyond.index(nearest(beyond))], figure, DEMO_BAR, least=False)


def second(bench: Bench) -> Iterator[Figure]:
    """A second version of a torch model is registered live; a model of 2 ms is asked meanwhile."""
    model = Model("torch", "torch_model.py:TorchModel", {"preload": ["torch"]})
    with running(spec("live", [FAST, model], workers=1)) as server:
        package(dataclasses.replace(model, version="2.0"), bench.folder)
        shutil.move(bench.folder / "torch.mar", server.folder / "second.mar")
        bench.load(server, 1)
        load = partial(registered_after, server, "url=second.mar", "torch/2.0")
        figure, detail = middle([load() - LOADS for _ in range(max(1, round(bench.seconds * bench.repeat)))])
        yield Figure("a second version, live, beyond its load time", detail, figure, SECOND_BAR, least=False)
        yield bench.beside("another model meanwhile", server, partial(repeated, load), BESIDE_BAR)


def beside_example(bench: Bench) -> Iterator[Figure]:
    """A model of 2 ms is asked while the image classification example is loaded and removed, again and again."""
    missing = [name for name in ("torch", "torchvision") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"  not measured: {' and '.join(missing)} not installed", file=sys.stderr)
        return
    archive = efficientnet(bench.folder)
    with running(spec("example", [FAST], archives=[archive], workers=1)) as server:
        bench.load(server, 1)
        load = partial(registered_after, server, f"url={archive.name}&model_name=second", "second")
        yield bench.beside("another model, while the example is loaded", server, partial(repeated, load), BESIDE_BAR)


SCENARIOS: dict[str, Scenario] = {"plain": plain, "demo": demo, "second": second, "beside-example": beside_example}


def first_answer(server: Spec) -> float:
    """Seconds from the start of the process to the first right answer."""
    with running(dataclasses.replace(server, ping=""), POLL) as started:
        return started.ready_after


def import_time(modules: str) -> float:
    """Seconds that a bare interpreter takes to start, import the modules and end."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", f"import os, {modules}; os._exit(0)"], env=server_environment(), check=True)
    return time.monotonic() - begun


def registered_after(server: Server, query: str, name: str) -> float:
    """Seconds from the call that registers it to the answer; the model or version is gone afterwards."""
    begun = time.monotonic()
    management(server, "POST", f"/models?{query}&synchronous=true&min_workers=1")
    took = time.monotonic() - begun
    management(server, "DELETE", f"/models/{name}")
    return took


@contextmanager
def repeated(load: Callable[[], float]) -> Iterator[None]:
    """Registers something and removes it, again and again, while the body runs."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.is_set():
            load()

    with ThreadPoolExecutor(1) as executor:
        loads = executor.submit(repeat)
        try:
            yield
        finally:
            ended.set()
        loads.result()


def nearest(values: Sequence[float]) -> float:
    """The one of them that is nearest to their median."""
    return min(values, key=lambda value: abs(value - statistics.median(values)))


def middle(seconds: Sequence[float]) -> tuple[float, str]:
    """The median, and what it is the median of."""
    return statistics.median(seconds), f"{min(seconds):.2f} to {max(seconds):.2f} s, in seconds"


if __name__ == "__main__":
    sys.exit(main("coldstart", "Cold start", __doc__, SCENARIOS))
