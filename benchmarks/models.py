"""Servers for measurements with chosen models: packaged, started, ready, ended."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.servers import Command, Server, ServerError, Spec, server_environment
from mms.client import describe_models, send

HANDLERS = Path(__file__).with_name("handlers")


@dataclass(frozen=True)
class Model:
    """One archive to serve: a file of benchmarks/handlers, its class, and its model-config.yaml."""

    name: str
    handler: str = "device.py:Device"
    config: Mapping[str, Any] = field(default_factory=dict)
    version: str = "1.0"
    files: Sequence[str] = ()  # more files of that folder


def spec(
    name: str, models: Sequence[Model], *, archives: Sequence[Path] = (), body: bytes = b"x", **settings: object
) -> Spec:
    """MMS without nginx that serves the models, and `archives` that are packaged already; the first answers `body`."""

    def commands(folder: Path, port: int) -> list[Command]:
        for model in models:
            package(model, folder)
        for archive in archives:
            shutil.copy(archive, folder)
        options = {
            "model-store": folder,
            "run-dir": folder / "run",
            "cache-dir": folder / "cache",
            "inference-address": f"127.0.0.1:{port}",
            "management-address": f"unix:{folder}/management.sock",
            "metrics-address": f"unix:{folder}/metrics.sock",
            "edge": "none",
            "queue-size": 10_000,
            "queue-order": "fifo",
            **{key.replace("_", "-"): value for key, value in settings.items()},
        }
        words = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        for file in (*(f"{model.name}.mar" for model in models), *(archive.name for archive in archives)):
            words += ["--models", file]
        return [[sys.executable, "-m", "mms.cli", "start", *words]]

    first = models[0].name if models else archives[0].stem
    return Spec(name, commands, f"/predictions/{first}", "/ping", body)


def package(model: Model, folder: Path) -> None:
    """Raises ServerError."""
    file, _, entry = model.handler.partition(":")
    config = folder / f"{model.name}.yaml"
    config.write_text(json.dumps(dict(model.config)))  # JSON is YAML
    words = ["--model-name", model.name, "--version", model.version]
    words += ["--handler", f"{HANDLERS / file}:{entry}", "--config-file", str(config)]
    if model.files:
        words += ["--extra-files", ",".join(str(HANDLERS / name) for name in model.files)]
    archiver = [sys.executable, "-c", "from mms_archiver.cli import main; raise SystemExit(main())"]
    command = [*archiver, *words, "--export-path", str(folder), "--force"]
    done = subprocess.run(command, capture_output=True, text=True, env=server_environment(), cwd=folder)
    if done.returncode != 0:
        raise ServerError(f"model-archiver failed: {done.stderr.strip()}")


def workers(server: Server) -> list[dict[str, Any]]:
    """The workers of all models that are ready, as the management API describes them."""
    models = describe_models(f"unix:{server.folder}/management.sock")
    return [worker for model in models for worker in model["workers"] if worker["status"] == "READY"]


def management(server: Server, method: str, path: str) -> None:
    """One call that is to succeed. Raises ServerError."""
    status, body = send(f"unix:{server.folder}/management.sock", method, path)
    if status != 200:
        raise ServerError(f"{method} {path}: {body.decode()}")


def change(server: Server, model: str, **settings: int) -> None:
    """Change settings of a model that is served. Raises ServerError."""
    query = "&".join(f"{name}={value}" for name, value in settings.items())
    management(server, "PUT", f"/models/{model}?{query}")


def metric(server: Server, name: str, model: str) -> float:
    """The value of a metric of a model, of all its series together."""
    _, text = send(f"unix:{server.folder}/metrics.sock", "GET", "/metrics")
    lines = [line for line in text.decode().splitlines() if line.startswith(f"{name}{{") and f'"{model}"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)
