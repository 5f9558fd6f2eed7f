"""Serves EfficientNet-Lite0 with `mms start`, sends it two photos, shows the answers and what the metrics say."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from urllib.error import HTTPError, URLError

import skimage
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RUN = HERE.parents[1] / "demo-run"
STORE = RUN / "model-store"
LOG = RUN / "mms.log"
MODEL = "efficientnet_lite0"
PHOTOS = Path(skimage.__file__).parent / "data"
EXPECTED = {"chelsea.png": {"tiger cat", "Egyptian cat", "tabby"}, "coffee.png": {"espresso"}}
PORTS = {"inference": 8080, "management": 8081, "metrics": 8082}
START_TIMEOUT = 180.0
STOP_TIMEOUT = 60.0
LEAVE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

console = Console(highlight=False)


class DemoError(Exception):
    """The demo did not show what it is meant to show."""


@dataclass(frozen=True)
class Server:
    """A running `mms start`, and the base URL of each of its ports."""

    process: subprocess.Popen[bytes]
    inference: str
    management: str
    metrics: str


def package() -> None:
    """Packages the network, unless the archive is newer than what it is made of."""
    archive = STORE / f"{MODEL}.mar"
    sources = [HERE / name for name in ("package.py", "network.py", "model-config.yaml")]
    if archive.exists() and archive.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        console.print(f"[bold]1. The archive is there already:[/] {archive}", soft_wrap=True)
        return
    console.print("[bold]1. Packaging EfficientNet-Lite0 with its ImageNet weights[/]")
    subprocess.run([sys.executable, HERE / "package.py", "--export-path", STORE], check=True)


def choose_ports() -> dict[str, int]:
    """The usual ports; where one is taken, a free one in its place."""
    ports = {}
    for name, port in PORTS.items():
        ports[name] = port if _is_free(port) else _free_port()
        if ports[name] != port:
            console.print(f"   port {port} is in use; {name} is on {ports[name]} instead")
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server() -> Iterator[Server]:
    """`mms start` with the archive, ready to answer; stopped at the end."""
    # Not in the clone: nginx's workers, who are another user, must get to the sockets, and their path must be short.
    with tempfile.TemporaryDirectory(prefix="mms-demo-") as run_dir:
        server = _start(Path(run_dir), choose_ports())
        try:
            _wait_until_ready(server)
            yield server
        finally:
            _stop(server.process)


def _start(run_dir: Path, ports: dict[str, int]) -> Server:
    addresses = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    options = [word for name, address in addresses.items() for word in (f"--{name}-address", address)]
    command = [f"{sysconfig.get_path('scripts')}/mms", "start", "--models", f"{MODEL}.mar", *options]
    command += ["--model-store", str(STORE), "--run-dir", str(run_dir), "--cache-dir", str(run_dir / "cache")]
    with LOG.open("wb") as log:
        # A session of its own: Ctrl-C reaches this program alone, which then stops the server in good order.
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    return Server(process, **{name: f"http://{address}" for name, address in addresses.items()})


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise DemoError(f"mms start ended with exit code {server.process.returncode}; its log:\n{LOG.read_text()}")
        if _is_healthy(server):
            return
        time.sleep(0.1)
    raise DemoError(f"the server is not ready after {START_TIMEOUT:.0f} seconds; its log:\n{LOG.read_text()}")


def _is_healthy(server: Server) -> bool:
    if "\nready in " not in f"\n{LOG.read_text()}":
        return False  # it answers before its models are loaded
    try:
        return "Healthy" in fetch(f"{server.inference}/ping")
    except (DemoError, URLError, ConnectionError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    for name in LEAVE:
        signal.signal(name, signal.SIG_IGN)  # a second Ctrl-C must not leave the server behind
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise DemoError(f"the server did not stop within {STOP_TIMEOUT:.0f} seconds") from None


def fetch(url: str, body: bytes | None = None) -> str:
    """The answer's text; `body` is sent with POST. Raises DemoError when the server answers with an error."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/octet-stream"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read(), "utf-8")
    except HTTPError as error:
        with error:
            raise DemoError(f"{url} answered {error.code}: {str(error.read(), 'utf-8')}") from None


def show_predictions(server: Server) -> None:
    """Sends each photo and prints its five most likely labels. Raises DemoError when they are wrong."""
    for photo, expected in EXPECTED.items():
        begun = time.perf_counter()
        answer = json.loads(fetch(f"{server.inference}/predictions/{MODEL}", (PHOTOS / photo).read_bytes()))
        milliseconds = (time.perf_counter() - begun) * 1000
        console.print(f"   {photo}, answered in {milliseconds:.0f} ms")
        table = Table("label", "probability")
        for label, probability in answer.items():
            table.add_row(label, f"{probability:.3f}")
        console.print(table)
        if set(list(answer)[: len(expected)]) != expected:
            raise DemoError(f"{photo} should be {', '.join(sorted(expected))}, not {', '.join(answer)}")


def show_metrics(server: Server) -> None:
    """Prints how many requests the metrics counted and how long they took. Raises DemoError when some are missing."""
    lines = [line for line in fetch(f"{server.metrics}/metrics").splitlines() if f'model="{MODEL}"' in line]
    counts = [line for line in lines if line.startswith("mms_requests_total") and 'code="200"' in line]
    times = [line for line in lines if "_duration_seconds_sum{" in line or "_duration_seconds_count{" in line]
    for line in counts + times:
        console.print(f"   {line}", soft_wrap=True)
    if sum(float(line.rpartition(" ")[2]) for line in counts) < len(EXPECTED):
        raise DemoError(f"the metrics do not count {len(EXPECTED)} requests for {MODEL}")


def show_commands(server: Server) -> None:
    """Prints what to try while the server runs."""
    console.print("\n[bold]The server keeps running; Ctrl-C stops it. In another terminal:[/]")
    for command in (
        f"curl {server.inference}/predictions/{MODEL} -T {PHOTOS / 'chelsea.png'}",
        f"curl '{server.inference}/predictions/{MODEL}?top_k=1' -F data=@{PHOTOS / 'coffee.png'}",
        f"curl {server.management}/models/{MODEL}",
        f"curl -X PUT '{server.management}/models/{MODEL}?min_worker=2&synchronous=true'",
        f"curl {server.metrics}/metrics",
    ):
        console.print(f"   {command}", soft_wrap=True)


def demonstrate(*, keep: bool) -> None:
    """The whole demo; with `keep` the server goes on until Ctrl-C."""
    RUN.mkdir(exist_ok=True)
    package()
    edge = "behind nginx" if shutil.which("nginx") else "without nginx, which is not installed"
    console.print(f"[bold]2. mms start, {edge}[/] (log: {LOG})", soft_wrap=True)
    with running_server() as server:
        console.print("[bold]3. Two photos[/]")
        show_predictions(server)
        console.print("[bold]4. What the metrics say about these requests[/]")
        show_metrics(server)
        if keep:
            show_commands(server)
            server.process.wait()
            raise DemoError(f"the server has stopped; its log is {LOG}")
    console.print("[bold green]The answers are right, and the server has stopped.[/]")


def _leave(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="keep the server running until Ctrl-C")
    arguments = parser.parse_args()
    for name in LEAVE:
        signal.signal(name, _leave)
    try:
        demonstrate(keep=arguments.keep)
    except KeyboardInterrupt:
        console.print("stopped")
        return 0 if arguments.keep else 128 + signal.SIGINT
    except subprocess.CalledProcessError as error:
        console.print(f"{os.fspath(error.cmd[1])} ended with exit code {error.returncode}", style="red")
        return 1
    except DemoError as error:
        console.print(str(error), style="red", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
