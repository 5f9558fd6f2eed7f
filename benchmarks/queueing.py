"""The scenarios of `benchmarks.engine` about what happens before a worker: batch size, priority, cache."""

from __future__ import annotations

import asyncio
import http.client
import statistics
import time
from collections.abc import Iterator, Sequence

import psutil

from benchmarks.figures import Bench, Figure, background
from benchmarks.load import LoadError
from benchmarks.models import Model, change, metric, spec, workers
from benchmarks.openloop import LATENESS, Phase, Request, lateness, percentile, run
from benchmarks.servers import Server, ServerError, running

OBJECTIVE = 0.050
DEVICE = {"inference": 10, "item": 1}  # a batch of n takes 10 ms + n ms
FIXED = (8, 12, 13, 14)  # batch sizes, with as many that wait: two batches of 15 take the whole objective
RISING = (120, 240, 360, 480, 600, 720, 840)  # requests per second; a batch of 14 serves 583
OVERLOADED = 2  # of these steps, the last ones, are more than any batch size serves in time
TRIES = 3  # to get a run in which the generator was in time

BATCH = 0.2
WAITING = 32
TURN = 0.05  # of a batch, for a request's way to the server, to the worker, and back

ALIKE = 100
PREPROCESS = 0.002


def objective(bench: Bench) -> Iterator[Figure]:
    """A batch size that follows a latency objective, beside fixed ones, under a rising load."""
    adaptive = Model("adaptive", config={"device_model": DEVICE, "latency_objective_ms": OBJECTIVE * 1000})
    fixed = Model("fixed", config={"device_model": DEVICE})
    slowest, shares, rate, best, size, latest = [], [], 0.0, 0.0, 0, 0.0
    with running(spec("objective", [adaptive, fixed], workers=1)) as server:
        for seed in range(bench.repeat):
            rates = []
            for batch in FIXED:
                change(server, "fixed", batch_size=batch, queue_size=batch)
                p99, served, _ = _rising(server, "fixed", bench.seconds, seed)
                if p99 <= OBJECTIVE:
                    rates.append((served, batch))
            if not rates:
                raise LoadError("no fixed batch size holds the objective; the machine is too busy")
            best, size = max(rates)
            p99, rate, late = _rising(server, "adaptive", bench.seconds, seed)
            latest = max(latest, late)
            slowest.append(p99)
            shares.append(rate / best)
    p99 = statistics.median(slowest)
    void = f"; void: the generator was {latest * 1000:.1f} ms late" if latest > LATENESS else ""
    detail = f"p99 {p99 * 1000:.1f} ms under a rising load{void}"
    yield Figure("latency_objective_ms: 50", detail, p99 / OBJECTIVE, 1.0, least=False)
    detail = f"{rate:.0f}/s, batches of {size} {best:.0f}/s"
    yield Figure("its throughput, of the best fixed batch size's", detail, statistics.median(shares), 0.9)


def _rising(server: Server, model: str, seconds: float, seed: int) -> tuple[float, float, float]:
    """p99 of those who were answered, answers per second in the steps that are too much, lateness of the generator."""
    requests = _offer(server, model, [Phase(rate, seconds / 2) for rate in RISING], seed)
    answered = [request for request in requests if request.status == 200]
    begun, end = (len(RISING) - OVERLOADED) * seconds / 2, len(RISING) * seconds / 2
    served = sum(begun <= request.scheduled + request.took < end for request in answered)
    return percentile([request.took for request in answered], 0.99), served / (end - begun), lateness(requests)


def _offer(server: Server, model: str, phases: Sequence[Phase], seed: int) -> list[Request]:
    """A run in which the generator was in time, or else the best of some."""
    best: list[Request] = []
    for _ in range(TRIES):
        requests = run(server.port, f"/predictions/{model}", phases, seed)
        if not best or lateness(requests) < lateness(best):
            best = requests
        if lateness(best) <= LATENESS:
            break
    return best


def priority(bench: Bench) -> Iterator[Figure]:
    """Requests of high priority, while the queue is full of low ones."""
    config = {"batch_size": 4, "queue_size": WAITING, "priority_levels": 2, "device_model": {"inference": 1000 * BATCH}}
    waits = []
    with running(spec("priority", [Model("device", config=config)], workers=1)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        with background(server, bench, "device", connections=WAITING + 4):
            _await_full(server, "device")
            until = time.monotonic() + bench.seconds
            while time.monotonic() < until:
                begun = time.monotonic()
                connection.request("POST", server.spec.path, b"high", {"x-request-priority": "1"})
                response = connection.getresponse()
                response.read()
                waits.append((time.monotonic() - begun - BATCH) / BATCH)
                if response.status != 200:
                    raise LoadError(f"a request of high priority was answered {response.status}")
        connection.close()
    detail = f"the longest of {len(waits)}, in batches of {1000 * BATCH:.0f} ms; {WAITING} low ones wait"
    yield Figure("wait of a high priority", detail, max(waits), 1 + TURN, least=False)


def _await_full(server: Server, model: str) -> None:
    until = time.monotonic() + 10
    while metric(server, "mms_queue_depth", model) < WAITING:
        if time.monotonic() > until:
            raise ServerError("the queue does not fill")
        time.sleep(0.01)


def cache(bench: Bench) -> Iterator[Figure]:
    """Requests that the cache answers, and identical ones in flight."""
    cached = Model("cached", config={"cache": {}, "device_model": {"preprocess": 1000 * PREPROCESS}})
    slow = Model("slow", config={"cache": {}, "device_model": {"inference": 500}})
    with running(spec("cache", [cached, slow], workers=1)) as server:
        bench.load(server, 1)  # the first of them is run
        before = _worker_seconds(server)
        load = bench.load(server, 16)
        seconds = _worker_seconds(server) - before
        handled = metric(server, "mms_batch_size_sum", "slow")
        answers = asyncio.run(_together(server, "slow"))
        runs = metric(server, "mms_batch_size_sum", "slow") - handled
    if answers != [200] * ALIKE:
        raise LoadError(f"of {ALIKE} identical requests, {answers.count(200)} were answered 200")
    detail = f"{load.requests / load.seconds:.0f}/s, of what a request costs a worker otherwise"
    yield Figure("worker time of a cached request", detail, seconds / load.requests / PREPROCESS, 0.001, least=False)
    yield Figure(f"{ALIKE} identical requests in flight", "are so many in the handler", runs, 1, least=False)


def _worker_seconds(server: Server) -> float:
    """CPU time that the workers have used."""
    times = [psutil.Process(worker["pid"]).cpu_times() for worker in workers(server)]
    return sum(time.user + time.system for time in times)


async def _together(server: Server, model: str) -> list[int]:
    """Send the same request on so many connections at once; the statuses."""
    message = b"POST /predictions/%b HTTP/1.1\r\nHost: bench\r\nConnection: close\r\nContent-Length: 5\r\n\r\nalike"

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(message % model.encode())
        answer = await reader.read()
        writer.close()
        return int(answer[9:12])

    return await asyncio.gather(*(one() for _ in range(ALIKE)))
