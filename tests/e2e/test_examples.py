"""The examples as their README tells it: packaged by their scripts, served by `mms start`, called over HTTP."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.servers import free_ports

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NETWORK = "efficientnet_lite0"
START_TIMEOUT = 120.0

pytestmark = pytest.mark.timeout(180)


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Examples:
    """Both examples behind one server."""

    inference: str
    metrics: str
    packaging_output: str

    def predict(self, model: str, body: bytes, content_type: str = "application/octet-stream") -> Reply:
        return fetch(f"{self.inference}/predictions/{model}", body, content_type)

    def answered(self, model: str) -> float:
        """How many requests for the model the metrics count as answered with 200."""
        lines = str(fetch(f"{self.metrics}/metrics").body, "utf-8").splitlines()
        counts = [line for line in lines if line.startswith("mms_requests_total{") and f'model="{model}"' in line]
        return sum(float(line.rpartition(" ")[2]) for line in counts if 'code="200"' in line)


def read_photo(name: str) -> bytes:
    import skimage  # here: all files of tests are imported in each process of a run, and this one takes long

    return (Path(skimage.__file__).parent / "data" / name).read_bytes()


def fetch(url: str, body: bytes | None = None, content_type: str = "application/octet-stream") -> Reply:
    request = urllib.request.Request(url, body, {"Content-Type": content_type})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return Reply(answer.status, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, error.read())


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with the archives of both examples; their scripts' output is beside them."""
    folder = tmp_path_factory.mktemp("examples")
    for example in ("image_classification", "digits"):
        command = [sys.executable, str(EXAMPLES / example / "package.py"), "--export-path", str(folder)]
        log = folder / f"{example}.txt"
        with log.open("wb") as output:
            status = subprocess.run(command, stdout=output, stderr=output, timeout=120, check=False).returncode
        assert status == 0, log.read_text()
    return folder


@pytest.fixture(scope="module")
def run_dir() -> Iterator[str]:
    """Not in pytest's folder, which is closed to nginx's workers: they are another user."""
    with tempfile.TemporaryDirectory(prefix="mms-test-") as folder:
        yield folder


@pytest.fixture(scope="module")
def examples(store: Path, run_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Examples]:
    """A server that is ready to answer; at the end it is stopped and no process of it is left."""
    log = tmp_path_factory.mktemp("server") / "log"
    inference, management, metrics = (f"127.0.0.1:{port}" for port in free_ports(3))
    command = [
        *(f"{sysconfig.get_path('scripts')}/mms", "start"),
        *("--model-store", str(store), "--models", "ALL", "--run-dir", run_dir, "--cache-dir", f"{run_dir}/cache"),
        *("--workers", "1"),
        *("--inference-address", inference, "--management-address", management, "--metrics-address", metrics),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    family: list[psutil.Process] = []
    try:
        wait_until_ready(process, f"http://{inference}/ping", log)
        family = psutil.Process(process.pid).children(recursive=True)
        yield Examples(f"http://{inference}", f"http://{metrics}", (store / "digits.txt").read_text())
    finally:
        stop(process, log)
    left = psutil.wait_procs(family, timeout=5)[1]
    assert not left, f"processes are left: {left}"


def stop(process: subprocess.Popen[bytes], log: Path) -> None:
    process.terminate()
    try:
        assert process.wait(40) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not ("\nready in " in f"\n{log.read_text()}" and is_healthy(url)):
        assert time.monotonic() < deadline, log.read_text()
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"mms start ended with exit code {process.returncode}:\n{log.read_text()}")


def is_healthy(url: str) -> bool:
    try:
        reply = fetch(url)
    except (urllib.error.URLError, ConnectionError):
        return False
    return reply.status == 200 and b"Healthy" in reply.body


@pytest.mark.parametrize(
    ("photo", "labels"), [("chelsea.png", {"tiger cat", "Egyptian cat", "tabby"}), ("coffee.png", {"espresso"})]
)
def test_network_names_what_is_in_the_photo(examples: Examples, photo: str, labels: set[str]) -> None:
    before = examples.answered(NETWORK)
    reply = examples.predict(NETWORK, read_photo(photo))
    assert reply.status == 200
    answer = reply.json()
    assert len(answer) == 5
    assert set(list(answer)[: len(labels)]) == labels
    assert list(answer.values()) == sorted(answer.values(), reverse=True)
    assert examples.answered(NETWORK) == before + 1


def test_top_k_in_the_query(examples: Examples) -> None:
    reply = examples.predict(f"{NETWORK}?top_k=1", read_photo("coffee.png"))
    assert list(reply.json()) == ["espresso"]


def test_what_is_no_photo_is_refused_and_the_next_is_answered(examples: Examples) -> None:
    reply = examples.predict(NETWORK, b"not a picture")
    assert reply.status == 400
    assert reply.json()["message"] == "the body is not a picture in a known format"
    assert examples.predict(NETWORK, read_photo("coffee.png")).status == 200


def test_digits_are_read_as_well_over_http_as_at_training(examples: Examples) -> None:
    printed = float(examples.packaging_output.partition("held-out digits: ")[2].split()[0])
    assert printed > 0.95
    _, pictures, _, digits = runpy.run_path(str(EXAMPLES / "digits" / "package.py"))["split_digits"]()
    answers = [
        examples.predict("digits", json.dumps((picture * 16).tolist()).encode(), "application/json").json()
        for picture in pictures
    ]
    right = sum(answer["digit"] == digit for answer, digit in zip(answers, digits.tolist(), strict=True))
    assert right / len(answers) == pytest.approx(printed, abs=0.001)


@pytest.mark.parametrize("body", [b"[1, 2]", b'["a"]', b"[" + b"17," * 63 + b"0]", b"{}", b"nonsense"])
def test_what_is_no_digit_is_refused(examples: Examples, body: bytes) -> None:
    reply = examples.predict("digits", body, "application/json")
    assert reply.status == 400
    assert reply.json()["message"]
