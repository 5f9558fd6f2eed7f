"""The fixtures that all tests share: archives made by the real archiver, servers, gates, folders."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from mms_archiver.cli import cli as archiver
from mms_nginx.find import find_nginx

from tests.gates import Gate
from tests.servers import Server, scratch, server

HANDLERS = Path(__file__).parent / "archives"

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of servers are started: they compile mms once, not each


MakeArchive = Callable[..., Path]
MakeGate = Callable[[], "Gate"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What has a row's number in its name (test_f1_..., test_s3_...) is a fault test: `make faults` runs these."""
    for item in items:
        if re.match(r"test_[fs]\d+_", item.name, re.IGNORECASE):
            item.add_marker(pytest.mark.fault)


@pytest.fixture(scope="session")
def make_archive(tmp_path_factory: pytest.TempPathFactory) -> MakeArchive:
    """Packs tests/archives/NAME.py with the real archiver, once per session; settings go to model-config.yaml."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("archives")

    def make(name: str, *, model_name: str = "", version: str = "1.0", requirements: str = "", **settings: Any) -> Path:
        key = json.dumps([name, model_name, version, requirements, settings], sort_keys=True)
        if key not in made:
            made[key] = pack(root / str(len(made)), name, model_name or name, version, requirements, settings)
        return made[key]

    return make


def pack(
    folder: Path, name: str, model_name: str, version: str, requirements: str, settings: Mapping[str, Any]
) -> Path:
    """The archive of tests/archives/NAME.py, in a new folder."""
    folder.mkdir()
    config = folder / "model-config.yaml"
    config.write_text(yaml.safe_dump({"min_workers": 1, **settings}))
    words = ["--model-name", model_name, "--version", version, "--handler", str(HANDLERS / f"{name}.py")]
    if requirements:
        (folder / "requirements.txt").write_text(requirements)
        words += ["--requirements-file", str(folder / "requirements.txt")]
    result = CliRunner().invoke(archiver, [*words, "--config-file", str(config), "--export-path", str(folder)])
    assert result.exit_code == 0, result.output
    return (folder / f"{model_name}.mar").rename(folder / f"{model_name}-{version}.mar")


@pytest.fixture
def make_gate(tmp_path: Path) -> Iterator[MakeGate]:
    """Closed gates; all are open at the end."""
    gates: list[Gate] = []

    def make() -> Gate:
        gates.append(Gate(tmp_path / f"gate{len(gates)}"))
        return gates[-1]

    yield make
    for gate in gates:
        gate.open()


@pytest.fixture(scope="session")
def shared_archives(make_archive: MakeArchive) -> tuple[Path, ...]:
    """What the shared servers serve."""
    plain = ("rows", "big", "crashes_on_predict", "wrong_count", "not_a_list", "unencodable", "raises")
    return (
        make_archive("echo"),
        *(make_archive(name) for name in plain),
        make_archive("status_and_headers"),
        make_archive("request_style", batch_size=8, max_batch_delay=100),
        make_archive("fails_one", batch_size=8, max_batch_delay=100, isolate_errors="true"),
    )


@pytest.fixture(scope="session")
def direct(shared_archives: tuple[Path, ...]) -> Iterator[Server]:
    """A server without nginx, for tests that leave it as it is."""
    with server(*shared_archives, max_request_size="2MiB", max_response_size="1MiB") as running:
        yield running


@pytest.fixture(scope="session")
def edged(make_archive: MakeArchive) -> Iterator[Server]:
    """A server behind nginx, for tests that leave it as it is."""
    if find_nginx("nginx") is None:
        pytest.skip("nginx is not installed")
    archives = make_archive("echo"), make_archive("big")
    with scratch() as folder:
        log = folder / "access.log"
        with server(*archives, folder=folder, max_request_size="2MiB", edge="nginx", access_log=log) as running:
            yield running


@pytest.fixture(params=["direct", "edged"])
def either(request: pytest.FixtureRequest) -> Server:
    """The same test without and with nginx."""
    running: Server = request.getfixturevalue(request.param)
    return running


@pytest.fixture
def folder() -> Iterator[Path]:
    with scratch() as made:
        yield made


@pytest.fixture
def manager(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The end of NOTIFY_SOCKET that systemd reads, of servers that are started with it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(folder / "notify"))
        sock.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "notify"))
        yield sock
