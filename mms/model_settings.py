"""The settings of a model, each documented where it is defined, and how a file or a call changes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mms.caching import CacheSettings, parse_cache
from mms.errors import ConfigError
from mms.instances import MAX_AT_A_TIME, Groups, parse_instances
from mms.instances import gpus as parse_gpus
from mms.samples import WarmupSample, parse_samples
from mms.setting import (
    MAX_BATCH,
    MAX_QUEUE,
    nearest,
    one_of,
    parse_batch_sizes,
    parse_boolean,
    parse_integer,
    parse_milliseconds,
    parse_number,
    parse_output,
    parse_queue_sizes,
    parse_setting,
    parse_words,
    setting,
    shown,
)
from mms.sizes import parse_size

MAX_WORKERS = 1024
MAX_THREADS = 1024
MAX_PRIORITIES = 16
MAX_TIMEOUT = 86_400  # seconds: beyond a day nobody waits


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How one model version is served: server defaults < model-config.yaml in the archive < the registration call.

    Durations are seconds here; `max_batch_delay` is given in milliseconds in every file and call, as MMS users know it.
    """

    batch_size: int = setting(
        1, parse_integer, "most requests that one call of the handler gets", low=1, high=MAX_BATCH
    )
    max_batch_delay: float = setting(
        0.0, parse_milliseconds, "milliseconds an idle worker waits for a fuller batch (0: takes what is there)", low=0
    )
    min_workers: int = setting(
        -1,
        parse_integer,
        "workers to run (-1: as instances say, else one per GPU, without GPUs one per core)",
        low=-1,
        high=MAX_WORKERS,
    )
    max_workers: int = setting(
        -1,
        parse_integer,
        "workers to run while there is work for them; above min_workers it turns autoscaling on (-1: as min_workers)",
        low=-1,
        high=MAX_WORKERS,
    )
    scale_up_after: float = setting(
        2.0, parse_number, "autoscaling: seconds of too much work before workers are added", low=0.001, high=3600
    )
    scale_down_after: float = setting(
        60.0,
        parse_number,
        "autoscaling: seconds in which fewer workers were enough before some go",
        low=0.001,
        high=86400,
    )
    scale_to_zero_after: float = setting(
        0.0, parse_number, "with min_workers 0: seconds without a request after which all workers go (0: never)", low=0
    )
    load_on_request: bool = setting(
        False, parse_boolean, "with min_workers 0: the first request starts a worker and waits for it in the queue"
    )
    response_timeout: float = setting(
        120.0,
        parse_number,
        "seconds one batch, or a chunk of its streams, may take before its worker is killed",
        low=0.001,
    )
    startup_timeout: float = setting(300.0, parse_number, "seconds a worker may take to load", low=0.001)
    queue_size: int = setting(
        100, parse_integer, "requests that may wait; one more is refused with 429", low=1, high=MAX_QUEUE
    )
    queue_bytes: int = setting(512 << 20, parse_size, "bytes of bodies that may wait; beyond that 429", low=1)
    queue_timeout: float = setting(60.0, parse_number, "seconds a request may wait for a worker; then 504", low=0.001)
    queue_order: str = setting(
        "adaptive",
        one_of("adaptive", "fifo"),
        "which request is served next (adaptive: the oldest, or while the queue does not empty any more the newest)",
    )
    preferred_batch_sizes: tuple[int, ...] = setting(
        (), parse_batch_sizes, "batch sizes that are better than others: the largest for which enough wait is taken"
    )
    request_timeout: float = setting(
        0.0,
        parse_number,
        "seconds after its arrival in which a request must be answered, else 504 (0: no such limit)",
        low=0,
        high=MAX_TIMEOUT,
    )
    priority_levels: int = setting(
        1, parse_integer, "priorities that a request may have, 1 is the highest", low=1, high=MAX_PRIORITIES
    )
    default_priority: int = setting(
        0, parse_integer, "priority of a request that asks for none (0: the middle one)", low=0, high=MAX_PRIORITIES
    )
    priority_queue_sizes: tuple[int, ...] = setting(
        (), parse_queue_sizes, "requests of each priority that may wait, from the highest on (0: as many as queue_size)"
    )
    latency_objective_ms: float = setting(
        0.0,
        parse_number,
        "milliseconds in which 99 % of the requests are to be answered; the batch size follows from it (0: none)",
        low=0,
        high=MAX_TIMEOUT * 1000,
    )
    default_output: Any = setting(None, parse_output, "answer to give in place of one that would miss the objective")
    default_on_miss: bool = setting(
        False, parse_boolean, "answer with default_output as soon as the objective is missed, or could only be"
    )
    retry: int = setting(1, parse_integer, "times a request is run again after its worker died (0 or 1)", low=0, high=1)
    isolate_errors: str = setting(
        "auto",
        one_of("auto", "true", "false"),
        "when a whole batch fails, run its halves to find the guilty request (auto: for request-style handlers)",
    )
    device: str = setting(
        "auto", one_of("auto", "cpu", "gpu"), "where the workers run (auto: GPUs where there are any)"
    )
    gpus: tuple[int | str, ...] = setting(
        (), parse_gpus, "the GPUs to spread the workers over, by number or UUID (empty: all)"
    )
    instances: Groups = setting(
        (), parse_instances, "groups of workers and their devices, instead of device and gpus (empty: one group)"
    )
    cpu_threads: int = setting(
        0,
        parse_integer,
        "CPU threads per worker (0: its share when it starts, cores / workers)",
        low=0,
        high=MAX_THREADS,
    )
    threads: int = setting(
        1, parse_integer, "batches that a worker runs at a time, with one copy of the model", low=1, high=MAX_AT_A_TIME
    )
    preprocess_threads: int = setting(
        -1,
        parse_integer,
        "threads in which a worker prepares requests while batches run (request style; -1: 2 on a GPU, else 0)",
        low=-1,
        high=MAX_AT_A_TIME,
    )
    preload: tuple[str, ...] = setting(
        (), parse_words, "modules that the fork server imports before the workers are forked"
    )
    max_requests: int = setting(
        0, parse_integer, "requests after which a worker is replaced by a new one (0: never)", low=0
    )
    max_rss: int = setting(
        0, parse_size, "resident memory above which a worker is replaced by a new one (0: no bound)", low=0
    )
    warmup: tuple[WarmupSample, ...] = setting(
        (), parse_samples, "requests that each worker runs before it is ready: files of the archive, or shapes"
    )
    compile: bool = setting(
        False, parse_boolean, "torch.compile the networks that a request-style handler has loaded; a warmup triggers it"
    )
    cuda_graphs: tuple[int, ...] = setting(
        (), parse_batch_sizes, "batch sizes whose CUDA graphs the warmup captures (request style, on GPUs)"
    )
    share_weights: bool = setting(
        False,
        parse_boolean,
        "load once, one copy of the weights: workers on the CPU are forked from it, those on one GPU borrow it",
    )
    worker_fs: str = setting(
        "open",
        one_of("open", "restricted"),
        "restricted: workers read the system, Python and their archive, and write only their temporary folder",
    )
    worker_network: str = setting("open", one_of("open", "none"), "none: workers can open no network sockets")
    worker_memory: int = setting(
        0, parse_size, "address space that a worker may use, for models on CPUs (0: no bound); prefer max_rss", low=0
    )
    cache: CacheSettings | None = setting(
        None,
        parse_cache,
        "keep answers and give them to identical requests: {size: 64MiB, ttl_s: 60, headers: []} (empty: off)",
    )

    @property
    def worker_limit(self) -> int:
        return max(self.min_workers, self.max_workers, int(self.load_on_request))


_ALIASES = {  # TorchServe's spelling in model-config.yaml -> ours
    "batchSize": "batch_size",
    "maxBatchDelay": "max_batch_delay",
    "minWorkers": "min_workers",
    "maxWorkers": "max_workers",
    "responseTimeout": "response_timeout",
    "startupTimeout": "startup_timeout",
    "jobQueueSize": "queue_size",
    "deviceType": "device",
    "deviceIds": "gpus",
}


_NOT_PARALLEL = (None, "", "none")  # of TorchServe's parallelType


def merge_settings(base: ModelSettings, changes: Mapping[str, Any], origin: str, *, strict: bool) -> ModelSettings:
    """`base` with `changes` on top (TorchServe's spellings are understood).

    With strict, an unknown key raises ConfigError; without, it is left to the handler (model-config.yaml holds both).
    `instances` and the pair `device` and `gpus` are two answers to one question: the later one replaces the other, and
    new `instances` the numbers of workers, too.
    """
    known = [f.name for f in fields(ModelSettings)]
    values: dict[str, Any] = {}
    given: dict[str, str] = {}  # setting -> how it is spelt
    for key, value in changes.items():
        if key == "parallelType" and value not in _NOT_PARALLEL:
            raise ConfigError(f"{origin}: parallelType = {shown(value)}: a worker has one GPU; it cannot be split")
        name = _ALIASES.get(key, key)
        if name in known:
            values[name] = parse_setting(ModelSettings, name, value, origin, called=key)
            given[name] = key
        elif strict:
            raise ConfigError(f"{origin}: unknown setting {key}{nearest(key, known)}")
    devices = [given[name] for name in ("device", "gpus") if values.get(name) not in (None, "auto", ())]
    if values.get("instances"):
        if devices:
            raise ConfigError(f"{origin}: instances say where the workers run, and so does {devices[0]}: one must go")
        values = {"device": "auto", "gpus": (), "min_workers": -1, "max_workers": -1, **values}
    elif devices:
        values = {"instances": (), **values}
    merged = dataclasses.replace(base, **values)
    _check_scheduling(merged, origin)
    if merged.max_workers != -1 and merged.max_workers < merged.min_workers:
        raise ConfigError(f"{origin}: max_workers {merged.max_workers} is less than min_workers {merged.min_workers}")
    return merged


def _check_scheduling(settings: ModelSettings, origin: str) -> None:
    """Raises ConfigError when settings do not fit together."""
    levels, sizes, preferred = settings.priority_levels, settings.priority_queue_sizes, settings.preferred_batch_sizes
    problem = ""
    unbounded = settings.latency_objective_ms and settings.batch_size == 1
    if preferred and preferred[-1] > settings.batch_size and not unbounded:
        problem = f"preferred_batch_sizes has {preferred[-1]}, but batch_size is {settings.batch_size}"
    elif settings.default_priority > levels:
        problem = f"default_priority {settings.default_priority} is more than priority_levels {levels}"
    elif sizes and len(sizes) != levels:
        problem = f"priority_queue_sizes has {len(sizes)} numbers, but priority_levels is {levels}: one each is needed"
    elif settings.default_on_miss and not settings.latency_objective_ms:
        problem = "default_on_miss needs latency_objective_ms, which says when to give the default"
    elif settings.default_on_miss and settings.default_output is None:
        problem = "default_on_miss needs default_output, the answer to give"
    if problem:
        raise ConfigError(f"{origin}: {problem}")
