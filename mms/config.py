"""All settings of a server and of a model: one frozen Config of defaults < file < MMS_* environment < command line.

Each setting is documented where it is defined; the command line, the environment and `mms config` are derived from it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mms.caching import CacheSettings, parse_cache
from mms.errors import ConfigError
from mms.folders import default_cache_dir, default_run_dir, default_state
from mms.instances import MAX_AT_A_TIME, Groups, parse_instances
from mms.instances import gpus as parse_gpus
from mms.safe_yaml import read_yaml
from mms.samples import WarmupSample, parse_samples
from mms.setting import (
    MAX_BATCH,
    MAX_QUEUE,
    nearest,
    one_of,
    parse_address,
    parse_batch_sizes,
    parse_boolean,
    parse_integer,
    parse_milliseconds,
    parse_models,
    parse_networks,
    parse_number,
    parse_origins,
    parse_output,
    parse_path,
    parse_paths,
    parse_queue_sizes,
    parse_setting,
    parse_text,
    parse_words,
    setting,
    shown,
)
from mms.sizes import parse_size
from mms.token import VARIABLES

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


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one server."""

    model_store: Path | None = setting(None, parse_path, "folder of the archives")
    models: tuple[str, ...] = setting((), parse_models, "what to serve at start: a.mar, name=b.mar, or ALL")
    inference_address: str = setting(
        "127.0.0.1:8080", parse_address, "where clients send predictions: host:port or unix:/path"
    )
    management_address: str = setting(
        "127.0.0.1:8081", parse_address, "where models are registered and scaled; keep it private"
    )
    management_token_file: Path | None = setting(
        None, parse_path, "file (mode 0600) with the token that every management call must bring"
    )
    inference_token_file: Path | None = setting(
        None, parse_path, "file (mode 0600) with the token that every prediction must bring (empty: none is needed)"
    )
    management_hosts: tuple[str, ...] = setting(
        (), parse_words, "names by which the management port may be called, beside its address and localhost"
    )
    metrics_address: str = setting("127.0.0.1:8082", parse_address, "where Prometheus scrapes /metrics")
    tls_cert: Path | None = setting(
        None,
        parse_path,
        "certificate chain (PEM): nginx speaks TLS on the inference port, and on a public management port",
    )
    tls_key: Path | None = setting(None, parse_path, "the certificate's private key (PEM, mode 0600)")
    edge: str = setting(
        "auto",
        one_of("auto", "nginx", "none"),
        "nginx in front, or the front end alone (auto: nginx where it is installed)",
    )
    nginx: str = setting("nginx", parse_text, "the nginx program")
    run_dir: Path = setting(None, parse_path, "folder for sockets, pid file and logs")
    cache_dir: Path = setting(
        None,
        parse_path,
        "folder on disk for extracted archives, their requirements and request bodies that nginx spools",
    )
    state: Path = setting(
        None, parse_path, "file that keeps what is registered, for the next start (a path in cache_dir unless set)"
    )
    access_log: Path | None = setting(
        None, parse_path, "nginx writes a line of JSON per request to this file (SIGUSR1 opens it anew)"
    )
    log_level: str = setting("info", one_of("debug", "info", "warning", "error"), "how much is logged")
    log_file: Path | None = setting(None, parse_path, "log to this file instead of standard error (rotated at 100 MB)")
    max_request_size: int = setting(100 << 20, parse_size, "largest request body, before and after unpacking", low=1)
    max_response_size: int = setting(
        100 << 20, parse_size, "largest answer of a handler, or chunk of a streamed one", low=1
    )
    max_connections: int = setting(10_000, parse_integer, "connections the front end holds open", low=1)
    max_bytes_in_flight: int = setting(
        0, parse_size, "bytes of requests and answers that the front end holds (0: a quarter of the memory)", low=0
    )
    header_timeout: float = setting(
        10.0, parse_number, "seconds a client may take to send a request's headers", low=0.001
    )
    body_timeout: float = setting(
        60.0,
        parse_number,
        "seconds a client may pause while it sends a body, or take for 64 KiB of an answer",
        low=0.001,
    )
    keepalive_timeout: float = setting(
        75.0, parse_number, "seconds an idle connection stays open (behind nginx, nginx decides)", low=0.001
    )
    drain_delay: float = setting(
        0.0,
        parse_number,
        "seconds at stop in which /readyz says 503 and the ports stay open, for load balancers",
        low=0,
    )
    drain_timeout: float = setting(
        30.0, parse_number, "seconds that requests in hand get to finish at stop and unload", low=0
    )
    stop_grace: float = setting(
        5.0, parse_number, "seconds a worker gets to leave by itself before it is killed", low=0
    )
    parallel_loads: int = setting(4, parse_integer, "workers that may load at the same time", low=1, high=MAX_WORKERS)
    verify_archives: bool = setting(
        True, parse_boolean, "compare every file with the manifest's SHA-256 before it is used"
    )
    trusted_keys: Path | None = setting(
        None, parse_path, "file of public keys (PEM); then only archives that one of them has signed are served"
    )
    allowed_urls: tuple[str, ...] = setting(
        (), parse_origins, "where archives may be downloaded from, such as https://models.example.com (empty: nowhere)"
    )
    allowed_networks: tuple[str, ...] = setting(
        (), parse_networks, "private networks that downloads may connect to, such as 10.1.0.0/16"
    )
    max_download_size: int = setting(8 << 30, parse_size, "largest archive that is downloaded", low=1)
    download_timeout: float = setting(600.0, parse_number, "seconds that one download may take", low=0.001)
    install_requirements: bool = setting(
        False, parse_boolean, "install an archive's requirements.txt into a virtual environment of its own"
    )
    require_hashes: bool = setting(False, parse_boolean, "refuse requirements that have no hash for each file")
    wheelhouse: Path | None = setting(
        None, parse_path, "folder of wheels that requirements are installed from, and from nowhere else"
    )
    worker_env: tuple[str, ...] = setting(
        (), parse_words, "names of environment variables that workers get beside the usual ones"
    )
    worker_user: str = setting("", parse_text, "run the workers as this user (the server must be root)")
    worker_fs: str = setting("open", one_of("open", "restricted"), "for all models: see worker_fs of a model")
    worker_read: tuple[str, ...] = setting(
        (), parse_paths, "further files and folders that restricted workers may read"
    )
    worker_network: str = setting("open", one_of("open", "none"), "for all models: see worker_network of a model")
    worker_memory: int = setting(0, parse_size, "for all models: see worker_memory of a model", low=0)
    worker_nice: int = setting(
        0, parse_integer, "how far workers stand back for the server when CPUs are short (0 to 19, as nice)", low=0
    )
    batch_size: int = setting(1, parse_integer, "default for models: see batch_size of a model", low=1, high=MAX_BATCH)
    max_batch_delay: float = setting(0.0, parse_milliseconds, "default for models, milliseconds", low=0)
    workers: int = setting(
        -1,
        parse_integer,
        "default number of workers per model (-1: one per GPU, else one per core)",
        low=-1,
        high=MAX_WORKERS,
    )
    instances: Groups = setting((), parse_instances, "default for models: see instances of a model")
    response_timeout: float = setting(120.0, parse_number, "default for models, seconds", low=0.001)
    startup_timeout: float = setting(300.0, parse_number, "default for models, seconds", low=0.001)
    queue_size: int = setting(100, parse_integer, "default for models: requests that may wait", low=1, high=MAX_QUEUE)
    queue_bytes: int = setting(512 << 20, parse_size, "default for models: bytes of bodies that may wait", low=1)
    queue_timeout: float = setting(60.0, parse_number, "default for models, seconds", low=0.001)
    queue_order: str = setting("adaptive", one_of("adaptive", "fifo"), "default for models: adaptive or fifo")

    def model_defaults(self) -> ModelSettings:
        return ModelSettings(
            batch_size=self.batch_size,
            max_batch_delay=self.max_batch_delay,
            min_workers=self.workers,
            instances=self.instances,
            response_timeout=self.response_timeout,
            startup_timeout=self.startup_timeout,
            queue_size=self.queue_size,
            queue_bytes=self.queue_bytes,
            queue_timeout=self.queue_timeout,
            worker_fs=self.worker_fs,
            worker_network=self.worker_network,
            worker_memory=self.worker_memory,
            queue_order=self.queue_order,
        )


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


def load_config(
    *, file: Path | None = None, environ: Mapping[str, str] | None = None, command_line: Mapping[str, Any] | None = None
) -> tuple[Config, dict[str, str]]:
    """The configuration and, per setting, where its value came from. Raises ConfigError on the first fault."""
    known = [f.name for f in fields(Config)]
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")

    def take(source: Mapping[str, Any], origin: str) -> None:
        for name, value in source.items():
            if name not in known:
                raise ConfigError(f"{origin}: unknown setting {name}{nearest(name, known)}")
            values[name] = parse_setting(Config, name, value, origin)
            origins[name] = origin

    if file is not None:
        take(read_yaml(file), str(file))
    environ = os.environ if environ is None else environ
    named = {
        key.removeprefix("MMS_").lower(): value
        for key, value in environ.items()
        if key.startswith("MMS_") and key not in VARIABLES.values()  # secrets, which no command shows
    }
    for name in named:
        if name not in known:
            suggestion = nearest(name, known).upper().replace("; DID YOU MEAN ", "; did you mean MMS_")
            raise ConfigError(f"environment: unknown setting MMS_{name.upper()}{suggestion}")
    take(named, "environment")
    take(command_line or {}, "command line")
    values["run_dir"] = values.get("run_dir") or default_run_dir()
    values["cache_dir"] = values.get("cache_dir") or default_cache_dir()
    values["state"] = values.get("state") or default_state(
        values["cache_dir"], values["run_dir"], values.get("model_store")
    )
    return Config(**values), origins


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
