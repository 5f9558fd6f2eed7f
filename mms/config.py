"""The settings of a server: one frozen Config of defaults < file < MMS_* environment < command line.

Each setting is documented where it is defined; the command line, the environment and `mms config` are derived from it.
Those of a model are in mms.model_settings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mms.errors import ConfigError
from mms.folders import default_cache_dir, default_run_dir, default_state
from mms.instances import Groups, parse_instances
from mms.model_settings import MAX_WORKERS, ModelSettings
from mms.safe_yaml import read_yaml
from mms.setting import (
    MAX_BATCH,
    MAX_QUEUE,
    nearest,
    one_of,
    parse_address,
    parse_boolean,
    parse_integer,
    parse_milliseconds,
    parse_models,
    parse_networks,
    parse_number,
    parse_origins,
    parse_path,
    parse_paths,
    parse_setting,
    parse_text,
    parse_words,
    setting,
)
from mms.sizes import parse_size
from mms.token import VARIABLES


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
        "seconds a client may take for 64 KiB of a body, or of an answer",
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
