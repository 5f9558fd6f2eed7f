"""Real servers that are always stopped, the command line beside them, and ports and folders for them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from mms_nginx.find import find_nginx
from prometheus_client.parser import text_string_to_metric_families

from tests.asking import Reply, fetch
from tests.waiting import eventually

needs_nginx = pytest.mark.skipif(find_nginx("nginx") is None, reason="nginx is not installed")


# Below the ports that the kernel gives to outgoing connections; each process of a test run has its own, in any order.
_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_own = range(10_000 + _PROCESS, 32_000, _PROCESSES)
_ports = iter(random.sample(_own, len(_own)))


def free_ports(count: int) -> list[int]:
    return list(itertools.islice((port for port in _ports if is_free(f"127.0.0.1:{port}")), count))


def is_free(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_server((host, int(port)), reuse_port=False).close()
    except OSError:
        return False
    return True


def processes_in(folder: Path) -> list[psutil.Process]:
    """The running processes that work in `folder` or below: a server of ours and all that descends from it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
    return found


class Successor:
    """A server that another one has started: not our child, so its exit code is its own affair."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)  # tells of its end at once, not when somebody has reaped it

    def poll(self) -> int | None:
        return 0 if self._ended(0) else None

    def wait(self, timeout: float) -> int:
        assert self._ended(timeout), f"pid {self.pid} is still there after {timeout:g} s"
        return 0

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float) -> bool:
        return bool(select.select([self._pidfd], [], [], timeout)[0])


class Server:
    """A server that `mms start` runs as a child of the tests; `output` is all it has printed and logged."""

    def __init__(
        self, folder: Path, arguments: list[str], addresses: list[str], *, descriptors: tuple[int, ...] = ()
    ) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.cache_dir = folder / "cache"
        self.url, self.management, self.metrics = addresses
        self.ready_line = ""
        self.expected_exit = 0
        self._stopping = False
        self._log = folder / "log"
        self._ready = threading.Event()
        with self._log.open("wb") as log:
            self.process: subprocess.Popen[bytes] | Successor = subprocess.Popen(
                arguments,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(),
                pass_fds=descriptors,
            )
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def reads(self) -> bool:
        """Whether its standard output is still open."""
        return self._reader.is_alive()

    @property
    def extracted(self) -> list[Path]:
        """The folders of extracted archives."""
        return list(self.cache_dir.glob("servers/*/models/*"))

    @property
    def output(self) -> str:
        return self._log.read_text(errors="backslashreplace")

    def wait_until_ready(self, timeout: float = 30.0) -> None:
        assert self._ready.wait(timeout), f"not ready after {timeout:g} s:\n{self.output}"
        assert self.ready_line, self.output

    def predict(self, model: str, body: Any = b"", **headers: str) -> Reply:
        return fetch(
            self.url, "POST", f"/predictions/{model}", body, {k.replace("_", "-"): v for k, v in headers.items()}
        )

    def manage(self, method: str, path: str, **parameters: Any) -> Reply:
        """Parameters go as JSON."""
        if not parameters:
            return fetch(self.management, method, path)
        return fetch(self.management, method, path, json.dumps(parameters), {"Content-Type": "application/json"})

    def describe(self, model: str) -> Any:
        return self.manage("GET", f"/models/{model}").json()

    def unregister_all(self) -> None:
        for model in self.manage("GET", "/models").json()["models"]:
            assert self.manage("DELETE", f"/models/{model['modelName']}").status == 200

    def workers(self, model: str) -> list[int]:
        """The pids of the model's ready workers."""
        return [worker["pid"] for worker in self.describe(model)["workers"] if worker["status"] == "READY"]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        families = text_string_to_metric_families(fetch(self.metrics, "GET", "/metrics").body.decode())
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def named(self, name: str) -> list[psutil.Process]:
        """The server's processes of that name (mms-forkserver, nginx)."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.name() == name:
                    found.append(process)
        return found

    def kill_named(self, name: str) -> None:
        """SIGKILL the server's processes of that name; one may have ended or taken another name meanwhile."""
        for process in self.named(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def signal(self, number: int) -> None:
        self._stopping = self._stopping or number in (signal.SIGTERM, signal.SIGINT)
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL the server's process alone; returns when it is gone."""
        self.expected_exit = -signal.SIGKILL
        self.process.kill()
        self.process.wait(5)

    def stop(self, timeout: float = 20.0) -> int:
        """SIGTERM, unless it has ended or was asked to end already; the exit code."""
        if self.process.poll() is None and not self._stopping:
            self.signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def succeed(self, pid: int) -> None:
        """Its successor of that pid is the server from now on; the process before must end well."""
        assert self.process.wait(20) == self.expected_exit, self.output
        self.process = Successor(pid)

    def close(self) -> None:
        """Stop it and see that nothing is left."""
        try:
            code = self.stop()
            assert code == self.expected_exit, f"exit code {code}:\n{self.output}"
            eventually(lambda: not processes_in(self.folder))
            assert all(is_free(address) for address in (self.url, self.management, self.metrics))
            assert "ERROR   asyncio" not in self.output, self.output
        finally:
            for process in processes_in(self.folder):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self.process.wait(5)
            self._reader.join(5)

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                if line.startswith(b"ready in"):
                    self.ready_line = line.decode().strip()
                    self._ready.set()
        self._ready.set()


def environment(**extra: str) -> dict[str, str]:
    """This process's variables without settings of MMS that a developer may have in force."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MMS_")} | extra


def mms(*words: str, cwd: Path | None = None, timeout: float = 30.0, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    command = [sys.executable, "-P", "-m", "mms.cli", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=environment(**extra), check=False
    )


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder with a short name (socket paths are limited to 107 bytes) that nginx's workers can pass through."""
    folder = Path(tempfile.mkdtemp(prefix="mms-"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start_arguments(folder: Path, addresses: list[str], *archives: Path, **settings: Any) -> list[str]:
    """The command line of a server that keeps everything in `folder`, with `archives` in its store."""
    store = folder / "store"
    store.mkdir(exist_ok=True)
    for archive in archives:
        if not (store / archive.name).exists():
            os.link(archive, store / archive.name)
    names = ("inference_address", "management_address", "metrics_address")
    defaults = {
        "model_store": store,
        "run_dir": folder / "run",
        "cache_dir": folder / "cache",
        "edge": "none",
        **dict(zip(names, addresses, strict=True)),
    }
    words = [sys.executable, "-P", "-m", "mms.cli", "start"]
    for name, value in {**defaults, **settings}.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


@contextlib.contextmanager
def server(
    *archives: Path, spare: tuple[Path, ...] = (), folder: Path | None = None, **settings: Any
) -> Iterator[Server]:
    """A running server with `archives` loaded and `spare` ones in its store; stopped at the end without a trace."""
    with contextlib.ExitStack() as stack:
        folder = folder or stack.enter_context(scratch())
        addresses = [f"127.0.0.1:{port}" for port in free_ports(3)]
        words = start_arguments(folder, addresses, *archives, *spare, **settings)
        for archive in archives:
            words += ["--models", archive.name]
        running = Server(folder, words, addresses)
        stack.callback(running.close)
        running.wait_until_ready()
        yield running
