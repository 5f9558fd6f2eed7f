"""What is compared, and how each is started, found ready and ended."""

from __future__ import annotations

import contextlib
import http.client
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mms_nginx import Listener, edge_user, find_nginx, render

from benchmarks.cpu import MARK, ProcessTree

READY_TIMEOUT = 60.0
READY_POLL = 0.05
STOP_TIMEOUT = 15.0
HANDLER = "def handle(data, context):\n    return None if data is None else [b'ok'] * len(data)\n"

Command = list[str]


class ServerError(Exception):
    """A server to compare could not be started, or ended by itself."""


@dataclass(frozen=True)
class Spec:
    """One server to compare: `commands` writes its files into a scratch folder and says what to run there."""

    name: str
    commands: Callable[[Path, int], list[Command]]
    path: str = "/"
    ping: str = "/"  # with this, unless it is empty
    body: bytes = b"x"  # and a POST of this it answers with 200 once it is ready


def free_port() -> int:
    """A port that nobody uses at this moment, below those that the system gives to clients."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _nginx_program() -> str:
    program = find_nginx("nginx")
    if program is None:
        raise ServerError("nginx is not installed")
    return program


def _nginx(folder: Path, text: str) -> Command:
    file = folder / "nginx.conf"
    file.write_text(text)
    return [_nginx_program(), "-e", "stderr", "-p", f"{folder}/", "-c", str(file)]


def _bare_nginx(folder: Path, port: int, location: str, upstream: str = "") -> Command:
    user = pwd.getpwuid(os.geteuid()).pw_name
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = " ".join(f"{name}_temp_path {folder}/{name};" for name in names)
    server = f"server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ {location} }} }}"
    return _nginx(
        folder,
        f"daemon off; {f'user {user};' if os.geteuid() == 0 else ''} worker_processes 1; pid {folder}/nginx.pid;\n"
        f"events {{ worker_connections 4096; }}\n"
        f"http {{ access_log off; keepalive_requests 1000000000; client_body_buffer_size 64k; {paths}\n"
        f"{upstream}\n{server} }}\n",
    )


def _floor(folder: Path, port: int) -> list[Command]:
    return [_bare_nginx(folder, port, "return 200 ok;")]


def _echo_command(address: str) -> Command:
    return [sys.executable, "-m", "benchmarks.echo", address]


def _echo(folder: Path, port: int) -> list[Command]:
    return [_echo_command(f"127.0.0.1:{port}")]


def _body_echo(folder: Path, port: int) -> list[Command]:
    return [[*_echo_command(f"127.0.0.1:{port}"), "--body"]]


def _proxy(folder: Path, port: int) -> list[Command]:
    location = 'proxy_pass http://echo; proxy_http_version 1.1; proxy_set_header Connection "";'
    upstream = f"upstream echo {{ server unix:{folder}/echo.sock; keepalive 512; keepalive_requests 1000000000; }}"
    return [_echo_command(f"unix:{folder}/echo.sock"), _bare_nginx(folder, port, location, upstream)]


def _edge(folder: Path, port: int) -> list[Command]:
    user = edge_user()
    (folder / "temporary").mkdir()
    text = render(
        [Listener("inference", f"127.0.0.1:{port}", (folder / "echo.sock",))],
        directory=folder,
        max_request_size=100 << 20,
        user=user[0] if user else None,
        response_timeout=120.0,
        body_timeout=60.0,
        header_timeout=10.0,
        log_level="warning",
    )
    # umask 0: nginx's workers run as another user and must be able to connect.
    echo = ["/bin/sh", "-c", 'umask 0; exec "$@"', "sh", *_echo_command(f"unix:{folder}/echo.sock")]
    return [echo, _nginx(folder, text)]


def _package(folder: Path, handler: str) -> None:
    (folder / "noop.py").write_text(handler)
    archiver = [sys.executable, "-c", "from mms_archiver.cli import main; raise SystemExit(main())"]
    options = ["--model-name", "noop", "--handler", f"{folder}/noop.py:handle", "--export-path", str(folder)]
    done = subprocess.run([*archiver, *options], capture_output=True, text=True, env=server_environment(), cwd=folder)
    if done.returncode != 0:
        raise ServerError(f"model-archiver failed: {done.stderr.strip()}")


def mms_command(
    batch_size: int, edge: str, *, handler: str = HANDLER, **more: object
) -> Callable[[Path, int], list[Command]]:
    """How to start MMS with one worker that runs `handler`; `more` are further settings."""

    def commands(folder: Path, port: int) -> list[Command]:
        _package(folder, handler)
        settings = {
            "model-store": folder,
            "models": "noop.mar",
            "run-dir": folder / "run",
            "inference-address": f"127.0.0.1:{port}",
            "management-address": f"127.0.0.1:{free_port()}",
            "metrics-address": f"127.0.0.1:{free_port()}",
            "edge": edge,
            "workers": 1,
            "batch-size": batch_size,
            "queue-size": 10_000,
            **{name.replace("_", "-"): value for name, value in more.items()},
        }
        options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        return [[sys.executable, "-m", "mms.cli", "start", *options]]

    return commands


def _ours(name: str, batch_size: int, edge: str) -> Spec:
    return Spec(name, mms_command(batch_size, edge), "/predictions/noop", "/ping")


FLOOR = Spec("nginx return 200", _floor)
BODY_ECHO = Spec("httptools echo of the body", _body_echo)
BATCH_32 = _ours("mms, batch 32", 32, "none")
BATCH_1 = _ours("mms, batch 1", 1, "none")
BEHIND_NGINX = _ours("mms, batch 32, behind nginx", 32, "nginx")
PROXY = Spec("nginx proxy + httptools echo", _proxy)
SPECS = {
    "floor": FLOOR,
    "echo": Spec("httptools echo", _echo),
    "proxy": PROXY,
    "edge": Spec("our edge + httptools echo", _edge),
    "mms-32": BATCH_32,
    "mms-1": BATCH_1,
    "mms-nginx": BEHIND_NGINX,
}


def server_environment() -> dict[str, str]:
    """Ours, without what keeps Python from keeping compiled modules: users have theirs compiled."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}


class Server:
    """One started server with all its processes, in a scratch folder that goes with it."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}{spec.path}"
        self.folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self.folder.chmod(0o711)  # nginx's workers run as another user when we are root
        self._log = self.folder / "server.log"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.ready_after = 0.0  # seconds from the start of its first process on
        self.tree = ProcessTree(set(), uuid.uuid4().hex)

    @property
    def pid(self) -> int:
        """Of the first process that was started."""
        return self._processes[0].pid

    def start(self, poll: float = READY_POLL) -> None:
        """Returns when a POST is answered with 200, tried every `poll` seconds. Raises ServerError."""
        commands = self.spec.commands(self.folder, self.port)
        begun = time.monotonic()
        with self._log.open("wb") as log:
            for command in commands:
                self._spawn(command, log.fileno())
        while not self._is_ready():
            ended = [process.args for process in self._processes if process.poll() is not None]
            if ended or time.monotonic() - begun > READY_TIMEOUT:
                raise ServerError(f"{self.spec.name} is not ready{' (it ended)' if ended else ''}:\n{self._tail()}")
            time.sleep(poll)
        self.ready_after = time.monotonic() - begun

    def stop(self) -> None:
        """Ends every process of the server by its pid, with patience and then without."""
        self.tree.pids()  # learns who belongs to it, while those can still be found by descent
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        for pid in self.tree.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _spawn(self, command: Command, log: int) -> None:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**server_environment(), MARK: self.tree.mark},
            start_new_session=True,
        )
        self._processes.append(process)
        self.tree.roots.add(process.pid)

    def _is_ready(self) -> bool:
        pinged = not self.spec.ping or self._answers("GET", self.spec.ping)
        return pinged and self._answers("POST", self.spec.path)

    def _answers(self, method: str, path: str) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, self.spec.body if method == "POST" else None)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


@contextlib.contextmanager
def running(spec: Spec, poll: float = READY_POLL) -> Iterator[Server]:
    """The server, ready; ended in any case."""
    server = Server(spec)
    try:
        server.start(poll)
        yield server
    finally:
        server.stop()
